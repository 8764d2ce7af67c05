"""The decoder's pictures as pairs (z_image, x_T): the noise that a picture stands for (Section 3).

B pictures, R their side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unclip.conditioning import Cond
from unclip.diffusion.inversion import invert
from unclip.diffusion.sampling import SamplingConfig
from unclip.diffusion.schedulers import make_scheduler
from unclip.stages.stage import Stage, chunk_size

# Inversions end where this much of the signal √ᾱ is left: on the cosine schedule the noisiest steps
# would divide by a ten-thousandth of it.
SIGNAL = 0.02


def levels(decoder: Stage) -> int:
    """How many timesteps lie below a given x_T; see `denoise`."""
    return decoder.diffusion.levels(SIGNAL)


def exact(steps: int, eta: float = 0.0) -> SamplingConfig:
    """How pictures are drawn from an inverted x_T: at eta 0, the way back of the inversion."""
    return SamplingConfig(sampler="ddim", steps=steps, eta=eta, clip=None)


def noise_of(
    decoder: Stage,
    x: Tensor,
    cond: Cond,
    steps: int,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """x_T of pictures under the conditions that they will be drawn with, without guidance.

    **Shapes**: x (B, 3, R, R) in [-1, 1], cond B rows → (B, 3, R, R).
    """
    config = exact(steps)
    _, timesteps = make_scheduler(decoder.diffusion, config.sampler, steps, levels(decoder))
    chunk, parts = chunk_size(x.shape[-1], cond.device), []
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        guess = decoder.guess(cond.rows(rows), config, dtype=dtype)
        parts.append(invert(guess, decoder.diffusion, x[rows], timesteps, on_step=on_step))
    return torch.cat(parts)
