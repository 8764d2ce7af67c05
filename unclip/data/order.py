"""Captioned pictures in training order: which sample comes when is arithmetic on global ids.

Sample number `step * batch + slot` is the same whatever the number of processes, so one process or
eight see the same pictures and a run resumes exactly.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from unclip.data.sample import Batch, Dataset, Sample
from unclip.errors import ConfigError, DataError, UnclipError
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
    made: Callable[[Batch], Batch] | None = None,
    pin: bool = False,
) -> Iterator[Batch]:
    """Micro-batches of one process from `start_step` on, without end, in order.

    Step s holds the global ids s * batch … (s + 1) * batch - 1; micro-batch m of process `rank`
    takes slots (m * world + rank) * per … + per, where per = batch / (accumulate * world).
    Pictures that are no squares, or with a `crop` all of them, are cut at random places. `made`
    adds to a batch what can be made beside the pictures, in a loader's worker; `pin` leaves
    batches where an accelerator fetches them while the CPU goes on.

    **Raises**: `ConfigError` when the batch can't be divided or the crop is too large.
    """
    micro_batch(batch, accumulate, world)
    if len(dataset) == 0:
        raise DataError(f"{dataset.name} holds no pictures")
    loader = DataLoader(
        _ById(dataset, seed, crop),
        batch_sampler=_Slots(len(dataset), batch, seed, start_step, rank, world, accumulate),
        num_workers=workers,
        collate_fn=_Join(made),
        pin_memory=pin,
        worker_init_fn=_apart,
        generator=torch.Generator(),  # or it would draw from the default one, even at 0 workers
    )
    return _checked(loader)


def _apart(worker: int) -> None:
    """What stops a training reaches its whole process group (Ctrl-C, `timeout`, schedulers): a
    worker that died of it would end the training before it has saved."""
    os.setpgrp()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _checked(loader: DataLoader[Any]) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, UnclipError):
            raise batch
        yield batch


# Up to so many samples are shuffled as a whole. Of more, blocks of neighbours are, and then the
# samples of each so many blocks: that takes no memory, and reads in few places at a time.
WHOLE, BLOCK, BLOCKS = 2**20, 2**10, 2**6


def index_of(seed: int, g: int, n: int) -> int:
    """Which of n samples has global id g. Every pass is another permutation."""
    epoch, place = divmod(g, n)
    if n <= WHOLE:
        return int(_permutation(seed, epoch, n)[place])
    window, slot = divmod(place, BLOCK * BLOCKS)
    first = window * BLOCK * BLOCKS
    size = min(BLOCK * BLOCKS, n - first)
    block, row = divmod(first + int(_window(seed, epoch, window, size)[slot]), BLOCK)
    blocks = _permutation(seed, epoch, n // BLOCK)
    # What is left after the last whole block keeps its place in the last window.
    return (int(blocks[block]) if block < len(blocks) else block) * BLOCK + row


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> Tensor:
    return permutation(seed, epoch, n)


@lru_cache(maxsize=4)
def _window(seed: int, epoch: int, window: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, "window", epoch, window))


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
                yield [(g, index_of(self.seed, g, self.n)) for g in range(first, first + per)]
            step += 1


class _ById(TorchDataset[Any]):
    """Looks samples up by global id, in this process or in a loader's worker."""

    def __init__(self, dataset: Dataset, seed: int, crop: int | None) -> None:
        self.dataset, self.seed, self.crop = dataset, seed, crop

    def __getitem__(self, item: tuple[int, int]) -> tuple[int, Sample] | UnclipError:
        g, index = item
        try:
            sample = self.dataset.get(index, generator(self.seed, "data", g))
            self._check_crop(sample)
        except UnclipError as error:
            return error  # raised in the main process: from a worker it would be a traceback
        return g, sample.cut(self.crop, generator(self.seed, "crop", g))

    def _check_crop(self, sample: Sample) -> None:
        if self.crop is None:
            return
        if sample.pixels is None:
            raise ConfigError(
                f"data.crop = {self.crop}, but {self.dataset.name} holds embeddings, not pictures"
            )
        height, width = sample.pixels.shape[-2:]
        if self.crop > min(height, width):
            raise ConfigError(
                f"data.crop = {self.crop} is larger than the pictures, {height} x {width} "
                "(data.resolution)"
            )


class _Join:
    """Samples to a batch, where they were read, with what else is `made` of it there."""

    def __init__(self, made: Callable[[Batch], Batch] | None) -> None:
        self.made = made

    def __call__(self, items: list[Any]) -> Batch | UnclipError:
        errors = [item for item in items if isinstance(item, UnclipError)]
        if errors:
            return errors[0]
        batch = Batch.of([sample for _, sample in items], [g for g, _ in items])
        return batch if self.made is None else self.made(batch)
