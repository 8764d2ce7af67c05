"""Captioned pictures in training order: which sample comes when is arithmetic on global ids.

B batch, R resolution, H and W crop size. Sample number `step * batch + slot` is the same whatever
the number of processes, so one process or eight see the same pictures and a run resumes exactly.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from unclip.config import Config
from unclip.errors import ConfigError, DataError
from unclip.randomness import generator, permutation

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


class DataConfig(Config):
    """What to train on: `emoji`, `shapes`, a folder, a table of captions, tar shards, or for a
    prior a cache of embeddings."""

    train: str
    val: str | None = None
    resolution: int = Field(gt=0)
    crop: int | None = Field(default=None, gt=0)
    workers: int = Field(default=0, ge=0)


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


class Tolerant:
    """A dataset in which another sample, always the same, stands for one that can't be used.

    Each kind of damage is reported once. More than 5 % of the samples seen end it; of fewer than
    200 seen the share is not known well, so that it is taken of 200, or of all there are.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.name = dataset, dataset.name
        self.seen, self.bad = 0, 0
        self.bad_places: Counter[str] = Counter()
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Sample `index`, or the first whole one of those that stand for it.

        **Raises**: `DataError` naming the worst files when too many are bad.
        """
        self.seen += 1
        while True:
            try:
                return self.dataset.get(index, generator)
            except DataError as error:
                self._count(index, error)
            index = (index + len(self) // 3 + 1) % len(self)  # far from it, not the damage beside

    def _count(self, index: int, error: DataError) -> None:
        place = getattr(self.dataset, "place", None)
        self.bad += 1
        self.bad_places[place(index) if place is not None else self.name] += 1
        if self.bad > MAX_BAD * max(self.seen, min(len(self), 200)):
            worst = ", ".join(f"{name} ({n})" for name, n in self.bad_places.most_common(5))
            raise DataError(
                f"{error}. {self.bad} of {self.seen} samples of {self.name} can't be used, most of "
                f"them in {worst}"
            ) from None
        if error.kind not in self._reported:
            self._reported.add(error.kind)
            warnings.warn(
                f"data {self.name}: {error}. Another sample stands for it; further ones like this "
                "are counted and not reported",
                stacklevel=2,
            )


def fixed(dataset: Dataset, index: int) -> Sample:
    """Picture `index` with the same wording and augmentation every time."""
    return dataset.get(index, generator(0, "preview", index))


def open_dataset(spec: str, resolution: int, *, embeddings: bool = False) -> Dataset:
    """The dataset that `data.train` names, with pictures of `resolution` pixels.

    - `emoji`, `emoji-vector` (without the one raster set), `shapes`, each also with `:val`;
    - a folder of pictures; a `.jsonl`, `.csv` or `.parquet` of file names and captions;
    - a tar file, a folder of them, or a pattern such as `shards-{000..009}.tar` or `shards/*.tar`;
      likewise parquet files that hold the pictures;
    - `hf:owner/name`, `hf:owner/name#config:split`: a dataset of the Hugging Face hub;
    - with `embeddings` also a cache (`train/embed.py`, clip-retrieval), whose samples hold those
      instead of pictures.

    Of files that people bring, single samples may be bad: see `Tolerant`.

    **Raises**: `DataError` when nothing of that name exists or it can't be used.
    """
    name, _, split = spec.partition(":")
    if name in ("emoji", "emoji-vector", "shapes") and split not in ("", "train", "val"):
        raise DataError(f"{spec!r}: the parts of {name} are train and val, not {split!r}")
    if name in ("emoji", "emoji-vector"):
        from unclip.data.emoji import Emoji

        return Emoji(resolution, split or "train", vector_only=name == "emoji-vector")
    if name == "shapes":
        from unclip.data.shapes import Shapes

        return Shapes(resolution, split or "train")
    if is_cache(spec):
        if not embeddings:
            raise DataError(f"{spec} holds embeddings, not pictures: only a prior learns from them")
        from unclip.data.cache import EmbeddingCache

        return EmbeddingCache(Path(spec))
    if name == "hf":
        from unclip.data.hub import open_hub

        return Tolerant(open_hub(spec, resolution))
    from unclip.data.readers import open_path

    return Tolerant(open_path(spec, resolution))


def cache_folder(what: str) -> Path:
    """Where things made from data are kept: `$UNCLIP_CACHE`, or `~/.cache/unclip`."""
    chosen = os.environ.get("UNCLIP_CACHE")
    return (Path(chosen) if chosen else Path.home() / ".cache" / "unclip") / what


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_cache(spec: str) -> bool:
    """Whether `data.train` names a cache of embeddings."""
    return (Path(spec) / "img_emb").is_dir()


def micro_batch(batch: int, accumulate: int, world: int) -> int:
    """A process's samples at a time. **Raises**: `ConfigError` when the batch can't be divided."""
    per, left = divmod(batch, accumulate * world)
    if left or per == 0:
        raise ConfigError(
            f"train.batch = {batch} must be a multiple of train.accumulate x processes = "
            f"{accumulate} x {world}"
        )
    return per


def batches(
    dataset: Dataset,
    *,
    batch: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    crop: int | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """Micro-batches of one process from `start_step` on, without end, in order.

    Step s holds the global ids s * batch … (s + 1) * batch - 1; micro-batch m of process `rank`
    takes slots (m * world + rank) * per … + per, where per = batch / (accumulate * world).

    **Raises**: `ConfigError` when the batch can't be divided or the crop is too large.
    """
    micro_batch(batch, accumulate, world)
    if len(dataset) == 0:
        raise DataError(f"{dataset.name} holds no pictures")
    loader = DataLoader(
        _ById(dataset, seed, crop),
        batch_sampler=_Slots(len(dataset), batch, seed, start_step, rank, world, accumulate),
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # or it would draw from the default one, even at 0 workers
    )
    return _checked(loader)


def _checked(loader: DataLoader[Any]) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> Tensor:
    return permutation(seed, epoch, n)


@dataclass(frozen=True)
class _Slots:
    """The (global id, index in the dataset) pairs of each micro-batch of one process."""

    n: int
    batch: int
    seed: int
    start_step: int
    rank: int
    world: int
    accumulate: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per = micro_batch(self.batch, self.accumulate, self.world)
        step = self.start_step
        while True:
            for micro in range(self.accumulate):
                first = step * self.batch + (micro * self.world + self.rank) * per
                yield [(g, self._index(g)) for g in range(first, first + per)]
            step += 1

    def _index(self, g: int) -> int:
        epoch, place = divmod(g, self.n)
        return int(_order(self.seed, epoch, self.n)[place])


class _ById(TorchDataset[Any]):
    """Looks samples up by global id, in this process or in a loader's worker."""

    def __init__(self, dataset: Dataset, seed: int, crop: int | None) -> None:
        self.dataset, self.seed, self.crop = dataset, seed, crop

    def __getitem__(self, item: tuple[int, int]) -> tuple[int, Sample] | DataError:
        g, index = item
        try:
            sample = self.dataset.get(index, generator(self.seed, "data", g))
        except DataError as error:
            return error  # raised in the main process: from a worker it would be a traceback
        if self.crop is not None:
            image = _random_crop(sample.image, self.crop, generator(self.seed, "crop", g))
            sample = replace(sample, image=image)
        return g, sample


def _random_crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """**Shapes**: (3, H, W) → (3, size, size)."""
    height, width = image.shape[-2:]
    if size > min(height, width):
        raise ConfigError(
            f"data.crop = {size} is larger than the pictures, {height} x {width} (data.resolution)"
        )
    top = int(torch.randint(height - size + 1, (), generator=generator))
    left = int(torch.randint(width - size + 1, (), generator=generator))
    return image[:, top : top + size, left : left + size]


def _collate(items: list[Any]) -> Batch | DataError:
    errors = [item for item in items if isinstance(item, DataError)]
    if errors:
        return errors[0]
    samples = [sample for _, sample in items]
    embeds = [sample.embed for sample in samples if sample.embed is not None]
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        captions=[sample.caption for sample in samples],
        ids=torch.tensor([g for g, _ in items]),
        keys=[sample.key for sample in samples],
        embeds=torch.stack(embeds) if embeds else None,
    )
