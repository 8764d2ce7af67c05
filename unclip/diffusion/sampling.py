"""Sampling x_0 step by step from a network's guesses, with the schedulers of diffusers.

B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from unclip.config import Config
from unclip.diffusion.process import GaussianDiffusion, Guess
from unclip.diffusion.schedulers import SamplerName, make_scheduler
from unclip.randomness import noise_of


class SamplingConfig(Config):
    """How to sample a stage unless the caller says otherwise.

    `guidance` 1 is off and costs one forward per step; an upsampler's always costs one (see
    `Guided`). `interval` limits it to a part of time, 0 the cleanest and 1 the noisiest. `clip`
    bounds x_0 at each step, None does not. `eta` is DDIM's share of fresh noise (0 deterministic,
    1 like DDPM). The network is told a timestep that lies `time_shift`, a share of time, above that
    of x (Li et al. 2024): what x has of the network's own mistakes counts as noise too.
    """

    sampler: SamplerName = "ddim"
    steps: int = Field(ge=1)
    guidance: float = 1.0
    interval: tuple[float, float] | None = None
    eta: float = Field(0.0, ge=0, le=1)
    clip: float | None = 1.0
    time_shift: float = Field(default=0.0, ge=0, le=0.5)

    @model_validator(mode="after")
    def _check(self) -> SamplingConfig:
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(
                f"interval must be two numbers in order within 0 and 1: {self.interval}"
            )
        return self


class Step(NamedTuple):
    """A finished step: x now, its timestep (None: it is the sample), the x_0 that led to it."""

    x: Tensor
    t: int | None
    x0: Tensor


@torch.no_grad()
def denoise(
    guess: Guess,
    diffusion: GaussianDiffusion,
    config: SamplingConfig,
    x_T: Tensor,
    generators: Sequence[torch.Generator],
    after: Callable[[Tensor, int | None], Tensor] | None = None,
    *,
    levels: int | None = None,
    repeats: int = 1,
) -> Iterator[Step]:
    """Go from x_T to x_0; the last step's x is the sample.

    Row k depends on its own generator (CPU, float32) and never on its neighbours: one draw a step
    where the sampler is stochastic. `after(x, t)` may put another x in the place of what a step has
    led to, at timestep t or, where that is None, finished. x_T stands at timestep levels - 1, at
    the noisiest where that is None. `repeats` above 1 takes every step but the last so many times,
    with the noise put back in between, so that what `after` puts in and what is drawn agree
    (RePaint, Lugmayr et al. 2022); for samplers of one step, ddpm and ddim.

    **Shapes**: x_T (B, *) float32, generators B.
    """
    scheduler, timesteps = make_scheduler(diffusion, config.sampler, config.steps, levels)
    noise: dict[str, Any] = {"generator": list(generators)}
    if config.sampler == "ddim":
        noise = {"eta": config.eta}
    elif config.sampler == "unipc":
        noise = {}
    x = x_T
    following = [*timesteps[1:], None]
    for index, t, then in zip(scheduler.timesteps, timesteps, following, strict=True):
        for left in reversed(range(1 if then is None else repeats)):
            x0, variance = guess(x, t)
            given = x0
            if variance is not None and config.sampler == "ddpm":
                given = torch.cat([x0, variance], 1)  # the scheduler splits it off again
            if noise.get("eta"):  # drawn here: the scheduler would wait for it
                fresh = noise_of(generators, x.shape[1:])
                noise["variance_noise"] = fresh.to(x.device, non_blocking=True)
            x = scheduler.step(given, index, x, **noise, return_dict=False)[0]
            if after is not None:
                x = after(x, then)
            if left and then is not None:
                x = diffusion.renoise(x, then, t, noise_of(generators, x.shape[1:]))
        yield Step(x, then, x0)
