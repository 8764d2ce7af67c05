"""Random numbers depend on seed, purpose and id, and on nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from unclip import randomness


def test_draws_depend_on_every_argument_and_only_on_them() -> None:
    def draw(*arguments: object) -> float:
        torch.rand(1)  # the default generator must not matter
        return torch.rand((), generator=randomness.generator(*arguments)).item()  # type: ignore[arg-type]

    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 1, 0), (0, "a", 0, 1),
            (0, "a", 11), (0, "a", 1, 1)]  # fmt: skip
    first = [draw(*key) for key in keys]
    assert [draw(*key) for key in keys] == first
    assert len(set(first)) == len(keys)


def test_default_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    randomness.normal(0, "x", [1], (2,))
    assert torch.equal(torch.rand(1), expected)


def test_numbers_do_not_depend_on_the_batch() -> None:
    ids = torch.arange(100, 108)
    for draw in (
        lambda ids: randomness.normal(7, "noise", ids, (3, 2)),
        lambda ids: randomness.uniform(7, "drop", ids),
        lambda ids: randomness.integers(7, "t", ids, 1000),
    ):
        together = draw(ids)
        assert torch.equal(together, torch.cat([draw(ids[:3]), draw(ids[3:])]))
        assert torch.equal(together.flip(0), draw(ids.flip(0)))
        assert torch.equal(together, draw(ids.tolist()))


@pytest.mark.parametrize("shape", [(), (5,), (3, 17, 16)])
def test_noise_is_what_torch_draws_by_itself(shape: tuple[int, ...]) -> None:
    """Or a run that goes on would not be the one that was stopped."""
    for row, i in zip(randomness.normal(1, "n", [3, 4], shape), [3, 4], strict=True):
        assert row.equal(torch.randn(shape, generator=randomness.generator(1, "n", i)))


def test_numbers_have_the_right_distribution() -> None:
    ids = range(2000)
    normal = randomness.normal(0, "n", ids, (4,))
    assert_close(normal.mean(), torch.tensor(0.0), atol=0.04, rtol=0)
    assert_close(normal.std(), torch.tensor(1.0), atol=0.04, rtol=0)
    between = torch.corrcoef(torch.stack([normal[:-1, 0], normal[1:, 0]]))[0, 1]
    assert abs(between) < 0.08  # neighbouring ids are independent
    uniform = randomness.uniform(0, "u", ids)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert_close(uniform.mean(), torch.tensor(0.5), atol=0.02, rtol=0)
    counts = randomness.integers(0, "i", ids, 5).bincount(minlength=5)
    assert counts.shape == (5,)
    assert counts.min() > 330


def test_processes_and_purposes_draw_independently() -> None:
    """Two processes at a batch of 8 each; correlations beyond 4.5 deviations would show a link."""
    ids = torch.arange(16 * 128).view(-1, 2, 8)  # (step, process, sample)
    columns = []
    for process in range(2):
        own = ids[:, process].flatten()
        columns.append(randomness.normal(3, "noise", own, ()))
        columns.append(randomness.normal(3, "jittered", own, ()))
        columns.append(randomness.integers(3, "t", own, 1000).float())
        columns += [
            (randomness.uniform(3, f"drop {x}", own) < 0.5).float() for x in ("text", "image")
        ]
    between = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert between.abs().max() < 4.5 / len(own) ** 0.5


def test_permutation_visits_every_sample_once_in_another_order_each_time() -> None:
    orders = [randomness.permutation(0, epoch, 50) for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(50))
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[2], randomness.permutation(0, 2, 50))
