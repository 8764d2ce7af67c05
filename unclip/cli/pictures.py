"""The verbs that make pictures: text, vary, upscale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.cli.arguments import (
    Device,
    Guidance,
    Model,
    N,
    Offload,
    Out,
    Precision,
    Sampler,
    Seed,
    Size,
    Steps,
    Tile,
)
from unclip.cli.shell import by_stage, draw, load

if TYPE_CHECKING:
    from PIL.Image import Image


def text(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="In quotes.")],
    n: N = 1,
    seed: Seed = 0,
    size: Size = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    prior_candidates: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Embeddings drawn for each picture; the closest is kept [default: the model's].",
        ),
    ] = None,
    candidates: Annotated[
        int, typer.Option(min=1, help="Pictures drawn for each one kept, by CLIP score.")
    ] = 1,
    tile: Tile = None,
    out: Out = Path("out"),
    model: Model = None,
    device: Device = "auto",
    dtype: Precision = "fp32",
    offload: Offload = False,
) -> None:
    """Make pictures of one or several prompts."""
    from unclip.cli.output import Writer

    labels = [prompt for prompt in prompts for _ in range(n)]
    options = by_stage(steps, guidance, sampler) | {"size": size, "tile": tile}
    options |= {"prior_candidates": prior_candidates, "candidates": candidates}
    writer = Writer(out, len(labels))
    pipe = load(model, device, dtype, offload, writer, options, verb="text")

    def make(rows: slice, first: int) -> list[Image]:
        return pipe.text_to_image(labels[rows], seed=first, **options)

    draw(pipe, make, labels, labels, seed, options["size"], writer)
    several = len(prompts) > 1
    columns = n if several and n > 1 else math.ceil(len(labels) ** 0.5)
    writer.sheet(prompts[0], columns, labels if several else None)


def vary(
    source: Annotated[
        Path, typer.Argument(metavar="IMAGE|EMBEDDINGS", help="A picture, .safetensors or .npy.")
    ],
    n: N = 1,
    seed: Seed = 0,
    size: Size = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    eta: Annotated[
        float, typer.Option(min=0, max=1, help="DDIM's fresh noise in the decoder.")
    ] = 1.0,
    tile: Tile = None,
    out: Out = Path("out"),
    model: Model = None,
    device: Device = "auto",
    dtype: Precision = "fp32",
    offload: Offload = False,
) -> None:
    """Make variations of a picture, or pictures of embeddings that `embed` wrote."""
    from unclip.cli.output import Writer
    from unclip.clip.embeddings import SUFFIXES, read_embeddings
    from unclip.images import load_image

    options = by_stage(steps, guidance, sampler) | {"size": size, "tile": tile}
    options["eta"] = eta
    embedded = source.suffix in SUFFIXES
    image = None if embedded else load_image(source)
    writer = Writer(out, n)
    pipe = load(model, device, dtype, offload, writer, options, verb="vary", source=source.name)
    if image is None:
        z_image, keys = read_embeddings(source, pipe.encoder)
    else:
        z_image, keys = pipe.encode_image(image), [source.stem]
    writer.expect(n * len(keys))
    z_image = z_image.repeat_interleave(n, 0)  # (N n, D)

    def make(rows: slice, first: int) -> list[Image]:
        return pipe.image_from_embedding(z_image[rows], seed=first, **options)

    names = [f"{Path(key).stem} variation" for key in keys for _ in range(n)]
    draw(pipe, make, names, None, seed, options["size"], writer)
    columns = n if len(keys) > 1 and n > 1 else math.ceil(len(names) ** 0.5)
    writer.sheet(f"{source.stem} variation", columns)


def upscale(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture smaller than --size.")],
    seed: Seed = 0,
    size: Size = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    tile: Tile = None,
    out: Out = Path("out"),
    model: Model = None,
    device: Device = "auto",
    dtype: Precision = "fp32",
    offload: Offload = False,
) -> None:
    """Enlarge a picture with the upsamplers; single values of options are for all of them."""
    from unclip.cli.output import Writer
    from unclip.images import load_image

    options = by_stage(steps, guidance, sampler) | {"size": size, "tile": tile}
    picture, writer = load_image(image), Writer(out, 1)
    pipe = load(model, device, dtype, offload, writer, options, verb="upscale", source=image.name)
    larger = pipe.upscale(picture, seed=seed, **options)
    writer.save(larger, f"{image.stem} {larger.width}px", seed)
