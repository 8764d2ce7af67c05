"""Analytic-DPM (Bao et al. 2022), with which the paper samples its prior in 64 steps.

DDPM's mean with the variance that is best for it, known once the mean square of the network's ε is:
one number a timestep, measured on training samples and stored with the network.

B batch, T timesteps of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from unclip.diffusion.process import GaussianDiffusion, Guess
from unclip.randomness import noise_of


def reverse_variance(here: float, there: float, power: float) -> float:
    """σ² of a step from ᾱ_t = `here` to ᾱ_s = `there`, given E‖ε_θ‖²/d = `power` at t.

    Bao et al., equation 9, between timesteps that need not be neighbours.
    """
    ratio = here / there  # α_{t|s}
    posterior = (1 - there) / (1 - here) * (1 - ratio)  # λ², DDPM's
    spread = ((1 - here) / ratio) ** 0.5 - (1 - there - posterior) ** 0.5
    return posterior + spread**2 * (1 - power)


@torch.no_grad()
def measure_power(
    diffusion: GaussianDiffusion,
    samples: Iterable[tuple[Tensor, Guess]],
    timesteps: Sequence[int],
    generator: torch.Generator,
) -> list[float]:
    """E‖ε_θ‖²/d at some timesteps, over batches of clean samples, each with its network's guess.

    The estimate is at most 1, which the true value never exceeds. **Shapes**: x0 (B, *).
    """
    sums, count = torch.zeros(len(timesteps), dtype=torch.float64), 0
    for x0, guess in samples:
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        for k, timestep in enumerate(timesteps):
            t = torch.full((len(x0),), timestep, device=x0.device)
            x_t = diffusion.q_sample(x0, t, noise)
            eps = diffusion.eps_from_x0(guess(x_t, timestep)[0], x_t, t)
            sums[k] += eps.cpu().double().square().flatten(1).mean(1).sum()
        count += len(x0)
    return (sums / count).clamp(max=1).tolist()


class AnalyticDPM:
    """A scheduler with diffusers' `step`: from x_t and the network's x0 to the next x."""

    def __init__(self, diffusion: GaussianDiffusion, timesteps: Sequence[int], power: Tensor):
        self.timesteps = torch.tensor(list(timesteps))
        self._alpha_bar, self._power = diffusion.alpha_bar, power

    def step(
        self,
        x0: Tensor,
        timestep: Tensor,
        sample: Tensor,
        *,
        generator: Sequence[torch.Generator],
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """One step towards the next of `timesteps`, or from the last one to x0.

        **Shapes**: x0, sample (B, *), generators B → (B, *).
        """
        after = self.timesteps[self.timesteps < timestep]
        if not len(after):
            return (x0,)
        here, there = (float(self._alpha_bar[int(k)]) for k in (timestep, after[0]))
        variance = reverse_variance(here, there, float(self._power[int(timestep)]))
        posterior = (1 - there) / (1 - here) * (1 - here / there)
        eps = (sample - here**0.5 * x0) / (1 - here) ** 0.5
        mean = there**0.5 * x0 + (1 - there - posterior) ** 0.5 * eps
        noise = noise_of(generator, x0.shape[1:]).to(mean.device)
        return (mean + variance**0.5 * noise,)


def interpolated(power: Mapping[int, float], steps: int) -> Tensor:
    """The statistics at every timestep, linearly between those measured. **Shapes**: → (T,)."""
    at = sorted(power)
    return torch.from_numpy(np.interp(np.arange(steps), at, [power[t] for t in at]))
