"""Drawing z_image from text with a prior: the best of several (Section 2.2).

B captions, D CLIP embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unclip import randomness
from unclip.conditioning import Cond, TextEncoding
from unclip.stages.stage import Draw, Stage


def draw_embeddings(
    prior: Stage,
    text: TextEncoding,
    generators: Sequence[torch.Generator],
    candidates: int,
    draw: Draw,
) -> Tensor:
    """Draw several z_image for each caption and keep the one closest to its z_text.

    The first candidate is drawn by the picture's own generator, the others by ones derived from its
    seed. **Shapes**: text of B captions, B generators → (B, D) raw.
    """
    several = [g for own in generators for g in _candidates(own, candidates)]
    texts = text.repeat(candidates)
    z = prior.embeddings(draw(prior, Cond(text=texts), several))  # (B n, D)
    score = cosine_similarity(z, texts.embed.float()).view(-1, candidates)  # (B, n)
    return z[torch.arange(len(score), device=z.device) * candidates + score.argmax(1)]  # (B, D)


def _candidates(own: torch.Generator, count: int) -> list[torch.Generator]:
    seed = own.initial_seed()
    return [own, *(randomness.generator(seed, "prior candidate", j) for j in range(1, count))]
