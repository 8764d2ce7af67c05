"""Checking configurations before anything is spent: widths, data, weights to start from, memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator

from unclip.clip.encoder import FrozenCLIP
from unclip.config import load_config
from unclip.data.order import batches, micro_batch
from unclip.data.sample import Batch, Dataset
from unclip.errors import ConfigError
from unclip.files.disk import check_writable, write_new
from unclip.images import grid, resize, to_pil
from unclip.stages.kinds import KINDS, build
from unclip.training.launch import start_accelerator
from unclip.training.plan import GB, Plan, plan
from unclip.training.start import FREE, OF_A_BASE, Widths, check_widths, kin_of
from unclip.training.task import stage_of
from unclip.training.trainers import TRAINERS, trained_by

SHOWN, SIDE = 64, 96  # pictures on a contact sheet, at most, and pixels of each


class Planned(NamedTuple):
    """The widths of an encoder that another configuration will train."""

    width: int
    text_width: int
    context: int


class Run(NamedTuple):
    """A configuration, where it came from, and the name of the training."""

    path: str
    name: str
    config: Any


def validate(
    paths: Sequence[str],
    overrides: Sequence[str],
    out: Path,
    gpus: int = 1,
    memory: float | None = None,
) -> Iterator[str]:
    """Check the configurations of one stack, or one of them, and say what was found.

    Each is read as its training does it, and its first batch is drawn onto a contact sheet in the
    folder `out`. An encoder that one of them will train is known by that one's widths. **Units**:
    `memory` of a GPU in GB.

    **Raises**: what the training would: `ConfigError`, also for stages that don't fit together or
    into `memory`, `DataError`, `CheckpointError`.
    """
    check_writable(out, "--out")
    runs = [_read(path, overrides) for path in paths]
    for run in runs:
        yield f"{run.path}: keys and types are right; it trains the stage {run.name}."
    _check_stack(runs)
    accelerator = start_accelerator("fp32")
    for run in runs:
        check_writable(Path(run.config.train.out), "train.out")
        micro_batch(run.config.train.batch, run.config.train.accumulate, gpus)
        for sentence in _checks(run, runs, accelerator, out):
            yield f"{run.path}: {sentence}"
        if run.name in KINDS:
            needs = plan(run.path, list(overrides), gpus)
            yield f"{run.path}: {_told(run.path, needs, gpus, memory)}"


def _read(path: str, overrides: Sequence[str]) -> Run:
    name = trained_by(path)
    return Run(path, name, load_config(path, overrides, TRAINERS[name].schema))


def _check_stack(runs: Sequence[Run]) -> None:
    """What configurations say of each other."""
    stages = [run for run in runs if run.name in KINDS]
    encoders = {run.config.clip: run.path for run in stages if run.name != "upsampler"}
    if len(encoders) > 1:
        said = ", ".join(f"{path} has clip = {name}" for name, path in encoders.items())
        raise ConfigError(f"{said}; the stages of a stack share one encoder")
    sides = {run.config.model.resolution: run.path for run in stages if run.name == "decoder"}
    upsamplers = [run for run in stages if run.name == "upsampler"]
    sides |= {run.config.model.high: run.path for run in upsamplers} if sides else {}
    for run in upsamplers:
        if sides and run.config.model.low not in sides:
            drawn = ", ".join(f"{path} draws {side} px" for side, path in sides.items())
            raise ConfigError(f"{run.path}: model.low = {run.config.model.low}, but {drawn}")


def _pending(place: str | None, runs: Sequence[Run]) -> Run | None:
    """The one that will train what is named, where nothing is there yet."""
    for run in runs:
        folder = Path(run.config.train.out)
        same = place is not None and folder.absolute() == Path(place).absolute()
        if same and not (folder / "checkpoints").is_dir():
            return run
    return None


def _planned(place: str | None, runs: Sequence[Run]) -> Widths | None:
    """What is known of an encoder that another configuration will train, if one will."""
    first = _pending(place, runs)
    if first is None:
        return None
    if first.name == "clip_text":  # its widths are those of the one that it starts from
        return _planned(first.config.clip, runs) or FrozenCLIP.load(first.config.clip)
    model = first.config.model
    return Planned(model.embed_dim, model.text_cfg.width, model.text_cfg.context_length)


def _checks(run: Run, runs: Sequence[Run], accelerator: Accelerator, out: Path) -> Iterator[str]:
    """What a training does before its first step, with nothing allocated for its network."""
    config, clip = run.config, None
    encoder: Widths | None = _planned(getattr(config, "clip", None), runs)
    there = "" if encoder is None else ", which another of these trains,"
    if encoder is None:
        dataset, clip = TRAINERS[run.name].opens(config, accelerator)
        encoder = clip
    else:
        dataset = config.data.open(config.data.train)
    if encoder is not None:
        if run.name in KINDS:
            check_widths(encoder, config)
        widths = f"{encoder.width} and {encoder.text_width}"
        yield f"the encoder {config.clip}{there} fits: its widths are {widths}."
    yield _drawn(run, dataset, out)
    if config.data.val is not None:
        yield f"{len(config.data.open(config.data.val)):,} samples to validate on."
    if _pending(config.train.init, runs):
        yield f"train.init: {config.train.init} is what another of these trains."
    elif config.train.init is not None and run.name in KINDS:
        encoder_of = None if clip is None else clip.fingerprint
        free = FREE if getattr(config, "lora", None) is None else OF_A_BASE
        kin_of(stage_of(config, build(config.model), encoder_of), config.train.init, free)
        yield f"train.init: the weights in {config.train.init} can be started from."


def _drawn(run: Run, dataset: Dataset, out: Path) -> str:
    """Draw the first batch, or as much as a sheet holds, and save it."""
    config = run.config
    count = min(config.train.batch, SHOWN)
    batch = next(batches(dataset, batch=count, seed=config.train.seed, crop=config.data.crop))
    said = f"{len(dataset):,} samples to train on"
    empty = sum(not caption.strip() for caption in batch.captions)
    if empty:
        said += f", {empty} of the first {count} without a caption"
    if batch.pixels is None:
        return f"{said}, embeddings without pictures; the first: {batch.captions[0]!r}."
    out.mkdir(parents=True, exist_ok=True)
    sheet = write_new(out / f"{Path(run.path).stem}.png", lambda to: _sheet(batch, to))
    return f"{said}; the first {count}, with their captions, are in {sheet}."


def _sheet(batch: Batch, to: Path) -> None:
    pictures = [to_pil(x) for x in resize(batch.images, SIDE).clamp(-1, 1)]
    columns = math.ceil(len(pictures) ** 0.5)
    grid(pictures, columns, batch.captions).save(to, "PNG")


def _told(path: str, needs: Plan, gpus: int, memory: float | None) -> str:
    """What a plan says about memory. **Raises**: `ConfigError` if `memory` is not enough."""
    where = f"on each of {gpus} GPUs" if gpus > 1 else "where it trains"
    said = f"{needs.total / GB:,.2f} GB {where} for a micro-batch of {needs.micro_batch}"
    if memory is None:
        return f"{said}; this machine has {memory_here()}."
    if needs.total > memory * GB:
        largest = needs.fits(memory * GB)
        mend = (
            f"a micro-batch of {largest} would fit: raise train.accumulate"
            if largest
            else ("no batch would fit: share it out over GPUs, or make the network smaller")
        )
        raise ConfigError(f"{path}: {said}, but there are {memory:g} GB; {mend}")
    return f"{said}, of {memory:g} GB."


def memory_here() -> str:
    """How much memory this machine computes in, and whose it is."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return f"{psutil.virtual_memory().total / GB:,.1f} GB and no GPU"
    return f"a {device.type} device with {torch.accelerator.get_memory_info()[1] / GB:,.1f} GB"
