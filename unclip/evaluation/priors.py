"""From text to an embedding in five ways, compared on held-out captions (Section 5.1).

N captions, S seeds each, D CLIP embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from unclip.errors import UnclipError
from unclip.evaluation import measures
from unclip.evaluation.findings import Findings
from unclip.evaluation.report import Columns, lines_of
from unclip.evaluation.scores import agreement, hit_rates, ranks
from unclip.evaluation.setting import DISTRIBUTION, OWN, Request, Setting, set_up
from unclip.images import grid, to_pil
from unclip.pipeline import UnCLIP
from unclip.stages.prior import PriorName, check_prior

SHOWN, LARGE = 8, 128  # captions in the figure, and the least side of a picture there
TITLES = {
    "real": "the data's own pictures",
    "true": "the true embedding",
    "diffusion": "diffusion prior",
    "ar": "autoregressive prior",
    "draft": "draft: regression alone",
    "text": "text embedding in its place",
    "none": "no embedding, the caption alone",
}
LIKENESS: Columns = {  # see `likeness`
    "frechet": ("Fréchet", 1, 1),
    "kernel": ("kernel", 1000, 0),
    "precision": ("precision", 100, 0),
    "recall": ("recall", 100, 0),
}
COLUMNS: Columns = {
    "top1": ("name top-1", 100, 1),
    "top5": ("top-5", 100, 1),
    **LIKENESS,
    "variety": ("over seeds", 1, 3),
    "cosine": ("cosine to true z", 1, 3),
    "seconds": ("s a caption", 1, 3),
}
MEANING = """\
Decoder and its noise are the same in every row. **Name**: what {judge} calls the picture, among
{names} names. **Fréchet**, **kernel** × 1000: distance from real pictures in features of {eye};
**precision**, **recall**: % of pictures near a real one, and of real ones near a picture; of one
seed at a time. **Over seeds**: mean cosine distance between pictures of one caption. **Cosine**: of
the embedding to that of the caption's own real picture. **s a caption**: seconds for the
embedding.""".replace("\n", " ")


def compare_priors(pipe: UnCLIP, model: str, request: Request, work: Path) -> Findings:
    """Draw pictures of the same captions in every way that the model has, and measure them.

    Held-out captions, or where there are none the data's first. **Raises**: as `set_up` does.
    """
    notes, ways = [], []
    for way in get_args(PriorName):
        try:
            check_prior(way, pipe.ar_prior if way == "ar" else pipe.prior, pipe.decoder)
        except UnclipError as error:
            notes.append(f"Left out, {TITLES[way]}: {str(error).partition(';')[0]}.")
        else:
            ways.append(way)
    with set_up(pipe, model, request, work) as setting:
        subjects = setting.held or setting.train
        count, seeds = setting.measured, request.seeds
        captions = [caption for caption in subjects.captions[:count] for _ in range(seeds)]
        z_true = subjects.seen.get(OWN, torch.empty(0))[:count]  # (N, D)
        pictures = {"real": [to_pil(x) for x in subjects.pictures(range(count))]}
        told: dict[str, Tensor | None] = {}  # (N S, D)
        scores: dict[str, Any] = {"real": {}}
        if len(z_true):
            told["true"], scores["true"] = z_true.repeat_interleave(seeds, 0), {}
        for way in ways:
            told[way], scores[way] = _embeddings(setting, captions, way)
        for way, z in told.items():
            draw = drawer(pipe, captions, z, {"size": setting.side, **setting.options})
            pictures[way] = setting.kept.draw(f"prior-{way}", len(captions), draw)
            if z is not None and len(z_true):
                cosine = agreement(z.cpu(), z_true.repeat_interleave(seeds, 0))["cosine"]
                scores[way]["cosine"] = cosine
        tables = []
        by_judge = named(setting, pictures, subjects.names[:count])
        for eye in request.features:
            about = MEANING.format(
                judge=setting.judge_in_words,
                names=len(setting.names),
                eye=setting.eyes[eye].network.about,
            )
            rows = {
                TITLES[way]: scores[way]
                | by_judge.get(way, {})
                | likeness(setting, eye, x, 1 if way == "real" else seeds)
                for way, x in pictures.items()
            }
            title = f"Priors on {count} captions, {seeds} seeds each, by {eye}"
            tables.append((title, about, *lines_of(COLUMNS, rows)))
            scores[eye] = rows
    shown = {TITLES[way]: images for way, images in pictures.items()}
    return Findings(scores, tables, figure(shown, subjects.captions[:count]), notes)


def _embeddings(
    setting: Setting, captions: list[str], way: str
) -> tuple[Tensor | None, dict[str, float]]:
    """z_image of captions, by way of a prior, and what it took. **Shapes**: → (N S, D)."""
    if way == "none":
        return None, {}
    since = time.perf_counter()
    z = setting.pipe.text_to_embedding(captions, prior=way, **setting.options)
    return z, {"seconds": (time.perf_counter() - since) / len(captions)}


def drawer(
    pipe: UnCLIP, captions: list[str], z: Tensor | None, options: dict[str, Any]
) -> Callable[[range], list[Image.Image]]:
    """Pictures of captions with these embeddings, or with none: picture k by seed k."""

    def draw(rows: range) -> list[Image.Image]:
        own = captions[rows.start : rows.stop]
        how = {"seed": rows.start, **options}
        if z is None:
            return pipe.text_to_image(own, prior="none", **how)
        return pipe.image_from_embedding(z[rows.start : rows.stop], own, **how)

    return draw


def named(
    setting: Setting, pictures: dict[str, list[Image.Image]], names: list[str]
) -> dict[str, dict[str, float]]:
    """How often the judge gives pictures their own name."""
    if setting.judge not in setting.judges:
        return {}
    z_text, number = setting.names_as_read_by(setting.judge), setting.names
    found = {}
    for way, images in pictures.items():
        own = torch.tensor([number.index(name) for name in names])
        own = own.repeat_interleave(len(images) // len(names))
        found[way] = hit_rates(ranks(setting.look(setting.judge, images), z_text, own))
    return found


def likeness(setting: Setting, eye: str, images: list[Image.Image], seeds: int) -> dict[str, float]:
    """Distance from real pictures that aren't measured themselves, and what varies by seed."""
    x, real = setting.look(eye, images), setting.train.seen[eye]
    if setting.held is None:
        real = real[setting.measured :]
    real = real[:DISTRIBUTION]
    # As many pictures in every row: these depend on how many there are.
    ones = [x[seed::seeds] for seed in range(seeds)]
    found = {
        "frechet": mean(measures.frechet_distance(one, real) for one in ones),
        "precision": mean(measures.realistic(one, real) for one in ones),
        "recall": mean(measures.realistic(real, one) for one in ones),
    }
    if len(x) > seeds:
        found["kernel"] = measures.kernel_distance(x, real, together=seeds)
    if seeds > 1:
        found["variety"] = mean(measures.variety(part) for part in x.split(seeds))
    return found


def figure(pictures: dict[str, list[Image.Image]], captions: list[str]) -> Image.Image:
    """A caption a row, a way a column, the first seed of each; none selected."""
    tiles, words = [], []
    for k, caption in enumerate(captions[:SHOWN]):
        for column, (way, images) in enumerate(pictures.items()):
            image = images[k * (len(images) // len(captions))]
            factor = max(1, LARGE // image.width)
            tiles.append(image.resize((factor * image.width,) * 2, Image.Resampling.NEAREST))
            words.append(way if column else f"{caption} ({way})")
    return grid(tiles, len(pictures), words)
