"""Training the decoder: a picture from its own z_image and its caption (Section 2.1).

B batch, D CLIP embedding, R the picture's side.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from unclip import randomness
from unclip.clip.encoder import FrozenCLIP
from unclip.conditioning import Cond
from unclip.config import Config, Place
from unclip.data.cache import EmbeddingCache, Joined
from unclip.data.open import DataConfig, Spec
from unclip.data.sample import Batch, Dataset
from unclip.data.tolerant import Tolerant
from unclip.diffusion.inpainting import Kept
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.sampling import SamplingConfig
from unclip.errors import ConfigError
from unclip.images import grid, resize, to_pil
from unclip.models.decoder import DecoderConfig
from unclip.precision import resolve_precision
from unclip.training import sharding
from unclip.training.adversary import (
    AdversaryConfig,
    Contested,
    Critic,
    Drawn,
    Together,
    drawn_to,
    parted,
)
from unclip.training.augment import PlaceConfig, masks, place
from unclip.training.drafts import fit_layout, fit_scale, jittered
from unclip.training.fit import TrainConfig
from unclip.training.misses import Misses, misses_of
from unclip.training.start import check_lora, check_sampling
from unclip.training.task import (
    PREVIEWS,
    DropConfig,
    Prepared,
    StageTask,
    draw,
    frozen_clip,
    told_of,
    train,
)

FARTHEST = 1.2  # a prior's misses are enlarged by up to this much


class DecoderRun(Config):
    """A training run of the decoder; `clip` names the frozen encoder.

    `embeddings` is a cache that has those of the training pictures by key (`unclip train embed`),
    which else the encoder makes at every step. `jitter` moves the image embeddings off the data
    (see `jittered`), by up to so much and most by little: from the farthest, a layout tells little.
    `prior` is a trained one: half of the embeddings are moved as far as its draws are off instead,
    and the layout learns what those mean (see `Misses`). `augment` moves pictures before the
    encoder sees them, in training only: the embedding says what was done, so that nothing of it
    comes back unasked. `perceptual` weighs what the encoder sees of the guess of x_0 beside the
    picture (see `perceived`). `lora`: only low-rank changes of that rank are trained, of the
    decoder in `train.init`. `adversary` lets a critic judge what the decoder draws by itself.
    """

    clip: Place
    data: DataConfig
    embeddings: Spec | None = None
    model: DecoderConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    drop: DropConfig
    jitter: float = Field(0.0, ge=0)
    prior: Place | None = None
    perceptual: float = Field(0.0, ge=0)
    adversary: AdversaryConfig | None = None
    augment: PlaceConfig = PlaceConfig()
    lora: int | None = Field(None, ge=1)
    train: TrainConfig

    @model_validator(mode="after")
    def _check(self) -> DecoderRun:
        check_lora(self)
        check_sampling(self)
        if self.model.learned_variance != self.diffusion.learned_variance:
            raise ValueError("model.learned_variance and diffusion.learned_variance must agree")
        if self.model.layout is not None and self.diffusion.target != "x0":
            raise ValueError("model.layout needs diffusion.target = x0")
        if self.adversary is not None and self.lora is not None:
            raise ValueError("adversary and lora can't go together: leave one of them out")
        if self.embeddings is not None and self.augment != PlaceConfig():
            raise ValueError("augment moves pictures away from their embeddings in the cache")
        return self


class DecoderTask(StageTask):
    """Draw a picture from its own z_image and its caption, either sometimes left out."""

    run: DecoderRun
    misses: Misses | None = None

    def __init__(self, run: DecoderRun, clip: FrozenCLIP, train: Dataset | None = None):
        super().__init__(run, clip, train)
        if run.adversary is not None:
            critic = Critic(clip.features, run.model.resolution, run.model.embed)
            self.model = self.trained = Contested(self.model, critic, self.stage.diffusion)

    def loss(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        """The loss of each picture. **Shapes**: → (B,)."""
        ids, images = batch.ids, self.moved(batch.images, batch.ids)
        told = told_of(self.clip, self.stage, images, batch.text, batch.z_image)
        cond = self.drop(self._jittered(told, ids), ids)
        x0 = resize(images, self.run.model.resolution).clamp(-1, 1)  # bicubic overshoots
        if self.run.model.inpaint:
            hidden = masks(ids, x0.shape[-1], self.run.train.seed).to(x0.device, non_blocking=True)
            cond = replace(cond, known=Kept(x0, hidden).shown())
        t, noise = draw(self.run, ids, x0, batch.noise)
        distance = self.perceived if self.run.perceptual > 0 else None
        diffusion = self.stage.diffusion
        if self.run.adversary is None:
            return diffusion.loss(model, x0, cond, t, noise, distance)
        numbers = parted(ids, self.run.adversary.share)
        own, rest = (part.to(x0.device, non_blocking=True) for part in numbers)
        drawn = self._drawn(cond.rows(own), ids[numbers[0]], x0[own], step)
        both = Together(model, drawn)
        found = diffusion.loss(both, x0[rest], cond.rows(rest), t[rest], noise[rest], distance)
        return both.losses(found, own, rest, self.run.adversary.weight)

    @torch.no_grad()
    def _drawn(self, cond: Cond, ids: Tensor, real: Tensor, step: int) -> Drawn:
        """What the decoder has drawn of these samples up to some step, always told the embedding.

        **Shapes**: n rows, ids (n,), real (n, 3, R, R).
        """
        assert self.run.adversary is not None
        seed, steps = self.run.train.seed, self.run.adversary.steps
        cond = replace(cond, keep_image=None)
        generators = [randomness.generator(seed, "drawn", i) for i in ids.tolist()]
        level = int(randomness.integers(seed, "drawn to", [step], steps))
        half = resolve_precision(self.run.train.precision, real.device) == "bf16"
        with torch.autocast(real.device.type, torch.bfloat16, enabled=half):
            x_t, t = drawn_to(self.stage, cond, steps, level, generators)
        reach = real.shape[-1] // 2 + 1
        corners = (randomness.uniform(seed, "corner", ids, (2,)) * reach).long()  # (n, 2)
        corners = corners.to(real.device, non_blocking=True)
        return Drawn(x_t, t, cond, real, self.stage.network.scale(cond.image_embed), corners)

    def perceived(self, guess: Tensor, x0: Tensor) -> Tensor:
        """How unlike two pictures are to the frozen encoder, times `perceptual`.

        At each place the squared distance of the features' directions, averaged over places and
        summed over the image tower's stages: LPIPS (Zhang et al. 2018) with no weights learned.

        **Shapes**: (B, 3, R, R) twice → (B,).
        """
        with torch.no_grad():
            real = self.clip.features(x0)
        distance = torch.zeros(len(x0), device=x0.device)
        for a, b in zip(self.clip.features(guess), real, strict=True):
            a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)  # (B, C, h, w)
            distance = distance + (a - b).square().sum(1).mean((1, 2))
        return self.run.perceptual * distance

    def moved(self, images: Tensor, ids: Tensor) -> Tensor:
        """Pictures as `augment` has them by sample. **Shapes**: (B, 3, H, W) → same."""
        return place(images, ids, self.run.train.seed, self.run.augment)

    def preview(self, model: Any) -> Image.Image | None:
        """Top row: validation pictures; below: what the decoder makes of their embeddings."""
        images, captions = self.shown.first(PREVIEWS)
        side = self.run.model.resolution
        cond = told_of(self.clip, self.stage, images, captions)
        out = self.drawn(model.network if isinstance(model, Contested) else model, cond)
        rows = torch.cat([resize(images, side), out.cpu()])
        return grid([to_pil(x) for x in rows], columns=len(images))

    def _jittered(self, cond: Cond, ids: Tensor) -> Cond:
        z, seed, scale = cond.image_embed, self.run.train.seed, self.stage.network.scale
        if z is None or (self.run.jitter == 0 and self.misses is None):
            return cond
        share = randomness.uniform(seed, "jitter", ids).to(z.device, non_blocking=True)  # (B,)
        noise = randomness.normal(seed, "jittered", ids, z.shape[1:])
        noise, sigma = noise.to(z.device, non_blocking=True), self.run.jitter * share.square()
        if self.misses is not None:
            rows = randomness.integers(seed, "missed", ids, len(self.misses.picture))
            missed = (randomness.uniform(seed, "as a prior", ids) < 0.5).to(
                z.device, non_blocking=True
            )
            noise = torch.where(missed[:, None], self.misses.offset(rows, scale), noise)
            sigma = torch.where(missed, FARTHEST * share, sigma)
        return replace(cond, image_embed=jittered(scale, z, sigma, noise))


def open_decoder(run: DecoderRun, accelerator: Accelerator) -> tuple[Dataset, FrozenCLIP]:
    """What the decoder learns from, perhaps with embeddings from a cache, and the encoder.

    **Raises**: `CheckpointError` if another encoder made the cache, `DataError` if it can't be used
    with these pictures.
    """
    dataset, clip = run.data.open(run.data.train), frozen_clip(run.clip, accelerator)
    if run.embeddings is not None:
        cache = EmbeddingCache(Path(run.embeddings))
        cache.check_encoder(clip, run.clip)
        cache.check_fit(run.data.fit)
        if not run.model.scale.normalizes:
            cache.check_raw(clip)
        dataset = Tolerant(Joined(dataset, cache))
    return dataset, clip


def train_decoder(run: DecoderRun, accelerator: Accelerator) -> Path:
    """Train the decoder; the newest checkpoint's folder."""
    if run.adversary is not None and accelerator.num_processes > 1 and sharding.asked():
        raise ConfigError(
            "adversary can't be shared out; train it with configs/accelerate/ddp_8.yaml"
        )
    dataset, clip = open_decoder(run, accelerator)
    task = DecoderTask(run, clip, dataset)

    def prepare(newest: Path | None) -> None:
        if run.prior is not None:
            task.misses = misses_of(run.prior, clip, dataset, run.train, accelerator, newest)

    def begin() -> None:
        fit_scale(task.stage.network.scale, clip, dataset)
        if run.model.layout is not None:
            seed, jitter = run.train.seed, run.jitter
            network, autocast = task.stage.network, accelerator.autocast
            moved = task.moved if run.augment != PlaceConfig() else None
            fit_layout(network, clip, dataset, seed, jitter, autocast, moved, task.misses)

    tokenizer = clip.towers.tokenizer if task.stage.reads_text else None
    made = Prepared(run.train.seed, task.stage.shape, tokenizer)
    return train(task, run, dataset, accelerator, made, begin, prepare)
