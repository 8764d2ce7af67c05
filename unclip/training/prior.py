"""Training the diffusion prior: z_image from its caption (Section 2.2).

B batch, D CLIP embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unclip.clip.encoder import FrozenCLIP
from unclip.conditioning import Cond
from unclip.config import Config, Place
from unclip.data.cache import EmbeddingCache
from unclip.data.open import PairsConfig, is_cache
from unclip.data.sample import Batch, Dataset
from unclip.data.tolerant import Tolerant
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.sampling import SamplingConfig
from unclip.images import grid, to_pil
from unclip.models.prior import PriorConfig
from unclip.training.drafts import fit_draft, fit_scale
from unclip.training.fit import TrainConfig
from unclip.training.start import check_lora, check_sampling
from unclip.training.task import (
    PREVIEWS,
    DropConfig,
    Prepared,
    StageTask,
    draw,
    embeddings_of,
    frozen_clip,
    numbers_of_draws,
    train,
)


class PriorRun(Config):
    """A training run of the diffusion prior; `clip` names the frozen encoder.

    `draws`: how many (t, noise) are drawn for each pair. The text, most of what the transformer
    reads, is read once for all of them. `lora`: only low-rank changes of that rank are trained, of
    the prior in `train.init`."""

    clip: Place
    data: PairsConfig
    model: PriorConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    drop: DropConfig
    draws: int = Field(1, ge=1)
    lora: int | None = Field(None, ge=1)
    train: TrainConfig

    @model_validator(mode="after")
    def _check(self) -> PriorRun:
        check_lora(self)
        check_sampling(self)
        if self.model.draft is not None and self.diffusion.target != "x0":
            raise ValueError("model.draft needs diffusion.target = x0")
        return self


class PairsTask(StageTask):
    """What trainings of priors share: pairs of a picture's embedding and its caption."""

    def preview(self, model: Any) -> Image.Image | None:
        """Each row: a validation picture, then those nearest to what its caption gave; nothing
        where validation data are a cache, which holds no pictures."""
        if is_cache(self.run.data.val or self.run.data.train):
            return None
        images, captions = self.shown.first(64)
        z_image = self.clip.encode_image(images)
        cond = Cond(text=self.clip.encode_text(captions[:PREVIEWS]))
        z = self.stage.embeddings(self.drawn(model, cond))
        similar = cosine_similarity(z[:, None], z_image[None], dim=-1)
        near = similar.topk(min(4, len(images)), dim=1).indices
        rows = [[k, *near[k].tolist()] for k in range(len(z))]
        return grid([to_pil(images[i]) for row in rows for i in row], columns=len(rows[0]))


class PriorTask(PairsTask):
    """Predict z_image from its caption (Section 2.2: mean squared error on z_image itself)."""

    run: PriorRun

    def loss(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        """The loss of each pair. **Shapes**: → (B,)."""
        ids, n = batch.ids, self.run.draws
        z_image = embeddings_of(self.clip, batch)
        cond = self.drop(Cond(text=self.clip.encode_text(batch.text)), ids)
        x0 = self.stage.network.scale(z_image).repeat_interleave(n, dim=0)  # (nB, D)
        t, noise = draw(self.run, numbers_of_draws(ids, n), x0, batch.noise)
        losses = self.stage.diffusion.loss(model, x0, cond, t, noise)
        return {  # of a pair's draws; what nan marks in the other entries counts for nothing
            name: value.view(-1, n).mean(1) if name == "loss" else value.view(-1, n).nanmean(1)
            for name, value in losses.items()
        }


def open_pairs(run: Any, accelerator: Accelerator) -> tuple[Dataset, FrozenCLIP]:
    """What a prior of either kind learns from, pictures or a cache of their embeddings, and the
    encoder.

    **Raises**: `CheckpointError` if another encoder made the cache, or that of validation data,
    `DataError` if raw embeddings are needed, by the diffusion prior's scale, and it holds unit
    vectors.
    """
    dataset, clip = run.data.open(run.data.train), frozen_clip(run.clip, accelerator)
    raw = isinstance(run, PriorRun) and not run.model.scale.normalizes
    val = run.data.val
    for data in (dataset, run.data.open(val) if val is not None and is_cache(val) else None):
        if isinstance(data, Tolerant) and isinstance(data.dataset, EmbeddingCache):
            data.dataset.check_encoder(clip, run.clip)
            if raw:
                data.dataset.check_raw(clip)
    return dataset, clip


def train_prior(run: PriorRun, accelerator: Accelerator) -> Path:
    """Train the prior; the newest checkpoint's folder."""
    dataset, clip = open_pairs(run, accelerator)
    task = PriorTask(run, clip, dataset)

    def begin() -> None:
        fit_scale(task.stage.network.scale, clip, dataset)
        if run.model.draft is not None:
            seed, drop = run.train.seed, run.drop.text
            fit_draft(task.stage.network, clip, dataset, seed, drop, accelerator.autocast)

    made = Prepared(run.train.seed, task.stage.shape, clip.towers.tokenizer, run.draws)
    return train(task, run, dataset, accelerator, made, begin)
