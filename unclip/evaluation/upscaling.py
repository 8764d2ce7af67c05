"""Each upsampler against bicubic, from the same shrunken real picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from PIL import Image

from unclip.data.emoji import LARGEST_ARRAY
from unclip.data.open import open_dataset
from unclip.data.sample import fixed
from unclip.evaluation.drawings import Kept
from unclip.evaluation.scores import Scores, Upscaled, mean_scores, upscale_again
from unclip.images import to_pil
from unclip.options import BY_STAGE
from unclip.pipeline import UnCLIP
from unclip.randomness import permutation
from unclip.stages.stage import Stage

TILE = 256  # the page shows the middle of larger pictures, pixel for pixel
SHOWN = 6


def upscaling(
    pipe: UnCLIP, spec: str, count: int, kept: Kept, options: Mapping[str, Any]
) -> tuple[dict[str, Scores], dict[str, list[Image.Image]]]:
    """PSNR and gradient energy of each upsampler, and of all in a chain, beside bicubic's.

    Also triples of tiles to look at: bicubic, upsampler, real. Real pictures are taken to have the
    upsampler's size; smaller files have no truth there. Of a call's `options` those
    count that are said of upsamplers by name.
    """
    stages = pipe.upsamplers
    spans = [[stage] for stage in stages]
    joined = (a.side == b.low for a, b in pairwise(stages))
    if len(stages) > 1 and all(joined):
        spans.append(list(stages))
    scores: dict[str, Scores] = {}
    tiles: dict[str, list[Image.Image]] = {}
    for span in spans if count else ():
        low, high = span[0].low, span[-1].side
        cases = _enlarge(pipe, _Real(spec, high, count), low, high, kept, _said(options, span))
        scores[f"{low} → {high}"] = mean_scores([case.scores() for case in cases])
        tiles[f"{low} → {high}"] = [
            _middle(x) for case in cases[:SHOWN] for x in (case.bicubic, case.made, case.real)
        ]
    return scores, tiles


def _said(options: Mapping[str, Any], stages: Sequence[Stage]) -> dict[str, Any]:
    """What options by stage say of these."""
    by_stage = {key: value for key in BY_STAGE if isinstance(value := options.get(key), dict)}
    names = [stage.name for stage in stages]
    own = {key: {n: value[n] for n in names if n in value} for key, value in by_stage.items()}
    return {key: value for key, value in own.items() if value}


def _enlarge(
    pipe: UnCLIP, real: _Real, low: int, high: int, kept: Kept, given: Mapping[str, Any]
) -> list[Upscaled]:
    def draw(rows: range) -> list[Image.Image]:
        (k,) = rows
        upscale = partial(pipe.upscale, seed=k, size=high, **given)
        return [upscale_again(upscale, real(k), low).made]

    made = kept.draw(f"upscaled-{low}-{high}", len(real), draw, together=1)
    # Kept pictures are not drawn again; what bicubic makes of the same small picture is.
    cases = [upscale_again(Image.Image.copy, real(k), low) for k in range(len(real))]
    return [replace(case, made=image) for case, image in zip(cases, made, strict=True)]


class _Real:
    """The first pictures of a data set, in the order in which all of it is measured."""

    def __init__(self, spec: str, side: int, count: int):
        if side > LARGEST_ARRAY and spec.startswith("emoji"):  # one set has no truth above
            spec = spec.replace("emoji-vector", "emoji").replace("emoji", "emoji-vector")
        self.dataset = open_dataset(spec, side)
        self.order = permutation(0, 0, len(self.dataset))[:count].tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __call__(self, k: int) -> Image.Image:
        return to_pil(fixed(self.dataset, self.order[k]).image)


def _middle(image: Image.Image) -> Image.Image:
    if image.width <= TILE:
        return image
    edge = (image.width - TILE) // 2
    return image.crop((edge, edge, edge + TILE, edge + TILE))
