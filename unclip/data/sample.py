"""What a dataset is: captioned pictures by number, alone and in batches.

B batch, R resolution, H and W crop size, D CLIP embedding.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from unclip.randomness import generator

MAX_BAD = 0.05  # the share of samples, or shards, that may be unusable


@dataclass(frozen=True)
class Sample:
    """One captioned picture, or from a cache its embedding, or both.

    **Shapes**: image (3, R, R) float32 in [-1, 1], or (D,) float32; embed (D,) float32.
    """

    image: Tensor
    caption: str
    key: str
    embed: Tensor | None = None


class Dataset(Protocol):
    """Pictures by number; `get` is a pure function of the number and the generator's state."""

    name: str

    def __len__(self) -> int: ...

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Picture `index`; the generator picks the caption's wording and any augmentation."""
        ...


@dataclass(frozen=True)
class Batch:
    """**Shapes**: images (B, 3, H, W) float32 in [-1, 1], or (B, D) embeddings from a cache; ids
    (B,) int64 global sample ids; embeds (B, D) of pictures that come with them."""

    images: Tensor
    captions: list[str]
    ids: Tensor
    keys: list[str]
    embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str) -> Batch:
        """The images on another device; ids stay on the CPU, where random numbers are drawn."""
        images = self.images.to(device, non_blocking=True)
        embeds = None if self.embeds is None else self.embeds.to(device, non_blocking=True)
        return replace(self, images=images, embeds=embeds)


def fixed(dataset: Dataset, index: int) -> Sample:
    """Picture `index` with the same wording and augmentation every time."""
    return dataset.get(index, generator(0, "preview", index))


def cache_folder(what: str) -> Path:
    """Where things made from data are kept: `$UNCLIP_CACHE`, or `~/.cache/unclip`."""
    chosen = os.environ.get("UNCLIP_CACHE")
    return (
        Path(os.path.expanduser(chosen)) if chosen else Path.home() / ".cache" / "unclip"
    ) / what
