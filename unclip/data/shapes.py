"""Coloured shapes with exact captions: trains in minutes and is scored from the pixels.

R resolution, K colours, H and W rows and columns. Scenes hold one object in a 3 x 3 grid of places
or two side by side or stacked, on white. A tenth of all combinations never occurs in training.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip import randomness
from unclip.data.sample import Sample

PALETTE = {
    "red": (220, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (245, 205, 40),
    "green": (40, 160, 70),
    "cyan": (60, 190, 210),
    "blue": (50, 90, 220),
    "purple": (140, 60, 180),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.095, "large": 0.155}  # radius of the circle of equal area, in image widths
PLACES = {
    "in the top left corner": (0.26, 0.27),
    "at the top": (0.5, 0.27),
    "in the top right corner": (0.74, 0.27),
    "on the left": (0.26, 0.5),
    "in the centre": (0.5, 0.5),
    "on the right": (0.74, 0.5),
    "in the bottom left corner": (0.26, 0.73),
    "at the bottom": (0.5, 0.73),
    "in the bottom right corner": (0.74, 0.73),
}
PAIRS = (("on the left", "on the right"), ("at the top", "at the bottom"))
JITTER = 0.02
TRAIN_SCENES, VAL_SCENES = 50_000, 512


@dataclass(frozen=True)
class Object:
    """One shape; `offset` moves it a little from the middle of its place."""

    colour: str
    shape: str
    position: str
    size: str
    offset: tuple[float, float] = (0.0, 0.0)

    @property
    def phrase(self) -> str:
        """As in a caption, with the size."""
        return f"a {self.size} {self.colour} {self.shape} {self.position}"

    @property
    def plain(self) -> str:
        """As in a caption, without the size."""
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.shape} {self.position}"


@dataclass(frozen=True)
class Scene:
    """One or two objects that don't overlap."""

    objects: tuple[Object, ...]

    @property
    def caption(self) -> str:
        """The canonical caption: every object with size, colour, shape and place."""
        return " and ".join(item.phrase for item in self.objects)

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept from training (a tenth are, by a fixed hash).

        Single objects by all four properties, pairs by which coloured shapes come together.
        """
        if len(self.objects) == 1:
            text = self.caption
        else:
            text = "+".join(sorted(f"{item.colour} {item.shape}" for item in self.objects))
        return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] < 26


class Shapes:
    """Virtual scenes: 50,000 in `train`; in `val` 512 of the combinations held out of training."""

    def __init__(self, resolution: int, split: str = "train") -> None:
        self.name = "shapes" if split == "train" else f"shapes:{split}"
        self.resolution = resolution
        self.split = split

    def __len__(self) -> int:
        return TRAIN_SCENES if self.split == "train" else VAL_SCENES

    def scene(self, index: int) -> Scene:
        """What picture `index` shows, always the same."""
        return _held_out_scenes()[index] if self.split == "val" else _training_scene(index)

    def attributes(self, index: int) -> dict[str, str]:
        """What picture `index` shows, where it is a single object."""
        first, *more = self.scene(index).objects
        names = () if more else ("colour", "shape", "position", "size")
        return {name: getattr(first, name) for name in names}

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Picture `index`; in training the generator picks the caption's wording."""
        scene = self.scene(index)
        caption = scene.caption if self.split == "val" else _vary_caption(scene, generator)
        return Sample(render(scene, self.resolution), caption, f"{self.name}-{index}")


def _vary_caption(scene: Scene, generator: torch.Generator) -> str:
    """The canonical caption; a quarter without sizes, half of the pairs the other way round."""
    plain, backwards = (torch.rand(2, generator=generator) < torch.tensor([0.25, 0.5])).tolist()
    objects = scene.objects[::-1] if backwards else scene.objects
    return " and ".join(item.plain if plain else item.phrase for item in objects)


def _draw_scene(generator: torch.Generator, pair: bool) -> Scene:
    def pick(options: Sequence[str]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def offset() -> tuple[float, float]:
        x, y = ((2 * torch.rand(2, generator=generator) - 1) * JITTER).tolist()
        return x, y

    places: tuple[str, ...]
    if pair:
        places = PAIRS[int(torch.randint(len(PAIRS), (), generator=generator))]
        order = torch.randperm(len(PALETTE), generator=generator)[:2].tolist()  # two colours
        colours = [list(PALETTE)[k] for k in order]
    else:
        places, colours = (pick(list(PLACES)),), [pick(list(PALETTE))]
    return Scene(
        tuple(
            Object(colour, pick(SHAPES), place, pick(list(SIZES)), offset())
            for colour, place in zip(colours, places, strict=True)
        )
    )


def _training_scene(index: int) -> Scene:
    generator = randomness.generator(0, "shapes", index)
    pair = bool(torch.rand((), generator=generator) < 0.5)
    while True:
        scene = _draw_scene(generator, pair)
        if not scene.held_out:
            return scene


@lru_cache(maxsize=1)
def _held_out_scenes() -> tuple[Scene, ...]:
    """Every held-out single object, then held-out pairs with captions of their own."""
    scenes = {}
    for combination in itertools.product(PALETTE, SHAPES, PLACES, SIZES):
        scene = Scene((Object(*combination),))
        if scene.held_out:
            scenes[scene.caption] = scene
    generator = randomness.generator(0, "shapes:val")
    while len(scenes) < VAL_SCENES:
        scene = _draw_scene(generator, pair=True)
        if scene.held_out:
            scenes.setdefault(scene.caption, scene)
    return tuple(scenes.values())


def render(scene: Scene, resolution: int) -> Tensor:
    """Draw a scene with smooth edges. **Shapes**: → (3, R, R) float32 in [-1, 1]."""
    image = torch.ones(3, resolution, resolution)
    for item in scene.objects:
        x, y = (p + o for p, o in zip(PLACES[item.position], item.offset, strict=True))
        cover = coverage(item.shape, x, y, SIZES[item.size], resolution)
        colour = torch.tensor(PALETTE[item.colour]).view(3, 1, 1) / 127.5 - 1
        image = image + cover * (colour - image)
    return image


def coverage(shape: str, x: float, y: float, radius: float, resolution: int) -> Tensor:
    """How much of each pixel a shape covers, from its signed distance.

    All shapes have the area of a circle of `radius` and their centroid at (x, y).
    **Units**: image widths. **Shapes**: → (R, R) float32 in [0, 1].
    """
    pixel = (torch.arange(resolution) + 0.5) / resolution
    dx, dy = (pixel - x)[None, :], (pixel - y)[:, None]
    if shape == "circle":
        distance = torch.hypot(dx, dy) - radius
    elif shape == "square":
        distance = _box(dx, dy, radius * math.sqrt(math.pi) / 2, radius * math.sqrt(math.pi) / 2)
    elif shape == "triangle":  # equilateral, point up; area 3 √3 inradius²
        inradius = radius * math.sqrt(math.pi / (3 * math.sqrt(3)))
        slope = math.sqrt(3) / 2
        sides = torch.maximum(slope * dx - dy / 2, -slope * dx - dy / 2)
        distance = torch.maximum(sides, dy) - inradius
    else:
        assert shape == "cross", shape
        arm = radius * math.sqrt(math.pi / 5) / 2  # five squares of side 2 arm
        distance = torch.minimum(_box(dx, dy, 3 * arm, arm), _box(dx, dy, arm, 3 * arm))
    return (0.5 - distance * resolution).clamp(0, 1)


def _box(dx: Tensor, dy: Tensor, half_width: float, half_height: float) -> Tensor:
    across, down = torch.broadcast_tensors(dx.abs() - half_width, dy.abs() - half_height)
    outside = torch.hypot(across.clamp(min=0), down.clamp(min=0))
    return outside + torch.maximum(across, down).clamp(max=0)


def parse_scene(image: Tensor) -> list[Object]:
    """What a picture shows, read from its pixels; objects from left to right, top to bottom.

    Every pixel is explained as a mixture of white and one palette colour; connected pixels form
    objects; a shape is the one whose drawing of the same area and centre fits best.

    **Shapes**: image (3, R, R) in [-1, 1].
    """
    resolution = image.shape[-1]
    cover, colour = _unmix(image.detach().float().cpu())
    least = math.pi * (SIZES["small"] * resolution) ** 2 / 3
    found = []
    for region in _regions(cover > 0.5, least):
        votes = torch.bincount(colour[region], minlength=len(PALETTE))
        # Touching objects of two colours are one region with two strong parties.
        parties = [k for k in votes.argsort(descending=True).tolist() if votes[k] >= least]
        for k in parties[:2] if len(parties) > 1 else [int(votes.argmax())]:
            part = region if len(parties) < 2 else region & (colour == k)
            found.append(_describe(_soft(part, cover, colour, k, len(parties) > 1), k))
    places = list(PLACES)
    return sorted(found, key=lambda item: places.index(item.position))


def _unmix(image: Tensor) -> tuple[Tensor, Tensor]:
    """**Shapes**: (3, H, W) → cover (H, W) in [0, 1], colour (H, W) int64 into the palette."""
    from_white = (1 - image) / 2
    palette = 1 - torch.tensor(list(PALETTE.values())) / 255  # (K, 3)
    amount = torch.einsum("kc,chw->khw", palette, from_white)  # (K, H, W)
    amount = (amount / palette.square().sum(1).view(-1, 1, 1)).clamp(0, 1)
    mixture = amount[:, None] * palette[:, :, None, None]  # (K, 3, H, W)
    colour = (mixture - from_white).square().sum(1).argmin(0)  # (H, W)
    return amount.gather(0, colour[None])[0], colour


def _regions(mask: Tensor, least: float) -> list[Tensor]:
    """Connected parts (8 neighbours) of at least so many pixels. **Shapes**: each (H, W) bool."""
    labels = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask
    while True:  # the largest number spreads through each part
        spread = F.max_pool2d(labels[None], 3, stride=1, padding=1)[0] * mask
        # A label is also the (one-based) pixel it came from, which may know a larger one by now.
        spread[mask] = spread.flatten()[spread[mask].long() - 1]
        if torch.equal(spread, labels):
            break
        labels = spread
    values, counts = labels[mask].unique(return_counts=True)
    return [labels == value for value in values[counts >= least]]


def _soft(part: Tensor, cover: Tensor, colour: Tensor, k: int, divided: bool) -> Tensor:
    """A part's coverage with its smooth edge of up to two pixels. **Shapes**: → (H, W)."""
    near = F.max_pool2d(part[None].float(), 5, stride=1, padding=2)[0] > 0
    if divided:  # leave the neighbour of another colour out
        near &= colour == k
    return cover * near * (cover > 0.15)


def _describe(cover: Tensor, colour: int) -> Object:
    resolution = cover.shape[-1]
    pixel = (torch.arange(resolution) + 0.5) / resolution
    area = cover.sum()
    x, y = float((cover.sum(0) * pixel).sum() / area), float((cover.sum(1) * pixel).sum() / area)
    radius = float((area / math.pi).sqrt()) / resolution
    misfit = [
        (cover - coverage(shape, x, y, radius, resolution)).square().sum() for shape in SHAPES
    ]
    return Object(
        colour=list(PALETTE)[colour],
        shape=SHAPES[int(torch.stack(misfit).argmin())],
        position=min(PLACES, key=lambda place: math.dist(PLACES[place], (x, y))),
        size="small" if radius < math.sqrt(SIZES["small"] * SIZES["large"]) else "large",
    )


def score(images: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """How well pictures show what was asked for, each from 0 to 1.

    `colour`, `shape`, `position` and `size` count which of them occur, whatever they belong to;
    `binding`, over scenes of two objects, asks for each object's colour, shape and place
    together; `exact` asks for everything. A wrong number of objects costs in every figure.

    **Shapes**: images (B, 3, R, R) in [-1, 1]; B scenes.
    """
    assert len(images) == len(scenes) > 0
    figures: dict[str, list[float]] = {}
    for image, scene in zip(images, scenes, strict=True):
        seen, asked = parse_scene(image), scene.objects
        for name in ("colour", "shape", "position", "size"):
            right = Counter(getattr(o, name) for o in seen) & Counter(
                getattr(o, name) for o in asked
            )
            figures.setdefault(name, []).append(right.total() / max(len(seen), len(asked)))
        bound = _bag(seen, "colour", "shape", "position") == _bag(
            asked, "colour", "shape", "position"
        )
        everything = bound and _bag(seen, "colour", "shape", "position", "size") == _bag(
            asked, "colour", "shape", "position", "size"
        )
        if len(asked) == 2:
            figures.setdefault("binding", []).append(float(bound))
        figures.setdefault("exact", []).append(float(everything))
    return {name: sum(values) / len(values) for name, values in figures.items()}


def _bag(objects: Sequence[Object], *names: str) -> Counter[tuple[str, ...]]:
    return Counter(tuple(getattr(item, name) for name in names) for item in objects)
