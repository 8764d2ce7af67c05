"""One training step of a network counted on fake tensors, which have shapes and no data.

One observer counts the bytes alive, another the floating-point operations.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from unclip.conditioning import Cond, TextEncoding
from unclip.config import Config
from unclip.models.lora import adapt
from unclip.stages.kinds import kind_of
from unclip.training.ar_prior import ArPriorRun
from unclip.training.prior import PriorRun
from unclip.training.upsampler import UpsamplerRun

CONTEXT = 77  # of CLIP's text encoders: at most as many token states enter a decoder


class StepNeeds(NamedTuple):
    """Of one training step: floating-point operations; its peak in bytes beyond weights, gradients
    and optimizer; operations that write something, each of which a GPU has to be told; numbers that
    group norms read going forward and backward.
    """

    flops: int
    peak: int
    operations: int
    normed: tuple[int, int]


def step_needs(run: Any, micro: int, checkpointing: bool) -> StepNeeds:
    """What a step on a micro-batch takes, with every block computed again or not."""
    config = with_checkpointing(run.model.model_dump(), checkpointing)
    model = type(run.model).model_validate(config)
    # The peak's observer sees operations whole; the other takes some of them apart to count them.
    with FakeTensorMode(), flop_counter() as flops, _Peak() as peak:
        network = network_of(run, model)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        x_t, t, cond = inputs_of(run, micro)
        before = peak.start()
        # auto is bf16 on the GPUs that a plan is for
        with torch.autocast("cpu", torch.bfloat16, enabled=run.train.precision != "fp32"):
            out = network(x_t, t, cond)
        out.float().square().mean().backward()
    return StepNeeds(
        int(flops.get_total_flops()), peak.most - before, peak.operations, tuple(peak.normed)
    )


NORMS = [torch.ops.aten.native_group_norm, torch.ops.aten.native_group_norm_backward]


class _Peak(TorchDispatchMode):
    """Counts the bytes of tensors' storages while they live, and what is done, since `start`."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = self._clean = self.operations = 0
        self.normed = [0, 0]
        self._seen: dict[int, Any] = {}
        gc.collect()
        gc.freeze()  # what is there now needs no look each time

    def start(self) -> int:
        """Forget the peak so far; the bytes alive now."""
        self.most, self.operations, self.normed = self.alive, 0, [0, 0]
        return self.alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += func.namespace == "aten" and not func.is_view
        if func.overloadpacket in NORMS:
            self.normed[NORMS.index(func.overloadpacket)] += args[0].numel()
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def dead(_: Any) -> None:
            del self._seen[key]
            self.alive -= size
            self._clean = min(self._clean, self.alive)

        self._seen[key] = weakref.ref(storage, dead)
        self.alive += size
        if self.alive > self.most:
            # Recomputed tensors of a checkpoint hang in cycles of Python objects.
            if self.alive > 1.01 * self._clean:
                gc.collect()
                self._clean = self.alive
            self.most = max(self.most, self.alive)

    def __exit__(self, *exception: Any) -> None:
        gc.unfreeze()
        super().__exit__(*exception)


def flop_counter() -> FlopCounterMode:
    """Counts operations; the fused attention of CPUs too, which torch's own table lacks."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


def _attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


class _Full(TextEncoding):
    """Text as long as it can be; fake tensors can't be asked where it ends."""

    def length(self) -> int:
        return self.mask.shape[1]


def inputs_of(run: Any, n: int) -> tuple[Tensor, Tensor, Cond]:
    """What a network is called with, for n samples: x_t (or what stands there), t, conditions."""
    model, t = run.model, torch.zeros(n, dtype=torch.long)
    if isinstance(run, UpsamplerRun):
        side = run.data.crop or run.data.resolution
        x_t = torch.zeros(n, 3, side, side)
        return x_t, t, Cond(low_res=torch.zeros_like(x_t))
    prior = isinstance(run, PriorRun | ArPriorRun)
    text, length = None, model.context if prior else CONTEXT
    if model.text_width is not None:
        mask = torch.ones(n, length, dtype=torch.bool)
        text = _Full(torch.zeros(n, length, model.text_width), mask, torch.zeros(n, model.embed))
    if isinstance(run, ArPriorRun):  # its two inputs are bucket numbers
        return torch.zeros(n, model.components, dtype=torch.long), t, Cond(text=text)
    if isinstance(run, PriorRun):
        return torch.zeros(n, model.embed), t, Cond(text=text)
    x_t = torch.zeros(n, 3, model.resolution, model.resolution)
    return x_t, t, Cond(image_embed=torch.zeros(n, model.embed), text=text)


def network_of(run: Any, model: Config | None = None) -> nn.Module:
    """The network that a run trains, or one of another configuration of its kind."""
    config = model or run.model
    network = kind_of(config).network(config)
    if getattr(run, "lora", None) is not None:
        adapt(network, run.lora)
    return network


def with_checkpointing(config: Any, on: bool) -> Any:
    """A configuration with every `checkpointing` in it set."""
    if not isinstance(config, dict):
        return config
    return {k: on if k == "checkpointing" else with_checkpointing(v, on) for k, v in config.items()}
