"""Keeping a part of a picture while the rest is drawn, at every size (RePaint, Lugmayr 2022).

B pictures, S the final side, R a stage's side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.diffusion.process import GaussianDiffusion
from unclip.images import resize
from unclip.randomness import noise_of


@dataclass(frozen=True)
class Kept:
    """Pictures of which only what the mask shows is drawn anew.

    **Shapes**: pictures (B, 3, S, S) in [-1, 1]; mask (B, 1, S, S) bool, True = drawn anew.
    """

    pictures: Tensor
    mask: Tensor

    def at(self, side: int) -> Kept:
        """The same at another size; a pixel is kept where everything under it is.

        **Shapes**: → pictures (B, 3, R, R), mask (B, 1, R, R).
        """
        if side == self.mask.shape[-1]:
            return self
        return Kept(resize(self.pictures, side).clamp(-1, 1), mask_at(self.mask, side))

    def rows(self, index: slice) -> Kept:
        """The chosen pictures."""
        return Kept(self.pictures[index], self.mask[index])

    def repeat(self, n: int, device: torch.device) -> Kept:
        """One picture for n draws of it, where they are drawn."""
        return Kept(*(x.to(device).expand(n, -1, -1, -1) for x in (self.pictures, self.mask)))

    def shown(self) -> Tensor:
        """What is kept, as `Cond.known` has it. **Shapes**: → (B, 4, S, S)."""
        known = (~self.mask).to(self.pictures.dtype)
        return torch.cat([self.pictures * known, known], dim=1)

    def paste(self, x: Tensor) -> Tensor:
        """What is kept, into x of the same size. **Shapes**: (B, 3, S, S) → same."""
        return torch.where(self.mask, x, self.pictures.to(x.dtype))

    def after(
        self, diffusion: GaussianDiffusion, generators: Sequence[torch.Generator]
    ) -> Callable[[Tensor, int | None], Tensor]:
        """What to do after each step: put back what is kept, as noisy as x is there.

        The noise is drawn by each picture's own generator, one draw a step.
        """

        def put_back(x: Tensor, t: int | None) -> Tensor:
            known = self.pictures
            if t is not None:
                noise = noise_of(generators, x.shape[1:]).to(x.device)
                times = torch.full((len(x),), t, device=x.device)
                known = diffusion.q_sample(known, times, noise)
            return torch.where(self.mask, x, known)

        return put_back


def mask_at(mask: Tensor, side: int) -> Tensor:
    """A mask at another size: set where anything under a pixel is set.

    **Shapes**: (B, 1, S, S) bool → (B, 1, R, R) bool.
    """
    x = mask.float()
    # Where a side is no multiple of the other, windows overlap, so that none is passed over.
    smaller = side < mask.shape[-1]
    return (F.adaptive_max_pool2d(x, side) if smaller else F.interpolate(x, side)) > 0
