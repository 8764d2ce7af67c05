"""A second device that isn't there: its tensors are the CPU's, but may not be mixed with them.

`enable()` registers it with torch, for good, so it belongs into a process of its own. What runs on
it is computed on the CPU; counted is where the host would have waited for a GPU. Run as a script,
it does one thing named by its arguments there and prints what it saw as JSON.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
aten = torch.ops.aten
# On a GPU the size of their result has to be known by the host.
SIZED_BY_DATA = {aten.nonzero, aten.masked_select, aten._unique2, aten.repeat_interleave}
# Indices and single numbers may come from the CPU.
TAKES_INDICES = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}


class Waits(Counter[str]):
    """How often the host waited, by the line of ours that made it: reads, and blocking uploads."""


waits = Waits()


class _Module:
    """What torch asks of a backend."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    is_available = is_initialized

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None: ...

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    @contextmanager
    def device(index: int) -> Iterator[None]:
        yield


class There(Tensor):
    """A tensor on the pretended device; `here` is what it holds."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        there = Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(NAME, 0),
        )
        there.here = here
        return there

    def __repr__(self, **options: Any) -> str:
        return f"There({self.here})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, dtype=self.dtype).to(self.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what is asked of the other device, and take note of its traffic."""
    op, leaves = func.overloadpacket, tree_leaves((args, kwargs))
    there = [x for x in leaves if isinstance(x, There)]
    here = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, There)]
    goal = kwargs.get("device") if op is not aten.set_ else None
    goal = torch.device(goal) if goal is not None else None
    if op in (aten._to_copy, aten.copy_):
        target = goal or args[0].device
        source = args[1] if op is aten.copy_ else args[0]
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if target.type == "cpu" and isinstance(source, There):
            _note("read")
        elif target.type == NAME and not isinstance(source, There) and blocking:
            _note("upload")
    elif op is aten._local_scalar_dense or op in SIZED_BY_DATA or _masks(op, args):
        _note("read")
    elif there and (odd := [x for x in here if x.ndim and op not in TAKES_INDICES]):
        shapes = [tuple(x.shape) for x in odd]
        raise RuntimeError(f"{func} is given tensors of the CPU {shapes} with the device's")
    bare = {id(x.here): x for x in there}
    given = {**kwargs, "device": torch.device("cpu")} if goal is not None else kwargs
    out = func(*tree_map(_bare, args), **tree_map(_bare, given))
    stays = goal.type == NAME if goal is not None else bool(there)
    if op is aten.copy_:
        stays = isinstance(args[0], There)

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return bare.get(id(x)) if id(x) in bare else There(x)

    return tree_map(wrap, out) if stays else out


def _bare(x: Any) -> Any:
    return x.here if isinstance(x, There) else x


def _masks(op: Any, args: Any) -> bool:
    if op not in TAKES_INDICES:
        return False
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])


def _note(kind: str) -> None:
    frames = [f for f in traceback.extract_stack() if "/unclip/" in f.filename]
    place = "elsewhere"
    if frames:
        place = f"{frames[-1].filename.rpartition('/unclip/')[2]}:{frames[-1].name}"
    waits[f"{kind} {place}"] += 1


def enable() -> torch.device:
    """Register the device; there is no way back."""
    _setup_privateuseone_for_python_backend(NAME, _Module)
    every = torch.library.Library("_", "IMPL")
    every.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    cast = torch.library.Library("aten", "IMPL")
    for precision, names in AUTOCAST.items():
        for name in names:
            cast.impl(
                name,
                _autocast(aten.__getattr__(name.partition(".")[0]), precision),
                "AutocastPrivateUse1",
            )
    _kept.extend([every, cast])
    plain = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        return plain(data, **options) if device is None else plain(data, **options).to(device)

    torch.tensor = tensor
    return torch.device(NAME, 0)


# As on CUDA.
AUTOCAST = {
    None: [
        "linear",
        "conv2d",
        "conv_transpose2d.input",
        "matmul",
        "bmm",
        "mm",
        "addmm",
        "scaled_dot_product_attention",
    ],
    torch.float32: ["group_norm", "layer_norm", "linalg_vector_norm", "mse_loss", "softmax.int"],
}


def _autocast(op: Any, precision: torch.dtype | None) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        goal = precision or torch.get_autocast_dtype(NAME)

        def cast(x: Any) -> Any:
            floats = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(goal) if floats else x

        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_kept: list[Any] = []
