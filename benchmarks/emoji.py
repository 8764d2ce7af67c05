"""What the shipped model does on held-out emoji: retrieval, the decoder, the upsamplers.

Section 5 of the paper asks people; here two CLIPs and pixels answer. See benchmarks/README.md.
N held-out pictures, n samples of each, M = all held-out captions, D CLIP embedding.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from emoji_tables import report
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip import randomness
from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import check_same_encoder
from unclip.data.emoji import Emoji
from unclip.errors import CheckpointError, ConfigError, exit_on_error
from unclip.evaluation.scores import (
    agreement,
    coinciding,
    cosine_to_others,
    hit_rates,
    mean_scores,
    sample_ranks,
    shift,
    upscale_again,
)
from unclip.files.disk import write_json
from unclip.files.find import resolve_folder
from unclip.files.folder import CONFIG, WEIGHTS
from unclip.images import from_array, grid, load_image, to_pil, to_tensor
from unclip.pipeline import UnCLIP
from unclip.stages.stage import Stage

RASTER_SIDE = 256  # the one raster set has no truth above
CHUNK = 64  # pictures that are made, and saved, together
GRID_ROWS = 12
THUMBNAIL = 256


class HeldOut:
    """The validation split at one size, in a fixed shuffled order, so that a part is a fair one."""

    def __init__(self, resolution: int):
        self.emoji = Emoji(resolution, "val", vector_only=resolution > RASTER_SIDE)
        self.order = randomness.permutation(0, 0, len(self.emoji)).tolist()
        self.captions = [self.emoji.caption(i) for i in self.order]
        self.sibling = torch.tensor([self.emoji.has_fluent_sibling(i) for i in self.order])

    def __len__(self) -> int:
        return len(self.order)

    def picture(self, k: int) -> Tensor:
        """**Shapes**: → (3, R, R)."""
        return from_array(self.emoji.images(self.order[k]))

    def pictures(self, count: int) -> Tensor:
        """The first ones. **Shapes**: → (count, 3, R, R)."""
        return torch.stack([self.picture(k) for k in range(count)])


class Progress:
    """Pictures and scores of one measurement on disk, so that an interrupted run goes on."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        kept = len(list(folder.glob("*.png"))) + len(list(folder.glob("*.json")))
        if kept:
            tqdm.write(f"reusing {kept} results in {folder} (--fresh makes them anew)")

    def has(self, name: str) -> bool:
        """Whether this picture was made before."""
        return (self.folder / f"{name}.png").is_file()

    def save(self, name: str, image: Image.Image) -> None:
        """Keep a picture; never half of one."""
        beside = self.folder / f"{name}.tmp"
        image.save(beside, "PNG")
        os.replace(beside, self.folder / f"{name}.png")

    def load(self, name: str) -> Image.Image:
        """A picture that was made before."""
        return load_image(self.folder / f"{name}.png")


@dataclass(frozen=True)
class Bench:
    """What every measurement needs. `judges` holds "own" and, when given, "judge"."""

    pipe: UnCLIP
    model: Path
    judges: dict[str, FrozenCLIP]
    samples: int
    limit: int | None
    prior_candidates: int
    work: Path
    results: Path
    fresh: bool

    def progress(self, what: str, stages: Sequence[str]) -> Progress:
        """Where one measurement keeps its progress; other weights or settings, another place."""
        digest = hashlib.sha256(f"{self.samples}/{self.prior_candidates}".encode())
        for stage in stages:
            for file in (CONFIG, WEIGHTS):
                digest.update((self.model / stage / file).read_bytes())
        folder = self.work / f"{what}-{digest.hexdigest()[:12]}"
        if self.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        return Progress(folder)

    def count(self, held: HeldOut) -> int:
        """How many pictures to measure."""
        return min(self.limit or len(held), len(held))

    @property
    def own(self) -> FrozenCLIP:
        """The stack's CLIP. **Raises**: `ConfigError` without one."""
        if self.pipe.clip is None:
            raise ConfigError(f"{self.model} has no CLIP encoder; use --only upsamplers")
        return self.pipe.clip

    @property
    def decoder(self) -> Stage:
        """**Raises**: `ConfigError` without one."""
        if self.pipe.decoder is None:
            raise ConfigError(f"{self.model} has no decoder; use --only upsamplers")
        return self.pipe.decoder


def make(
    progress: Progress,
    names: Sequence[str],
    draw: Callable[[range], list[Image.Image]],
    chunk_size: int,
) -> list[Image.Image]:
    """One picture for each name: those of an earlier run, and the others by `draw` in chunks."""
    with tqdm(total=len(names), desc=progress.folder.name, unit=" pictures") as bar:
        for start in range(0, len(names), chunk_size):
            chunk = range(start, min(start + chunk_size, len(names)))
            if not all(progress.has(names[k]) for k in chunk):
                for k, image in zip(chunk, draw(chunk), strict=True):
                    progress.save(names[k], image)
            bar.update(len(chunk))
    return [progress.load(name) for name in names]


def encode(clip: FrozenCLIP, images: Tensor) -> Tensor:
    """**Shapes**: (B, 3, H, W) → (B, D) float32 on the CPU."""
    return torch.cat([clip.encode_image(part).float().cpu() for part in images.split(CHUNK)])


def retrieval(bench: Bench) -> dict[str, Any]:
    """Text to image: the rank of each picture's own caption among all held-out captions."""
    side, n = bench.decoder.network.config.resolution, bench.samples
    held = HeldOut(side)
    count = bench.count(held)
    progress = bench.progress("retrieval", ["clip", "prior", "decoder"])

    def draw(chunk: range) -> list[Image.Image]:
        # Picture k has caption k // n and seed k however the work is divided.
        return bench.pipe.text_to_image(
            held.captions[chunk.start // n : chunk.stop // n],
            n=n,
            seed=chunk.start,
            size=side,
            candidates=1,
            prior_candidates=bench.prior_candidates,
        )

    names = [f"{i:03d}-{j}" for i in range(count) for j in range(n)]
    made = make(progress, names, draw, max(1, CHUNK // n) * n)
    real = held.pictures(count)
    pixels = torch.stack([to_tensor(image) for image in made])
    by: dict[str, Any] = {}
    for judge, clip in bench.judges.items():
        z_text = clip.encode_text(held.captions).embed.float().cpu()  # (M, D)
        z_made = rearrange(encode(clip, pixels), "(i n) d -> i n d", n=n)
        ranks = {"made": sample_ranks(z_made, z_text)}
        ranks["real"] = sample_ranks(encode(clip, real)[:, None], z_text)
        sibling = held.sibling[:count]
        groups = {"all": sibling | True, "no Fluent sibling": ~sibling, "Fluent sibling": sibling}
        scores = {
            group: {who: hit_rates(r, keep) for who, r in ranks.items()}
            for group, keep in groups.items()
            if keep.any()
        }
        by[judge] = {"captions_with_twins": coinciding(z_text), "groups": scores}
    _text_grid(bench, held, made, real)
    return {"samples": n, "prior_candidates": bench.prior_candidates, "by": by}


def _text_grid(bench: Bench, held: HeldOut, made: list[Image.Image], real: Tensor) -> None:
    """Real picture and all samples of the first captions; the first sample at full size."""
    n, rows, double = bench.samples, min(GRID_ROWS * 2, len(real)), Image.Resampling.NEAREST
    cells, captions = [], []
    for i in range(rows):
        images = [to_pil(real[i]), *made[i * n : (i + 1) * n]]
        cells += [x.resize((2 * x.width, 2 * x.height), double) for x in images]
        captions += [held.captions[i], *(f"seed {i * n + j}" for j in range(n))]
    grid(cells, 2 * (n + 1), captions).save(bench.results / "text_decoder.png")
    if not bench.pipe.upsamplers:
        return
    names = ["clip", *(stage.name for stage in bench.pipe.stages)]
    progress = bench.progress("full-size", names)

    def draw(chunk: range) -> list[Image.Image]:
        i = chunk.start
        return bench.pipe.text_to_image(
            held.captions[i], seed=i * n, prior_candidates=bench.prior_candidates
        )

    full = make(progress, [f"{i:03d}" for i in range(min(GRID_ROWS, rows))], draw, chunk_size=1)
    small = [x.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS) for x in full]
    grid(small, 4, held.captions[: len(small)]).save(bench.results / "text_full_size.png")


def decoder(bench: Bench) -> dict[str, Any]:
    """Pictures from true image embeddings: do they give the embedding they were made from?"""
    side = bench.decoder.network.config.resolution
    held = HeldOut(side)
    count, real = bench.count(held), held.pictures(len(held))
    progress = bench.progress("decoder", ["clip", "decoder"])
    z_image = encode(bench.own, real)  # (M, D)
    made: dict[str, Tensor] = {}
    sources: dict[str, list[str] | None] = {"embedding": None}
    if bench.decoder.network.config.text_width is not None:
        sources["embedding and text"] = held.captions
    for source, captions in sources.items():

        def draw(chunk: range, captions: list[str] | None = captions) -> list[Image.Image]:
            rows = slice(chunk.start, chunk.stop)
            text = None if captions is None else captions[rows]
            return bench.pipe.image_from_embedding(
                z_image[rows], text, seed=chunk.start, size=side, candidates=1
            )

        names = [f"{source.replace(' ', '-')}-{i:03d}" for i in range(count)]
        images = make(progress, names, draw, CHUNK)
        made[source] = torch.stack([to_tensor(image) for image in images])
    _decoder_grid(bench, held, real, made)
    by: dict[str, Any] = {}
    for judge, clip in bench.judges.items():
        z_true = encode(clip, real)
        scores: dict[str, Any] = {
            source: agreement(encode(clip, images), z_true) for source, images in made.items()
        }
        scores["real, one pixel to the right"] = agreement(
            encode(clip, shift(real[:count])), z_true
        )
        scores["a random other picture"] = {"cosine": cosine_to_others(z_true)}
        by[judge] = scores
    return {"by": by}


def _decoder_grid(bench: Bench, held: HeldOut, real: Tensor, made: dict[str, Tensor]) -> None:
    """Real pictures beside what their embeddings gave."""
    cells, captions = [], []
    for i in range(min(GRID_ROWS * 2, len(made["embedding"]))):
        pictures = [to_pil(x) for x in (real[i], *(images[i] for images in made.values()))]
        cells += [x.resize((2 * x.width, 2 * x.height), Image.Resampling.NEAREST) for x in pictures]
        captions += [held.captions[i], *made]
    grid(cells, 4 * (1 + len(made)), captions).save(bench.results / "decoder.png")


def upsamplers(bench: Bench) -> dict[str, Any]:
    """Each upsampler against bicubic, from the same shrunken held-out picture."""
    stages = bench.pipe.upsamplers
    if not stages:
        raise ConfigError(f"{bench.model} has no upsampler; use --only retrieval or decoder")
    spans = [[stage] for stage in stages]
    joined = (a.network.config.high == b.network.config.low for a, b in pairwise(stages))
    if len(stages) > 1 and all(joined):
        spans.append(stages)
    result = {}
    for span in spans:
        low, high = span[0].network.config.low, span[-1].network.config.high
        result[f"{low} → {high}"] = _upsampling(bench, span, low, high)
    return {"spans": result}


def _upsampling(bench: Bench, span: list[Stage], low: int, high: int) -> dict[str, Any]:
    held = HeldOut(high)
    progress = bench.progress(f"upsample-{low}-{high}", [stage.name for stage in span])
    scores = []
    for i in tqdm(range(bench.count(held)), desc=f"{low} to {high}", unit=" pictures"):
        file = progress.folder / f"{i:03d}.json"
        if not file.is_file():
            upscale = partial(bench.pipe.upscale, seed=i, size=high)
            case = upscale_again(upscale, to_pil(held.picture(i)), low)
            if i < GRID_ROWS // 2:
                progress.save(f"{i:03d}", grid([case.bicubic, case.made, case.real], 3))
            write_json(file, case.scores())
        scores.append(json.loads(file.read_text()))
    rows = [progress.load(f"{i:03d}") for i in range(min(GRID_ROWS // 2, len(scores)))]
    titles = [f"bicubic, upsampler, real: {held.captions[i]}" for i in range(len(rows))]
    if high > 2 * THUMBNAIL:
        # The middle of each, pixel for pixel, where differences can be seen.
        rows = [_middles(row, high) for row in rows]
    grid(rows, 2, titles).save(bench.results / f"upsample_{low}_{high}.png")
    return {**mean_scores(scores), "steps": [s.sampling.steps for s in span]}


def _middles(row: Image.Image, side: int) -> Image.Image:
    """A quarter of the side, cut from the middle of each of the three pictures in a row."""
    part, gap = side // 4, (row.width - 3 * side) // 4
    lefts = [gap + k * (side + gap) + (side - part) // 2 for k in range(3)]
    top = gap + (side - part) // 2
    return grid([row.crop((x, top, x + part, top + part)) for x in lefts], 3)


SECTIONS = {"retrieval": retrieval, "decoder": decoder, "upsamplers": upsamplers}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure a model on held-out emoji.")
    parser.add_argument("--model", default="weights/emoji", type=Path)
    parser.add_argument("--judge", help="a second CLIP that never took part in sampling")
    parser.add_argument("--only", choices=list(SECTIONS), help="one section instead of all three")
    parser.add_argument("--samples", type=int, default=4, help="pictures for each caption")
    parser.add_argument("--prior-candidates", type=int, help="by default as many as the model's")
    parser.add_argument("--limit", type=int, help="only so many held-out pictures, for a trial")
    parser.add_argument("--out", default="benchmarks/results/emoji.json", type=Path)
    parser.add_argument("--work", default="runs/benchmarks", type=Path, help="progress goes here")
    parser.add_argument("--fresh", action="store_true", help="forget the progress of earlier runs")
    given = parser.parse_args(argv)
    for name in ("samples", "prior_candidates", "limit"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return given


def open_bench(given: argparse.Namespace) -> Bench:
    """Load the model and the judges. **Raises**: `ConfigError` if the judge is the stack's own."""
    model = resolve_folder(given.model)
    pipe = UnCLIP.from_pretrained(model)
    judges = {} if pipe.clip is None else {"own": pipe.clip}
    if given.judge is not None:
        judges["judge"] = FrozenCLIP.load(given.judge)
        if pipe.clip is not None and _same(pipe.clip, judges["judge"]):
            raise ConfigError(f"--judge {given.judge} is the CLIP that the model samples with")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    return Bench(
        pipe,
        model,
        judges,
        given.samples,
        given.limit,
        given.prior_candidates or pipe.prior_candidates,
        given.work,
        given.out.parent,
        given.fresh,
    )


def _same(a: FrozenCLIP, b: FrozenCLIP) -> bool:
    try:
        check_same_encoder(a.fingerprint, b.fingerprint, "judge")
    except CheckpointError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save after each section, print the tables."""
    given = parse(argv)
    with exit_on_error():
        bench = open_bench(given)
        results = json.loads(given.out.read_text()) if given.out.is_file() else {}
        for name in [given.only] if given.only else list(SECTIONS):
            begun = time.perf_counter()
            measured = SECTIONS[name](bench)
            results[name] = {
                "model": str(given.model),
                "judge": given.judge,
                "seconds": time.perf_counter() - begun,
                **measured,
            }
            write_json(given.out, results)
        print(report({given.only: results[given.only]} if given.only else results))


if __name__ == "__main__":
    main()
