"""The model-folder format: one folder per stage and an index.

folder/unclip.json              {"format": 1, "stages": ["clip", "prior", ...], ...}
folder/<stage>/config.json      what builds the model
folder/<stage>/model.safetensors
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.errors import CheckpointError
from unclip.files.disk import read_json, write_json
from unclip.files.tensors import write_tensors

FORMAT = 1
INDEX = "unclip.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_LAST = "model_last.safetensors"  # a second network, for the last sampling step
ORDER = ("clip", "prior", "ar_prior", "decoder", "upsampler")  # kinds of stages in the stack


def write_stage(
    folder: str | Path,
    name: str,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    exact: Collection[str] = (),
) -> None:
    """Write one stage and enter it in the folder's index; `dtype` and `exact` as `write_tensors`.

    **Raises**: `CheckpointError` if the name is not a stage's.
    """
    folder = Path(folder)
    stage_order(name)
    (folder / name).mkdir(parents=True, exist_ok=True)
    write_json(folder / name / CONFIG, config)
    write_tensors(folder / name / WEIGHTS, tensors, dtype, exact)
    stages = read_index(folder)["stages"] if (folder / INDEX).exists() else []
    update_index(folder, stages=sorted({*stages, name}, key=stage_order))


def stage_kind(name: str) -> str:
    """What the stage of a name must be: there is one of each, but upsamplers have their size.

    **Raises**: `CheckpointError` if the name is not a stage's.
    """
    return ORDER[stage_order(name)[0]]


def stage_order(name: str) -> tuple[int, int]:
    """Where a stage comes in the stack: clip, priors, decoder, then upsamplers by size.

    **Raises**: `CheckpointError` if the name is not a stage's.
    """
    *single, several = ORDER
    if name in single:
        return single.index(name), 0
    sized = re.fullmatch(rf"{several}_([1-9]\d*)", name)
    if sized is None:
        raise CheckpointError(
            f"unknown stage {name!r}: expected one of {', '.join(single)}, or {several}_SIZE"
        )
    return len(single), int(sized[1])


def read_index(folder: str | Path) -> dict[str, Any]:
    """The folder's `unclip.json`: at least `format` and `stages`, in order.

    **Raises**: `CheckpointError` if it is missing, damaged, or of a newer format.
    """
    path = Path(folder) / INDEX
    index = read_json(path)
    if not isinstance(index.get("stages"), list):
        raise CheckpointError(f"{path} has no list of stages")
    if index.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {index.get('format')!r}; this version reads format {FORMAT}"
        )
    return index


def update_index(folder: str | Path, **entries: Any) -> None:
    """Set entries of the folder's `unclip.json` and leave the others as they are."""
    path = Path(folder) / INDEX
    index = read_index(folder) if path.exists() else {"format": FORMAT, "stages": []}
    write_json(path, {**index, **entries})


def read_stage_config(folder: str | Path, name: str) -> dict[str, Any]:
    """What builds the model of one stage.

    **Raises**: `CheckpointError` if the folder has no such stage.
    """
    folder = Path(folder)
    if not (folder / name / CONFIG).is_file():
        stages = read_index(folder)["stages"]
        raise CheckpointError(
            f"no stage {name!r} in {folder}, which has {', '.join(stages) or 'none'}"
        )
    return read_json(folder / name / CONFIG)
