"""Pictures moved and masked at random, each by its sample's number: more pictures than there are.

B batch, R a picture's side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unclip import randomness
from unclip.config import Config


class PlaceConfig(Config):
    """How pictures are moved: mirrored, shifted and scaled, on white.

    `flip` is the share that is mirrored; `shift` the largest move in each direction, as a share of
    the side; `scale` the largest change of size, by factors from 1 - scale to 1 + scale.
    """

    flip: float = Field(default=0.0, ge=0, le=1)
    shift: float = Field(default=0.0, ge=0, lt=1)
    scale: float = Field(default=0.0, ge=0, lt=1)


def place(images: Tensor, ids: Tensor, seed: int, how: PlaceConfig) -> Tensor:
    """Move each picture at random on white. **Shapes**: (B, 3, R, R) → same."""
    if how.flip > 0:
        mirrored = randomness.uniform(seed, "flip", ids) < how.flip
        mirrored = mirrored[:, None, None, None].to(images.device, non_blocking=True)
        images = torch.where(mirrored, images.flip(-1), images)
    if how.shift == 0 and how.scale == 0:
        return images
    unit = 2 * randomness.uniform(seed, "augment", ids, (3,)) - 1  # (B, 3)
    theta = torch.zeros(len(ids), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / (1 + how.scale * unit[:, 0])
    theta[:, :, 2] = 2 * how.shift * unit[:, 1:]  # a picture spans [-1, 1]
    theta = theta.to(images.device, non_blocking=True)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Outside a picture grid_sample reads 0: shift white there and back.
    return F.grid_sample(images - 1, grid, padding_mode="zeros", align_corners=False) + 1


def masks(ids: Tensor, side: int, seed: int) -> Tensor:
    """What of pictures is to be drawn while an inpainting decoder trains: a quarter each have a
    rectangle hidden, all but a rectangle, a half of the picture, and everything, so that drawing
    whole pictures is not forgotten.

    **Shapes**: ids (B,) → (B, 1, R, R) bool, True = hidden.
    """
    hidden = torch.ones(len(ids), 1, side, side, dtype=torch.bool)
    for k, i in enumerate(ids):
        generator = randomness.generator(seed, "mask", int(i))
        kind, turn = torch.randint(4, (2,), generator=generator).tolist()
        low, span = torch.rand(2, 2, generator=generator)  # of both directions
        height, width = (side * (1 + 2 * span) / 4).ceil().long().tolist()  # 1/4 to 3/4
        top, left = (low * (side + 1 - torch.tensor([height, width]))).long().tolist()
        if kind == 2:
            hidden[k] = torch.arange(side)[:, None] < side // 2
            hidden[k] = hidden[k].rot90(turn, (1, 2))
        elif kind < 2:
            hidden[k] = bool(kind)
            hidden[k, :, top : top + height, left : left + width] = not kind
    return hidden
