"""Weights, averages, gradients and optimizer spread over processes (ZeRO 3, by torch's FSDP2).

On when accelerate's launcher says so (`distributed_type: FSDP`). accelerate's own wrapping is left
aside: it wraps model and optimizer together, and on CPUs not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parametrize

from unclip.errors import ConfigError

ASKED, VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"  # what accelerate's launcher sets

# Methods other than forward that use a module's weights, and are called from outside of it.
METHODS = ("prepare", "project", "encode", "step", "advance")


def asked() -> bool:
    """Whether the launcher asked for sharding.

    **Raises**: `ConfigError` if it asked for the older kind.
    """
    if os.environ.get(ASKED, "false").lower() not in ("true", "1"):
        return False
    if os.environ.get(VERSION, "1") != "2":
        raise ConfigError("fsdp_version must be 2; see configs/accelerate/fsdp2_8.yaml")
    return True


@contextmanager
def hidden() -> Iterator[None]:
    """Keep from accelerate that sharding was asked for."""
    value = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[ASKED] = value


def grid(world: int) -> tuple[int, int]:
    """How many machines there are, and over how many processes of each weights are shared out.

    Machines hold copies, because what connects them is slower than what connects the GPUs of one;
    where each has a single process, all of them share.

    **Raises**: `ConfigError` if machines differ in their processes.
    """
    each = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if each in (1, world):
        return 1, world
    if world % each:
        raise ConfigError(
            f"{world} processes, {each} of them on this machine: start as many on every machine"
        )
    return world // each, each


def told(world: int) -> str:
    """What a run says of it."""
    machines, each = grid(world)
    copies = f" of each of {machines} machines" if machines > 1 else ""
    return f"weights are shared out over {each} processes{copies}"


def shard(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Spread a model over the processes of a machine, with rank 0's values; each of its blocks is
    whole only while it runs. In bf16, blocks are put together in half the bytes; gradients are
    added up in float32.

    **Raises**: `ConfigError` if it can't be spread.
    """
    scalars = [name for name, p in model.named_parameters() if p.ndim == 0]
    if scalars:
        raise ConfigError(
            f"{scalars[0]} of this model is a single number, which FSDP can't share out; train it "
            "with configs/accelerate/ddp_8.yaml"
        )
    if any(parametrize.is_parametrized(part) for part in model.modules()):
        raise ConfigError("lora can't be shared out; train it with configs/accelerate/ddp_8.yaml")
    model = accelerator.prepare_model(model, evaluation_mode=True)  # autocast and device alone
    for p in model.parameters():
        p.data = p.data.contiguous()  # FSDP takes no channels-last weights
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)
    machines, each = grid(accelerator.num_processes)
    sides = {"copies": machines, "parts": each} if machines > 1 else {"parts": each}
    mesh = init_device_mesh(
        accelerator.device.type, tuple(sides.values()), mesh_dim_names=tuple(sides)
    )
    policy = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        # Inputs stay as they are: autocast knows better which of them may be rounded.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for unit in units(model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        for name in _methods(unit):
            _gather_for(unit, name)
    return model


def units(model: nn.Module) -> list[nn.Module]:
    """The modules whose own weights are put together at once, inner ones first."""
    blocks = {
        block for part in model.modules() if isinstance(part, nn.ModuleList) for block in part
    }
    inner_first = reversed(list(model.modules()))
    return [part for part in inner_first if part is model or part in blocks or _methods(part)]


def largest_unit(model: nn.Module) -> int:
    """The parameters of the unit that has most, those of inner units left out."""
    seen: set[nn.Parameter] = set()
    sizes = []
    for unit in units(model):
        own = set(unit.parameters()) - seen
        seen |= own
        sizes.append(sum(p.numel() for p in own))
    return max(sizes)


def _methods(module: nn.Module) -> list[str]:
    if next(module.parameters(), None) is None:  # a quantizer, which has buffers
        return []
    return [name for name in METHODS if callable(getattr(module, name, None))]


def _gather_for(module: nn.Module, name: str) -> None:
    """Have a method gather the module's weights, as forward does, unless it runs inside that."""
    plain: Callable[..., Any] = getattr(module, name)
    register_fsdp_forward_method(module, name)
    gathering: Callable[..., Any] = getattr(module, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        apart = isinstance(next(module.parameters()), DTensor)
        return gathering(*args, **kwargs) if apart else plain(*args, **kwargs)

    setattr(module, name, method)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wholes(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All of them whole, those that had to be put together on the CPU; none without `keep`."""
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            kept[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return kept


def part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, or this process's part of it, into `target`."""
    if isinstance(target, DTensor):
        mesh, placements = target.device_mesh, target.placements
        value = value.to(target.device)  # every process has read the same file
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    target.copy_(value)
