"""Sampling x_0 from a denoiser: classifier-free guidance around the schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from unclip.conditioning import Cond, TextEncoding
from unclip.config import Config
from unclip.diffusion.process import Denoiser, GaussianDiffusion
from unclip.diffusion.schedulers import SamplerName, make_scheduler


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
