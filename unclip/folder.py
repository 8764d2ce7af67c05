"""The model-folder format: one folder per stage, an index, and for checkpoints a manifest.

folder/unclip.json              {"format": 1, "stages": ["clip", "prior", ...], ...}
folder/<stage>/config.json      what builds the model
folder/<stage>/model.safetensors
folder/manifest.json            checkpoints only: size and sha256 of every file
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unclip.errors import CheckpointError

FORMAT = 1
INDEX = "unclip.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
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


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write a safetensors file in one piece: contiguous, untied, readable as the umask says."""
    path = Path(path)
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        tensor = tensor.detach().to("cpu", wanted).contiguous()
        if tensor.untyped_storage().data_ptr() in storages:  # tied: safetensors refuses it
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    beside = path.with_name(path.name + ".tmp")
    beside.unlink(missing_ok=True)
    beside.touch()
    mode = beside.stat().st_mode
    save_file(plain, beside, metadata={"format": "pt"})
    beside.chmod(mode)  # safetensors makes its files 0600
    sync(beside)
    os.replace(beside, path)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU.

    **Raises**: `CheckpointError` if the file is missing, truncated or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file: {error}"
        ) from None


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors into a model; names and shapes must all match. `what` names them in errors.

    **Raises**: `CheckpointError` naming what is missing, left over, or of another shape.
    """
    expected = model.state_dict()
    wrong = {
        "missing": [name for name in expected if name not in tensors],
        "left over": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {_shape(tensors[name])}, expected {_shape(tensor)}"
            for name, tensor in expected.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
    }
    problems = [f"{len(found)} {how} ({_some(found)})" for how, found in wrong.items() if found]
    if problems:
        raise CheckpointError(f"{what} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(dict(tensors))


def resolve_folder(path: str | Path) -> Path:
    """The model folder that a path means: itself, or a run's newest sound checkpoint.

    **Raises**: `CheckpointError` if there is none.
    """
    path = Path(path)
    if (path / INDEX).is_file():
        if (path / MANIFEST).is_file():
            check_manifest(path, training=False)
        return path
    if (path / "checkpoints").is_dir():
        newest = newest_checkpoint(path, training=False)
        if newest is None:
            raise CheckpointError(f"the run in {path} has saved no checkpoint yet")
        return newest
    if not path.exists():
        raise CheckpointError(f"no model at {path}: there is no such folder")
    hint = f"; did you mean {path.parent}?" if (path.parent / INDEX).is_file() else ""
    raise CheckpointError(
        f"no model at {path}: expected a model folder (with {INDEX}) "
        f"or a run folder (with checkpoints/){hint}"
    )


def checkpoint_step(folder: Path) -> int | None:
    """The N of a folder named step-N, else None."""
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match[1]) if match else None


def list_checkpoints(run: str | Path) -> list[Path]:
    """The run's folders checkpoints/step-N, newest first, sound or not."""
    found = [
        (step, folder)
        for folder in Path(run).glob("checkpoints/step-*")
        if (step := checkpoint_step(folder)) is not None
    ]
    return [folder for _, folder in sorted(found, reverse=True)]


def newest_checkpoint(run: str | Path, training: bool) -> Path | None:
    """The newest checkpoint whose manifest holds; None if the run has no checkpoint at all.

    A damaged one is passed over with a warning. `training` checks the trainer's files as well.

    **Raises**: `CheckpointError` if there are checkpoints and all of them are damaged.
    """
    damaged: list[CheckpointError] = []
    for folder in list_checkpoints(run):
        try:
            check_manifest(folder, training)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for reason in damaged:
            warnings.warn(f"passing over a damaged checkpoint: {reason}", stacklevel=2)
        return folder
    if damaged:
        raise CheckpointError(f"every checkpoint of {run} is damaged; the newest: {damaged[0]}")
    return None


def write_manifest(folder: Path) -> None:
    """Record size and sha256 of every file under `folder`; written last, it means complete."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    write_json(folder / MANIFEST, {"format": FORMAT, "files": entries})
    for inside in {path.parent for path in files}:
        sync(inside)


def check_manifest(folder: Path, training: bool) -> None:
    """Compare every file with the manifest; `training` includes those that only resuming needs.

    **Raises**: `CheckpointError` naming the first file that differs.
    """
    manifest = read_json(folder / MANIFEST)
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise CheckpointError(f"{folder / MANIFEST} is not a list of files")
    for name, entry in entries.items():
        path = folder / name
        if name.startswith("training/") and not training:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != entry.get("size"):
            raise CheckpointError(f"{path} has {size} bytes, expected {entry.get('size')}")
        if _sha256(path) != entry.get("sha256"):
            raise CheckpointError(f"{path} has changed since it was written (sha256 differs)")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON in one piece, on disk when this returns."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    sync(beside)
    os.replace(beside, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. **Raises**: `CheckpointError` if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"no {path.name} in {path.parent}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return data


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
