"""Embeddings as directions: interpolated, mixed, turned towards a caption."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from unclip.clip.sphere import mix, slerp, text_diff
from unclip.errors import ConfigError


def some(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(a.double(), b.double(), dim=-1).clamp(-1, 1).acos()


def test_slerp_ends_at_its_ends_to_the_bit() -> None:
    a, b = some(4), some(4, 1)
    assert torch.equal(slerp(a, b, 0), a)
    assert torch.equal(slerp(a, b, 1), b)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 1.3, -0.2])
def test_slerp_turns_by_the_share_of_the_angle_in_the_plane_of_both(share: float) -> None:
    a, b = some(4), some(4, 1)
    c = slerp(a, b, share)
    torch.testing.assert_close(angle(a, c), abs(share) * angle(a, b), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        c.norm(dim=-1), torch.lerp(a.norm(dim=-1), b.norm(dim=-1), share), rtol=1e-5, atol=0
    )
    for k in range(4):
        plane = torch.stack([a[k], b[k], c[k]]).double()
        assert float(torch.linalg.svdvals(plane)[-1]) < 1e-4


def test_slerp_on_a_circle_is_its_closed_form() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    shares = torch.linspace(0, 1, 7)
    c = slerp(a.expand(7, 2), b.expand(7, 2), shares)
    expected = torch.stack([(shares * math.pi / 2).cos(), (shares * math.pi / 2).sin()], -1)
    torch.testing.assert_close(c, expected)


def test_slerp_of_equal_embeddings_is_that_embedding() -> None:
    a = some(3)
    torch.testing.assert_close(slerp(a, a.clone(), 0.3), a)
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)


def test_slerp_between_opposites_is_refused() -> None:
    with pytest.raises(ConfigError, match="opposite"):
        slerp(some(2), -some(2), 0.5)


def test_an_embedding_of_weight_one_comes_back_to_the_bit() -> None:
    z = some(3)
    assert torch.equal(mix(z[:1], [0.3]), z[0])
    assert torch.equal(mix(z, [0, 1, 0]), z[1])


def test_a_mix_of_two_equal_weights_is_half_way() -> None:
    z = F.normalize(some(2), dim=-1)
    torch.testing.assert_close(mix(z, [2, 2]), slerp(z[0], z[1], 0.5))


def test_a_mix_does_not_depend_on_order_or_scale_of_weights() -> None:
    z = some(3)
    torch.testing.assert_close(mix(z, [1, 2, 3]), mix(z.flip(0), [30, 20, 10]))


@pytest.mark.parametrize("weights", [[1, -1], [0, 0], [math.nan, 1], [1], [math.inf, 1]])
def test_weights_that_make_no_mean_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weights"):
        mix(some(2), weights)


def test_embeddings_that_cancel_are_refused() -> None:
    z = some(1)
    with pytest.raises(ConfigError, match="cancel"):
        mix(torch.cat([z, -z]), [1, 1])


def test_a_text_diff_keeps_the_norm_and_turns_towards_the_difference() -> None:
    z, old, new = some(2), some(1, 1)[0], some(1, 2)[0]
    turned = text_diff(z, old, new, 0.4)
    torch.testing.assert_close(turned.norm(dim=-1), z.norm(dim=-1))
    difference = F.normalize(new, dim=-1) - F.normalize(old, dim=-1)
    before, after = angle(z, difference.expand(2, -1)), angle(turned, difference.expand(2, -1))
    torch.testing.assert_close(after, 0.6 * before, rtol=1e-4, atol=1e-5)
    assert torch.equal(text_diff(z, old, new, 0.0), z)


def test_captions_of_one_embedding_are_refused() -> None:
    with pytest.raises(ConfigError, match="same embedding"):
        text_diff(some(1), some(1, 1)[0], 3 * some(1, 1)[0], 0.3)
