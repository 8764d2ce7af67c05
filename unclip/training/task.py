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
from unclip.data.open import DataConfig
from unclip.data.order import batches
from unclip.data.sample import Batch, Dataset, Sample, fixed
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


class Shown:
    """What previews show: the first pictures of the validation set, or where there is none of the
    training set, which is open already. They are read once and kept."""

    def __init__(self, data: DataConfig, train: Dataset | None = None) -> None:
        self.data, self.train = data, train
        self._kept: list[Sample] = []

    def first(self, count: int) -> tuple[Tensor, list[str]]:
        """**Shapes**: → (n, 3, H, W) in [-1, 1] and n captions, n at most `count`."""
        if not self._kept:
            spec = self.data.val or self.data.train
            use = None if self.data.val else self.train
            dataset = self.data.open(spec) if use is None else use
            self._kept = [fixed(dataset, i) for i in range(min(count, len(dataset)))]
        shown = self._kept[:count]
        return torch.stack([s.image for s in shown]), [s.caption for s in shown]


def open_train(run: Any) -> Dataset:
    return run.data.open(run.data.train)


def stream(
    dataset: Dataset,
    run: Any,
    accelerator: Accelerator,
    made: Callable[[Batch], Batch] | None = None,
) -> Callable[[int], Iterator[Batch]]:
    """This process's micro-batches from a step on; `made` as in `batches`."""
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
        pin=accelerator.device.type == "cuda",
        **({} if made is None else {"made": made}),
    )


def draw(run: Any, ids: Tensor, x0: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Timestep (B,) and noise (B, *) of each sample, by its global id, or with noise at hand."""
    seed = run.train.seed
    t = randomness.integers(seed, "t", ids, run.diffusion.steps)
    if noise is None:
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
