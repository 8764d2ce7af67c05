"""Parts that the networks share: time embedding, attention, embedding scale (Sections 2.1, 2.2).

B batch, H heads, N queries, M keys, C channels a head, D CLIP embedding, L text positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unclip.conditioning import TextEncoding
from unclip.config import Config
from unclip.errors import DataError


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of t at frequencies from 1 down to 1/10000 (as ADM, GLIDE and Karlo).

    **Shapes**: t (B,), channels even → (B, channels), float32.
    """
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(exponent)  # bf16 can't tell t = 999 from 1000
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of t through a two-layer network."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.channels = channels
        self.fc1 = nn.Linear(channels, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """**Shapes**: t (B,) → (B, width)."""
        sinusoids = timestep_embedding(t, self.channels).to(self.fc1.weight.dtype)
        return self.fc2(silu(self.fc1(sinusoids)))


MOST_KEYS = 512  # see `_by_products`


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, the only one here; masked keys get exactly no weight.

    **Shapes**: q (B, H, N, C); k, v (B, H, M, C); mask bool, True = attend, broadcast to
    (B, H, N, M) → (B, H, N, C).
    """
    on_cpu = q.is_cpu and type(q) is Tensor  # a plan's fake ones stand for a GPU's
    if on_cpu and q.requires_grad and q.dtype == torch.bfloat16 and k.shape[2] <= MOST_KEYS:
        return _by_products(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # Forward and backward in bf16 a CPU's fused attention takes two to four times as long; but
    # these keep all scores.
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)  # (B, H, N, M)
    if mask is not None:
        scores = scores + scores.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nothing else holds: overwrites it where no gradient is recorded."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def zero_init(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Start a layer at zero, so that its branch starts as no change (ADM, DiT)."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class DraftConfig(Config):
    """A residual network of `blocks` fully connected layers of `width`."""

    width: int = Field(1024, gt=0)
    blocks: int = Field(2, ge=0)


class Draft(nn.Module):
    """What a condition alone lets one expect, and its share in a network's result.

    The expectation is learned by itself (`fit_layout`, `fit_draft`) and then stays, with `fitted`
    as its parameters: as a part of the whole it would drift into a code that tells the network
    less. The share, from `gate`, is trained with the network.
    """

    def __init__(self, config: DraftConfig, inputs: int, outputs: int, time: int):
        super().__init__()
        width = config.width
        self.fc = nn.Linear(inputs, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(config.blocks)])
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(config.blocks)])
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, outputs)
        self.gate = zero_init(nn.Linear(time, 1))
        for parameter in self.fitted():
            parameter.requires_grad_(False)

    def fitted(self) -> list[nn.Parameter]:
        """The parameters of the expectation."""
        return [p for name, p in self.named_parameters() if not name.startswith("gate.")]

    def share(self, time: Tensor) -> Tensor:
        """From 0 to 1. **Shapes**: the time embedding (B, E) → (B, 1)."""
        logit = self.gate(time) / time.shape[1] ** 0.5 - 4  # begins at 2 %, moves in small steps
        return logit.sigmoid()

    def forward(self, condition: Tensor) -> Tensor:
        """**Shapes**: (B, inputs), scaled → (B, outputs)."""
        h = silu(self.fc(condition))  # (B, width)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = h + silu(block(norm(h)))
        return self.out(self.norm(h))


def run(block: Callable[..., Any], *args: Any, checkpointing: bool) -> Any:
    """Call a block; with checkpointing, store only its inputs and run it again going backward."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def trim_text(text: TextEncoding) -> tuple[Tensor, Tensor]:
    """Token states and mask; on a CPU cut behind the longest real text of the batch.

    An accelerator would have to be waited for to learn where that is, and a compiled network be
    compiled for every length: there padding is only masked.

    **Shapes**: → tokens (B, l, W) and mask (B, l) with l ≤ L.
    """
    if not text.mask.is_cpu or torch.compiler.is_compiling():
        return text.tokens, text.mask
    length = text.length()
    return text.tokens[:, :length], text.mask[:, :length]


class ScaleConfig(Config):
    """How raw CLIP embeddings become network inputs.

    `raw` leaves them; `unit` normalises, then multiplies by `factor` (17.2 in the paper: the
    variance of ImageNet's pixels at D = 1024); `whiten` subtracts a mean and divides by a standard
    deviation measured on training embeddings, after normalising if `normalize`.
    """

    kind: Literal["raw", "unit", "whiten"]
    factor: float = Field(17.2, gt=0)
    normalize: bool = False

    @property
    def normalizes(self) -> bool:
        """Whether embeddings count by direction only."""
        return self.kind == "unit" or (self.kind == "whiten" and self.normalize)


class Statistics(nn.Module):
    """A module of numbers measured on training data, buffers that stay float32 always."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Statistics:
        # `model.to(bfloat16)` would round them to three digits.
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in kept.items():
            if getattr(self, name).dtype != old.dtype:
                setattr(self, name, old.to(getattr(self, name).device))
        return self


def statistics(model: nn.Module) -> set[str]:
    """Names in a model's state of all that `Statistics` hold, which stays float32 in files too."""
    return {
        f"{place}.{name}"
        for place, module in model.named_modules()
        if isinstance(module, Statistics)
        for name, _ in module.named_buffers()
    }


class EmbeddingScale(Statistics):
    """Raw CLIP embeddings to network inputs and back."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ScaleConfig, width: int):
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))  # zeros, as in diffusers, would divide by 0

    def forward(self, z: Tensor) -> Tensor:
        """**Shapes**: (B, D) raw → (B, D) scaled, float32."""
        z = F.normalize(z.float(), dim=-1) if self.config.normalizes else z.float()
        if self.config.kind == "unit":
            return z * self.config.factor
        return (z - self.mean) / self.std if self.config.kind == "whiten" else z

    def inverse(self, z: Tensor) -> Tensor:
        """Back to raw; where `forward` normalises, the norm it took away stays one.

        **Shapes**: (B, D) scaled → (B, D) raw, float32.
        """
        z = z.float()
        if self.config.kind == "unit":
            return z / self.config.factor
        if self.config.kind == "whiten":  # where the network is offloaded its statistics are, too
            return z * self.std.to(z.device) + self.mean.to(z.device)
        return z

    @property
    def norm(self) -> float | None:
        """The norm of the raw embeddings that it was measured on, if their norms count."""
        if self.config.kind != "whiten" or self.config.normalize:
            return None
        return float((self.mean.square() + self.std.square()).sum().sqrt())

    def fit(self, z: Tensor) -> None:
        """Measure mean and standard deviation on training embeddings (used by `whiten`).

        **Shapes**: z (n, D) raw. **Raises**: `DataError` where a dimension never varies.
        """
        z = z.cpu().double()  # which Apple's GPUs lack
        z = F.normalize(z, dim=-1) if self.config.normalize else z
        std, mean = torch.std_mean(z, dim=0, correction=0)
        if not bool((std > 0).all()):
            dead = int((~(std > 0)).sum())
            raise DataError(
                f"{dead} of {z.shape[1]} embedding dimensions don't vary over {len(z)} embeddings; "
                "whitening needs more, and different, training images"
            )
        self.mean.copy_(mean)
        self.std.copy_(std)
