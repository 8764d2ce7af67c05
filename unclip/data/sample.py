"""What a dataset is: captioned pictures by number, alone and in batches.

B batch, H and W a picture's sides, h and w those of its small copy, D CLIP embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from unclip.images import crop, from_pixels
from unclip.randomness import generator

MAX_BAD = 0.05  # the share of samples, or shards, that may be unusable
TOGETHER = 64  # samples that are read at once, where a dataset is gone through


@dataclass(frozen=True)
class Sample:
    """One captioned picture, or from a cache its embedding, or both.

    **Shapes**: pixels (3, H, W), uint8, or float32 in [-1, 1] where they were computed; z_image
    (D,) float32.
    """

    pixels: Tensor | None
    caption: str
    key: str
    z_image: Tensor | None = None

    @property
    def image(self) -> Tensor:
        """**Shapes**: (3, H, W) float32 in [-1, 1]."""
        assert self.pixels is not None, "a cache holds no pictures"
        return from_pixels(self.pixels)

    def cut(self, size: int | None = None, generator: torch.Generator | None = None) -> Sample:
        """With a square of the picture, at random or its middle: see `images.crop`.

        Without a `size` it is as large as the picture lets it be.
        """
        if self.pixels is None:
            return self
        size = min(self.pixels.shape[-2:]) if size is None else size
        if self.pixels.shape[-2:] == (size, size):
            return self
        return replace(self, pixels=crop(self.pixels, size, generator))


class Dataset(Protocol):
    """Pictures by number; `get` is a pure function of the number and the generator's state.

    They are squares, or with `data.fit = crop` of one height or width: who asks cuts (`cut`).
    """

    name: str

    def __len__(self) -> int: ...

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Picture `index`; the generator picks the caption's wording and any augmentation."""
        ...


@dataclass(frozen=True)
class Batch:
    """**Shapes**: ids (B,) int64 global sample ids; what there is of pixels (B, 3, H, W), uint8 or
    float32 in [-1, 1]; z_image (B, D); an upsampler's low_res (B, 3, h, w); noise, of the shape of
    what is learned; the captions' tokens (2, B, L), ids and mask.
    """

    captions: list[str]
    ids: Tensor
    pixels: Tensor | None = None
    z_image: Tensor | None = None
    low_res: Tensor | None = None
    noise: Tensor | None = None
    tokens: Tensor | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample], ids: Sequence[int] = ()) -> Batch:
        """Samples that are alike in shape and in what they have."""
        pixels = [sample.pixels for sample in samples if sample.pixels is not None]
        z_image = [sample.z_image for sample in samples if sample.z_image is not None]
        return cls(
            captions=[sample.caption for sample in samples],
            ids=torch.tensor(ids, dtype=torch.int64),
            pixels=torch.stack(pixels) if pixels else None,
            z_image=torch.stack(z_image) if z_image else None,
        )

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def images(self) -> Tensor:
        """The pictures, converted where they are. **Shapes**: (B, 3, H, W) float32 in [-1, 1]."""
        assert self.pixels is not None, "a cache holds no pictures"
        return from_pixels(self.pixels)

    @property
    def text(self) -> list[str] | Tensor:
        """The captions, as tokens where these are made."""
        return self.captions if self.tokens is None else self.tokens

    def to(self, device: torch.device | str) -> Batch:
        """On another device; ids stay on the CPU, where random numbers are drawn."""
        moved = {name: x.to(device, non_blocking=True) for name, x in self._movable().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        """In memory from which a GPU copies while the CPU goes on; the loader calls this."""
        pinned = {name: x.pin_memory() for name, x in self._movable().items()}
        return replace(self, **pinned)  # type: ignore[arg-type]

    def _movable(self) -> dict[str, Tensor]:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: x for k, x in parts.items() if isinstance(x, Tensor) and k != "ids"}


def fixed(dataset: Dataset, index: int, own: torch.Generator | None = None) -> Sample:
    """The middle of picture `index`, with the same wording every time unless `own` draws it."""
    return dataset.get(index, own or generator(0, "preview", index)).cut()


def evenly(dataset: Dataset, count: int) -> range:
    """The numbers of at most about `count` pictures, evenly over the dataset."""
    return range(0, len(dataset), max(1, len(dataset) // count))[:count]


def batches_of(dataset: Dataset, numbers: Sequence[int]) -> Iterator[Batch]:
    """The pictures with these numbers, some at a time, as `fixed` has them."""
    for first in range(0, len(numbers), TOGETHER):
        yield Batch.of([fixed(dataset, i) for i in numbers[first : first + TOGETHER]])


def reworded(
    dataset: Dataset, count: int, seed: int, purpose: str
) -> Iterator[tuple[range, Batch]]:
    """So many draws evenly over the dataset, each with a wording of its own: their numbers, and the
    pictures; of a small dataset several of each."""
    for first in range(0, count, TOGETHER):
        draws = range(first, min(first + TOGETHER, count))
        own = {j: generator(seed, purpose, j) for j in draws}
        yield draws, Batch.of([fixed(dataset, j * len(dataset) // count, own[j]) for j in draws])
