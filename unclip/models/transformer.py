"""The transformer of the prior and of the decoder's text side (Section 2.2, Appendix C).

B batch, N positions, P positions before them, H heads, C channels a head, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from unclip.config import Config
from unclip.models.layers import attention, run

KeyValue = tuple[Tensor, Tensor]  # each (B, H, N, C)


class TransformerConfig(Config):
    """Width, depth and heads; `checkpointing` trades a third more time for activation memory."""

    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    checkpointing: bool = False

    @model_validator(mode="after")
    def _check(self) -> TransformerConfig:
        if self.width % self.heads or self.width % 2:
            raise ValueError(
                f"width must be even and a multiple of heads, got {self.width} and {self.heads}"
            )
        return self


class Block(nn.Module):
    """Pre-norm attention and a fourfold GELU network, each added to its input."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values. **Shapes**: (B, N, W) → three (B, H, N, C)."""
        qkv = self.qkv(self.norm1(x))  # (B, N, 3W)
        q, k, v = rearrange(qkv, "b n (s h c) -> s b h n c", s=3, h=self.heads)
        return q, k, v

    def forward(
        self, x: Tensor, mask: Tensor | None, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Also returns the keys and values of these positions and of those before them.

        **Shapes**: x (B, N, W); mask broadcast to (B, H, N, P + N); past (B, H, P, C).
        """
        q, k, v = self.project(x)  # (B, H, N, C)
        if past is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))  # P + N
        h = rearrange(attention(q, k, v, mask), "b h n c -> b n (h c)")  # (B, N, W)
        x = x + self.dropout(self.out(h))
        h = self.dropout(F.gelu(self.fc1(self.norm2(x))))  # (B, N, 4W)
        return x + self.fc2(h), (k, v)


class Transformer(nn.Module):
    """A stack of blocks and a final norm; what comes in front of a sequence can be encoded once."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.width)
        for module in self.modules():
            if isinstance(module, Block):
                self._init(module)

    def _init(self, block: Block) -> None:
        # CLIP's rules: unit variance into every layer; what is added to the stream shrinks with
        # the depth, so that the stream's variance does not grow with it.
        width, depth = self.config.width, 2 * self.config.layers
        for layer, std in (
            (block.qkv, width**-0.5),
            (block.out, (width * depth) ** -0.5),
            (block.fc1, (2 * width) ** -0.5),
            (block.fc2, (width * depth) ** -0.5),
        ):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor | None, past: list[KeyValue] | None = None) -> Tensor:
        """**Shapes**: x (B, N, W); mask broadcast to (B, H, N, P + N); past as by `encode`."""
        for i, block in enumerate(self.blocks):
            before = past[i] if past is not None else None
            x, _ = run(block, x, mask, before, checkpointing=self.config.checkpointing)
        return self.norm(x)  # (B, N, W)

    def advance(
        self, x: Tensor, mask: Tensor | None, past: list[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        """The next positions, and the keys and values of all: decoding one by one.

        **Shapes**: x (B, N, W); mask broadcast to (B, H, N, P + N) → (B, N, W).
        """
        longer = []
        for block, before in zip(self.blocks, past, strict=True):
            x, kv = block(x, mask, before)
            longer.append(kv)
        return self.norm(x), longer

    def encode(self, x: Tensor, mask: Tensor | None) -> list[KeyValue]:
        """Keys and values of every layer, for positions that later ones attend to.

        **Shapes**: x (B, P, W); mask broadcast to (B, H, P, P).
        """
        past = []
        for block in self.blocks[:-1]:
            x, kv = run(block, x, mask, checkpointing=self.config.checkpointing)
            past.append(kv)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        _, k, v = last.project(x)  # nothing reads the last layer's output here
        return [*past, (k, v)]
