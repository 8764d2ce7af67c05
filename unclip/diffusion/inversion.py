"""DDIM run backwards: the noise x_T from which it draws a given picture (Section 3).

Dhariwal & Nichol 2021, Appendix F; each step is solved for the x_t that the sampler's own step
would bring to where the inversion stands, by a few fixed-point iterations.

B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unclip.diffusion.process import GaussianDiffusion, Guess

ITERATIONS = 4  # a step; the first is what inverting without iterations would take


@torch.no_grad()
def invert(
    guess: Guess,
    diffusion: GaussianDiffusion,
    x0: Tensor,
    timesteps: Sequence[int],
    iterations: int = ITERATIONS,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """The x_T that DDIM at eta 0 brings to x0 over these timesteps, guided as `guess` is.

    The guesses must not be clipped: what clipping cuts off could not be found again. The timesteps
    are those of the sampling, noisiest first.

    **Shapes**: x0 (B, *) → (B, *).
    """
    x = x0.float()
    previous = 1.0  # ᾱ of where x stands: clean
    for timestep in reversed(list(timesteps)):
        alpha_bar = float(diffusion.alpha_bar[timestep])
        (a_s, s_s), (a_t, s_t) = _scales(previous), _scales(alpha_bar)
        y = x
        for _ in range(iterations):
            clean, _ = guess(y, timestep)
            # DDIM: x_s = a_s x0 + s_s ε with ε = (x_t − a_t x0) / s_t. Solved for x_t with either
            # x0 or ε held, whichever changes less with x_t: in noise it is x0, near a picture ε.
            if s_t > a_t and s_s > 0:
                y = a_t * clean + s_t * (x - a_s * clean) / s_s
            else:
                noise = (y - a_t * clean) / s_t
                y = a_t / a_s * x + (s_t - a_t / a_s * s_s) * noise
        x, previous = y, alpha_bar
        if on_step is not None:
            on_step()
    return x


def _scales(alpha_bar: float) -> tuple[float, float]:
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
