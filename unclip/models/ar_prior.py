"""The autoregressive prior: from text to the CLIP image embedding, component by component (2.2).

The embedding is reduced by PCA to its k strongest components, each is quantised, and a causal
transformer predicts one after the other, strongest first.

B batch, D CLIP embedding, k components, V buckets, l text positions after trimming, W width.
Positions, in order: text tokens, text embedding, dot product, components 1 … k - 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unclip.conditioning import Cond
from unclip.config import Config
from unclip.errors import DataError
from unclip.models.layers import Statistics
from unclip.models.prior import TextCache, causal, encode_text
from unclip.models.transformer import Transformer, TransformerConfig


class ArPriorConfig(Config):
    """`embed`, `text_width`, `context` as the diffusion prior's. `components` k of the embedding
    are kept, each in `buckets`; the dot product of text and image embedding in `dot_buckets`."""

    embed: int = Field(gt=0)
    text_width: int = Field(gt=0)
    context: int = Field(gt=0)
    components: int = Field(gt=0)
    buckets: int = Field(gt=1)
    dot_buckets: int = Field(gt=1)
    transformer: TransformerConfig

    @model_validator(mode="after")
    def _check(self) -> ArPriorConfig:
        if self.components > self.embed:
            raise ValueError(f"components = {self.components} of an embedding of {self.embed}")
        return self


class Quantizer(Statistics):
    """Unit-norm embeddings as k bucket numbers, and back.

    Components are those of a PCA, by decreasing eigenvalue. Each has V buckets of one width between
    its smallest and its largest training value, so that a training embedding comes back with at
    most half a bucket's error in each component, besides what the dropped ones held. The dot
    product with the text embedding has buckets of equal mass: the upper half of the numbers is the
    top half of its distribution.
    """

    mean: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor
    dot_edges: Tensor

    def __init__(self, embed: int, components: int, buckets: int, dot_buckets: int):
        super().__init__()
        self.buckets = buckets
        self.register_buffer("mean", torch.zeros(embed))
        self.register_buffer("axes", torch.eye(components, embed))
        self.register_buffer("low", -torch.ones(components))
        self.register_buffer("high", torch.ones(components))
        self.register_buffer("dot_edges", torch.linspace(-1, 1, dot_buckets + 1)[1:-1].clone())

    @torch.no_grad()
    def fit(self, z_image: Tensor, z_text: Tensor) -> None:
        """Measure axes, ranges and the dot product's quantiles on training pairs.

        **Shapes**: z_image, z_text (n, D) raw. **Raises**: `DataError` with too few pairs for k
        components, or a component that never varies.
        """
        z, z_text = (F.normalize(z.cpu().double(), dim=-1) for z in (z_image, z_text))
        k = len(self.low)
        mean = z.mean(0)
        _, spread, axes = torch.linalg.svd(z - mean, full_matrices=False)
        if len(z) <= k or float(spread[k - 1]) <= 1e-6 * float(spread[0]):
            raise DataError(
                f"{len(z)} training embeddings vary in fewer than model.components = {k} "
                "directions; take fewer components, or more and different pictures"
            )
        # Of an axis and its mirror image, the one whose largest entry is positive.
        sign = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
        self.mean.copy_(mean)
        self.axes.copy_((axes * sign)[:k])
        values = self.project(z_image)  # (n, k)
        self.low.copy_(values.amin(0))
        self.high.copy_(values.amax(0))
        shares = torch.linspace(0, 1, len(self.dot_edges) + 2, dtype=torch.float64)[1:-1]
        self.dot_edges.copy_(torch.quantile((z * z_text).sum(1), shares))

    def project(self, z_image: Tensor) -> Tensor:
        """The k components. **Shapes**: (B, D) raw → (B, k) float32."""
        return (F.normalize(z_image.float(), dim=-1) - self.mean) @ self.axes.T

    def quantize(self, z_image: Tensor) -> Tensor:
        """Bucket numbers; beyond the ends, the outermost. **Shapes**: (B, D) → (B, k) int64."""
        share = (self.project(z_image) - self.low) / (self.high - self.low)  # (B, k)
        return (share * self.buckets).floor().long().clamp(0, self.buckets - 1)

    def dequantize(self, numbers: Tensor) -> Tensor:
        """The buckets' middles as an embedding. **Shapes**: (B, k) → (B, D) float32, unit norm."""
        share = (numbers.float() + 0.5) / self.buckets  # (B, k)
        values = self.low + share * (self.high - self.low)
        return F.normalize(self.mean + values @ self.axes, dim=-1)

    def dot(self, z_image: Tensor, z_text: Tensor) -> Tensor:
        """The dot product's bucket. **Shapes**: two (B, D) raw → (B,) int64."""
        cosine = F.cosine_similarity(z_image.float(), z_text.float(), dim=-1)
        return torch.bucketize(cosine.contiguous(), self.dot_edges)


class ArPrior(nn.Module):
    """Predicts each component's bucket from the text, the dot product and the components before.

    How text enters is the diffusion prior's way: the frozen encoder's token states and its text
    embedding, each projected to one position.
    """

    def __init__(self, config: ArPriorConfig):
        super().__init__()
        self.config = config
        width = config.transformer.width
        self.quantizer = Quantizer(
            config.embed, config.components, config.buckets, config.dot_buckets
        )
        self.text_tokens = nn.Linear(config.text_width, width)
        self.text_embed = nn.Linear(config.embed, width)
        self.dot = nn.Embedding(config.dot_buckets, width)
        self.component = nn.Embedding(config.buckets, width)
        # Of text tokens, text embedding, dot product, components but the last.
        self.position = nn.Parameter(torch.empty(config.context + 1 + config.components, width))
        self.transformer = Transformer(config.transformer)
        self.out = nn.Linear(width, config.buckets)
        for table in (self.dot.weight, self.component.weight, self.position):
            nn.init.normal_(table, std=0.02)  # as in GPT
        nn.init.zeros_(self.out.weight)  # starts with every bucket as likely as another
        nn.init.zeros_(self.out.bias)

    def prepare(self, cond: Cond) -> Cond:
        """Encode the text part. **Raises**: `ValueError` without text, or with too much of it."""
        if cond.cache is not None:
            return cond
        _, cache = encode_text(self, cond)
        return replace(cond, cache=cache)

    def forward(self, numbers: Tensor, dot: Tensor, cond: Cond) -> Tensor:
        """Logits of every component from those before it; teacher forcing.

        **Shapes**: numbers (B, k) int64, dot (B,) int64 → (B, k, V).
        """
        past, mask, _ = self.prepare(cond).cache
        x = self._embed(numbers[:, :-1], dot)  # (B, k, W)
        own = causal(x).expand(len(x), 1, -1, -1)  # (B, 1, k, k)
        seen = torch.cat([mask.expand(-1, -1, x.shape[1], -1), own], dim=-1)  # (B, 1, k, l+1+k)
        return self.out(self.transformer(x, seen, past))  # (B, k, V)

    def step(self, token: Tensor, place: int, cond: Cond) -> tuple[Tensor, Cond]:
        """Logits of component `place` from the token before it, and the longer cache.

        Token 0 is the dot product, token j the bucket of component j - 1.

        **Shapes**: token (B,) int64 → (B, V).
        """
        past, mask, _ = self.prepare(cond).cache
        table = self.dot if place == 0 else self.component
        x = table(token) + self.position[self.config.context + 1 + place]  # (B, W)
        mask = F.pad(mask, (0, 1), value=True)  # (B, 1, 1, P + 1)
        x, past = self.transformer.advance(x[:, None], mask, past)  # (B, 1, W)
        return self.out(x[:, 0]), replace(cond, cache=TextCache(past, mask))

    def _embed(self, before: Tensor, dot: Tensor) -> Tensor:
        """**Shapes**: (B, k - 1) and (B,) → (B, k, W)."""
        x = torch.cat([self.dot(dot)[:, None], self.component(before)], dim=1)  # (B, k, W)
        return x + self.position[self.config.context + 1 :]
