"""What a training will need, counted without allocating it: memory by kind, arithmetic, days.

The network's own training step is counted (`counting`), not a formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unclip.config import load_config
from unclip.data.order import micro_batch
from unclip.errors import ConfigError
from unclip.stages.kinds import KINDS
from unclip.text import markdown_table
from unclip.training.counting import network_of, step_needs
from unclip.training.sharding import largest_unit
from unclip.training.trainers import TRAINERS, trained_by

GB = 1e9
LAUNCH = 5e-6  # seconds that a host takes to tell a GPU of one operation, about
MOMENTS = {"adamw": 8, "adamw8bit": 2, "muon": 4}  # bytes a parameter, about


@dataclass(frozen=True)
class Plan:
    """A run's needs. **Units**: bytes on each GPU, floating-point operations for each picture.

    `activations` is what a micro-batch adds at its peak, the low-precision copies of weights
    included; `checkpointed` the same with every block computed again going backward.
    `checkpointing` says which of the two the configuration has; `flops` is that one's, and so are
    `operations`, those of a micro-batch, however small. `gathered` is what sharding puts together
    for a moment. The frozen CLIP encoder of priors and decoders comes on top of everything.
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
    operations: int
    accumulate: int
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

    def feeds(self, speed: float) -> int:
        """The smallest micro-batch that takes longer to compute than to launch, about.

        **Units**: `speed` in operations a second that are reached.
        """
        return max(1, math.ceil(self.operations * LAUNCH * speed / self.flops))

    def days(self, gpus: int, peak: float, utilisation: float) -> float:
        """Days for all pictures. **Units**: `peak` in operations a second of one GPU."""
        return self.pictures * self.flops / (gpus * peak * utilisation) / 86400


def plan(
    path: str | Path, overrides: list[str], gpus: int, shard: bool = False, machines: int = 1
) -> Plan:
    """Plan the run of a configuration on so many GPUs, in all machines together.

    Each has a copy of everything (DDP) or, with `shard`, its share of its machine's (FSDP2).

    **Raises**: `ConfigError` if it is no prior, decoder or upsampler, or its batch can't be shared.
    """
    if gpus % machines:
        raise ConfigError(f"{gpus} GPUs can't be divided by {machines} machines")
    run = _load(path, overrides)
    train = run.train
    micro = micro_batch(train.batch, train.accumulate, gpus)
    config = run.model.model_dump()
    asked = any(_checkpointing(config))
    plain, again = (step_needs(run, micro, on) for on in (False, True))
    with torch.device("meta"):
        network = network_of(run)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(t.numel() for t in network.state_dict().values()) - trained
    share = gpus // machines if shard else 1
    needs = again if asked else plain
    return Plan(
        parameters=trained + frozen,
        micro_batch=micro,
        weights=4 * (trained + frozen) // share,
        gradients=4 * trained // share,
        optimizer=MOMENTS[run.train.optimizer] * trained // share,
        ema=4 * trained // share,
        # Two units' weights, because the next one is fetched ahead, and one's gradients.
        gathered=12 * largest_unit(network) if share > 1 else 0,
        activations=plain.peak,
        checkpointed=again.peak,
        checkpointing=asked,
        flops=needs.flops / micro,
        operations=needs.operations,
        accumulate=train.accumulate,
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
    starved = _starved(plan, tflops * 1e12 * utilisation)
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
            *([starved] if starved else []),
        ]
    )


def _starved(plan: Plan, speed: float) -> str:
    """What to do about a micro-batch that leaves a GPU waiting for its host, if it does."""
    least, micro = plan.feeds(speed), plan.micro_batch
    if micro >= least:
        return ""
    launch, compute = 1e3 * plan.operations * LAUNCH, 1e3 * micro * plan.flops / speed
    page = (
        f"A micro-batch of {micro} starves a GPU: {plan.operations:,} operations take about "
        f"{launch:.0f} ms to launch and {compute:.0f} ms to compute, from {least} on they would "
        "not; "
    )
    fewer = [n for n in range(1, plan.accumulate) if plan.accumulate % n == 0]
    enough = [n for n in fewer if micro * plan.accumulate // n >= least]
    n = max(enough) if enough else 1
    if plan.accumulate == 1:
        return page + "raise train.batch, or use fewer GPUs."
    page += f"train.accumulate={n} makes it {micro * plan.accumulate // n}"
    return page + ("." if enough else ", and train.batch has to grow too.")


def _load(path: str | Path, overrides: list[str]) -> Any:
    name = trained_by(path)
    if name not in KINDS:
        raise ConfigError(f"{path} is no configuration of a prior, a decoder or an upsampler")
    return load_config(path, overrides, TRAINERS[name].schema)


def _checkpointing(config: Any) -> Iterator[bool]:
    for key, value in config.items():
        if key == "checkpointing":
            yield value
        elif isinstance(value, dict):
            yield from _checkpointing(value)
