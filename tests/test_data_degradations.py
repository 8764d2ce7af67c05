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
    spread = blur(point, _generator(0))
    torch.testing.assert_close(spread[0, 2:5, 2:5], torch.outer(line, line))
    assert float(spread.sum()) == pytest.approx(3)
    flat = torch.full((3, 5, 5), 0.3)
    torch.testing.assert_close(blur(flat, _generator(0)), flat)


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


def test_bsr_loses_detail_but_shows_the_same_and_more_so_when_stronger() -> None:
    x = torch.stack([render(Shapes(64).scene(i), 64) for i in range(12)])
    clean = resize(x, 16)

    def degraded(strength: float) -> torch.Tensor:
        parts = [bsr(image, 16, _generator(k), strength) for k, image in enumerate(x)]
        return torch.stack(parts)

    quality = [float(psnr(degraded(strength), clean).mean()) for strength in (0.2, 1.0, 3.0)]
    assert quality[0] > quality[1] > quality[2] > 12
    assert gradient_energy(degraded(1.0)).mean() < gradient_energy(clean).mean()


def test_strength_nought_only_resizes_and_impossible_requests_are_refused() -> None:
    flat = torch.full((3, 32, 32), 0.25)
    torch.testing.assert_close(bsr(flat, 8, _generator(0), 0.0), torch.full((3, 8, 8), 0.25))
    with pytest.raises(ConfigError, match="can't degrade 32 x 32 to 64 x 64"):
        bsr(flat, 64, _generator(0))
    with pytest.raises(ConfigError, match="strength = -1"):
        bsr(flat, 8, _generator(0), -1)
