"""Drawing from the autoregressive prior: guidance, temperature and top-p, with a cache (2.2).

B batch, D CLIP embedding, V buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor

from unclip.clip.fingerprint import Fingerprint
from unclip.conditioning import Cond, TextEncoding
from unclip.config import Config
from unclip.models.ar_prior import ArPrior
from unclip.progress import steps_of
from unclip.stages.stage import OWN_NOISE, PLAIN, Manner, Stage, Start, chunks


class ArSamplingConfig(Config):
    """`guidance` 1 is off; `top_p` keeps the likeliest buckets that hold that much together."""

    guidance: float = 1.0
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)


@dataclass
class ArStage(Stage):
    """The autoregressive prior as a stage: it has no diffusion, and its sampling is another."""

    @classmethod
    def of(cls, network: Any, sampling: ArSamplingConfig, encoder: Fingerprint | None) -> ArStage:
        """The stage `ar_prior` of a network."""
        return cls("ar_prior", network, cast(Any, None), cast(Any, sampling), encoder)

    def embeddings(self, drawn: Tensor) -> Tensor:
        """What is drawn is an embedding already. **Shapes**: (B, D) → (B, D)."""
        return drawn

    def draw(
        self,
        cond: Cond,
        config: Any,
        generators: Sequence[torch.Generator],
        *,
        null_text: TextEncoding | None = None,
        negative: Cond | None = None,
        start: Start = OWN_NOISE,
        how: Manner = PLAIN,
    ) -> Tensor:
        """One embedding for each generator; see `sample_autoregressive`. No `start` has an effect.

        **Shapes**: cond and negative have B rows of text, null_text one; generators B → (B, D).
        """
        parts, together = [], chunks(len(generators), self.shape, cond.device)
        steps = self.config.components * len(together)
        with steps_of(self.name, steps, how.progress) as step_done:
            for rows in together:
                own = cond.rows(rows)
                away = own.null(null_text) if negative is None else negative.rows(rows)
                parts.append(
                    sample_autoregressive(
                        self.network, own, away, config, generators[rows], step_done
                    )
                )
        return torch.cat(parts)


@torch.no_grad()
def sample_autoregressive(
    model: ArPrior,
    cond: Cond,
    away: Cond,
    config: ArSamplingConfig,
    generators: Sequence[torch.Generator],
    on_step: Callable[[], Any] = lambda: None,
) -> Tensor:
    """Draw one embedding for each generator, its components one after the other.

    Guidance leads away from what `away` makes likely: the null text, or what is not wanted.

    The dot product with the text embedding is drawn evenly from the top half of its distribution,
    as the paper does. Sample k depends on its own generator (CPU) alone: one uniform number for the
    dot product, then one a component.

    **Shapes**: cond and away have B rows of text; generators B → (B, D) float32, unit norm.
    """
    k, dots = model.config.components, model.config.dot_buckets
    uniform = torch.stack([torch.rand(k + 1, generator=g) for g in generators]).to(cond.device)
    guided = config.guidance != 1
    ready = model.prepare(Cond.cat([away, cond]) if guided else cond)
    token = dots // 2 + (uniform[:, 0] * (dots - dots // 2)).long()  # (B,)
    numbers = []
    for place in range(k):
        given = torch.cat([token, token]) if guided else token
        logits, ready = model.step(given, place, ready)
        logits = logits.float()
        if guided:
            without, with_ = logits.chunk(2)
            logits = without + config.guidance * (with_ - without)  # (B, V)
        token = choose(logits, uniform[:, place + 1], config.temperature, config.top_p)
        numbers.append(token)
        on_step()
    return model.quantizer.dequantize(torch.stack(numbers, dim=1))


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """One number a row by inverse transform: the likeliest ones first, as far as `top_p` reaches.

    **Shapes**: logits (B, V), uniform (B,) in [0, 1) → (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    total = p.cumsum(-1)
    p = p.masked_fill(total - p >= top_p, 0)  # the likeliest always stays
    total = p.cumsum(-1)
    place = (total <= uniform[:, None] * total[:, -1:]).sum(-1).clamp(max=p.shape[-1] - 1)
    return order.gather(-1, place[:, None])[:, 0]
