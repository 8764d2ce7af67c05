"""What a network guesses of x_0 at a step: its conditions, guidance and bounds (Section 2.1).

B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unclip.conditioning import Cond, TextEncoding
from unclip.diffusion.process import Denoiser, GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig
from unclip.diffusion.schedulers import make_scheduler


class Guided:
    """A denoiser's guess under classifier-free guidance (Ho & Salimans 2021).

    From `negative` or, without one, from no condition at all to `cond` the prediction goes
    `config.guidance` times as far as the network says. Outside of `config.interval` `cond` stands
    alone (Kynkäänniemi et al. 2024). An upsampler without a condition guesses the resized picture,
    from which x_0 goes so many times as far as predicted, at no cost. `config.clip` bounds x_0.
    `last` takes the model's place in the final step, as Karlo has it.

    **Shapes**: cond and negative have B rows, null_text one, needed for guidance with text.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        model: Denoiser,
        cond: Cond,
        config: SamplingConfig,
        *,
        null_text: TextEncoding | None = None,
        negative: Cond | None = None,
        last: Denoiser | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.diffusion, self.config, self.dtype = diffusion, config, dtype
        self.low_res, self.guides = cond.low_res, cond.low_res is None and config.guidance != 1
        both = cond
        if self.guides:
            both = Cond.cat([cond.null(null_text) if negative is None else negative, cond])
        self._model = model, model.prepare(both)
        self._alone = model.prepare(cond) if self.guides and config.interval is not None else None
        self._last, self._last_at = self._model, -1
        if last is not None:
            self._last = last, last.prepare(both)
            self._last_at = make_scheduler(diffusion, config.sampler, config.steps)[1][-1]

    def __call__(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """x_0, guided and bounded, and the condition's variance channels, if learned.

        **Shapes**: x_t (B, *) → (B, *), float32.
        """
        model, ready = self._last if t == self._last_at else self._model
        config, guides, noisiest = self.config, self.guides, self.diffusion.config.steps - 1
        if config.interval is not None:
            first, final = (share * noisiest for share in config.interval)
            if not first <= t <= final:
                guides, ready = False, self._alone or ready
        told = min(t + round(config.time_shift * noisiest), noisiest)
        times = torch.full((len(x_t),), told, device=x_t.device)
        x_in, t_in = (torch.cat([x_t] * 2), torch.cat([times] * 2)) if guides else (x_t, times)
        prediction, variance = self.diffusion.split(model(x_in.to(self.dtype), t_in, ready).float())
        if guides:
            less, more = prediction.chunk(2)
            prediction = less + config.guidance * (more - less)
            variance = None if variance is None else variance.chunk(2)[1]
        x0 = self.diffusion.x0_from(prediction, x_t, times)
        if self.low_res is not None and config.guidance != 1:
            x0 = self.low_res + config.guidance * (x0 - self.low_res)
        if config.clip is not None:
            x0 = x0.clamp(-config.clip, config.clip)
        return x0, variance
