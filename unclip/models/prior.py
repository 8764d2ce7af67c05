"""The diffusion prior: from text to the CLIP image embedding (Section 2.2).

B batch, D CLIP embedding, l text positions after trimming, W width. Positions, in order: text
tokens, text embedding, time, noised image embedding, query.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from unclip.conditioning import Cond, TextEncoding
from unclip.config import Config
from unclip.models.layers import (
    Draft,
    DraftConfig,
    EmbeddingScale,
    ScaleConfig,
    TimeEmbedding,
    trim_text,
    zero_init,
)
from unclip.models.transformer import KeyValue, Transformer, TransformerConfig

TEXT_SCALE = ScaleConfig(kind="whiten", factor=1.0, normalize=True)


class PriorConfig(Config):
    """`embed`, `text_width`: widths of the CLIP embeddings and text states; `context`: the most
    text positions. `scale` turns raw image embeddings into the x0 that is diffused. `draft`
    expects x0 from the text embedding in one go, which the transformer sees beside x_t and which
    stands for its result where there is nothing but noise (target x0 only): it sees a hundred
    times as many captions a second, and small data are learned by seeing them often."""

    embed: int = Field(gt=0)
    text_width: int = Field(gt=0)
    context: int = Field(gt=0)
    transformer: TransformerConfig
    scale: ScaleConfig
    draft: DraftConfig | None = None


class TextCache(NamedTuple):
    """Keys and values of the text part; mask (B, 1, 1, l + 1) bool; draft (B, D), if any."""

    past: list[KeyValue]
    mask: Tensor
    draft: Tensor | None = None


class DiffusionPrior(nn.Module):
    """Predicts the clean, scaled image embedding from a noised one and the text.

    Under the causal mask the text part sees neither the time nor the noised embedding, so
    `prepare` encodes it once for all sampling steps.
    """

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        width = config.transformer.width
        self.scale = EmbeddingScale(config.scale, config.embed)
        self.text_tokens = nn.Linear(config.text_width, width)
        self.text_embed = nn.Linear(config.embed, width)
        self.time = TimeEmbedding(width, width)
        self.text_scale = self.draft = None
        if config.draft is not None:
            self.text_scale = EmbeddingScale(TEXT_SCALE, config.embed)
            self.draft = Draft(config.draft, config.embed, config.embed, width)
        noised = config.embed if self.draft is None else 2 * config.embed  # x_t, then the draft
        self.image_embed = nn.Linear(noised, width)
        self.query = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(config.context + 4, width))
        self.transformer = Transformer(config.transformer)
        self.out = zero_init(nn.Linear(width, config.embed))  # starts at the mean embedding
        nn.init.normal_(self.query, std=0.02)  # small beside the projected tokens, as in GPT
        nn.init.normal_(self.position, std=0.02)

    def prepare(self, cond: Cond) -> Cond:
        """Encode the text part. **Raises**: `ValueError` without text, or with too much of it."""
        if cond.cache is not None:
            return cond
        text, cache = encode_text(self, cond)
        return replace(cond, cache=cache._replace(draft=self.drafted(text.embed)))

    def drafted(self, embed: Tensor) -> Tensor | None:
        """The draft of raw text embeddings, if there is one. **Shapes**: (B, D) → (B, D)."""
        if self.draft is None or self.text_scale is None:
            return None
        return self.draft(self.text_scale(embed).to(self.out.weight.dtype))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """One draw of (x_t, t) for each text, or n that read the same text, side by side.

        **Shapes**: x_t (nB, D) scaled, t (nB,), those of one text in a row → prediction of the
        scaled x0 (nB, D).
        """
        past, mask, draft = self.prepare(cond).cache
        n = len(x_t) // len(mask)
        draft = None if draft is None else draft.repeat_interleave(n, dim=0)
        x = x_t if draft is None else torch.cat([x_t, draft.to(x_t.dtype)], dim=1)  # (nB, 2 D)
        time, noised = self.time(t), self.image_embed(x.to(self.out.weight.dtype))  # (nB, W)
        x = torch.stack([time, noised, self.query.expand_as(noised)], dim=1)  # (nB, 3, W)
        own = torch.block_diag(*[causal(x)] * n).expand(len(mask), 1, -1, -1)  # (B, 1, 3n, 3n)
        mask = torch.cat([mask.expand(-1, -1, 3 * n, -1), own], dim=-1)  # (B, 1, 3n, l + 1 + 3n)
        x = rearrange(x + self.position[-3:], "(b n) s w -> b (n s) w", n=n)
        x = rearrange(self.transformer(x, mask, past), "b (n s) w -> (b n) s w", n=n)
        out = self.out(x[:, -1]).to(x_t.dtype)  # (nB, D)
        if self.draft is None or draft is None:
            return out
        return out + self.draft.share(time).to(x_t.dtype) * (draft.to(x_t.dtype) - out)


def encode_text(prior: Any, cond: Cond) -> tuple[TextEncoding, TextCache]:
    """The text, and its keys and values in a prior of either kind: token states, then the text
    embedding. **Raises**: `ValueError` without text, or for more tokens than the context."""
    if (text := cond.text) is None:
        raise ValueError("the prior needs cond.text; null text is the encoded empty string")
    tokens, mask = trim_text(text)  # (B, l, ·), (B, l)
    length, context = tokens.shape[1], prior.config.context
    if length > context:
        raise ValueError(f"{length} text tokens, but context is {context}")
    dtype = prior.text_embed.weight.dtype
    tokens = prior.text_tokens(tokens.to(dtype)) + prior.position[:length]  # (B, l, W)
    embed = prior.text_embed(text.embed.to(dtype)) + prior.position[context]  # (B, W)
    x = torch.cat([tokens, embed[:, None]], dim=1)  # (B, l + 1, W)
    mask = F.pad(mask, (0, 1), value=True)[:, None, None]  # (B, 1, 1, l + 1)
    return text, TextCache(prior.transformer.encode(x, mask & causal(x)), mask)


def causal(x: Tensor) -> Tensor:
    """Each position sees itself and those before it. **Shapes**: (B, N, W) → (N, N) bool."""
    n = x.shape[1]
    return torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
