"""What can be done on the page: each verb calls the pipeline with what its form gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unclip import edit as edits
from unclip.app.studio import NO_PICTURE, Verb, bounded, of_a_size, uploaded
from unclip.cli.arguments import numbers
from unclip.errors import DataError
from unclip.images import to_rgb
from unclip.options import Options
from unclip.pipeline import UnCLIP

Pictures = Iterable[Image.Image]


def text(pipe: UnCLIP, seed: int, options: Options, *, caption: str, n: int) -> Pictures:
    """Pictures of a caption."""
    return pipe.iterate(caption, bounded("n", n), seed, options=options)


def vary(
    pipe: UnCLIP, seed: int, options: Options, *, picture: Path | None, change: float, n: int
) -> Pictures:
    """Variations of a picture; below a change of 1 they start from its own noise."""
    given, count = uploaded(picture), bounded("n", n)
    if change < 1:
        return edits.vary(pipe, given, count, seed, options=options)
    return pipe.iterate(None, count, seed, image=given, options=options)


def mix(
    pipe: UnCLIP,
    seed: int,
    options: Options,
    *,
    first: Path | None,
    first_weight: float,
    second: Path | None,
    second_weight: float,
    caption: str,
    caption_weight: float,
    n: int,
) -> Pictures:
    """Pictures of the mean of up to two pictures and a text."""
    named = [(first, first_weight), (second, second_weight)]
    parts: list[tuple[Any, float]] = [(uploaded(x), weight) for x, weight in named if x is not None]
    if caption.strip():
        parts.append((caption, caption_weight))
    weights = [weight for _, weight in parts]
    mixed_of = [x for x, _ in parts]
    return edits.mix(pipe, mixed_of, weights, bounded("n", n), seed, options=options)


def interpolate(
    pipe: UnCLIP,
    seed: int,
    options: Options,
    *,
    first: Path | None,
    second: Path | None,
    frames: int,
    fixed_noise: bool,
) -> Pictures:
    """Frames from one picture to the other."""
    ends, count = [uploaded(first), uploaded(second)], bounded("frames", frames)
    given: dict[str, Any] = {"fixed_noise": fixed_noise, "seed": seed, "options": options}
    return edits.interpolate(pipe, ends, count, **given)


def edit(
    pipe: UnCLIP,
    seed: int,
    options: Options,
    *,
    picture: Path | None,
    source: str,
    caption: str,
    strength: str,
) -> Pictures:
    """A picture turned from one caption towards another, once for each strength."""
    turns, given = numbers("strength", strength), uploaded(picture)
    bounded("n", len(turns))
    return edits.text_diff(pipe, given, caption, source, turns, seed, options=options)


def inpaint(
    pipe: UnCLIP,
    seed: int,
    options: Options,
    *,
    painted: dict[str, Any] | None,
    caption: str,
    strength: float,
    repeats: int,
    n: int,
) -> Pictures:
    """A picture whose painted part is drawn anew; where nothing is painted, all of it."""
    picture, mask = unpainted(painted)
    given: dict[str, Any] = {"repeats": bounded("repeats", repeats), "options": options}
    how = caption.strip() or None, strength, bounded("n", n), seed
    return edits.inpaint(pipe, picture, mask, *how, **given)


def upscale(pipe: UnCLIP, seed: int, options: Options, *, picture: Path | None) -> Pictures:
    """A picture through the upsamplers."""
    return [pipe.upscale(uploaded(picture), seed, options=options)]


def unpainted(painted: dict[str, Any] | None) -> tuple[Image.Image, Image.Image | None]:
    """The picture below the brush, and what was painted as a mask, None if that is nothing.

    **Raises**: `DataError` without a picture, or for one that is too large.
    """
    if painted is None or painted["background"] is None:
        raise DataError(NO_PICTURE)
    picture = to_rgb(of_a_size(painted["background"], "the picture"))
    mask = np.zeros((picture.height, picture.width), bool)
    for layer in painted["layers"]:
        mask |= np.asarray(layer.getchannel("A")) > 0
    return picture, Image.fromarray(mask.astype(np.uint8) * 255) if mask.any() else None


def varied(pipe: UnCLIP, options: Options, change: float) -> tuple[UnCLIP, Options]:
    """What draws variations: below a change of 1, from inverted noise with so much fresh noise."""
    if change < 1:
        return edits.exact(pipe), replace(options, eta=change)
    return pipe, pipe.varied(options)


def mixed(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was mixed: files and texts, and their weights."""
    files = [(x.name, given[f"{k}_weight"]) for k in ("first", "second") if (x := given[k])]
    said = given["caption"].strip()
    return {"images": files, "texts": [(said, given["caption_weight"])] if said else []}


def painted_over(given: Mapping[str, Any]) -> dict[str, Any]:
    """Whether anything was painted over, and told what to be."""
    mask = unpainted(given["painted"])[1] and "painted"
    return {"mask": mask, "as_it_is": not given["caption"].strip()}


TEXT = Verb("text", text)
VARY = Verb(
    "vary",
    vary,
    drawn_by=lambda pipe, options, given: varied(pipe, options, given["change"]),
    own=lambda given, k: {"invert": given["change"] < 1},
)
MIX = Verb(
    "mix",
    mix,
    drawn_by=lambda pipe, options, given: (pipe, pipe.varied(options)),
    own=lambda given, k: {**mixed(given), "place": k},
)
INTERPOLATE = Verb(
    "interpolate",
    interpolate,
    drawn_by=lambda pipe, options, given: (edits.exact(pipe), options),
    own=lambda given, k: {"place": k},
    one_seed=True,
)
EDIT = Verb(
    "edit",
    edit,
    drawn_by=lambda pipe, options, given: (edits.exact(pipe), options),
    own=lambda given, k: {"strength": numbers("strength", given["strength"])[k]},
    one_seed=True,
)
INPAINT = Verb(
    "inpaint",
    inpaint,
    drawn_by=lambda pipe, options, given: (edits.anew(pipe, given["strength"]), options),
    own=lambda given, k: painted_over(given),
)
UPSCALE = Verb("upscale", upscale, meant_for="upsampler", one_seed=True)
