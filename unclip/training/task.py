"""What the trainings of diffusion stages share: their data, random draws, previews."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from unclip import randomness
from unclip.clip.encoder import FrozenCLIP
from unclip.conditioning import Cond
from unclip.config import Config
from unclip.data.open import DataConfig, open_dataset
from unclip.data.order import batches
from unclip.data.sample import Batch, Dataset, fixed
from unclip.errors import ConfigError
from unclip.stages.stage import Stage

PREVIEWS = 8


class DropConfig(Config):
    """Shares of samples that train without a condition, for classifier-free guidance."""

    image: float = Field(0.0, ge=0, le=1)
    text: float = Field(0.0, ge=0, le=1)


def check_widths(clip: FrozenCLIP, name: str, embed: int, text_width: int | None) -> None:
    """Refuse a model whose widths are not its encoder's.

    **Raises**: `ConfigError` naming the key, its value and the encoder's width.
    """
    for key, value, actual in [
        ("embed", embed, clip.width),
        ("text_width", text_width, clip.text_width),
    ]:
        if value is not None and value != actual:
            raise ConfigError(
                f"model.{key} = {value}, but the CLIP encoder {name} has {actual}: set them equal"
            )


def first_samples(data: DataConfig, count: int) -> tuple[Tensor, list[str]]:
    """The first pictures of the validation set, or of the training set where there is none."""
    dataset = open_dataset(data.val or data.train, data.resolution)
    samples = [fixed(dataset, i) for i in range(min(count, len(dataset)))]
    return torch.stack([s.image for s in samples]), [s.caption for s in samples]


def open_train(run: Any) -> Dataset:
    return open_dataset(run.data.train, run.data.resolution)


def stream(
    dataset: Dataset, run: Any, accelerator: Accelerator
) -> Callable[[int], Iterator[Batch]]:
    return lambda step: batches(
        dataset,
        batch=run.train.batch,
        seed=run.train.seed,
        start_step=step,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        accumulate=run.train.accumulate,
        crop=run.data.crop,
        workers=run.data.workers,
    )


def draw(run: Any, ids: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Timestep (B,) and noise (B, *) of each sample, by its global id."""
    seed = run.train.seed
    steps, power = run.diffusion.steps, run.diffusion.time_power
    if power == 1:
        t = randomness.integers(seed, "t", ids, steps)
    else:
        u = randomness.uniform(seed, "t", ids).double() ** (1 / power)
        t = (u * steps).long().clamp(max=steps - 1)
    noise = randomness.normal(seed, "noise", ids, x0.shape[1:])
    return t.to(x0.device), noise.to(x0.device)


def drop(run: Any, what: str, ids: Tensor, like: Tensor) -> Tensor:
    """Which samples go without a condition. **Shapes**: (B,) → (B,) bool."""
    share = getattr(run.drop, what)
    return (randomness.uniform(run.train.seed, f"drop {what}", ids) < share).to(like.device)


def sample_preview(
    stage: Stage, model: Any, cond: Cond, shape: tuple[int, ...], clip: FrozenCLIP | None
) -> Tensor:
    """One sample for each condition, seeds 0, 1, …, with the stage's own sampling settings."""
    generators = [torch.Generator().manual_seed(k) for k in range(len(cond))]
    null_text = None if clip is None else clip.null_text
    drawing = replace(stage, network=model)
    return drawing.draw(cond, shape, stage.sampling, generators, null_text=null_text)
