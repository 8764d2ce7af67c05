"""The verbs that work on trainings: plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    config: Annotated[Path, typer.Argument(help="Of a prior, a decoder or an upsampler.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many there are.")] = 1,
    shard: Annotated[
        bool, typer.Option("--shard", help="Each holds its share (FSDP2), not a copy (DDP).")
    ] = False,
    machines: Annotated[
        int, typer.Option(min=1, help="That the GPUs are in; each shares out by itself.")
    ] = 1,
    memory: Annotated[float, typer.Option(min=1, help="Of one GPU, in GB.")] = 80.0,
    tflops: Annotated[float, typer.Option(min=0.001, help="Of one GPU at its best.")] = 312.0,
    utilisation: Annotated[float, typer.Option(min=0.001, max=1, help="Share reached.")] = 0.4,
) -> None:
    """Say what a training will need, without allocating it: memory, arithmetic, days."""
    from unclip.training.plan import plan as count
    from unclip.training.plan import report

    needs = count(config, overrides or [], gpus, shard, machines)
    print(report(needs, gpus=gpus, memory=memory, tflops=tflops, utilisation=utilisation))
