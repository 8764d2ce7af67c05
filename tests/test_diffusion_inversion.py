"""DDIM inversion against a denoiser that is known in closed form."""

from __future__ import annotations

import pytest
import torch

from unclip.diffusion.inversion import invert
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion

DIFFUSION = GaussianDiffusion(DiffusionConfig(target="x0"))
MEAN = 0.3


def trailing(steps: int) -> list[int]:
    """Timesteps of a sampling of so many steps, noisiest first, where √ᾱ is at least 0.02."""
    usable = DIFFUSION.levels(0.02)
    return [round((k + 1) * usable / steps) - 1 for k in range(steps)][::-1]


def optimal(deviation: float):
    """The best x0 there is for pixels of N(MEAN, deviation²)."""

    def guess(x: torch.Tensor, t: int) -> tuple[torch.Tensor, None]:
        alpha_bar = float(DIFFUSION.alpha_bar[t])
        gain = alpha_bar**0.5 * deviation**2 / (alpha_bar * deviation**2 + 1 - alpha_bar)
        return MEAN + gain * (x - alpha_bar**0.5 * MEAN), None

    return guess


def ddim(guess, x: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
    """DDIM as its paper has it (equation 12 at eta 0), in float64."""
    x = x.double()
    for t, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        clean = guess(x.float(), t)[0].double()
        here = DIFFUSION.alpha_bar[t]
        there = torch.tensor(1.0) if following is None else DIFFUSION.alpha_bar[following]
        noise = (x - here.sqrt() * clean) / (1 - here).sqrt()
        x = there.sqrt() * clean + (1 - there).sqrt() * noise
    return x.float()


@pytest.mark.parametrize("deviation", [0.3, 0.5, 1.0])
def test_what_ddim_draws_from_the_inverted_noise_is_the_picture(deviation: float) -> None:
    x0 = MEAN + deviation * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    guess, timesteps = optimal(deviation), trailing(50)
    drawn = ddim(guess, invert(guess, DIFFUSION, x0, timesteps), timesteps)
    torch.testing.assert_close(drawn, x0, rtol=0, atol=1e-4)


def test_iterations_are_what_makes_it_exact() -> None:
    x0 = MEAN + 0.5 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    guess, timesteps = optimal(0.5), trailing(25)
    error = [
        float((ddim(guess, invert(guess, DIFFUSION, x0, timesteps, n), timesteps) - x0).abs().max())
        for n in (1, 2, 4)
    ]
    assert error[0] > 10 * error[1] > 100 * error[2]


def test_the_noise_of_a_gaussian_is_its_standardised_value() -> None:
    """The flow that DDIM follows keeps ranks: with many steps x_T is (x_0 − MEAN) / deviation."""
    x0 = MEAN + 0.5 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    timesteps = trailing(200)
    noise = invert(optimal(0.5), DIFFUSION, x0, timesteps)
    torch.testing.assert_close(noise, (x0 - MEAN) / 0.5, rtol=0.03, atol=0.03)


def test_every_step_is_reported() -> None:
    steps: list[int] = []
    invert(optimal(0.5), DIFFUSION, torch.zeros(1, 2), trailing(7), 1, lambda: steps.append(1))
    assert len(steps) == 7
