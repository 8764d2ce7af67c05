"""Scores on held-out pictures: retrieval, nearest embeddings, fidelity of upsampling (Section 5).

N pictures, n samples of each, M ≥ N candidates, D CLIP embedding, R the picture's side. Row i of
the pictures belongs to row i of the candidates; candidates beyond N only compete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.clip.contrastive import retrieval_rank
from unclip.images import gradient_energy, psnr, resize, to_pil, to_tensor

TOLERANCE = 1e-6  # of a cosine: what rounding does to two equal captions

Scores = dict[str, float]


def sample_ranks(z_samples: Tensor, z_candidates: Tensor) -> Tensor:
    """How many candidates each of n samples prefers to its own.

    **Shapes**: z_samples (N, n, D), z_candidates (M, D) → (N, n) int64; below k is a top-k hit.
    **Raises**: `ValueError` for too few candidates, or for embeddings that are not finite.
    """
    if len(z_candidates) < len(z_samples):
        raise ValueError(f"{len(z_samples)} pictures, but only {len(z_candidates)} candidates")
    if not (z_samples.isfinite().all() and z_candidates.isfinite().all()):
        raise ValueError("an embedding is not finite")  # it would rank first: NaN is never larger
    return torch.stack([retrieval_rank(z, z_candidates) for z in z_samples.unbind(1)], dim=1)


def coinciding(z: Tensor) -> int:
    """How many embeddings have a twin. Twins do not compete, so they must be few.

    **Shapes**: z (M, D).
    """
    unit = F.normalize(z.float(), dim=-1)
    return int(((unit @ unit.T > 1 - TOLERANCE).sum(1) > 1).sum())


def hit_rates(ranks: Tensor, keep: Tensor | None = None) -> Scores:
    """Top-1 and top-5 shares over pictures and their samples, and top-5's standard error.

    The samples of one caption are not independent, so the error is that of the captions' means.

    **Shapes**: ranks (N, n); keep (N,) bool chooses pictures.
    """
    ranks = ranks if keep is None else ranks[keep]
    top5 = (ranks < 5).float().mean(1)  # (N,)
    return {
        "top1": float((ranks < 1).float().mean()),
        "top5": float(top5.mean()),
        "top5_error": float(top5.std(correction=0)) / max(1, len(ranks)) ** 0.5,
        "pictures": len(ranks),
    }


def agreement(z: Tensor, z_true: Tensor) -> Scores:
    """How often an embedding is nearest to its own true one, and their mean cosine.

    **Shapes**: z (N, D), z_true (M, D).
    """
    ranks = sample_ranks(z[:, None], z_true)
    cosine = F.cosine_similarity(z.float(), z_true[: len(z)].float())
    return {
        "nearest": float((ranks == 0).float().mean()),
        "cosine": float(cosine.mean()),
        "pictures": len(z),
    }


def cosine_to_others(z: Tensor) -> float:
    """Mean cosine between different pictures: what a random other one has. **Shapes**: z (M, D)."""
    unit = F.normalize(z.float(), dim=-1)
    cosine = unit @ unit.T
    return float((cosine.sum() - cosine.trace()) / (len(z) * (len(z) - 1)))


def shift(x: Tensor) -> Tensor:
    """Move pictures right by one pixel, repeating the left edge. **Shapes**: (B, 3, H, W) → same"""
    return F.pad(x, (1, 0, 0, 0), mode="replicate")[..., :-1]


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
    """The mean of each score over pictures, and their number."""
    means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    return {**means, "pictures": len(rows)}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well in a terminal and in a README."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
