"""The decoder's pictures as pairs (z_image, x_T): the noise that a picture stands for (Section 3).

B pictures, R their side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unclip.conditioning import Cond
from unclip.diffusion.inversion import invert
from unclip.diffusion.sampling import SamplingConfig
from unclip.diffusion.schedulers import check_sampler, make_scheduler
from unclip.errors import ConfigError
from unclip.progress import steps_of
from unclip.stages.stage import OWN_NOISE, Manner, Stage, Start, chunks

# Inversions end where this much of the signal √ᾱ is left: on the cosine schedule the noisiest steps
# would divide by a ten-thousandth of it.
SIGNAL = 0.02


def levels(decoder: Stage) -> int:
    """How many timesteps lie below a given x_T; see `denoise`."""
    return decoder.diffusion.levels(SIGNAL)


def exact(steps: int, eta: float = 0.0) -> SamplingConfig:
    """How pictures are drawn from an inverted x_T: at eta 0, the way back of the inversion."""
    return SamplingConfig(sampler="ddim", steps=steps, eta=eta, clip=None)


def started(
    given: Start | Tensor | None, decoder: Stage, config: SamplingConfig, count: int
) -> Start:
    """What `count` pictures start from: one x_T for each or one for all, as inversions give them.

    **Raises**: `ConfigError` for another shape, or a sampling that can't start so.
    """
    start = OWN_NOISE if given is None else given
    if not isinstance(start, Start):
        shape = tuple(getattr(start, "shape", ()))
        if shape[1:] != decoder.shape or shape[0] not in (1, count):
            raise ConfigError(
                f"x_T of shape {shape}; this decoder takes {(count, *decoder.shape)} for {count} "
                "pictures, or a first side of 1"
            )
        start = Start(start.expand(count, -1, -1, -1), levels(decoder))
    check_sampler(decoder.diffusion, config.sampler, config.steps, start.levels)
    if start.repeats < 1 or (start.repeats > 1 and config.sampler not in ("ddpm", "ddim")):
        raise ConfigError(
            f"repeats = {start.repeats} with {config.sampler}: must be at least 1, and only ddpm "
            "and ddim can do more than that"
        )
    return start


def inverted(decoder: Stage, x: Tensor, cond: Cond, steps: int, how: Manner) -> Tensor:
    """x_T of pictures under the conditions that they will be drawn with, without guidance.

    **Shapes**: x (B, 3, R, R) in [-1, 1], cond B rows → (B, 3, R, R).
    """
    config = exact(steps)
    _, timesteps = make_scheduler(decoder.diffusion, config.sampler, steps, levels(decoder))
    parts, together = [], chunks(len(x), decoder.shape, cond.device)
    with steps_of("inversion", steps * len(together), how.progress) as step_done:
        for rows in together:
            guess = decoder.guess(cond.rows(rows), config, how=how)
            parts.append(invert(guess, decoder.diffusion, x[rows], timesteps, on_step=step_done))
    return torch.cat(parts)
