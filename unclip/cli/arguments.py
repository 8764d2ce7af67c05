"""Arguments and options that several verbs share, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

SEEDS = 2**63 - 1
Dtype = Literal["fp32", "fp16", "bf16"]
N = Annotated[int, typer.Option("--n", min=1, help="Pictures for each prompt, or each input.")]
Seed = Annotated[int, typer.Option(min=0, max=SEEDS, help="Picture k uses seed + k.")]
Size = Annotated[int | None, typer.Option(min=1, help="Side in pixels [default: the largest].")]
BY_STAGE = "One value for the decoder, or by stage: prior=…,decoder=…,upsampler_256=…"
Steps = Annotated[str | None, typer.Option(help=f"Sampling steps. {BY_STAGE}")]
Guidance = Annotated[str | None, typer.Option(help=f"Guidance scale, 1 is off. {BY_STAGE}")]
Sampler = Annotated[str | None, typer.Option(help=f"ddpm, ddim, dpm++ or unipc. {BY_STAGE}")]
Tile = Annotated[int | None, typer.Option(help="Upsample in tiles of this side: less memory.")]
Out = Annotated[Path, typer.Option(help="A folder, or a .png file for a single picture.")]
Model = Annotated[
    Path | None,
    typer.Option(help="A model folder, a run or a hub id [default: the shipped weights]."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps …, or auto.")]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep one stage at a time on the device: less memory.")
]
Precision = Annotated[Dtype, typer.Option("--dtype", help="Precision of the networks.")]
