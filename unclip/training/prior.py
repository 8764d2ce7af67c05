"""Training the diffusion prior: z_image from its caption (Section 2.2).

B batch, D CLIP embedding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from unclip.clip.encoder import FrozenCLIP
from unclip.conditioning import Cond
from unclip.config import Config, Place
from unclip.data.cache import EmbeddingCache
from unclip.data.open import DataConfig, is_cache
from unclip.data.sample import Batch, Dataset
from unclip.data.tolerant import Tolerant
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig
from unclip.images import grid, to_pil
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.stages.stage import Stage
from unclip.training.drafts import fit_draft, fit_scale
from unclip.training.fit import TrainConfig, fit
from unclip.training.task import (
    PREVIEWS,
    DropConfig,
    Prepared,
    Shown,
    check_widths,
    draw,
    drop,
    embeddings_of,
    frozen_clip,
    sample_preview,
    start_from,
    stream,
)


class PriorRun(Config):
    """A training run of the diffusion prior; `clip` names the frozen encoder.

    `draws`: how many (t, noise) are drawn for each pair. The text, most of what the transformer
    reads, is read once for all of them."""

    clip: Place
    data: DataConfig
    model: PriorConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    drop: DropConfig
    draws: int = Field(1, ge=1)
    train: TrainConfig

    @model_validator(mode="after")
    def _check(self) -> PriorRun:
        if self.model.draft is not None and self.diffusion.target != "x0":
            raise ValueError("model.draft needs diffusion.target = x0")
        return self


class PriorTask:
    """Predict z_image from its caption (Section 2.2: mean squared error on z_image itself)."""

    name = "prior"

    def __init__(self, run: PriorRun, clip: FrozenCLIP, train: Dataset | None = None):
        check_widths(clip, run.clip, run.model.embed, run.model.text_width)
        self.run, self.clip, self.shown = run, clip, Shown(run.data, train)
        self.model: nn.Module = DiffusionPrior(run.model)
        self.product: nn.Module = self.model
        diffusion = GaussianDiffusion(run.diffusion)
        self.stage = Stage("prior", self.model, diffusion, run.sampling, clip.fingerprint)

    def loss(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        """The loss of each pair. **Shapes**: → (B,)."""
        ids, n = batch.ids, self.run.draws
        z_image = embeddings_of(self.clip, batch)
        cond = Cond(text=self.clip.encode_text(batch.text))
        cond = cond.drop(self.clip.null_text, drop_text=drop(self.run, "text", ids, z_image))
        x0 = self.stage.network.scale(z_image).repeat_interleave(n, dim=0)  # (nB, D)
        draws = (ids[:, None] * n + torch.arange(n)).flatten()  # each its own number
        t, noise = draw(self.run, draws, x0, batch.noise)
        losses = self.stage.diffusion.loss(model, x0, cond, t, noise)
        return {  # of a pair's draws; what nan marks in the other entries counts for nothing
            name: value.view(-1, n).mean(1) if name == "loss" else value.view(-1, n).nanmean(1)
            for name, value in losses.items()
        }

    def preview(self, model: Any) -> Image.Image | None:
        """Each row: a validation picture, then those nearest to what its caption gave."""
        return nearest_pictures(self.stage, model, self.run.data, self.shown, self.clip)

    def describe(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The stage's `config.json`."""
        return self.stage.describe()

    def start_from(self, path: str) -> None:
        """Take over the weights of the same stage, or of its only kin."""
        start_from(self.stage, path)


def nearest_pictures(
    stage: Stage, model: Any, data: DataConfig, shown: Shown, clip: FrozenCLIP
) -> Image.Image | None:
    """Each row: a validation picture, then those nearest to what a prior makes of its caption."""
    if data.val is None and is_cache(data.train):
        return None  # no pictures to show
    images, captions = shown.first(64)
    z_image = clip.encode_image(images)
    cond = Cond(text=clip.encode_text(captions[:PREVIEWS]))
    z = replace(stage, network=model).embeddings(
        sample_preview(stage, model, cond, stage.shape, clip)
    )
    similar = cosine_similarity(z[:, None], z_image[None], dim=-1)
    near = similar.topk(min(4, len(images)), dim=1).indices
    rows = [[k, *near[k].tolist()] for k in range(len(z))]
    return grid([to_pil(images[i]) for row in rows for i in row], columns=len(rows[0]))


def open_pairs(run: Any, accelerator: Accelerator, raw: bool = False) -> tuple[Dataset, FrozenCLIP]:
    """What a prior learns from, pictures or a cache of their embeddings, and the encoder.

    **Raises**: `CheckpointError` if another encoder made the cache, `DataError` if `raw` embeddings
    are needed and it holds unit vectors.
    """
    dataset = run.data.open(run.data.train, embeddings=True)
    clip = frozen_clip(run.clip, accelerator)
    if isinstance(dataset, Tolerant) and isinstance(dataset.dataset, EmbeddingCache):
        dataset.dataset.check_encoder(clip, run.clip)
        if raw:
            dataset.dataset.check_raw(clip)
    return dataset, clip


def train_prior(run: PriorRun, accelerator: Accelerator) -> Path:
    """Train the prior; the newest checkpoint's folder."""
    dataset, clip = open_pairs(run, accelerator, raw=not run.model.scale.normalizes)
    task = PriorTask(run, clip, dataset)

    def begin() -> None:
        fit_scale(task.stage.network.scale, clip, dataset)
        if run.model.draft is not None:
            seed, drop = run.train.seed, run.drop.text
            fit_draft(task.stage.network, clip, dataset, seed, drop, accelerator.autocast)

    shape = task.stage.shape if run.draws == 1 else None  # else drawn as many times
    made = Prepared(run.train.seed, shape, clip.towers.tokenizer)
    batches_from = stream(dataset, run, accelerator, made)
    return fit(task, batches_from, run.train, run, accelerator, begin)
