"""Scores by a CLIP and by pixels: retrieval, nearest embeddings, fidelity of upsampling.

N pictures, M candidates, D CLIP embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.images import gradient_energy, psnr, resize, to_pil, to_tensor

TOLERANCE = 1e-6  # of a cosine: what rounding does to two equal captions

Scores = dict[str, float]


def ranks(z: Tensor, candidates: Tensor, own: Tensor) -> Tensor:
    """How many candidates each embedding prefers to its own one; below k is a top-k hit.

    **Shapes**: z (N, D), candidates (M, D), own (N,) int64 rows of candidates → (N,) int64.
    **Raises**: `ValueError` for embeddings that are not finite.
    """
    if not (z.isfinite().all() and candidates.isfinite().all()):
        raise ValueError("an embedding is not finite")  # it would rank first: NaN is never larger
    score = F.normalize(z.float(), dim=-1) @ F.normalize(candidates.float(), dim=-1).T  # (N, M)
    return (score > score.gather(1, own[:, None])).sum(1)


def coinciding(z: Tensor) -> int:
    """How many embeddings have a twin. Twins do not compete, so they must be few.

    **Shapes**: z (M, D).
    """
    unit = F.normalize(z.float(), dim=-1)
    return int(((unit @ unit.T > 1 - TOLERANCE).sum(1) > 1).sum())


def hit_rates(ranks: Tensor) -> Scores:
    """Top-1 and top-5 shares. **Shapes**: ranks (N,)."""
    return {"top1": float((ranks < 1).float().mean()), "top5": float((ranks < 5).float().mean())}


def agreement(z: Tensor, z_true: Tensor) -> Scores:
    """How often an embedding is nearest to its own true one, and their mean cosine.

    **Shapes**: z (N, D), z_true (N, D).
    """
    cosine = F.cosine_similarity(z.float(), z_true.float())
    return {
        "nearest": float((ranks(z, z_true, torch.arange(len(z))) == 0).float().mean()),
        "cosine": float(cosine.mean()),
    }


@dataclass(frozen=True)
class Upscaled:
    """A real picture, and what bicubic and an upsampler make of the same small copy of it.

    All are 8-bit pictures, as a person would save them.
    """

    real: Image.Image
    bicubic: Image.Image
    made: Image.Image

    def scores(self) -> Scores:
        """PSNR in dB, and gradient energy over the real picture's: a blur is below 1."""
        rows = torch.stack([to_tensor(x) for x in (self.real, self.bicubic, self.made)])
        ratio = gradient_energy(rows) / gradient_energy(rows[:1])
        error = psnr(rows[1:], rows[:1].expand(2, -1, -1, -1))
        return {
            "psnr": float(error[1]),
            "psnr_bicubic": float(error[0]),
            "gradient": float(ratio[2]),
            "gradient_bicubic": float(ratio[1]),
        }


def upscale_again(
    upscale: Callable[[Image.Image], Image.Image], real: Image.Image, low: int
) -> Upscaled:
    """Shrink a square picture to `low` pixels (bicubic, antialiased) and enlarge it again."""
    small = to_pil(resize(to_tensor(real)[None], low)[0])
    bicubic = to_pil(resize(to_tensor(small)[None], real.width)[0])
    return Upscaled(real, bicubic, upscale(small))


def mean_scores(rows: Sequence[Scores]) -> Scores:
    """The mean of each score over pictures, and their number; those of one colour have none."""
    rows = [row for row in rows if all(map(math.isfinite, row.values()))]
    means = {key: mean(row[key] for row in rows) for key in (rows[0] if rows else ())}
    return {**means, "pictures": len(rows)}
