"""Shapes: drawn exactly, read back exactly, and held-out combinations that never leak."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torchvision.transforms.functional as transforms

from unclip.data.open import open_dataset
from unclip.data.shapes import (
    PALETTE,
    PLACES,
    SHAPES,
    SIZES,
    Object,
    Scene,
    Shapes,
    coverage,
    parse_scene,
    render,
    score,
)


def _scenes(n: int) -> list[Scene]:
    singles = [Scene((Object(*o),)) for o in itertools.product(PALETTE, SHAPES, PLACES, SIZES)]
    return singles[:: len(singles) // n] + [Shapes(32, "train").scene(i) for i in range(n)]


@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_true_pictures_score_one_hundred_percent(resolution: int) -> None:
    scenes = _scenes(64 if resolution < 128 else 16)
    figures = score(torch.stack([render(scene, resolution) for scene in scenes]), scenes)
    assert figures == dict.fromkeys(
        ("colour", "shape", "position", "size", "binding", "exact"), 1.0
    )


@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_blurred_and_noisy_pictures_are_still_read(resolution: int) -> None:
    scenes = _scenes(64 if resolution < 128 else 16)
    x = torch.stack([render(scene, resolution) for scene in scenes])
    x = transforms.gaussian_blur(x, [5, 5], [resolution / 90 + 0.3] * 2)
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert min(score(x.clamp(-1, 1), scenes).values()) > 0.95


def test_wrong_pictures_lose_exactly_what_is_wrong() -> None:
    red = Object("red", "circle", "on the left", "small")
    blue = Object("blue", "square", "on the right", "large")
    asked = Scene((red, blue))
    swapped = Scene(
        (
            Object("blue", "circle", "on the left", "small"),
            Object("red", "square", "on the right", "large"),
        )
    )
    figures = score(render(swapped, 64)[None], [asked])
    assert figures["colour"] == figures["shape"] == figures["position"] == figures["size"] == 1
    assert figures["binding"] == figures["exact"] == 0
    figures = score(render(Scene((red,)), 64)[None], [asked])
    assert figures["colour"] == 0.5 and figures["binding"] == 0
    larger = Scene((Object("red", "circle", "on the left", "large"), blue))
    figures = score(render(larger, 64)[None], [asked])
    assert figures["binding"] == 1 and figures["size"] == 0.5 and figures["exact"] == 0
    blank = score(torch.ones(1, 3, 64, 64), [asked])
    assert set(blank.values()) == {0.0}


def test_touching_objects_of_two_colours_are_told_apart() -> None:
    pair = Scene(
        (
            Object("red", "square", "on the left", "large", (0.11, 0.0)),
            Object("blue", "square", "on the right", "large", (-0.09, 0.0)),
        )
    )
    assert {item.colour for item in parse_scene(render(pair, 64))} == {"red", "blue"}


def test_garbage_gets_an_answer() -> None:
    g = torch.Generator().manual_seed(0)
    for x in (torch.randn(3, 32, 32, generator=g), -torch.ones(3, 32, 32), torch.ones(3, 32, 32)):
        assert isinstance(parse_scene(x.clamp(-1, 1)), list)


def test_held_out_combinations_never_occur_in_training() -> None:
    train, val = Shapes(32, "train"), Shapes(32, "val")
    held = [val.scene(i) for i in range(len(val))]
    assert all(scene.held_out for scene in held)
    assert len({scene.caption for scene in held}) == len(val) == 512
    seen = [train.scene(i) for i in range(0, len(train), 100)]
    assert not any(scene.held_out for scene in seen)
    assert 0.4 < sum(len(scene.objects) == 2 for scene in seen) / len(seen) < 0.6
    every = [Scene((Object(*o),)) for o in itertools.product(PALETTE, SHAPES, PLACES, SIZES)]
    assert 0.05 < sum(scene.held_out for scene in every) / len(every) < 0.15


def test_pictures_and_captions_are_pure_functions() -> None:
    data = open_dataset("shapes", 32)
    for index in (0, 7):
        a, b = (data.get(index, torch.Generator().manual_seed(1)) for _ in range(2))
        assert a.caption == b.caption and torch.equal(a.image, b.image)
    index = next(i for i in range(50) if len(Shapes(32).scene(i).objects) == 2)
    captions = {data.get(index, torch.Generator().manual_seed(k)).caption for k in range(40)}
    assert len(captions) == 4  # with and without sizes, either object first
    val = open_dataset("shapes:val", 32)
    assert val.get(0, torch.Generator()).caption == Shapes(32, "val").scene(0).caption
    item = Object("orange", "cross", "at the top", "small")
    assert item.phrase == "a small orange cross at the top"
    assert item.plain == "an orange cross at the top"


@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes_have_the_same_area_and_centre(shape: str) -> None:
    cover = coverage(shape, 0.45, 0.55, 0.155, 256)
    pixel = (torch.arange(256) + 0.5) / 256
    area = float(cover.mean())
    assert area == pytest.approx(math.pi * 0.155**2, rel=0.01)
    x, y = ((cover.mean(dim) * pixel).sum() / cover.mean(dim).sum() for dim in (0, 1))
    assert float(x) == pytest.approx(0.45, abs=1e-3) and float(y) == pytest.approx(0.55, abs=1e-3)


def test_a_scene_looks_the_same_at_every_resolution() -> None:
    scene = Shapes(32).scene(3)
    small = torch.nn.functional.avg_pool2d(render(scene, 256)[None], 4)[0]
    assert (small - render(scene, 64)).abs().mean() < 0.01
