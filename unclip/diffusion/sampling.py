"""Sampling x_0 from a denoiser: classifier-free guidance around the schedulers of diffusers.

The schedulers differ in how they treat variance channels, clipping and prediction types, so we
settle all three here and hand them a finished x_0 with `prediction_type="sample"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from pydantic import Field
from torch import Tensor

from unclip.conditioning import Cond, TextEncoding
from unclip.config import Config
from unclip.diffusion.process import Denoiser, GaussianDiffusion
from unclip.errors import ConfigError

SamplerName = Literal["ddpm", "ddim", "dpm++", "unipc"]

# The multistep solvers work in λ = log(√ᾱ / √(1 − ᾱ)), which the cosine schedule drives to −20 in
# its last few steps. From here up nothing but noise is left, so they start here.
LAMBDA_MIN = -5.1


class SamplingConfig(Config):
    """How to sample a stage unless the caller says otherwise.

    `guidance` 1 is off and costs one forward per step; an upsampler's always costs one, because
    its guess without a condition is the resized picture, from which x_0 goes `guidance` times as
    far as predicted. `clip` bounds x_0 at each step, None does not; `eta` is DDIM's share of fresh
    noise (0 deterministic, 1 like DDPM).
    """

    sampler: SamplerName = "ddim"
    steps: int = Field(ge=1)
    guidance: float = 1.0
    eta: float = Field(0.0, ge=0, le=1)
    clip: float | None = 1.0


@torch.no_grad()
def sample(
    diffusion: GaussianDiffusion,
    model: Denoiser,
    cond: Cond,
    shape: Sequence[int],
    config: SamplingConfig,
    generators: Sequence[torch.Generator],
    *,
    null_text: TextEncoding | None = None,
    x_T: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[], Any] | None = None,
    last: Denoiser | None = None,
) -> Tensor:
    """Draw one x_0 for each generator.

    Sample k depends on its own generator (CPU, float32) and never on its neighbours: the starting
    noise is drawn first, then one draw a step where the sampler is stochastic. The trajectory is
    float32; the network computes in `dtype`. `last` takes the model's place in the final step.

    **Shapes**: cond has B rows, shape is that of one sample; generators B; null_text one row,
    needed for guidance with text; x_T (B, *shape) replaces the starting noise → (B, *shape).
    """
    device = cond.device
    scheduler, timesteps = make_scheduler(diffusion, config.sampler, config.steps)
    if x_T is None:
        x_T = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])
    x = x_T.to(device, torch.float32)
    low_res = cond.low_res if config.guidance != 1 else None
    guided = config.guidance != 1 and low_res is None
    both = Cond.cat([cond.null(null_text), cond]) if guided else cond
    ready = model.prepare(both)
    noise: dict[str, Any] = {"generator": list(generators)}
    if config.sampler == "ddim":
        noise["eta"] = config.eta
    elif config.sampler == "unipc":
        noise = {}
    for step, (index, timestep) in enumerate(zip(scheduler.timesteps, timesteps, strict=True), 1):
        if step == len(timesteps) and last is not None:
            model, ready = last, last.prepare(both)
        t = torch.full((len(x),), timestep, device=device)
        x_in, t_in = (torch.cat([x, x]), torch.cat([t, t])) if guided else (x, t)
        prediction, variance = diffusion.split(model(x_in.to(dtype), t_in, ready).float())
        if guided:
            without, with_ = prediction.chunk(2)
            prediction = without + config.guidance * (with_ - without)
            variance = None if variance is None else variance.chunk(2)[1]
        x0 = diffusion.x0_from(prediction, x, t)
        if low_res is not None:
            x0 = low_res + config.guidance * (x0 - low_res)
        if config.clip is not None:
            x0 = x0.clamp(-config.clip, config.clip)
        if variance is not None and config.sampler == "ddpm":
            x0 = torch.cat([x0, variance], 1)  # the scheduler splits it off again
        x = scheduler.step(x0, index, x, **noise, return_dict=False)[0]
        if on_step is not None:
            on_step()
    return x


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


def make_scheduler(diffusion: GaussianDiffusion, sampler: str, steps: int) -> tuple[Any, list[int]]:
    """A diffusers scheduler on our schedule, and the network's timestep at each of its steps.

    **Raises**: `ConfigError` for an unknown sampler or more steps than the schedule has.
    """
    if sampler not in get_args(SamplerName):
        known = ", ".join(get_args(SamplerName))
        raise ConfigError(f"unknown sampler {sampler!r}; choose one of {known}")
    total = diffusion.config.steps
    if not 1 <= steps <= total:
        raise ConfigError(f"{steps} sampling steps; choose between 1 and {total}")
    common: dict[str, Any] = {"prediction_type": "sample"}
    if sampler == "ddpm":
        learned = diffusion.config.learned_variance
        scheduler: Any = Ancestral(
            num_train_timesteps=total,
            variance_type="learned_range" if learned else "fixed_small_log",
            clip_sample=False,
            **common,
        )
        scheduler.betas = diffusion.betas.float()
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = diffusion.alpha_bar.float()
        if steps > 1:
            scheduler.set_timesteps(steps)
        else:  # one starts at the noisy end; UnCLIPScheduler would divide by zero
            scheduler.timesteps = torch.tensor([total - 1])
        return scheduler, scheduler.timesteps.tolist()
    if sampler == "ddim":
        # DDIM steps by total // steps whatever its timesteps say, so give it a schedule of `steps`
        # steps: the trailing subset of ours (improved DDPM, Section 4: respacing).
        kept = torch.arange(steps, 0, -1, dtype=torch.float64).mul(total / steps).round().long() - 1
        alpha_bar = diffusion.alpha_bar[kept.flip(0)]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        scheduler = DDIMScheduler(
            num_train_timesteps=steps,
            trained_betas=(1 - alpha_bar / previous).tolist(),
            clip_sample=False,
            timestep_spacing="leading",
            **common,
        )
        scheduler.set_timesteps(steps)
        return scheduler, kept.tolist()
    lambdas = 0.5 * (diffusion.alpha_bar / (1 - diffusion.alpha_bar)).log()
    usable = int((lambdas >= LAMBDA_MIN).sum())
    if steps >= usable:
        raise ConfigError(
            f"{sampler} takes at most {usable - 1} steps on this schedule, not {steps}"
        )
    kind = DPMSolverMultistepScheduler if sampler == "dpm++" else UniPCMultistepScheduler
    scheduler = kind(
        num_train_timesteps=usable,
        trained_betas=diffusion.betas[:usable].tolist(),
        timestep_spacing="linspace",
        **common,
    )
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.timesteps.tolist()
