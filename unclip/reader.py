"""A model's CLIP encoder at work: what it reads of prompts and pictures (Section 2).

B prompts or pictures, D CLIP embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.towers import Tokenizer
from unclip.conditioning import TextEncoding
from unclip.data.embeddings import check_raw
from unclip.errors import CheckpointError, UnclipWarning
from unclip.images import pad_to_square
from unclip.inputs import Picture, as_embeddings, as_pictures, as_prompts
from unclip.stages.resident import resident
from unclip.stages.stage import CHUNK_EMBEDDINGS, Stage

NO_CLIP = "this model has no CLIP encoder, which text and pictures need"
NOTES = 4  # prompts of a call that warnings name


@dataclass(frozen=True)
class Reader:
    """A model's encoder, if it has one, with its weights on the device while it is at work.

    **Raises**: `CheckpointError` where it has none and what is asked for needs it.
    """

    clip: FrozenCLIP | None
    device: torch.device

    @contextmanager
    def at_work(self) -> Iterator[FrozenCLIP]:
        """The encoder with its weights on the device."""
        if self.clip is None:
            raise CheckpointError(NO_CLIP)
        with resident([self.clip], self.device):
            yield self.clip

    def prompts(self, given: Any) -> list[str]:
        """Prompts, with a warning where the encoder does not read all of them."""
        several = as_prompts(given)
        notes = unread(several, self.clip.towers.tokenizer) if self.clip is not None else iter(())
        for note in islice(notes, NOTES):
            warnings.warn(note, UnclipWarning, stacklevel=3)
        if more := sum(1 for _ in notes):
            warnings.warn(f"{more} more prompts are not read whole", UnclipWarning, stacklevel=3)
        return several

    def text(self, prompts: Sequence[str]) -> TextEncoding:
        """What the networks are told of prompts."""
        with self.at_work() as clip:
            return clip.encode_text(prompts)

    def null_text(self) -> TextEncoding | None:
        """The encoded empty string; None without an encoder."""
        if self.clip is None:
            return None
        with self.at_work() as clip:
            return clip.null_text

    def images(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Raw image embeddings of pictures, padded to squares. **Shapes**: → (B, D)."""
        squares = [pad_to_square(image) for image in as_pictures(images)]
        with self.at_work() as clip:
            parts = range(0, len(squares), CHUNK_EMBEDDINGS)
            return torch.cat([clip.encode_pil(squares[k : k + CHUNK_EMBEDDINGS]) for k in parts])

    def embeddings(self, given: Any, decoder: Stage, stages: Sequence[Stage]) -> Tensor:
        """Embeddings from elsewhere, checked to be such as a decoder takes, by what its model's
        stages or the encoder know of them. **Shapes**: (B, D) → (B, D)."""
        z = as_embeddings(given, decoder.width)
        if not decoder.config.scale.normalizes:
            mend = "multiply them by that, or embed the pictures again (`unclip embed`)"
            check_raw(z, lambda: self._norm(stages), "these embeddings", mend)
        return z

    def _norm(self, stages: Sequence[Stage]) -> float | None:
        """The usual one of raw embeddings, as far as the stages or the encoder know it."""
        scales = (getattr(stage.network, "scale", None) for stage in stages)
        norm = next((scale.norm for scale in scales if scale is not None and scale.norm), None)
        if norm is not None or self.clip is None:
            return norm
        with self.at_work() as clip:
            return clip.norm


def unread(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[str]:
    """A sentence on each text of which an encoder does not read all: what, and why not."""
    for text in dict.fromkeys(texts):
        cut, unknown, known = tokenizer.lost(text)
        name = repr(text if len(text) <= 60 else f"{text[:59]}…")
        if unknown and not known:
            yield f"the encoder knows no word of {name}; pictures of such texts are all alike"
            continue
        if cut:
            yield (
                f"the encoder reads {tokenizer.context} tokens of a text; of {name} it does not "
                f"read the end, {cut!r}"
            )
        if unknown:
            words = ", ".join(map(repr, dict.fromkeys(unknown)))
            yield f"the encoder does not know these words of {name}: {words}"
