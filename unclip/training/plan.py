"""What a training will need, counted without allocating it: memory by kind, arithmetic, days.

The network's training step runs on fake tensors, which have shapes and no data, while one observer
counts the bytes alive and another the floating-point operations.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from unclip.config import Config, load_config, read_yaml
from unclip.data.order import micro_batch
from unclip.errors import ConfigError
from unclip.stages.kinds import kind_of, kind_of_keys
from unclip.text import markdown_table
from unclip.training.ar_prior import ArPriorRun
from unclip.training.decoder import DecoderRun
from unclip.training.prior import PriorRun
from unclip.training.sharding import largest_unit
from unclip.training.upsampler import UpsamplerRun

GB = 1e9
MOMENTS = {"adamw": 8, "adamw8bit": 2, "muon": 4}  # bytes a parameter, about
RUNS: dict[str, type[Config]] = {
    "prior": PriorRun,
    "ar_prior": ArPriorRun,
    "decoder": DecoderRun,
    "upsampler": UpsamplerRun,
}
CONTEXT = 77  # of CLIP's text encoders: at most as many token states enter a decoder


@dataclass(frozen=True)
class Plan:
    """A run's needs. **Units**: bytes on each GPU, floating-point operations for each picture.

    `activations` is what a micro-batch adds at its peak, the low-precision copies of weights
    included; `checkpointed` the same with every block computed again going backward.
    `checkpointing` says which of the two the configuration has, and `flops` is that one's.
    `gathered` is what sharding puts together for a moment. The frozen CLIP encoder of priors and
    decoders comes on top of everything.
    """

    parameters: int
    micro_batch: int
    weights: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int
    activations: int
    checkpointed: int
    checkpointing: bool
    flops: float
    pictures: int

    @property
    def fixed(self) -> int:
        """Bytes on each GPU whatever the batch."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.gathered

    @property
    def step(self) -> int:
        """Bytes that a micro-batch adds as the configuration stands."""
        return self.checkpointed if self.checkpointing else self.activations

    @property
    def total(self) -> int:
        """Bytes on each GPU as the configuration stands."""
        return self.fixed + self.step

    def fits(self, memory: float) -> int:
        """The largest micro-batch for so many bytes, about: activations grow with it evenly."""
        return max(0, int((memory - self.fixed) / self.step * self.micro_batch))

    def days(self, gpus: int, peak: float, utilisation: float) -> float:
        """Days for all pictures. **Units**: `peak` in operations a second of one GPU."""
        return self.pictures * self.flops / (gpus * peak * utilisation) / 86400


def plan(path: str | Path, overrides: list[str], gpus: int, shard: bool = False) -> Plan:
    """Plan the run of a configuration on so many GPUs.

    Each has a copy of everything (DDP) or, with `shard`, its share of it (FSDP2).

    **Raises**: `ConfigError` if it is no prior, decoder or upsampler, or its batch can't be shared.
    """
    run = _load(path, overrides)
    train = run.train
    micro = micro_batch(train.batch, train.accumulate, gpus)
    config = run.model.model_dump()
    asked = any(_checkpointing(config))
    plain, again = (step_needs(run, micro, on) for on in (False, True))
    with torch.device("meta"):
        network = _network(run)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(t.numel() for t in network.state_dict().values()) - trained
    share = gpus if shard else 1
    return Plan(
        parameters=trained + frozen,
        micro_batch=micro,
        weights=4 * (trained + frozen) // share,
        gradients=4 * trained // share,
        optimizer=MOMENTS[run.train.optimizer] * trained // share,
        ema=4 * trained // share,
        # Two units' weights, because the next one is fetched ahead, and one's gradients.
        gathered=12 * largest_unit(network) if shard and gpus > 1 else 0,
        activations=plain[1],
        checkpointed=again[1],
        checkpointing=asked,
        flops=(again if asked else plain)[0] / micro,
        pictures=train.steps * train.batch,
    )


def report(plan: Plan, *, gpus: int, memory: float, tflops: float, utilisation: float) -> str:
    """The plan as a page. **Units**: memory in GB, tflops of one GPU at its best."""
    kinds = {
        "weights (float32)": plan.weights,
        "gradients": plan.gradients,
        "AdamW's moments": plan.optimizer,
        "averaged weights": plan.ema,
        **({"put together for a while": plan.gathered} if plan.gathered else {}),
        f"activations, micro-batch {plan.micro_batch}": plan.activations,
        "the same with checkpointing": plan.checkpointed,
    }
    used = "with" if plan.checkpointing else "without"
    total, largest = plan.total / GB, plan.fits(memory * GB)
    if total <= memory:
        verdict = f"fits in {memory:g} GB"
    elif largest:
        verdict = f"does not fit in {memory:g} GB; a micro-batch of {largest} would: raise "
        verdict += "train.accumulate" + ("" if plan.checkpointing else ", or use checkpointing")
    else:
        verdict = f"does not fit in {memory:g} GB with any batch"
    days = plan.days(gpus, tflops * 1e12, utilisation)
    return "\n".join(
        [
            f"{plan.parameters / 1e6:,.1f} M parameters",
            markdown_table(
                ["on each GPU", "GB"], [[kind, f"{n / GB:,.2f}"] for kind, n in kinds.items()]
            ),
            f"{total:,.2f} GB {used} checkpointing, as configured: {verdict}. A frozen CLIP "
            "encoder and the libraries' own memory come on top.",
            f"{plan.flops / 1e9:,.1f} GFLOP a picture, forward and backward; "
            f"{plan.pictures:,} pictures take {days:,.1f} days on {gpus} GPU{'s' * (gpus > 1)} at "
            f"{utilisation:.0%} of {tflops:g} TFLOP/s.",
        ]
    )


def step_needs(run: Any, micro: int, checkpointing: bool) -> tuple[int, int]:
    """One training step: its floating-point operations, and its peak in bytes beyond weights,
    gradients and optimizer.
    """
    config = _with_checkpointing(run.model.model_dump(), checkpointing)
    model = type(run.model).model_validate(config)
    with FakeTensorMode(), _Peak() as peak, flop_counter() as flops:
        network = _network(run, model)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        x_t, t, cond = _inputs(run, micro)
        before = peak.start()
        # auto is bf16 on the GPUs that a plan is for
        with torch.autocast("cpu", torch.bfloat16, enabled=run.train.precision != "fp32"):
            out = network(x_t, t, cond)
        out.float().square().mean().backward()
    return int(flops.get_total_flops()), peak.most - before


class _Peak(TorchDispatchMode):
    """Counts the bytes of tensors' storages while they live; `most` since `start`."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = self._clean = 0
        self._seen: dict[int, Any] = {}
        gc.collect()
        gc.freeze()  # what is there now needs no look each time

    def start(self) -> int:
        """Forget the peak so far; the bytes alive now."""
        self.most = self.alive
        return self.alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
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


def _inputs(run: Any, n: int) -> tuple[Tensor, Tensor, Cond]:
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


def _network(run: Any, model: Config | None = None) -> nn.Module:
    config = model or run.model
    return kind_of(config).network(config)


def _load(path: str | Path, overrides: list[str]) -> Any:
    kind = kind_of_keys(read_yaml(Path(path)).get("model") or {})
    if kind is None:
        raise ConfigError(f"{path} is no configuration of a prior, a decoder or an upsampler")
    return load_config(path, overrides, RUNS[kind.name])


def _with_checkpointing(config: Any, on: bool) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        k: on if k == "checkpointing" else _with_checkpointing(v, on) for k, v in config.items()
    }


def _checkpointing(config: Any) -> Iterator[bool]:
    for key, value in config.items():
        if key == "checkpointing":
            yield value
        elif isinstance(value, dict):
            yield from _checkpointing(value)
