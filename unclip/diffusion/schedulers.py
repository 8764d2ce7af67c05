"""The schedulers of diffusers on our schedule: DDPM, DDIM, DPM-Solver++, UniPC; and Analytic-DPM.

They differ in how they treat variance channels, clipping and prediction types, so the sampling loop
settles all three and hands them a finished x_0 with `prediction_type="sample"`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from unclip.diffusion.analytic import AnalyticDPM, interpolated
from unclip.diffusion.process import GaussianDiffusion
from unclip.errors import ConfigError

SamplerName = Literal["ddpm", "ddim", "dpm++", "unipc", "analytic"]
# The multistep solvers work in λ = log(√ᾱ / √(1 − ᾱ)), which the cosine schedule drives to −20 in
# its last few steps. From here up nothing but noise is left, so they start here.
LAMBDA_MIN = -5.1


class Ancestral(UnCLIPScheduler):
    """DDPM's sampler with the timesteps and, to the last bit, the arithmetic of published unCLIP.

    `DDPMScheduler` computes the same in another order, which random networks amplify.
    """

    def step(self, x0: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        """One step towards the next of `timesteps`, or from the last one to x_0."""
        if len(self.timesteps) == 1:
            return (x0[:, : sample.shape[1]],)
        after = self.timesteps[self.timesteps < timestep]
        options["prev_timestep"] = after[0] if len(after) else None
        return super().step(x0, timestep, sample, **options)


class Implicit(DDIMScheduler):
    """DDIM. With all its noise, rounding of the first step's variance may leave less than nothing
    for the direction to x_t, whose square root is no number: then that is nothing."""

    def _get_variance(self, timestep: Tensor, prev_timestep: Tensor) -> Tensor:
        variance: Tensor = super()._get_variance(timestep, prev_timestep)
        if prev_timestep < 0:
            return variance
        room: Tensor = 1 - self.alphas_cumprod[prev_timestep]
        return variance if room - (variance**0.5) ** 2 >= 0 else room * (1 - 2**-22)


def check_sampler(
    diffusion: GaussianDiffusion, sampler: str, steps: int, levels: int | None = None
) -> None:
    """**Raises**: `ConfigError` for an unknown sampler or more steps than the schedule has."""
    if sampler not in get_args(SamplerName):
        known = ", ".join(get_args(SamplerName))
        raise ConfigError(f"unknown sampler {sampler!r}; choose one of {known}")
    if sampler == "analytic" and not diffusion.power:
        raise ConfigError(
            "the sampler 'analytic' needs statistics of the network, and this stage has none: "
            "`unclip measure` stores them with a prior; or choose ddim or dpm++"
        )
    total = diffusion.config.steps if levels is None else levels
    if not 1 <= steps <= total:
        raise ConfigError(f"{steps} sampling steps; choose between 1 and {total}")
    if sampler in ("dpm++", "unipc") and steps >= (usable := _usable(diffusion, total)):
        raise ConfigError(
            f"{sampler} takes at most {usable - 1} steps on this schedule, not {steps}"
        )


def make_scheduler(
    diffusion: GaussianDiffusion, sampler: str, steps: int, levels: int | None = None
) -> tuple[Any, list[int]]:
    """A scheduler on our schedule, and the network's timestep at each of its steps.

    With `levels` it begins at timestep levels - 1, where x_T then stands, instead of the noisiest.

    **Raises**: `ConfigError` for an unknown sampler or more steps than the schedule has.
    """
    check_sampler(diffusion, sampler, steps, levels)
    total = diffusion.config.steps if levels is None else levels
    common: dict[str, Any] = {"prediction_type": "sample"}
    if sampler == "analytic":
        even = torch.linspace(total - 1, 0, steps).round().long().tolist()
        power = interpolated(diffusion.power, diffusion.config.steps)
        return AnalyticDPM(diffusion, even, power), even
    if sampler == "ddpm":
        learned = diffusion.config.learned_variance
        scheduler: Any = Ancestral(
            num_train_timesteps=diffusion.config.steps,
            variance_type="learned_range" if learned else "fixed_small_log",
            clip_sample=False,
            **common,
        )
        scheduler.betas = diffusion.betas.float()
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = diffusion.alpha_bar.float()
        if levels is not None or steps == 1:  # at one step UnCLIPScheduler would divide by zero
            scheduler.timesteps = torch.linspace(total - 1, 0, steps).round().long()
        else:
            scheduler.set_timesteps(steps)
        return scheduler, scheduler.timesteps.tolist()
    if sampler == "ddim":
        # DDIM steps by total // steps whatever its timesteps say, so give it a schedule of `steps`
        # steps: the trailing subset of ours (improved DDPM, Section 4: respacing).
        kept = torch.arange(steps, 0, -1, dtype=torch.float64).mul(total / steps).round().long() - 1
        alpha_bar = diffusion.alpha_bar[kept.flip(0)]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        scheduler = Implicit(
            num_train_timesteps=steps,
            trained_betas=(1 - alpha_bar / previous).tolist(),
            clip_sample=False,
            timestep_spacing="leading",
            **common,
        )
        scheduler.set_timesteps(steps)
        return scheduler, kept.tolist()
    usable = _usable(diffusion, total)
    kind = DPMSolverMultistepScheduler if sampler == "dpm++" else UniPCMultistepScheduler
    scheduler = kind(
        num_train_timesteps=usable,
        trained_betas=diffusion.betas[:usable].tolist(),
        timestep_spacing="linspace",
        **common,
    )
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.timesteps.tolist()


def _usable(diffusion: GaussianDiffusion, total: int) -> int:
    """How many of so many timesteps, from the cleanest on, the multistep solvers can work with."""
    lambdas = 0.5 * (diffusion.alpha_bar / (1 - diffusion.alpha_bar)).log()
    return min(total, int((lambdas >= LAMBDA_MIN).sum()))
