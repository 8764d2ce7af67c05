"""Arithmetic on CLIP embeddings as directions (Section 3): between them, and mixed of them.

B batch, D CLIP embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.errors import ConfigError

PARALLEL = 1e-6  # radians; closer directions are joined by a straight line


def slerp(a: Tensor, b: Tensor, share: Tensor | float) -> Tensor:
    """Spherical interpolation: on the great circle from a to b, the share of the angle between.

    Norms are interpolated as well. At 0 it is a, at 1 it is b, to the bit.

    **Shapes**: a, b (..., D); share a number or (...) → (..., D). **Raises**: `ConfigError` where a
    and b point in opposite directions, between which there is no one way.
    """
    share = torch.as_tensor(share, dtype=torch.float32, device=a.device)[..., None]
    norm_a, norm_b = (x.float().norm(dim=-1, keepdim=True) for x in (a, b))
    unit_a, unit_b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
    # Of nearly equal directions the half of their difference knows the angle, the cosine doesn't.
    angle = 2 * torch.asin(((unit_a - unit_b).norm(dim=-1, keepdim=True) / 2).clamp(max=1))
    if bool((angle > torch.pi - 1e-3).any()):
        raise ConfigError("embeddings in opposite directions: there is no one way between them")
    sine = angle.sin()
    straight = angle < PARALLEL
    safe = torch.where(straight, torch.ones_like(sine), sine)
    weight_a = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / safe)
    weight_b = torch.where(straight, share, (share * angle).sin() / safe)
    middle = F.normalize(weight_a * unit_a + weight_b * unit_b, dim=-1)
    middle = middle * (norm_a + share * (norm_b - norm_a))
    return torch.where(share == 0, a.float(), torch.where(share == 1, b.float(), middle))


def mix(z: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted mean of directions, with the weighted mean of their norms.

    One embedding alone comes back to the bit, whatever its weight; negative weights lead away.

    **Shapes**: z (n, D), n weights → (D,). **Raises**: `ConfigError` for weights that do not fit,
    sum to zero or less, or cancel each other.
    """
    if len(weights) != len(z):
        raise ConfigError(f"{len(weights)} weights for {len(z)} embeddings")
    w = torch.tensor(list(weights), dtype=torch.float32, device=z.device)
    if not bool(w.isfinite().all()) or float(w.sum()) <= 0:
        raise ConfigError(f"weights {list(weights)}: they must be finite, and sum to more than 0")
    w = w / w.sum()
    used = w != 0
    if int(used.sum()) == 1:
        return z[used][0].float()
    mean = (w[:, None] * F.normalize(z.float(), dim=-1)).sum(0)
    if float(mean.norm()) < 1e-4:
        raise ConfigError(f"weights {list(weights)}: these embeddings cancel each other")
    norms = z.float().norm(dim=-1)
    return F.normalize(mean, dim=-1) * (w.abs() * norms).sum() / w.abs().sum()


def text_diff(z_image: Tensor, source: Tensor, target: Tensor, strength: float) -> Tensor:
    """An image embedding turned towards what the target caption adds to the source's.

    z_d = normalise(z_text(target) − z_text(source)), of unit embeddings; the result is
    slerp(z_image, z_d, strength) with the norm of z_image (Section 3.3; the paper goes up to 0.25
    to 0.50). **Shapes**: z_image (B, D), source and target (D,) or (B, D) → (B, D). **Raises**:
    `ConfigError` where the captions have one embedding.
    """
    difference = F.normalize(target.float(), dim=-1) - F.normalize(source.float(), dim=-1)
    if bool((difference.norm(dim=-1) < 1e-4).any()):
        raise ConfigError("the two captions have the same embedding, so they say no direction")
    norm = z_image.float().norm(dim=-1, keepdim=True)
    direction = F.normalize(difference, dim=-1).expand_as(z_image) * norm
    return slerp(z_image, direction, strength)
