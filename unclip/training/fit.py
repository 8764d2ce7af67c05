"""The one training loop (Appendix C): AdamW, averaged weights, exact resume, any process count."""

from __future__ import annotations

import fnmatch
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from unclip.config import Config, Place, flat
from unclip.errors import ConfigError
from unclip.precision import Precision, any_order
from unclip.randomness import generator
from unclip.training import sharding
from unclip.training.checkpoint import (
    TrainState,
    gathered,
    load_checkpoint,
    save_checkpoint,
)
from unclip.training.ema import EMA
from unclip.training.log import RunLog, add_up
from unclip.training.optimizer import OptimizerName, build_optimizer
from unclip.training.run import full_disk_explained, locked, on_main, open_run, stop_signal
from unclip.training.trackers import TrackerName


class TrainConfig(Config):
    """How to train. `batch` is global: over all processes and accumulation steps. A constant rate
    falls to zero over the last `cooldown` steps, which may be decided when they come.
    `deterministic` makes an accelerator's bits repeat, which a CPU's do anyway, at some cost.
    `only` and `anew` are patterns of parameters' names (`detail.*`, `*.attention.*`): nothing but
    those is trained, the others stay as `init` has them; those don't come from `init`, but begin as
    in a network that has learned nothing."""

    out: Place
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(gt=0)
    warmup: int = Field(default=0, ge=0)
    decay: Literal["constant", "cosine"] = "cosine"
    cooldown: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    optimizer: OptimizerName = "adamw"
    clip_grad: float | None = Field(default=1.0, gt=0)
    ema: float = Field(default=0.9999, ge=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**64)  # as torch has it
    save_every: int = Field(ge=1)
    sample_every: int = Field(ge=1)
    log_every: int = Field(default=10, ge=1)
    keep: int = Field(default=2, ge=2)
    precision: Precision = "fp32"
    compile: bool = False
    deterministic: bool = False
    tracker: TrackerName = "none"
    init: Place | None = None
    only: list[str] | None = Field(default=None, min_length=1)
    anew: list[str] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.only and self.init is None:
            raise ValueError("only needs init, which the other parameters stay as")
        if self.anew and self.init is None:
            raise ValueError("anew needs init, which the other parameters come from")
        if self.cooldown and self.decay != "constant":
            raise ValueError("cooldown needs decay = constant: a cosine falls by itself")
        return self


class Batch(Protocol):
    """One process's share of one micro-batch."""

    def to(self, device: torch.device) -> Any: ...


class Task(Protocol):
    """What is trained. `name` is a stage's, and `describe` gives its `config.json`; `start_from`
    takes over the weights of the same stage in a folder, a run or a hub id.

    `product` is what is averaged, saved and started from: the model, or the part of one whose rest
    only helps in training. `trained` is what checkpoints keep to go on: the model, or what changes.

    `loss` gives per-sample values (B,) on the model's device: "loss" is minimised, other entries
    are logged, without their nan, which marks samples that one does not apply to. It calls `model`
    (perhaps wrapped) exactly once and draws all its noise from `randomness` by the batch's global
    ids. `preview` draws with fixed seeds, on every process. `describe` gets the tensors that are
    saved, by the names of `product.state_dict()`.
    """

    name: str
    model: nn.Module
    product: nn.Module
    trained: nn.Module

    def loss(self, model: nn.Module, batch: Any, step: int) -> dict[str, Tensor]: ...

    def preview(self, model: nn.Module) -> Image.Image | None: ...

    def describe(self, tensors: dict[str, Tensor]) -> dict[str, Any]: ...

    def start_from(self, path: str) -> None: ...


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.decay == "constant":
        return config.lr * min(1, (config.steps - step) / max(1, config.cooldown))
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    task: Task,
    batches: Callable[[int], Iterator[Batch]],
    config: TrainConfig,
    resolved: Config,
    accelerator: Accelerator,
    begin: Callable[[], None] | None = None,
    held_out: Callable[[nn.Module], dict[str, float]] | None = None,
    prepare: Callable[[Path | None], None] | None = None,
) -> Path:
    """Train to `config.steps`, resuming from the run folder; the newest checkpoint's folder.

    `batches(step)` gives this process's micro-batches from that step on, `config.accumulate` for
    each step, without end. `begin` prepares the model of a run that starts from nothing, where it
    will train; the first process does that, and wrapping the model gives all of them what is there.
    `held_out` says what the averaged model makes of data that it is not trained on, beside each
    preview and as that on every process. `prepare` is called on each before any of that, once the
    folder is known to be this run's, with the checkpoint to go on from if there is one. SIGTERM,
    SIGUSR1 or SIGINT saves after the current step and returns.

    **Raises**: `ConfigError` if the run folder belongs to another configuration, another training
    is writing to it or a pattern in `config.only` or `config.anew` matches nothing,
    `CheckpointError` if its checkpoints are damaged or none can be written, `DivergedError` if ten
    steps in a row, or more than ten of a thousand, are not finite.
    """
    run = Path(config.out)
    with locked(accelerator, run), full_disk_explained(run):
        newest = on_main(accelerator, lambda: open_run(run, resolved))
        if prepare is not None:
            prepare(newest)
        _make_ready(task, config, accelerator, newest, begin)
        shares = accelerator.num_processes if sharding.asked() else 1
        wrap = sharding.shard if shares > 1 else Accelerator.prepare_model
        wrapped = wrap(accelerator, task.model)
        optimizer = build_optimizer(
            task.model, config.optimizer, config.lr, config.betas, config.eps, config.weight_decay
        )
        state = TrainState(task.trained, optimizer, EMA(task.product, config.ema))
        if newest is not None:
            load_checkpoint(newest, task, state)
        log = RunLog(
            run,
            start=state.step,
            steps=config.steps,
            batch=config.batch,
            accelerator=accelerator,
            tracker=config.tracker,
            settings=flat(resolved.model_dump(mode="json")),
        )
        for line in _said(config, newest, log.precision, shares):
            log.say(line)
        trainer = _Trainer(task, wrapped, config, state, log, accelerator, held_out)
        try:
            with stop_signal() as stopped:
                trainer.train(batches, stopped)
        finally:
            log.close()
            # Take accelerate's autocast wrapper off the model's forward again.
            accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        accelerator.wait_for_everyone()
        saved = trainer.saved or newest
        assert saved is not None, "steps >= 1 always ends in a checkpoint"
        return saved


def _make_ready(
    task: Task,
    config: TrainConfig,
    accelerator: Accelerator,
    newest: Path | None,
    begin: Callable[[], None] | None,
) -> None:
    """The model where it will train, with what a run that starts from nothing begins with."""
    task.model.to(accelerator.device)
    if newest is None and config.init is not None:
        fresh = _named(task.product, "anew", config.anew or [])
        kept = [parameter.detach().clone() for parameter in fresh.values()]
        task.start_from(config.init)
        for parameter, values in zip(fresh.values(), kept, strict=True):
            parameter.data.copy_(values)
    elif newest is None and begin is not None:
        on_main(accelerator, begin)
    if config.only is not None:
        trained = _named(task.product, "only", config.only)
        for name, parameter in task.product.named_parameters():
            parameter.requires_grad_(name in trained)
    task.model.train()
    if config.compile:
        task.model.compile()  # in place: keys keep their names


def _named(model: nn.Module, key: str, patterns: list[str]) -> dict[str, nn.Parameter]:
    """The parameters that are trained and called as `train.<key>` says."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in trained):
            raise ConfigError(
                f"train.{key}: no parameter that is trained is called {pattern!r}; they are called "
                f"{', '.join(dict.fromkeys(name.split('.')[0] + '.*' for name in trained))}"
            )
    chosen = {name for name in trained for p in patterns if fnmatch.fnmatchcase(name, p)}
    return {name: parameter for name, parameter in trained.items() if name in chosen}


def _said(config: TrainConfig, newest: Path | None, precision: str, shares: int) -> Iterator[str]:
    """What a run says of itself before it starts; `shares` is over how many it is spread."""
    if newest is not None:
        yield f"resumed from {newest}"
    if config.precision == "auto":
        yield f"train.precision = auto is {precision} on this machine"
    if shares > 1:
        yield sharding.told(shares)


def running_statistics(model: nn.Module) -> list[Tensor]:
    """What batch norms keep of the batches that they have seen."""
    norms = (part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers()]


@dataclass
class _Trainer:
    """The loop and what it works on; `wrapped` is the model as this process calls it."""

    task: Task
    wrapped: nn.Module
    config: TrainConfig
    state: TrainState
    log: RunLog
    accelerator: Accelerator
    held_out: Callable[[nn.Module], dict[str, float]] | None
    saved: Path | None = None

    def train(self, batches: Callable[[int], Iterator[Batch]], stopped: threading.Event) -> None:
        """Steps up to `config.steps`, or to the first one after `stopped` is set."""
        config, state = self.config, self.state
        with self.log.untimed():
            first = self._preview() if state.step == 0 else None
        if first is not None:
            self.log.say(f"{first} shows where it begins, those beside it how far it is")
        stream = batches(state.step)
        statistics = running_statistics(self.task.model)
        while state.step < config.steps:
            lr = learning_rate(state.step, config)
            before = [statistic.clone() for statistic in statistics]
            entries, wait = self._backward(stream)
            norm, skipped, stop = self._update(entries["loss"][0], lr, stopped.is_set())
            state.step += 1
            self.log.add(entries, wait, skipped)
            state.count(skipped)
            if skipped:  # what the batch was has gone into these all the same
                for statistic, value in zip(statistics, before, strict=True):
                    statistic.copy_(value)
            done = state.step == config.steps
            if state.step % config.log_every == 0 or done or stop:
                self.log.write(state.step, float(norm), lr)
            with self.log.untimed():
                if state.step % config.save_every == 0 or done or stop:
                    self._save()
                if state.step % config.sample_every == 0 or done:
                    self._preview()
            if stop and not done:
                self.log.say(f"stopped at step {state.step}; the same command continues from here")
                return
        self.log.say(f"trained to step {state.step}; its weights are in {config.out}")

    def _backward(self, stream: Iterator[Batch]) -> tuple[dict[str, Tensor], float]:
        """Gradients of one global batch; this process's entries and its wait for data.

        **Shapes**: each entry (2,), the sum over samples and how many it applies to.
        """
        config, step, rank = self.config, self.state.step, self.accelerator.process_index
        sums: dict[str, Tensor] = {}
        wait = 0.0
        for micro in range(config.accumulate):
            since = time.perf_counter()
            batch = next(stream).to(self.accelerator.device)
            wait += time.perf_counter() - since
            # Only dropout draws from the default generator.
            torch.manual_seed(generator(config.seed, "dropout", step, micro, rank).initial_seed())
            more = micro < config.accumulate - 1  # processes exchange gradients once a step
            with self.accelerator.no_sync(self.wrapped) if more else nullcontext():
                losses = self.task.loss(self.wrapped, batch, step)
                self.accelerator.backward(losses["loss"].mean() / config.accumulate)
            add_up(sums, losses)
        return sums, wait

    def _update(self, loss: Tensor, lr: float, stop: bool) -> tuple[Tensor, bool, bool]:
        """One optimizer step, unless loss or gradients are not finite on any process.

        The gradients' norm; whether the step was skipped; whether any process was told to stop.
        """
        optimizer = self.state.optimizer
        params = [p for group in optimizer.param_groups for p in group["params"]]
        spread = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        norm = sharding.whole(spread)
        finite = loss.isfinite() & norm.isfinite()
        flags = torch.stack([~finite, torch.full_like(finite, stop)]).int()
        if self.accelerator.num_processes > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        skipped, stop = (bool(flag) for flag in flags.tolist())
        if not skipped:
            if self.config.clip_grad is not None:
                nn.utils.clip_grads_with_norm_(params, self.config.clip_grad, spread)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            self.state.ema.update(self.state.step)
        optimizer.zero_grad()
        return norm, skipped, stop

    def _save(self) -> None:
        run, keep = Path(self.config.out), self.config.keep
        tensors = gathered(self.state, self.accelerator.is_main_process)
        self.saved = on_main(
            self.accelerator, lambda: save_checkpoint(run, self.task, self.state, tensors, keep)
        )

    def _preview(self) -> Path | None:
        """Write samples/step-N.png from the averaged weights; randomness stays as it is.

        Every process draws it, so that none waits for another, and a spread model can.
        """
        device = self.accelerator.device
        fork = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with fork, torch.no_grad(), self.state.ema.swapped(self.task.model) as averaged:
            with any_order():  # the autoregressive prior's choice needs sums that have none
                image = self.task.preview(averaged)
            scores = {} if self.held_out is None else self.held_out(averaged)
        self.log.write_held_out(self.state.step, scores)
        if image is None or not self.accelerator.is_main_process:
            return None
        path = Path(self.config.out) / "samples" / f"step-{self.state.step}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        self.log.show(path, self.state.step)
        return path
