"""Captioned pictures in training order: which sample comes when is arithmetic on global ids.

B batch, R resolution, H and W crop size. Sample number `step * batch + slot` is the same whatever
the number of processes, so one process or eight see the same pictures and a run resumes exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from unclip.data.sample import Batch, Dataset, Sample
from unclip.errors import ConfigError, DataError
from unclip.randomness import generator, permutation


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
