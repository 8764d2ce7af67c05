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
from unclip.conditioning import Cond
from unclip.config import Config
from unclip.data.degradations import blur, bsr
from unclip.data.open import DataConfig
from unclip.data.sample import Batch
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.sampling import SamplingConfig
from unclip.images import grid, resize, to_pil
from unclip.models.upsampler import UpsamplerConfig
from unclip.training.fit import TrainConfig
from unclip.training.task import PREVIEWS, StageTask, draw, train


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


class UpsamplerTask(StageTask):
    """Restore crops of pictures from their low-resolution, degraded copies."""

    run: UpsamplerRun

    def loss(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        """The loss of each crop, of which `Shrunk` has made a copy. **Shapes**: → (B,)."""
        assert batch.low_res is not None
        low = resize(batch.low_res, batch.images.shape[-1])  # (B, 3, H, W)
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
        out = self.drawn(model, cond, tuple(real.shape[1:]))
        return grid([to_pil(x) for x in torch.cat([low, out.cpu(), real])], columns=len(real))


def train_upsampler(run: UpsamplerRun, accelerator: Accelerator) -> Path:
    """Train one upsampler; the newest checkpoint's folder."""
    dataset = run.data.open(run.data.train)
    return train(UpsamplerTask(run, train=dataset), run, dataset, accelerator, Shrunk(run))
