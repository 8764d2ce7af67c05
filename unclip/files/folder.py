"""The model-folder format: one folder per stage and an index.

folder/unclip.json              {"format": 1, "stages": ["clip", "prior", ...], ...}
folder/<stage>/config.json      what builds the model
folder/<stage>/model.safetensors
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
_ORDER = ("clip", "prior", "ar_prior", "decoder")


def write_stage(
    folder: str | Path,
    name: str,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Write one stage and enter it in the folder's index; `dtype` converts floating tensors.

    **Raises**: `CheckpointError` if the name is not a stage's.
    """
    folder = Path(folder)
    stage_order(name)
    (folder / name).mkdir(parents=True, exist_ok=True)
    write_json(folder / name / CONFIG, config)
    write_tensors(folder / name / WEIGHTS, tensors, dtype)
    stages = read_index(folder)["stages"] if (folder / INDEX).exists() else []
    update_index(folder, stages=sorted({*stages, name}, key=stage_order))


def stage_order(name: str) -> tuple[int, int]:
    """Where a stage comes in the stack: clip, priors, decoder, then upsamplers by size.

    **Raises**: `CheckpointError` if the name is not a stage's.
    """
    if name in _ORDER:
        return _ORDER.index(name), 0
    upsampler = re.fullmatch(r"upsampler_([1-9]\d*)", name)
    if upsampler is None:
        raise CheckpointError(
            f"unknown stage {name!r}: expected one of {', '.join(_ORDER)}, or upsampler_SIZE"
        )
    return len(_ORDER), int(upsampler[1])


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
