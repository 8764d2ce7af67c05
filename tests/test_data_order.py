"""Which sample comes when is arithmetic on global ids, whatever the number of processes."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from unclip.data.open import DataConfig, open_dataset
from unclip.data.order import batches
from unclip.data.sample import Batch, Sample
from unclip.errors import ConfigError, DataError


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


def _take(n: int, **options: Any) -> list[Batch]:
    dataset = options.pop("dataset", Numbers(13))
    return list(islice(batches(dataset, **{"batch": 8, "seed": 3, **options}), n))


def _rows(parts: list[Batch]) -> dict[int, tuple[str, str, float]]:
    return {
        int(g): (key, caption, float(image.sum()))
        for part in parts
        for g, key, caption, image in zip(
            part.ids, part.keys, part.captions, part.images, strict=True
        )
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
    keys = [key for batch in _take(13) for key in batch.keys]  # 104 = 8 passes of 13
    passes = [keys[k : k + 13] for k in range(0, 104, 13)]
    assert all(sorted(p, key=int) == [str(k) for k in range(13)] for p in passes)
    assert len({tuple(p) for p in passes}) == 8
    assert keys != [key for batch in _take(13, seed=4) for key in batch.keys]


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
