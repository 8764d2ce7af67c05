"""Which sample comes when is arithmetic on global ids, whatever the number of processes."""

from __future__ import annotations

import itertools
import os
import signal
from itertools import islice
from typing import Any

import pytest
import torch

from unclip import randomness
from unclip.data import order
from unclip.data.open import DataConfig, open_dataset
from unclip.data.order import batches, index_of
from unclip.data.sample import Batch, Sample, fixed
from unclip.data.tolerant import Tolerant
from unclip.errors import ConfigError, DataError, UnclipWarning
from unclip.images import TOO_SMALL


class Numbers:
    """Picture k is filled with k; the caption is a draw from the generator."""

    name = "numbers"

    def __init__(self, n: int, size: int = 4) -> None:
        self.n, self.size = n, size

    def __len__(self) -> int:
        return self.n

    def get(self, index: int, generator: torch.Generator) -> Sample:
        place = torch.arange(self.size**2).view(self.size, self.size) / 100
        caption = str(float(torch.rand((), generator=generator)))
        return Sample((index + place).expand(3, -1, -1), caption, str(index))


def _numbers(batch: Batch) -> list[int]:
    """Which pictures these are."""
    return [int(image[0, 0, 0]) for image in batch.images]


def _take(n: int, **options: Any) -> list[Batch]:
    dataset = options.pop("dataset", Numbers(13))
    return list(islice(batches(dataset, **{"batch": 8, "seed": 3, **options}), n))


def _rows(parts: list[Batch]) -> dict[int, tuple[str, float]]:
    return {
        int(g): (caption, float(image.sum()))
        for part in parts
        for g, caption, image in zip(part.ids, part.captions, part.images, strict=True)
    }


@pytest.mark.parametrize("world, accumulate", [(2, 1), (1, 4), (2, 2), (8, 1)])
def test_processes_and_accumulation_see_the_same_samples(world: int, accumulate: int) -> None:
    whole = _take(5, crop=2)
    parts = [
        _take(5 * accumulate, rank=rank, world=world, accumulate=accumulate, crop=2)
        for rank in range(world)
    ]
    assert _rows(whole) == _rows([batch for part in parts for batch in part])
    for step in range(5):  # micro-batches in slot order, ranks side by side
        ids = torch.cat(
            [parts[r][step * accumulate + m].ids for m in range(accumulate) for r in range(world)]
        )
        assert torch.equal(ids, whole[step].ids)


def test_a_resumed_run_continues_exactly() -> None:
    whole, later = _take(6), _take(4, start_step=2)
    for a, b in zip(whole[2:], later, strict=True):
        assert a.captions == b.captions and torch.equal(a.images, b.images)
        assert torch.equal(a.ids, b.ids)


def test_every_pass_visits_each_picture_once_in_a_new_order() -> None:
    seen = [k for batch in _take(13) for k in _numbers(batch)]  # 104 = 8 passes of 13
    passes = [seen[k : k + 13] for k in range(0, 104, 13)]
    assert all(sorted(p) == list(range(13)) for p in passes)
    assert len({tuple(p) for p in passes}) == 8
    assert seen != [k for batch in _take(13, seed=4) for k in _numbers(batch)]


def test_loader_processes_give_the_same_and_leave_the_default_generator_alone() -> None:
    state = torch.get_rng_state()
    alone, helped = _take(4, crop=2), _take(4, crop=2, workers=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert _rows(alone) == _rows(helped)
    assert [b.ids.tolist() for b in alone] == [b.ids.tolist() for b in helped]


def test_crops_differ_between_samples_and_too_large_ones_are_refused() -> None:
    corners = {float(x[0, 0, 0]) % 1 for b in _take(4, crop=2) for x in b.images}
    assert len(corners) > 4
    assert _take(1, crop=2)[0].images.shape == (8, 3, 2, 2)
    with pytest.raises(ConfigError, match=r"data\.crop = 5"):
        _take(1, crop=5)


def test_a_batch_that_can_not_be_divided_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch = 8"):
        _take(1, world=3)
    with pytest.raises(ConfigError, match=r"train\.batch = 2"):
        _take(1, batch=2, accumulate=4)
    with pytest.raises(DataError, match="numbers holds no pictures"):
        _take(1, dataset=Numbers(0))


def test_names_that_mean_nothing_are_errors() -> None:
    with pytest.raises(DataError, match="did you mean 'emoji-vector'"):
        open_dataset("emoji_vector", 64)
    with pytest.raises(DataError, match="not 'test'"):
        open_dataset("emoji:test", 64)
    assert DataConfig(train="emoji", resolution=64).crop is None


def test_a_batch_moves_its_images_only() -> None:
    moved = _take(1)[0].to("meta")
    assert moved.images.device.type == "meta" and moved.ids.device.type == "cpu"
    assert len(moved) == 8


class Photographs(Numbers):
    """Pictures twice as wide as high, as `data.fit = crop` gives them, in uint8."""

    def get(self, index: int, generator: torch.Generator) -> Sample:
        row = torch.arange(2 * self.size, dtype=torch.uint8)
        return Sample(row.expand(3, self.size, -1), "", str(index))


def test_photographs_are_cut_at_random_and_previews_in_the_middle() -> None:
    dataset = Photographs(13, size=8)
    parts = _take(5, dataset=dataset)
    assert parts[0].images.shape == (8, 3, 8, 8)
    corners = [x[0, 0, 0].item() for part in parts for x in part.images]
    assert len({*corners}) > 5
    helped = _take(5, dataset=dataset, workers=1)
    assert corners == [x[0, 0, 0].item() for part in helped for x in part.images]
    assert fixed(dataset, 3).pixels[0, 0].tolist() == list(range(4, 12))  # type: ignore[index]


def test_bytes_become_numbers_where_they_are_used() -> None:
    (batch,) = _take(1, dataset=Photographs(13, size=8))
    assert batch.pixels is not None and batch.pixels.dtype == torch.uint8
    assert torch.equal(batch.images, batch.pixels.float() / 127.5 - 1)
    assert batch.images is batch.images  # converted once


class Embeddings(Numbers):
    def get(self, index: int, generator: torch.Generator) -> Sample:
        return Sample(None, "", str(index), torch.full((6,), float(index)))


def test_workers_outlive_what_stops_their_training() -> None:
    """`timeout` signals a whole process group: the worker died, and the training with it, before
    anything was saved."""

    class Telling:
        name = "telling"

        def __len__(self) -> int:
            return 8

        def get(self, index: int, generator: torch.Generator) -> Sample:
            return Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), str(os.getpid()), "")

    stream = batches(Telling(), batch=2, seed=0, workers=1)
    worker = int(next(stream).captions[0])
    assert worker != os.getpid() and os.getpgid(worker) != os.getpgrp()
    os.kill(worker, signal.SIGUSR1)  # what SLURM sends to every process
    assert {batch.captions[0] for batch in islice(stream, 6)} == {str(worker)}


@pytest.mark.parametrize("workers", [0, 1])
def test_embeddings_can_not_be_cropped(workers: int) -> None:
    """It used to unpack one size into two: a traceback."""
    (batch,) = _take(1, dataset=Embeddings(13))
    assert batch.z_image is not None and batch.z_image.shape == (8, 6) and batch.pixels is None
    with pytest.raises(ConfigError, match=r"data\.crop = 2, but numbers holds embeddings"):
        _take(1, dataset=Embeddings(13), crop=2, workers=workers)


def test_narrow_pictures_are_replaced_and_no_damage() -> None:
    """Nine in ten are: damage in more than one in twenty would end it."""

    class Narrow(Numbers):
        def get(self, index: int, generator: torch.Generator) -> Sample:
            if index % 10 or self.size == 0:
                raise DataError(f"{index} is narrower", TOO_SMALL)
            return super().get(index, generator)

    dataset = Tolerant(Narrow(500))
    with pytest.warns(UnclipWarning, match="is narrower. Another sample stands for it") as told:
        found = [fixed(dataset, index).key for index in range(500)]
    assert len(told) == 1 and all(int(key) % 10 == 0 for key in found)
    assert found[::10] == [str(k) for k in range(0, 500, 10)] and len({*found}) == 50
    with pytest.raises(DataError, match="and so are all others tried"):
        fixed(Tolerant(Narrow(500, size=0)), 0)


def test_a_folder_is_the_same_with_a_slash() -> None:
    """`D` and `D/` were two data sets when a run resumed."""
    slashed = DataConfig(train="D/", val="E/", resolution=8)
    assert slashed == DataConfig(train="D", val="E", resolution=8)
    assert DataConfig(train="/", resolution=8).train == "/"


def test_small_sets_keep_the_order_of_earlier_versions() -> None:
    """A run begun by them resumes with the same samples: one permutation of all."""
    for n in (13, 5000):
        for epoch in (0, 2):
            own = randomness.generator(3, "order", epoch)
            whole = torch.randperm(n, generator=own).tolist()
            assert [index_of(3, epoch * n + k, n) for k in range(n)] == whole
    assert order.WHOLE == 2**20  # all built-in sets are smaller


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of four blocks of eight, so that 1,000 samples are many."""
    for name, value in (("WHOLE", 100), ("BLOCK", 8), ("BLOCKS", 4)):
        monkeypatch.setattr(order, name, value)


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("n", [101, 128, 160, 1000, 1001, 1023])
def test_large_sets_are_shuffled_by_windows(n: int) -> None:
    passes = [[index_of(3, epoch * n + k, n) for k in range(n)] for epoch in (0, 1)]
    assert all(sorted(one) == list(range(n)) for one in passes)
    assert passes[0] != passes[1] != [index_of(4, k, n) for k in range(n)]
    for first in range(0, n, 32):  # a window reads in four places, and each all over
        window = passes[0][first : first + 32]
        assert len({k // 8 for k in window}) <= 5  # the left-over block is the fifth
        assert n < 900 or first + 32 > n or len({k // 8 for k in window[:8]}) > 1
    blocks = [k // 8 for k in passes[0]]
    assert n < 900 or sum(abs(a - b) for a, b in itertools.pairwise(blocks)) / n > n / 8 / 6


@pytest.mark.usefixtures("windows")
def test_processes_see_the_same_windows() -> None:
    dataset = Numbers(301)
    whole = _take(100, dataset=dataset)
    parts = [_take(100, dataset=dataset, rank=rank, world=2) for rank in (0, 1)]
    assert _rows(whole) == _rows([*parts[0], *parts[1]])
    later = _take(1, dataset=dataset, start_step=77)
    assert _rows(later) == _rows(whole[77:78])


def test_the_order_of_laion_takes_no_memory() -> None:
    """A permutation of 400 million samples took each process 3.2 GB and some minutes."""
    n = 400_000_000
    seen = [index_of(0, 3 * n + k, n) for k in range(0, n, n // 20)]
    assert len({*seen}) == 20 and all(0 <= k < n for k in seen)
