"""Checkpoints: a model folder with the averaged weights, and beside it what resuming needs.

checkpoints/step-N/unclip.json, <stage>/config.json, <stage>/model.safetensors (averages)
checkpoints/step-N/training/weights.safetensors     the live weights
checkpoints/step-N/training/optimizer.safetensors   exp_avg.<name>, exp_avg_sq.<name>, step.<name>
checkpoints/step-N/training/state.json
checkpoints/step-N/manifest.json                    written last
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from unclip.errors import CheckpointError, DivergedError
from unclip.files.checkpoints import checkpoint_step, list_checkpoints, write_manifest
from unclip.files.disk import read_json, sync, write_json
from unclip.files.folder import WEIGHTS, write_stage
from unclip.files.tensors import TensorFile, load_tensors, write_tensors
from unclip.training.ema import EMA
from unclip.training.sharding import put, wholes

# How many steps may be skipped in a row, and among how many of the last steps as many may be.
MAX_SKIPPED, WINDOW = 10, 1000


class Saves(Protocol):
    """The part of a task that checkpoints need; see `fit.Task`."""

    name: str

    def describe(self, tensors: dict[str, Tensor]) -> dict[str, Any]: ...


@dataclass
class TrainState:
    """What a training step changes; `step` counts finished steps, skipped ones included.

    `skipped` are those of late in which loss or gradients were not finite.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    step: int = 0
    skipped: list[int] = field(default_factory=list)

    def count(self, skipped: bool) -> None:
        """Take note of a finished step, which may have been skipped.

        **Raises**: `DivergedError` if ten in a row, or more than ten of a thousand, were.
        """
        self.skipped = [step for step in self.skipped if step > self.step - WINDOW]
        if not skipped:
            return
        self.skipped.append(self.step)
        recent = self.skipped[-MAX_SKIPPED:]
        in_a_row = len(recent) == MAX_SKIPPED and recent[0] == self.step - MAX_SKIPPED + 1
        if in_a_row or len(self.skipped) > MAX_SKIPPED:
            how = (
                f"{MAX_SKIPPED} steps in a row"
                if in_a_row
                else f"{len(self.skipped)} of the last {min(self.step, WINDOW)} steps"
            )
            raise DivergedError(
                f"loss or gradients were not finite in {how}, up to step {self.step}; lower "
                "train.lr, raise train.warmup, or use train.precision=fp32"
            )


@dataclass
class Tensors:
    """What a checkpoint holds, each tensor whole: by the names of the model's state, the live
    weights and buffers; in place of those that the task saves, by the names of that part's state,
    the averages; the optimizer's by their names in files.
    """

    live: dict[str, Tensor]
    averaged: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def gathered(state: TrainState, keep: bool) -> Tensors:
    """The state's tensors, put together from all processes; those that don't `keep` get none."""
    live = wholes(state.model.state_dict(), keep)
    product = wholes(state.ema.model.state_dict(), keep)
    averaged = {**product, **wholes(state.ema.tensors(), keep)}
    return Tensors(live, averaged, wholes(_optimizer_tensors(state), keep))


def save_checkpoint(run: Path, task: Saves, state: TrainState, tensors: Tensors, keep: int) -> Path:
    """Write `checkpoints/step-N` beside its place, rename it, and remove the oldest.

    At least two are kept, so that one damaged file never ends a run.

    **Raises**: `DivergedError` if a weight is not finite, `CheckpointError` if the files can't be
    written; then the older ones stay.
    """
    _check_finite(tensors, state.step)
    final = run / "checkpoints" / f"step-{state.step}"
    beside = final.with_name(final.name + ".tmp")
    for old in (run / "checkpoints").glob("step-*.tmp"):
        shutil.rmtree(old)
    try:
        _write(beside, task, state, tensors)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(
            f"{final} could not be written: {error}. Make room, then start the same command again: "
            "it continues from the checkpoint before"
        ) from None
    if final.exists():  # a damaged one that resuming has passed over
        shutil.rmtree(final)
    os.rename(beside, final)
    sync(final.parent)
    _prune(run, state.step, keep)
    return final


def _write(folder: Path, task: Saves, state: TrainState, tensors: Tensors) -> None:
    (folder / "training").mkdir(parents=True)
    write_stage(folder, task.name, task.describe(tensors.averaged), tensors.averaged)
    write_tensors(folder / "training" / "weights.safetensors", tensors.live)
    write_tensors(folder / "training" / "optimizer.safetensors", tensors.optimizer)
    saved = {"format": 1, "step": state.step, "skipped": state.skipped}
    write_json(folder / "training" / "state.json", saved)
    write_manifest(folder)


def load_checkpoint(folder: Path, task: Saves, state: TrainState) -> None:
    """Continue from `folder`, whose manifest has been checked.

    **Raises**: `CheckpointError` if it belongs to another model.
    """
    weights = folder / "training" / "weights.safetensors"
    load_tensors(state.model, TensorFile(weights), str(weights), put)
    stage = folder / task.name / WEIGHTS
    state.ema.load(TensorFile(stage), str(stage))
    _load_optimizer(folder / "training" / "optimizer.safetensors", state)
    saved = read_json(folder / "training" / "state.json")
    if saved.get("format") != 1:
        raise CheckpointError(f"{folder} has training state of format {saved.get('format')!r}")
    state.step, state.skipped = saved["step"], saved.get("skipped", [])


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": torch.as_tensor(value)
        for name, param in state.model.named_parameters()
        for key, value in state.optimizer.state.get(param, {}).items()
    }


def _load_optimizer(path: Path, state: TrainState) -> None:
    params = dict(state.model.named_parameters())
    for full_name, saved in TensorFile(path).items():
        key, _, name = full_name.partition(".")
        if name not in params:
            raise CheckpointError(f"{path} holds {full_name}, but the model has no {name}")
        param = params[name]
        # Moments get their parameter's memory format back; the file holds contiguous copies.
        if saved.ndim == 0 and saved.dtype == torch.int64:  # a plain count
            state.optimizer.state[param][key] = int(saved)
            continue
        value = torch.empty_like(param) if saved.shape == param.shape else torch.empty_like(saved)
        value = value.to(param.device, saved.dtype).detach()
        put(value, saved)
        state.optimizer.state[param][key] = value


def _check_finite(tensors: Tensors, step: int) -> None:
    """Gradients may be finite and an optimizer's step with them not."""
    for name, value in [*tensors.live.items(), *tensors.averaged.items()]:
        if not bool(value.isfinite().all()):
            raise DivergedError(
                f"{name} is not finite at step {step}, which is not saved; lower train.lr "
                "and start the same command again: it continues from the checkpoint before"
            )


def _prune(run: Path, step: int, keep: int) -> None:
    """Keep the newest up to `step`; a later one is damaged, else we had resumed from it."""
    folders = list_checkpoints(run)
    sound = [folder for folder in folders if (checkpoint_step(folder) or 0) <= step]
    for folder in set(folders) - set(sound[: max(keep, 2)]):
        shutil.rmtree(folder)
