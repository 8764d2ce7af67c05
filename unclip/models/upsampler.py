"""The upsamplers: from a low-resolution picture to a larger one (Section 2.1, Appendix C).

B batch, E time embedding, H and W height and width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unclip.conditioning import Cond
from unclip.config import Config
from unclip.models.layers import TimeEmbedding
from unclip.models.unet import UNet, UNetConfig


class UpsamplerConfig(Config):
    """From `low` to `high` pixels a side; the U-Net is purely convolutional.

    `residual`: the U-Net predicts what the resized low-resolution picture lacks (target x0 only),
    so that training begins at bicubic quality.
    """

    low: int = Field(gt=0)
    high: int = Field(gt=0)
    residual: bool = False
    unet: UNetConfig

    @model_validator(mode="after")
    def _check(self) -> UpsamplerConfig:
        if self.high <= self.low:
            raise ValueError(f"high = {self.high} must be above low = {self.low}")
        if self.unet.attends:
            raise ValueError("unet.attention and unet.mid_attention must be false in an upsampler")
        if self.high % self.unet.stride:
            raise ValueError(
                f"high = {self.high} must be a multiple of {self.unet.stride}, what unet.patch "
                "and the levels in unet.multiple shrink a picture by"
            )
        return self


class Upsampler(nn.Module):
    """A U-Net that sees x_t and the resized low-resolution picture; any size, crops too."""

    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        self.config = config
        self.time = TimeEmbedding(config.unet.channels, config.unet.embed)
        self.unet = UNet(config.unet, in_channels=6, out_channels=3, context_width=None)

    def prepare(self, cond: Cond) -> Cond:
        """Marks the conditions as ready: nothing here can be computed ahead of x_t."""
        return replace(cond, cache=())

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """**Shapes**: x_t (B, 3, H, W), t (B,), cond.low_res (B, 3, H, W) → (B, 3, H, W).

        **Raises**: `ValueError` without a low-resolution picture of x_t's size.
        """
        if cond.low_res is None or cond.low_res.shape != x_t.shape:
            got = "none" if cond.low_res is None else tuple(cond.low_res.shape)
            raise ValueError(f"cond.low_res must be resized to x_t, {tuple(x_t.shape)}; got {got}")
        emb = self.time(t)  # (B, E)
        low_res = cond.low_res.to(x_t.dtype)
        x = torch.cat([x_t, low_res], dim=1)  # (B, 6, H, W)
        out = self.unet(x.to(emb.dtype), emb, None).to(x_t.dtype)
        return out + low_res if self.config.residual else out
