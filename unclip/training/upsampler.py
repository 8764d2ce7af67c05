"""Training an upsampler: a picture from its small, degraded copy (Appendix C).

B batch, H, W the crop's sides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from unclip import randomness
from unclip.clip.fingerprint import check_same_encoder
from unclip.conditioning import Cond
from unclip.config import Config, Place
from unclip.data.degradations import blur, bsr
from unclip.data.open import DataConfig
from unclip.data.sample import Batch
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.sampling import SamplingConfig
from unclip.errors import ConfigError
from unclip.images import grid, resize, to_pil
from unclip.models.upsampler import UpsamplerConfig
from unclip.sources import Source
from unclip.stages.stage import Start
from unclip.training.fit import TrainConfig
from unclip.training.start import check_sampling
from unclip.training.task import PREVIEWS, StageTask, draw, frozen_clip, told_of, train


class RedrawnConfig(Config):
    """Low-resolution copies as the decoder draws them that the upsampler will follow.

    The share `share` of the pictures is noised, up to the share `level` of time, and drawn on from
    there in `steps` steps by the decoder of `model`, told what they show. So a copy has a decoder's
    flaws and still lies on its picture. Each batch has one level.
    """

    model: Place
    share: float = Field(0.5, gt=0, le=1)
    level: float = Field(0.4, gt=0, le=1)
    steps: int = Field(3, ge=1)


class UpsamplerRun(Config):
    """A training run of an upsampler on crops of `data.crop` pixels of the high resolution.

    `degradation` corrupts the share `degraded` of the low-resolution pictures, so that the
    upsampler does not take the decoder's flaws for detail, and meets clean ones as well. A blur's
    sigma is drawn from `blur_sigma`.
    """

    data: DataConfig
    model: UpsamplerConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    degradation: Literal["blur", "bsr"]
    degraded: float = Field(1.0, ge=0, le=1)
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.6, 0.6)
    redrawn: RedrawnConfig | None = None
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
        if self.redrawn is not None and self.data.crop is not None:
            raise ValueError("redrawn needs whole pictures: leave out data.crop")
        check_sampling(self)
        return self


@dataclass(frozen=True)
class Shrunk:
    """Adds to a batch what the upsampler sees of it, before it is enlarged, and the noise.

    A function of pictures and global ids, for a loader's workers: it draws on the CPU, and a BSR
    degradation goes through JPEG.
    """

    run: UpsamplerRun

    def __call__(self, batch: Batch) -> Batch:
        """**Shapes**: low_res (B, 3, h, w), noise as the pictures."""
        run, seed = self.run, self.run.train.seed
        small = batch.images.shape[-1] * run.model.low // run.model.high
        low = resize(batch.images, small)
        degrade = randomness.uniform(seed, "degrade", batch.ids) < run.degraded
        for row in degrade.nonzero().flatten().tolist():
            g = randomness.generator(seed, "degradation", int(batch.ids[row]))
            if run.degradation == "blur":
                low[row] = blur(low[row], run.blur_sigma, g)
            else:
                low[row] = bsr(batch.images[row], small, g)
        noise = randomness.normal(seed, "noise", batch.ids, batch.images.shape[1:])
        return replace(batch, low_res=low, noise=noise)


class Redrawn:
    """Puts the decoder's own drawings among the low-resolution copies; see `RedrawnConfig`.

    **Raises**: `ConfigError` if the model has no decoder or CLIP, or draws another size.
    """

    def __init__(self, run: UpsamplerRun, accelerator: Accelerator) -> None:
        assert run.redrawn is not None
        self.how, self.seed, self.accelerator = run.redrawn, run.train.seed, accelerator
        self.clip = frozen_clip(self.how.model, accelerator)
        self.decoder = Source(self.how.model).stage("decoder").load(accelerator.device)
        self.decoder.network.requires_grad_(False)
        if self.decoder.encoder is not None:
            where = f"redrawn.model = {self.how.model}"
            check_same_encoder(self.clip.fingerprint, self.decoder.encoder, where)
        if self.decoder.side != run.model.low:
            raise ConfigError(
                f"redrawn.model = {self.how.model} draws {self.decoder.side} px, but model.low = "
                f"{run.model.low}: name a model whose pictures this upsampler enlarges"
            )

    @torch.no_grad()
    def __call__(self, batch: Batch, step: int) -> Tensor:
        """The batch's copies, some of them redrawn. **Shapes**: → (B, 3, h, w)."""
        assert batch.low_res is not None
        low, ids, process = batch.low_res, batch.ids, self.decoder.diffusion
        chosen = randomness.uniform(self.seed, "redrawn", ids) < self.how.share
        rows = chosen.nonzero().flatten()  # numbers on the CPU: nothing has to be waited for
        if len(rows) == 0:
            return low
        share = self.how.level * float(randomness.uniform(self.seed, "redrawn from", [step]))
        level = int(share * process.config.steps)
        own = rows.to(low.device, non_blocking=True)
        x0 = resize(batch.images[own], low.shape[-1]).clamp(-1, 1)
        noise = randomness.normal(self.seed, "redrawing", ids[rows], x0.shape[1:])
        noise = noise.to(x0.device, non_blocking=True)
        t = torch.full((len(rows),), level, device=x0.device)
        captions = [batch.captions[k] for k in rows.tolist()]
        config = self.decoder.sampling.model_copy(
            update={"sampler": "ddim", "steps": min(self.how.steps, level + 1), "eta": 0.0}
        )
        with self.accelerator.autocast():
            drawn = self.decoder.draw(
                told_of(self.clip, self.decoder, batch.images[own], captions),
                config,
                [torch.Generator() for _ in rows],
                null_text=self.clip.null_text,
                start=Start(process.q_sample(x0, t, noise), level + 1),
            )
        return low.index_copy(0, own, drawn.to(low.dtype))


class UpsamplerTask(StageTask):
    """Restore crops of pictures from their low-resolution, degraded copies."""

    run: UpsamplerRun
    redrawn: Redrawn | None = None

    def loss(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        """The loss of each crop, of which `Shrunk` has made a copy. **Shapes**: → (B,)."""
        assert batch.low_res is not None
        copies = batch.low_res if self.redrawn is None else self.redrawn(batch, step)
        low = resize(copies, batch.images.shape[-1])  # (B, 3, H, W)
        t, noise = draw(self.run, batch.ids, batch.images, batch.noise)
        return self.stage.diffusion.loss(model, batch.images, Cond(low_res=low), t, noise)

    def preview(self, model: Any) -> Image.Image | None:
        """Rows: bicubic, upsampled, real; the middle of validation pictures, not degraded."""
        images, _ = self.shown.first(PREVIEWS)
        side = self.run.data.crop or self.run.data.resolution
        corner = (images.shape[-1] - side) // 2
        real = images[..., corner : corner + side, corner : corner + side]
        low = resize(resize(real, side * self.run.model.low // self.run.model.high), side)
        cond = Cond(low_res=low.to(next(model.parameters()).device))
        out = self.drawn(model, cond)
        return grid([to_pil(x) for x in torch.cat([low, out.cpu(), real])], columns=len(real))


def train_upsampler(run: UpsamplerRun, accelerator: Accelerator) -> Path:
    """Train one upsampler; the newest checkpoint's folder."""
    dataset = run.data.open(run.data.train)
    task = UpsamplerTask(run, train=dataset)
    if run.redrawn is not None:
        task.redrawn = Redrawn(run, accelerator)
    return train(task, run, dataset, accelerator, Shrunk(run))
