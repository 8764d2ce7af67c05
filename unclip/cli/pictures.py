"""The verbs that make pictures: text, vary, upscale; and app, where a browser asks for them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from unclip.cli.arguments import (
    Asked,
    Device,
    Model,
    N,
    Negative,
    Offload,
    Picture,
    Precision,
    Prior,
    Prompts,
    there,
)
from unclip.cli.shell import Making, default_model, precision, square, to_device
from unclip.errors import ConfigError


def text(
    prompts: Prompts = None,
    n: N = 1,
    *,
    asked: Asked,
    file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="A .txt, .csv or .jsonl of prompts."),
    ] = None,
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
    negative: Negative = None,
    prior: Prior = None,
) -> None:
    """Make pictures of one or several prompts, or of a file of them.

    A .csv or .jsonl has a prompt a line, and perhaps its seed, n and negative. Its pictures go into
    a folder or a .tar; the same command again draws those that are not there yet.
    """
    if bool(prompts) == (file is not None):
        raise ConfigError("give PROMPTs, or a file of them by --prompts: one of the two")
    more: dict[str, Any] = {
        "prior_candidates": prior_candidates,
        "candidates": candidates,
        "prior": prior,
    }
    if file is not None:
        return _batch(file, n, asked, negative, more)
    assert prompts is not None
    labels = [prompt for prompt in prompts for _ in range(n)]
    making = Making("text", asked, len(labels), negative_prompt=negative, **more)
    pictures = making.pipe.iterate(prompts, n, asked.seed, options=making.options)
    making.save(pictures, labels, prompts=labels, columns=_columns(len(prompts), n))


def _batch(file: Path, n: int, asked: Asked, negative: str | None, more: dict[str, Any]) -> None:
    from unclip.cli import batch

    wanted = batch.pictures_of(batch.read_lines(file), n, asked.seed, negative)
    form = asked.form or "png"
    place = batch.open_place(asked.out, form)
    making = Making("text", asked, None, source=file.name, **more)
    same = {"model": making.hash, "settings": making.settings}
    for path in batch.draw(making.pipe, making.options, wanted, place, form, same):
        print(path, flush=True)


def vary(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGE|EMBEDDINGS", help="A picture, .safetensors or .npy.", callback=there
        ),
    ],
    n: N = 1,
    *,
    asked: Asked,
    eta: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Fresh noise in a decoder sampled by DDIM [default: 1 there]."
        ),
    ] = None,
    invert: Annotated[
        bool,
        typer.Option("--invert", help="From the picture's own noise: the closer, the smaller eta."),
    ] = False,
) -> None:
    """Make variations of a picture, or pictures of embeddings that `embed` wrote."""
    from unclip.data.embeddings import SUFFIXES, read_embeddings
    from unclip.edit import exact, pair
    from unclip.images import load_image

    picture = None if source.suffix in SUFFIXES else load_image(source)
    if invert and picture is None:
        raise ConfigError("--invert needs a picture; embeddings have no noise of their own")
    by, given = exact if invert else None, {"invert": invert}
    making = Making("vary", asked, n, source=source.name, drawn_by=by, given=given, eta=eta)
    making.options = making.pipe.varied(making.options)
    z_image, keys = None, [source.stem]
    if picture is None:
        z_image, keys = read_embeddings(source, making.pipe.encoder)
    making.writer.expect(n * len(keys))
    how: dict[str, Any] = {"options": making.options}
    if invert and picture is not None:
        z_image, how["x_T"] = pair(making.pipe, picture, how)
    how |= {"image": picture} if z_image is None else {"z_image": z_image}
    pictures = making.pipe.iterate(n=n, seed=asked.seed, **how)
    names = [f"{Path(key).stem} variation" for key in keys for _ in range(n)]
    own = [{"key": key} for key in keys for _ in range(n)] if picture is None else None
    title = f"{source.stem} variation"
    making.save(pictures, names, columns=_columns(len(keys), n), title=title, own=own)


def upscale(image: Picture, asked: Asked) -> None:
    """Enlarge a picture with the upsamplers; single values of options are for all of them."""
    from unclip.images import load_image

    picture = load_image(image)
    making = Making("upscale", asked, source=image.name, meant_for="upsampler")
    larger = making.pipe.upscale(picture, seed=asked.seed, options=making.options)
    making.save([larger], [f"{image.stem} {larger.width}px"])


def app(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of 127.0.0.1.")] = 7860,
    model: Model = None,
    out: Annotated[Path, typer.Option(help="The folder that pictures are written to.")] = Path(
        "out"
    ),
    device: Device = "auto",
    dtype: Precision = None,
    offload: Offload = False,
) -> None:
    """Open a web page on this machine on which all of this can be done, until Ctrl-C."""
    try:
        from unclip.app.page import launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ConfigError("the web page needs gradio: pip install 'unclip[app]'") from None

    from unclip.app.studio import Studio
    from unclip.cli.output import Writer

    Writer(out, 1)  # says what is wrong with it
    where = to_device(device)
    studio = Studio(out, where, precision(dtype, where), offload)
    url = launch(studio, str(model or default_model()), port)
    print(f"unclip is at {url} and writes to {out}; Ctrl-C ends it", flush=True)
    threading.Event().wait()


def _columns(inputs: int, n: int) -> int:
    """A row of the sheet for each input where there are several of several."""
    return n if inputs > 1 and n > 1 else square(inputs * n)
