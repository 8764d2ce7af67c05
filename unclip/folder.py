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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unclip.errors import CheckpointError

FORMAT = 1
INDEX = "unclip.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_LAST = "model_last.safetensors"  # a second network, for the last sampling step
PIPELINE = "model_index.json"  # of diffusers' folders, Karlo's among them
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


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file whose tensors are read, onto the CPU, as they are asked for.

    **Raises**: `CheckpointError` if the file is missing, truncated or something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"no weights at {path}")
        try:
            self._file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} ({self.path.stat().st_size} bytes) is truncated or not a safetensors "
                f"file: {error}"
            ) from None
        self._names = list(self._file.keys())

    def shape(self, name: str) -> list[int]:
        """A tensor's shape, from the header."""
        return list(self._file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    what: str,
    put: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> None:
    """Copy tensors into a model one by one, with `put`; names and shapes must all match.

    `what` names them in errors. A `TensorFile` never has more than one tensor in memory.

    **Raises**: `CheckpointError` naming what is missing, left over, or of another shape.
    """
    expected = model.state_dict()
    wrong = {
        "missing": [name for name in expected if name not in tensors],
        "left over": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {_shape(shape_of(tensors, name))}, expected {_shape(tensor.shape)}"
            for name, tensor in expected.items()
            if name in tensors and shape_of(tensors, name) != list(tensor.shape)
        ],
    }
    if problems := tally(wrong):
        raise CheckpointError(f"{what} does not fit {type(model).__name__}: {problems}")
    with torch.no_grad():
        for name, target in expected.items():
            put(target, tensors[name])


def shape_of(tensors: Mapping[str, Tensor], name: str) -> list[int]:
    """A tensor's shape, from the header where it is in a file."""
    known = getattr(tensors, "shape", None)  # of one that reads when asked
    return known(name) if known is not None else list(tensors[name].shape)


def resolve_folder(source: str | Path, *, allow_pickle: bool = False) -> Path:
    """The model folder that a name means: itself, a run's newest sound checkpoint, or a hub id's.

    A folder in Karlo's layout is one too. `allow_pickle` downloads `.bin` files as well.

    **Raises**: `CheckpointError` if there is none.
    """
    path = Path(source)
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source))
    if is_id and not path.parent.is_dir():  # below a folder that is there it would be a path
        path = _download(str(source), allow_pickle)
    if (path / INDEX).is_file():
        if (path / MANIFEST).is_file():
            check_manifest(path, training=False)
        return path
    if (path / PIPELINE).is_file():
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
        f"no model at {path}: expected a model folder (with {INDEX}, or {PIPELINE} as diffusers "
        f"has it) or a run folder (with checkpoints/){hint}"
    )


def _download(repo: str, allow_pickle: bool) -> Path:
    """The newest snapshot of a model on the Hugging Face hub, from the cache where it is there."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.safetensors", *(["*.bin"] if allow_pickle else [])]
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"no model at {repo}: there is no such folder, and the hub gave none ({reason})"
        ) from None


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


def _shape(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides)) or "scalar"


def tally(wrong: Mapping[str, list[str]]) -> str:
    """How many names are wrong in which way, and the first few; empty where none are."""
    few = {how: ", ".join(names[:4]) + ", …" * (len(names) > 4) for how, names in wrong.items()}
    return "; ".join(f"{len(names)} {how} ({few[how]})" for how, names in wrong.items() if names)
