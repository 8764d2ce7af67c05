"""What a network guesses of x_0 at a step: its conditions, guidance and bounds (Section 2.1).

B batch.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from unclip.conditioning import Cond
from unclip.diffusion.process import Denoiser, GaussianDiffusion


class Guess(Protocol):
    """What a sampler asks at each step, and all that it knows of networks and conditions."""

    def __call__(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """x_0 and the channels of a learned variance. **Shapes**: (B, *) → (B, *), float32."""


class Guided:
    """A denoiser's guess under classifier-free guidance (Ho & Salimans 2021).

    From `away`, what to be guided away from (nothing, or what is not wanted), to `cond` the
    prediction goes `scale` times as far as the network says; without it there is no guidance.
    Within `interval`, the first and last guided timestep, that is; outside `cond` stands alone
    (Kynkäänniemi et al. 2024).

    `extrapolation` is an upsampler's guidance: without a condition its guess is the resized
    picture, from which x_0 goes so many times as far as predicted, at no cost. `clip` bounds x_0.
    `last` is a network that takes the model's place at one timestep (Karlo's final step).
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        model: Denoiser,
        cond: Cond,
        away: Cond | None = None,
        scale: float = 1.0,
        *,
        interval: tuple[int, int] | None = None,
        extrapolation: float = 1.0,
        clip: float | None = None,
        last: tuple[Denoiser, int] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.diffusion, self.guides, self.scale = diffusion, away is not None, scale
        self.interval, self.clip, self.dtype = interval, clip, dtype
        self.extrapolation, self.low_res = extrapolation, cond.low_res
        both = cond if away is None else Cond.cat([away, cond])
        self._model = model, model.prepare(both)
        self._alone = model.prepare(cond) if self.guides and interval is not None else None
        self._last_at = None if last is None else last[1]
        self._last = None if last is None else (last[0], last[0].prepare(both))

    def __call__(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """x_0, guided and bounded, and the condition's variance channels, if learned.

        **Shapes**: x_t (B, *) → (B, *), float32.
        """
        model, ready = self._model if self._last is None or t != self._last_at else self._last
        guides = self.guides
        if self.interval is not None and not self.interval[0] <= t <= self.interval[1]:
            guides, ready = False, self._alone or ready
        times = torch.full((len(x_t),), t, device=x_t.device)
        x_in, t_in = (torch.cat([x_t] * 2), torch.cat([times] * 2)) if guides else (x_t, times)
        prediction, variance = self.diffusion.split(model(x_in.to(self.dtype), t_in, ready).float())
        if guides:
            less, more = prediction.chunk(2)
            prediction = less + self.scale * (more - less)
            variance = None if variance is None else variance.chunk(2)[1]
        x0 = self.diffusion.x0_from(prediction, x_t, times)
        if self.extrapolation != 1 and self.low_res is not None:
            x0 = self.low_res + self.extrapolation * (x0 - self.low_res)
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        return x0, variance
