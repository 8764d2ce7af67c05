"""Measures on features agree with closed forms, and with cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unclip.evaluation.measures import (
    Probe,
    copies,
    copy_threshold,
    density_coverage,
    frechet_distance,
    kernel_distance,
    nearest,
    realistic,
    same_concept,
    spread,
    variety,
)


def at_angles(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_nearest_pictures_come_in_order_without_a_pictures_own():
    real = at_angles(0, 10, 40, 90)
    _, rows = nearest(at_angles(4, 41), real, 2)
    assert rows.tolist() == [[0, 1], [2, 1]]
    distance, rows = nearest(at_angles(4, 41), real, 2, torch.tensor([0, 2]))
    assert rows.tolist() == [[1, 2], [1, 0]]
    assert float(distance[0, 0]) == pytest.approx(1 - math.cos(math.radians(6)), abs=1e-6)


def test_nearest_pictures_do_not_depend_on_how_the_real_ones_are_divided(monkeypatch):
    x, real, own = normal(5, 3), normal(40, 3, seed=1), torch.tensor([0, 9, 10, 19, 39])
    whole = nearest(x, real, 4, own)
    monkeypatch.setattr("unclip.evaluation.measures.CHUNK", 10)
    for got, expected in zip(nearest(x, real, 4, own), whole, strict=True):
        torch.testing.assert_close(got, expected)


def test_too_few_real_pictures_are_refused():
    with pytest.raises(ValueError, match="3 real pictures are too few for 3 neighbours"):
        nearest(at_angles(1), at_angles(0, 1, 2), 3, torch.tensor([0]))


def test_same_concept_is_asked_only_where_another_picture_has_the_name():
    real, names = at_angles(0, 5, 60, 65, 120, 180), ["cat", "cat", "dog", "owl", "dog", "ant"]
    # 1° is a cat's, its own left out; 63° lies between owl and dog; nobody else is an ant.
    x, asked, own = at_angles(1, 63, 181), ["cat", "dog", "ant"], torch.tensor([0, 2, 5])
    assert same_concept(x, real, asked, names, own) == (0.5, 1.0)
    assert same_concept(x[2:], real, asked[2:], names, own[2:]) is None
    assert same_concept(x[2:], real, asked[2:], names, None) == (1.0, 1.0)


def test_realistic_is_within_the_third_neighbour_of_some_real_picture():
    real = at_angles(0, 10, 20, 30, 100, 110, 150, 160)
    # Third neighbours: of 0° at 30°, of 10° at 20°, of 30° at 30°, of 100° at 60°, of 160° at 60°.
    assert realistic(at_angles(-29), real) == 1
    assert realistic(at_angles(-31), real) == 0
    assert realistic(at_angles(-29, -31, 5, 219), real) == 0.75
    assert realistic(at_angles(65, 225), real) == 0.5  # within 60° of 100°, though nearer to 30°
    assert realistic(real, real) == 1


def test_five_per_cent_of_held_out_pictures_are_copies():
    held_out, real = at_angles(*range(1, 102)), at_angles(0)
    threshold = copy_threshold(held_out, real)  # at 6°, of 101
    assert threshold == pytest.approx(1 - math.cos(math.radians(6)), abs=1e-6)
    assert copies(at_angles(0, 5, 7, 20), real, threshold) == 0.5


def test_pairs_do_not_meet_in_a_kernel_distance_of_pairs():
    """Draws that lie beside their true ones seemed nearer than the same distribution is."""
    g = torch.Generator().manual_seed(0)
    true = torch.randn(400, 64, generator=g)
    drawn = true + 0.1 * torch.randn(400, 64, generator=g)
    assert kernel_distance(drawn, true) < -0.02
    assert abs(kernel_distance(drawn, true, paired=True)) < 2e-3


def test_pictures_of_one_caption_do_not_meet_in_a_kernel_distance():
    """Four of each were further from their own distribution than one of each."""
    met, apart = [], []
    for k in range(200):
        x, y = normal(8, 3, seed=k).repeat_interleave(4, 0), normal(32, 3, seed=k + 500)
        met.append(kernel_distance(x, y))
        apart.append(kernel_distance(x, y, together=4))
    met, apart = torch.tensor(met), torch.tensor(apart)
    assert met.mean() > 0.3
    assert abs(apart.mean()) < 3 * apart.std() / math.sqrt(200)


def test_kernel_distance_is_that_of_the_moments():
    """(x·y + 1)³ = Σ C(3, i) ⟨x⊗ⁱ, y⊗ⁱ⟩, so that the distance is Σ C(3, i) |E x⊗ⁱ - E y⊗ⁱ|²."""
    x = torch.nn.functional.normalize(normal(1500, 2), dim=1)  # all round
    y = torch.nn.functional.normalize(normal(1500, 2, seed=1) + 1, dim=1)
    angle = torch.atan2(y[:, 1], y[:, 0])
    mean = y.mean(0).square().sum()
    # Of the circle E x = 0, E x⊗² = I / 2, E x⊗³ = 0; the others by their Fourier coefficients.
    second, third = (torch.stack([(k * angle).cos(), (k * angle).sin()]).mean(1) for k in (2, 3))
    expected = 3 * mean + 3 * second.square().sum() / 2
    expected += third.square().sum() / 4 + 3 * mean / 4
    assert kernel_distance(x, y) == pytest.approx(float(expected), rel=0.1)
    assert kernel_distance(3 * x, 5 * y) == pytest.approx(kernel_distance(x, y))
    assert kernel_distance(x, normal(1500, 2, seed=2)) == pytest.approx(0, abs=0.01)


def test_kernel_distance_has_no_bias():
    """Of pairs of small samples of one distribution, as many are below zero as above."""
    pairs = [(normal(6, 2, seed=k), normal(6, 2, seed=k + 500)) for k in range(300)]
    distances = [kernel_distance(x, y) for x, y in pairs]
    mean, deviation = torch.tensor(distances).mean(), torch.tensor(distances).std()
    assert abs(mean) < 3 * deviation / math.sqrt(300)
    # By hand: k is 8 at 0°, 1 at 90°, 0 at 180°, and a row is not compared with itself.
    assert kernel_distance(at_angles(0, 90), at_angles(0, 0)) == pytest.approx(1 + 8 - 2 * 18 / 4)
    assert kernel_distance(at_angles(0, 180), at_angles(90, 90)) == pytest.approx(0 + 8 - 2 * 1)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@pytest.mark.parametrize(("n", "m"), [(50, 80), (4, 80), (4, 5)])  # few pictures: singular
def test_frechet_distance_agrees_with_roots_of_covariances(n, m):
    x, y = normal(n, 6) @ normal(6, 6, seed=1), normal(m, 6, seed=2) + 0.3
    a, b = x.T.cov(), y.T.cov()
    cross = root(root(a) @ b @ root(a))
    expected = (x.mean(0) - y.mean(0)).square().sum() + (a + b - 2 * cross).trace()
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_of_independent_directions():
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).double() * math.sqrt(3 / 4)
    x, y = signs * torch.tensor([1.0, 2]), signs * torch.tensor([3.0, 0.5]) + torch.tensor([1.0, 0])
    assert frechet_distance(x, y) == pytest.approx(1 + (1 - 3) ** 2 + (2 - 0.5) ** 2)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_density_and_coverage_by_hand():
    real = at_angles(0, 10, 30, 100)  # first neighbours at 10°, 10°, 20°, 70°
    density, coverage = density_coverage(at_angles(5, 5, 6, 250), real, k=1)
    # The three near ones lie within the balls of 0° and 10°, none within that of 30° or 100°.
    assert coverage == 0.5
    assert density == pytest.approx(6 / 4)


def test_a_probe_tells_what_is_linearly_apart_and_is_unsure_between():
    labels = torch.arange(300) % 3
    centres = torch.tensor([[4.0, 0, 1], [0, 4, 1], [-4, -4, 1]])
    x = centres[labels] + 0.3 * normal(300, 3).float()
    x[:, 2] = 7  # says nothing, and has no deviation
    probe = Probe(x[:150], labels[:150], 3)
    assert (probe(x[150:]).argmax(1) == labels[150:]).all()
    middle = probe(torch.tensor([[2.0, 2.0, 7.0]]))[0]
    assert float(middle.sum()) == pytest.approx(1)
    assert middle[:2].min() > 5 * middle[2]


def test_spread_and_variety():
    assert spread(torch.tensor([[0.0, 0], [2, 0], [0, 0], [2, 0]])) == pytest.approx(
        math.sqrt(4 / 3)
    )
    expected = 1 - (math.cos(math.pi / 3) + math.cos(math.pi / 3) + math.cos(2 * math.pi / 3)) / 3
    assert variety(at_angles(0, 60, 120)) == pytest.approx(expected, abs=1e-6)
    assert variety(at_angles(30, 30)) == pytest.approx(0, abs=1e-6)
