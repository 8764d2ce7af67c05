"""What each diffusion stage learns, and from what (Sections 2.1 and 2.2, Appendix C).

B batch, D CLIP embedding, R the picture's side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from unclip import randomness
from unclip.clip import FrozenCLIP
from unclip.conditioning import Cond
from unclip.config import Config
from unclip.data.cache import EmbeddingCache, Joined, as_embeddings
from unclip.data.dataset import (
    Batch,
    DataConfig,
    Dataset,
    Tolerant,
    batches,
    fixed,
    is_cache,
    open_dataset,
)
from unclip.data.degradations import blur, bsr
from unclip.data.images import grid, resize, to_pil
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig, sample
from unclip.errors import ConfigError
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.stages import Stage
from unclip.training.embeddings import fit_draft, fit_layout, fit_scale, jittered
from unclip.training.fit import TrainConfig, fit

PREVIEWS = 8


class DropConfig(Config):
    """Shares of samples that train without a condition, for classifier-free guidance."""

    image: float = Field(0.0, ge=0, le=1)
    text: float = Field(0.0, ge=0, le=1)


class PriorRun(Config):
    """A training run of the diffusion prior; `clip` names the frozen encoder."""

    clip: str
    data: DataConfig
    model: PriorConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    drop: DropConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _check(self) -> PriorRun:
        if self.model.draft is not None and self.diffusion.target != "x0":
            raise ValueError("model.draft needs diffusion.target = x0")
        return self


class DecoderRun(Config):
    """A training run of the decoder; `clip` names the frozen encoder.

    `embeddings` is a cache that has those of the training pictures by key (`train/embed.py`), which
    else the encoder makes at every step. `jitter` moves the image embeddings off the data (see
    `jittered`), each by another share of it.
    """

    clip: str
    data: DataConfig
    embeddings: str | None = None
    model: DecoderConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    drop: DropConfig
    jitter: float = Field(0.0, ge=0)
    train: TrainConfig

    @model_validator(mode="after")
    def _check(self) -> DecoderRun:
        if self.model.learned_variance != self.diffusion.learned_variance:
            raise ValueError("model.learned_variance and diffusion.learned_variance must agree")
        if self.model.layout is not None and self.diffusion.target != "x0":
            raise ValueError("model.layout needs diffusion.target = x0")
        return self


class UpsamplerRun(Config):
    """A training run of an upsampler on crops of `data.crop` pixels of the high resolution.

    `degradation` corrupts the share `degraded` of the low-resolution pictures, so that the
    upsampler does not take the decoder's flaws for detail.
    """

    data: DataConfig
    model: UpsamplerConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    degradation: Literal["blur", "bsr"]
    degraded: float = Field(1.0, ge=0, le=1)
    train: TrainConfig

    @model_validator(mode="after")
    def _check(self) -> UpsamplerRun:
        side, scale = self.data.crop or self.data.resolution, self.model.high / self.model.low
        if self.data.resolution != self.model.high:
            raise ValueError(
                f"data.resolution = {self.data.resolution} must be model.high = {self.model.high}"
            )
        if side % scale or side % self.model.unet.stride:
            raise ValueError(
                f"data.crop = {side} must be a multiple of {scale:g} (high / low) and of "
                f"{self.model.unet.stride} (what the U-Net shrinks a picture by)"
            )
        if self.diffusion.learned_variance:
            raise ValueError("diffusion.learned_variance must be false for an upsampler")
        if self.model.residual and self.diffusion.target != "x0":
            raise ValueError("model.residual needs diffusion.target = x0")
        return self


class PriorTask:
    """Predict z_image from its caption (Section 2.2: mean squared error on z_image itself)."""

    name = "prior"

    def __init__(self, run: PriorRun, clip: FrozenCLIP):
        check_widths(clip, run.clip, run.model.embed, run.model.text_width)
        self.run, self.clip = run, clip
        self.model: nn.Module = DiffusionPrior(run.model)
        diffusion = GaussianDiffusion(run.diffusion)
        self.stage = Stage("prior", self.model, diffusion, run.sampling, clip.fingerprint)

    def loss(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        """The loss of each pair. **Shapes**: → (B,)."""
        ids = batch.ids
        z_image = as_embeddings(self.clip, batch.images)
        cond = Cond(text=self.clip.encode_text(batch.captions))
        cond = cond.drop(self.clip.null_text, drop_text=_drop(self.run, "text", ids, z_image))
        x0 = self.stage.network.scale(z_image)  # (B, D)
        t, noise = _draw(self.run, ids, x0)
        return self.stage.diffusion.loss(model, x0, cond, t, noise)

    def preview(self, model: Any) -> Image.Image | None:
        """Each row: a validation picture, then those nearest to what its caption gave."""
        if self.run.data.val is None and is_cache(self.run.data.train):
            return None  # no pictures to show
        images, captions = first_samples(self.run.data, 64)
        z_image = self.clip.encode_image(images)
        text = self.clip.encode_text(captions[:PREVIEWS])
        z = model.scale.inverse(
            _sample(self.stage, model, Cond(text=text), (self.run.model.embed,), self.clip)
        )
        near = cosine_similarity(z[:, None], z_image[None], dim=-1).topk(4, dim=1).indices
        rows = [[k, *near[k].tolist()] for k in range(len(z))]
        return grid([to_pil(images[i]) for row in rows for i in row], columns=5)

    def save(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Write the stage in the model-folder format."""
        self.stage.save(folder, tensors)


class DecoderTask:
    """Draw a picture from its own z_image and its caption, either sometimes left out."""

    name = "decoder"

    def __init__(self, run: DecoderRun, clip: FrozenCLIP):
        check_widths(clip, run.clip, run.model.embed, run.model.text_width)
        self.run, self.clip = run, clip
        self.model: nn.Module = Decoder(run.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        diffusion = GaussianDiffusion(run.diffusion)
        self.stage = Stage("decoder", self.model, diffusion, run.sampling, clip.fingerprint)

    def loss(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        """The loss of each picture. **Shapes**: → (B,)."""
        ids = batch.ids
        cond = self._jittered(self._cond(batch.images, batch.captions, batch.embeds), ids)
        cond = cond.drop(
            self.clip.null_text,
            drop_image=_drop(self.run, "image", ids, batch.images),
            drop_text=_drop(self.run, "text", ids, batch.images),
        )
        x0 = resize(batch.images, self.run.model.resolution)  # (B, 3, R, R)
        t, noise = _draw(self.run, ids, x0)
        return self.stage.diffusion.loss(model, x0, cond, t, noise)

    def preview(self, model: Any) -> Image.Image | None:
        """Top row: validation pictures; below: what the decoder makes of their embeddings."""
        images, captions = first_samples(self.run.data, PREVIEWS)
        side = self.run.model.resolution
        cond = self._cond(images, captions)
        out = _sample(self.stage, model, cond, (3, side, side), self.clip)
        rows = torch.cat([resize(images, side), out.cpu()])
        return grid([to_pil(x) for x in rows], columns=PREVIEWS)

    def save(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Write the stage in the model-folder format."""
        self.stage.save(folder, tensors)

    def _cond(self, images: Tensor, captions: list[str], z_image: Tensor | None = None) -> Cond:
        reads_text = self.run.model.text_width is not None
        return Cond(
            image_embed=self.clip.encode_image(images).float() if z_image is None else z_image,
            text=self.clip.encode_text(captions) if reads_text else None,
        )

    def _jittered(self, cond: Cond, ids: Tensor) -> Cond:
        z, seed = cond.image_embed, self.run.train.seed
        if self.run.jitter == 0 or z is None:
            return cond
        sigma = self.run.jitter * randomness.uniform(seed, "jitter", ids)
        noise = randomness.normal(seed, "jittered", ids, z.shape[1:])
        z = jittered(self.stage.network.scale, z, sigma.to(z.device), noise.to(z.device))
        return replace(cond, image_embed=z)


class UpsamplerTask:
    """Restore crops of pictures from their low-resolution, degraded copies."""

    def __init__(self, run: UpsamplerRun):
        self.run = run
        self.name = f"upsampler_{run.model.high}"
        self.model: nn.Module = Upsampler(run.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.stage = Stage(
            self.name, self.model, GaussianDiffusion(run.diffusion), run.sampling, None
        )

    def loss(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        """The loss of each crop. **Shapes**: → (B,)."""
        low = self.low_resolution(batch.images, batch.ids)
        t, noise = _draw(self.run, batch.ids, batch.images)
        return self.stage.diffusion.loss(model, batch.images, Cond(low_res=low), t, noise)

    def low_resolution(self, images: Tensor, ids: Tensor) -> Tensor:
        """What the upsampler sees, at the size of the crop. **Shapes**: (B, 3, H, W) → same."""
        seed, side = self.run.train.seed, images.shape[-1]
        small = side * self.run.model.low // self.run.model.high
        low = resize(images, small)
        degrade = randomness.uniform(seed, "degrade", ids) < self.run.degraded
        for row in degrade.nonzero().flatten().tolist():
            g = randomness.generator(seed, "degradation", int(ids[row]))
            if self.run.degradation == "blur":
                low[row] = blur(low[row], g)
            else:
                low[row] = bsr(images[row], small, g)
        return resize(low, side)

    def preview(self, model: Any) -> Image.Image | None:
        """Rows: bicubic, upsampled, real; the middle of validation pictures, not degraded."""
        images, _ = first_samples(self.run.data, PREVIEWS)
        side = self.run.data.crop or self.run.data.resolution
        corner = (images.shape[-1] - side) // 2
        real = images[..., corner : corner + side, corner : corner + side]
        low = resize(resize(real, side * self.run.model.low // self.run.model.high), side)
        cond = Cond(low_res=low.to(next(model.parameters()).device))
        out = _sample(self.stage, model, cond, tuple(real.shape[1:]), None)
        return grid([to_pil(x) for x in torch.cat([low, out.cpu(), real])], columns=PREVIEWS)

    def save(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Write the stage in the model-folder format."""
        self.stage.save(folder, tensors)


def train_prior(run: PriorRun, accelerator: Accelerator) -> Path:
    """Train the prior; the newest checkpoint's folder."""
    dataset = open_dataset(run.data.train, run.data.resolution, embeddings=True)
    clip = FrozenCLIP.load(run.clip, accelerator.device)
    if isinstance(dataset, EmbeddingCache):
        dataset.check_encoder(clip, run.clip)
    task = PriorTask(run, clip)

    def begin() -> None:
        fit_scale(task.stage.network.scale, clip, dataset)
        if run.model.draft is not None:
            seed, drop = run.train.seed, run.drop.text
            fit_draft(task.stage.network, clip, dataset, seed, drop, accelerator.autocast)

    stream = _stream(dataset, run, accelerator)
    return fit(task, stream, run.train, run, accelerator, begin)


def train_decoder(run: DecoderRun, accelerator: Accelerator) -> Path:
    """Train the decoder; the newest checkpoint's folder."""
    dataset, clip = _open(run), FrozenCLIP.load(run.clip, accelerator.device)
    if run.embeddings is not None:
        cache = EmbeddingCache(Path(run.embeddings))
        cache.check_encoder(clip, run.clip)
        dataset = Tolerant(Joined(dataset, cache))
    task = DecoderTask(run, clip)

    def begin() -> None:
        fit_scale(task.stage.network.scale, clip, dataset)
        if run.model.layout is not None:
            seed, jitter = run.train.seed, run.jitter
            fit_layout(task.stage.network, clip, dataset, seed, jitter, accelerator.autocast)

    stream = _stream(dataset, run, accelerator)
    return fit(task, stream, run.train, run, accelerator, begin)


def train_upsampler(run: UpsamplerRun, accelerator: Accelerator) -> Path:
    """Train one upsampler; the newest checkpoint's folder."""
    dataset, task = _open(run), UpsamplerTask(run)
    return fit(task, _stream(dataset, run, accelerator), run.train, run, accelerator)


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


def _open(run: Any) -> Dataset:
    return open_dataset(run.data.train, run.data.resolution)


def _stream(
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


def _draw(run: Any, ids: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Timestep (B,) and noise (B, *) of each sample, by its global id."""
    seed = run.train.seed
    t = randomness.integers(seed, "t", ids, run.diffusion.steps)
    noise = randomness.normal(seed, "noise", ids, x0.shape[1:])
    return t.to(x0.device), noise.to(x0.device)


def _drop(run: Any, what: str, ids: Tensor, like: Tensor) -> Tensor:
    """Which samples go without a condition. **Shapes**: (B,) → (B,) bool."""
    share = getattr(run.drop, what)
    return (randomness.uniform(run.train.seed, f"drop {what}", ids) < share).to(like.device)


def _sample(
    stage: Stage, model: Any, cond: Cond, shape: tuple[int, ...], clip: FrozenCLIP | None
) -> Tensor:
    """One sample for each condition, seeds 0, 1, …, with the stage's own sampling settings."""
    generators = [torch.Generator().manual_seed(k) for k in range(len(cond))]
    null_text = None if clip is None else clip.null_text
    return sample(
        stage.diffusion, model, cond, shape, stage.sampling, generators, null_text=null_text
    )
