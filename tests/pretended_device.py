"""A second device that isn't there: its tensors are the CPU's, but may not be mixed with them.

`enable()` registers it with torch, for good, so it belongs into a process of its own. What runs on
it is computed on the CPU, under CUDA's rules of autocast; counted is where the host would have
waited for a GPU: to read a result, and to copy something there other than in passing.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import unclip

NAME = "pretended"
PACKAGE = Path(unclip.__file__).parent
aten = torch.ops.aten
# On a GPU the size of their result has to be known by the host.
SIZED_BY_DATA = {aten.nonzero, aten.masked_select, aten._unique2, aten.repeat_interleave}
# Indices and single numbers may come from the CPU.
TAKES_INDICES = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}


# How often the host waited, by what for and by the function of ours that made it.
waits: Counter[str] = Counter()


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
    """Compute on the CPU what is asked of the other device."""
    op, leaves = func.overloadpacket, tree_leaves((args, kwargs))
    there = {id(x.here): x for x in leaves if isinstance(x, There)}
    goal = kwargs.get("device")
    goes = torch.device(goal).type if goal is not None else NAME if there else "cpu"
    if op is aten.copy_:
        goes = args[0].device.type
    if op in (aten._to_copy, aten.copy_):
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        comes = args[op is aten.copy_].device.type
        if comes != goes and (goes == "cpu" or blocking):
            _note("read" if goes == "cpu" else "upload")
    elif op is aten._local_scalar_dense or op in SIZED_BY_DATA or _masks(op, args):
        _note("read")
    elif there and op not in TAKES_INDICES:
        odd = [tuple(x.shape) for x in leaves if type(x) is Tensor and x.ndim]
        if odd:
            raise RuntimeError(f"{func} is given tensors of the CPU {odd} with the device's")
    if goal is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))
    if goes == "cpu":
        return out
    # What an operation changes in place is given back as it is.
    return tree_map(lambda x: _wrapped(x, there), out)


def _wrapped(x: Any, there: dict[int, There]) -> Any:
    if not isinstance(x, Tensor):
        return x
    return there[id(x)] if id(x) in there else There(x)


def _bare(x: Any) -> Any:
    return x.here if isinstance(x, There) else x


def _masks(op: Any, args: Any) -> bool:
    if op not in TAKES_INDICES:
        return False
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])


def _note(kind: str) -> None:
    ours = [f for f in traceback.extract_stack() if PACKAGE in Path(f.filename).parents]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "elsewhere"
    waits[f"{kind} {place}"] += 1


def enable() -> torch.device:
    """Register the device; there is no way back."""
    _setup_privateuseone_for_python_backend(NAME, _Module)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `here` goes with them
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
