"""What a network guesses of x_0 at a step: its conditions, guidance and bounds (Section 2.1).

B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from unclip.conditioning import Cond
from unclip.diffusion.process import Denoiser, GaussianDiffusion


class Guess(Protocol):
    """What a sampler asks at each step, and all that it knows of networks and conditions."""

    def __call__(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """x_0 and the channels of a learned variance. **Shapes**: (B, *) → (B, *), float32."""


def dynamic_threshold(share: float, bound: float) -> Callable[[Tensor], Tensor]:
    """Bounds x_0 by each sample's own values: where more than 1 - `share` of them lie beyond
    `bound`, all are scaled down until they don't; the rest is cut off.

    **Source**: Saharia et al. 2022 (Imagen), Section 2.3.
    """

    def within(x0: Tensor) -> Tensor:
        limit = x0.abs().flatten(1).quantile(share, dim=1).clamp(min=bound)  # (B,)
        limit = limit.view(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-limit, limit) * (bound / limit)

    return within


class Guided:
    """A denoiser's guess under classifier-free guidance (Ho & Salimans 2021).

    `conds` tell more and more, B rows each: the first what to be guided away from (nothing, or
    what is not wanted), the last everything. From one to the next the prediction goes `scales`
    times as far as the network says; a single condition is not guided. Within `interval`, the
    first and last guided timestep, that is; outside the last condition stands alone (Kynkäänniemi
    et al. 2024).

    `guide` is a worse network of the same kind, whose guess under the first condition stands in the
    place of the model's (autoguidance, Karras et al. 2024): what it lacks is what is gone towards.

    `extrapolation` is an upsampler's guidance: without a condition its guess is the resized
    picture, from which x_0 goes so many times as far as predicted, at no cost. `threshold` bounds
    x_0. `last` is a network that takes the model's place at one timestep (Karlo's final step).
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        model: Denoiser,
        conds: Sequence[Cond],
        scales: Sequence[float] = (),
        *,
        interval: tuple[int, int] | None = None,
        guide: Denoiser | None = None,
        extrapolation: float = 1.0,
        threshold: Callable[[Tensor], Tensor] | None = None,
        last: tuple[Denoiser, int] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        assert len(scales) == len(conds) - 1, "a scale from each condition to the next"
        self.diffusion, self.scales, self.dtype = diffusion, tuple(scales), dtype
        self.interval = interval
        self.extrapolation, self.low_res = extrapolation, conds[-1].low_res
        self.threshold = threshold
        self._guide = None if guide is None or not scales else (guide, guide.prepare(conds[0]))
        asked = conds if self._guide is None else conds[1:]
        together = Cond.cat(asked) if len(asked) > 1 else asked[0]
        self._model = model, model.prepare(together)
        self._alone = model.prepare(conds[-1]) if scales and interval is not None else None
        self._last_at = None if last is None else last[1]
        self._last = None if last is None else (last[0], last[0].prepare(together))

    def __call__(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """x_0, guided and bounded, and the last condition's variance channels, if learned.

        **Shapes**: x_t (B, *) → (B, *), float32.
        """
        model, ready = self._model if self._last is None or t != self._last_at else self._last
        scales, guide = self.scales, self._guide
        if self.interval is not None and not self.interval[0] <= t <= self.interval[1]:
            scales, guide, ready = (), None, self._alone or ready
        times = torch.full((len(x_t),), t, device=x_t.device)
        rows = len(scales) + (guide is None)
        prediction, variance = self._ask(model, ready, x_t, times, rows)
        parts = prediction.chunk(rows)
        if guide is not None:
            parts = (self._ask(*guide, x_t, times, 1)[0], *parts)
        guided = parts[0]
        for scale, (less, more) in zip(scales, pairwise(parts), strict=True):
            guided = guided + scale * (more - less)
        x0 = self.diffusion.x0_from(guided, x_t, times)
        if self.extrapolation != 1 and self.low_res is not None:
            x0 = self.low_res + self.extrapolation * (x0 - self.low_res)
        if self.threshold is not None:
            x0 = self.threshold(x0)
        return x0, None if variance is None else variance.chunk(rows)[-1]

    def _ask(
        self, model: Denoiser, ready: Cond, x_t: Tensor, times: Tensor, rows: int
    ) -> tuple[Tensor, Tensor | None]:
        """The prediction and the variance channels under so many conditions at once."""
        if rows > 1:
            x_t, times = torch.cat([x_t] * rows), torch.cat([times] * rows)
        return self.diffusion.split(model(x_t.to(self.dtype), times, ready).float())
