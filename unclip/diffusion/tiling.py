"""Run a fully convolutional denoiser on overlapping tiles, for pictures that do not fit at once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unclip.conditioning import Cond
from unclip.diffusion.process import Denoiser


class Tiled:
    """A denoiser whose predictions are blended from tiles of `tile` pixels.

    Each tile weighs each pixel by its distance to the tile's nearest edge, so seams fade out; the
    tiles overlap by a quarter of their side. The tile must be a multiple of what the network
    halves its input by.
    """

    def __init__(self, model: Denoiser, tile: int):
        self.model, self.tile = model, tile

    def prepare(self, cond: Cond) -> Cond:
        """Nothing to compute once: every tile has its own low-resolution part."""
        return cond

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Blend the tiles' predictions. **Shapes**: (B, C, H, W) → (B, C', H, W)."""
        assert cond.low_res is not None, "tiles need a low-resolution picture to agree on"
        total, weight = None, x_t.new_zeros(x_t.shape[-2:])
        window = _window(self.tile, x_t)
        for top in _starts(x_t.shape[-2], self.tile):
            for left in _starts(x_t.shape[-1], self.tile):
                at = (..., slice(top, top + self.tile), slice(left, left + self.tile))
                part = replace(cond, low_res=cond.low_res[at])
                out = self.model(x_t[at].contiguous(memory_format=torch.channels_last), t, part)
                if total is None:
                    total = out.new_zeros(*out.shape[:2], *x_t.shape[-2:])
                corner = window[: out.shape[-2], : out.shape[-1]]
                total[at] += out * corner
                weight[at] += corner
        assert total is not None
        return total / weight


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles begin so that they cover `length` with at least a quarter of overlap."""
    stride = tile * 3 // 4
    return [*range(0, max(length - tile, 0), stride), max(length - tile, 0)]


def _window(tile: int, like: Tensor) -> Tensor:
    ramp = torch.arange(1, tile + 1, device=like.device, dtype=like.dtype)
    edge = torch.minimum(ramp, ramp.flip(0))
    return torch.minimum(edge[:, None], edge[None, :])
