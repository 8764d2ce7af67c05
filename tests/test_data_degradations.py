"""Degradations of low-resolution images: closed forms, purity, and that they degrade."""

from __future__ import annotations

import math

import pytest
import torch

from unclip.data.degradations import blur, bsr, gaussian_kernel
from unclip.data.shapes import Shapes, render
from unclip.errors import ConfigError
from unclip.images import gradient_energy, psnr, resize


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_blur_is_the_three_by_three_gaussian_of_sigma_0_6() -> None:
    point = torch.zeros(3, 7, 7)
    point[:, 3, 3] = 1
    side = math.exp(-1 / (2 * 0.6**2))
    line = torch.tensor([side, 1, side]) / (1 + 2 * side)
    spread = blur(point, (0.6, 0.6), _generator(0))
    torch.testing.assert_close(spread[0, 2:5, 2:5], torch.outer(line, line))
    assert float(spread.sum()) == pytest.approx(3)
    flat = torch.full((3, 5, 5), 0.3)
    torch.testing.assert_close(blur(flat, (0.4, 0.6), _generator(0)), flat)


def test_a_blurs_sigma_is_drawn_from_its_range() -> None:
    """The share of a point that stays in its middle tells sigma: 0.4 keeps more than 0.6."""
    point = torch.zeros(3, 5, 5)
    point[:, 2, 2] = 1

    def kept(sigma: tuple[float, float], seed: int) -> float:
        return float(blur(point, sigma, _generator(seed))[0, 2, 2])

    drawn = [kept((0.4, 0.6), seed) for seed in range(20)]
    assert kept((0.6, 0.6), 0) < min(drawn) < max(drawn) < kept((0.4, 0.4), 0)
    assert max(drawn) - min(drawn) > 0.5 * (kept((0.4, 0.4), 0) - kept((0.6, 0.6), 0))
    assert drawn == [kept((0.4, 0.6), seed) for seed in range(20)]


def test_a_turned_kernel_has_the_covariance_it_was_given() -> None:
    covariance = torch.tensor([[2.0, 0.7], [0.7, 1.0]])
    kernel = gaussian_kernel(10, covariance)
    axis = torch.arange(-10.0, 11.0)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    moments = [(kernel * a * b).sum() for a, b in ((x, x), (x, y), (y, y))]
    torch.testing.assert_close(
        torch.stack(moments), torch.tensor([2.0, 0.7, 1.0]), atol=1e-2, rtol=0
    )


def test_bsr_is_a_pure_function_of_picture_and_generator() -> None:
    x = render(Shapes(64).scene(0), 64)
    before = x.clone()
    state = torch.get_rng_state()
    a, b, c = (bsr(x, 16, _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert a.shape == (3, 16, 16) and a.dtype == torch.float32 and a.abs().max() <= 1


def test_bsr_loses_detail_but_shows_the_same() -> None:
    x = torch.stack([render(Shapes(64).scene(i), 64) for i in range(12)])
    clean = resize(x, 16)
    degraded = torch.stack([bsr(image, 16, _generator(k)) for k, image in enumerate(x)])
    assert 12 < float(psnr(degraded, clean).mean()) < 40
    assert gradient_energy(degraded).mean() < gradient_energy(clean).mean()


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="can't degrade 32 x 32 to 64 x 64"):
        bsr(torch.zeros(3, 32, 32), 64, _generator(0))
