"""From text to z_image: with a prior, the best of several, or without one (Section 2.2).

B captions, D CLIP embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unclip import randomness
from unclip.conditioning import Cond, TextEncoding
from unclip.errors import CheckpointError, ConfigError
from unclip.stages.resident import resident
from unclip.stages.stage import Draw, Stage

# What stands between text and decoder: a prior that is drawn from, the diffusion prior's draft
# alone, z_text in the place of z_image, or nothing: the null embedding, so that only the caption
# speaks.
DRAWN = ("diffusion", "ar")
PriorName = Literal["diffusion", "ar", "draft", "text", "none"]


def check_prior(name: str, drawn: Stage | None, decoder: Stage | None) -> None:
    """**Raises**: `ConfigError` or `CheckpointError` for a way that the stages can't go."""
    if name not in get_args(PriorName):
        raise ConfigError(f"prior = {name!r}: choose one of {', '.join(get_args(PriorName))}")
    if name in (*DRAWN, "draft") and drawn is None:
        which = "ar_prior" if name == "ar" else "prior"
        raise CheckpointError(
            f"this model has no {which}, which is needed for text to image; without one, make "
            "variations of a picture"
        )
    if name == "draft" and drawn is not None and drawn.network.draft is None:
        raise CheckpointError("this model's prior has no draft, so prior = 'draft' can't be used")
    if name == "none" and decoder is not None and not decoder.reads_text:
        raise ConfigError("prior = 'none' leaves only the caption, which this decoder can't read")


@dataclass(frozen=True)
class FromText:
    """How captions become z_image: `by` is a `PriorName`, `prior` the stage for that.

    Of several `candidates` for each caption the one closest to its z_text is kept. Guidance leads
    away from `negative`, one text, where it is given. Where `by` says that nothing is drawn, there
    is one z_image for a caption: the draft, or z_text itself.
    """

    by: str
    prior: Stage | None
    candidates: int
    draw: Draw
    negative: TextEncoding | None = None

    @property
    def drawn_from(self) -> list[Stage]:
        """The prior, where one is drawn from."""
        return [self.prior] if self.by in DRAWN and self.prior is not None else []

    @torch.no_grad()
    def __call__(self, text: TextEncoding, generators: Sequence[torch.Generator]) -> Tensor:
        """The first candidate is drawn by the picture's own generator, the others by ones derived
        from its seed. **Shapes**: B captions, B generators → (B, D) raw.
        """
        if self.by not in DRAWN:
            z_text = text.embed.float()
            if self.by != "draft" or self.prior is None:
                return z_text
            with resident([self.prior.network], self.draw.device):
                drafted = self.prior.network.drafted(z_text).float()
            return self.prior.embeddings(drafted)
        assert self.prior is not None
        count = self.candidates
        several = [g for own in generators for g in _candidates(own, count)]
        texts, away = text.repeat(count), None
        if self.negative is not None:
            away = Cond(text=self.negative.repeat(len(several)))
        drawn = self.draw(self.prior, Cond(text=texts), several, negative=away)
        z = self.prior.embeddings(drawn)  # (B n, D)
        score = cosine_similarity(z, texts.embed.float()).view(-1, count)  # (B, n)
        return z[torch.arange(len(score), device=z.device) * count + score.argmax(1)]  # (B, D)

    def unwanted(self, generators: Sequence[torch.Generator]) -> Cond | None:
        """What a decoder is guided away from: the negative text and what becomes of it by the same
        noise. For the same text that is the same embedding, because neither is guided then."""
        if self.negative is None:
            return None
        anew = [torch.Generator().manual_seed(own.initial_seed()) for own in generators]
        text = self.negative.repeat(len(anew))
        return Cond(image_embed=self(text, anew), text=text)


def _candidates(own: torch.Generator, count: int) -> list[torch.Generator]:
    seed = own.initial_seed()
    return [own, *(randomness.generator(seed, "prior candidate", j) for j in range(1, count))]
