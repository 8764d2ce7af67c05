"""Safetensors files: written in one piece, read a tensor at a time into networks."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unclip.errors import CheckpointError
from unclip.files.disk import sync, tally


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    exact: Collection[str] = (),
) -> None:
    """Write a safetensors file in one piece: contiguous, untied, readable as the umask says.

    `dtype` converts floating tensors, but for those named in `exact`, which it makes float32.

    **Raises**: `OSError` if the file can't be written.
    """
    path = Path(path)
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        wanted = tensor.dtype
        if dtype is not None and tensor.is_floating_point():
            wanted = torch.float32 if name in exact else dtype
        tensor = tensor.detach().to("cpu", wanted).contiguous()
        if tensor.untyped_storage().data_ptr() in storages:  # tied: safetensors refuses it
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    beside = path.with_name(path.name + ".tmp")
    beside.unlink(missing_ok=True)
    beside.touch()
    mode = beside.stat().st_mode
    try:
        save_file(plain, beside, metadata={"format": "pt"})
    except SafetensorError as error:  # says only in words what the system said
        code = re.search(r"\(os error (\d+)\)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number) if code else str(error), str(path)) from None
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


class Shards(Mapping[str, Tensor]):
    """Several safetensors files as one.

    **Raises**: `CheckpointError` if one is missing or damaged.
    """

    def __init__(self, paths: Sequence[Path]):
        self._files = {name: file for file in map(TensorFile, paths) for name in file}

    def shape(self, name: str) -> list[int]:
        """A tensor's shape, from its file's header."""
        return self._files[name].shape(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


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


def _shape(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides)) or "scalar"
