"""The verbs that work on pictures as pairs (z_image, x_T): reconstruct, interpolate, edit, mix,
inpaint, redraw."""

from __future__ import annotations

from functools import partial
from itertools import tee
from pathlib import Path
from typing import Annotated, Any

import typer

from unclip.cli.arguments import (
    Asked,
    N,
    Negative,
    Picture,
    Pictures,
    Prior,
    numbers,
    weighed,
)
from unclip.cli.shell import Making
from unclip.text import meant

STRENGTH = "1 forgets what was there; below it starts from the picture with so much noise."
NewPrompt = Annotated[
    str | None,
    typer.Argument(metavar="[PROMPT]", parser=meant, help="What to draw [default: as it is]."),
]


def reconstruct(image: Picture, asked: Asked) -> None:
    """Draw a picture again from its embedding and its noise, and say how close it comes."""
    from unclip.edit import exact
    from unclip.images import fit_square, load_image, psnr, to_tensor

    picture = load_image(image)
    making = Making("reconstruct", asked, source=image.name, drawn_by=exact)
    again = making.pipe.reconstruct(picture, seed=asked.seed, options=making.options)
    making.save([again], [f"{image.stem} reconstructed"])
    target = fit_square(picture, again.width)
    print(f"PSNR {float(psnr(to_tensor(again)[None], to_tensor(target)[None])):.1f} dB")


def interpolate(
    images: Pictures,
    asked: Asked,
    frames: Annotated[int, typer.Option(min=2, help="From each picture to the next, both in.")] = 9,
    fixed_noise: Annotated[
        bool, typer.Option("--fixed-noise", help="One x_T for all, drawn by the seed.")
    ] = False,
    gif: Annotated[bool, typer.Option("--gif", help="Also an animated GIF.")] = False,
    webp: Annotated[bool, typer.Option("--webp", help="Also an animated WebP.")] = False,
) -> None:
    """Go from picture to picture; the ends are their reconstructions."""
    from unclip import edit as edits
    from unclip.images import load_image

    pictures, count = [load_image(path) for path in images], (len(images) - 1) * (frames - 1) + 1
    source = ", ".join(path.name for path in images)
    given: dict[str, Any] = {"frames": frames, "fixed_noise": fixed_noise}
    by: dict[str, Any] = {"drawn_by": edits.exact, "given": given}
    making = Making("interpolate", asked, count, source=source, **by)
    how = {**given, "seed": asked.seed, "options": making.options}
    between, again = tee(edits.interpolate(making.pipe, pictures, **how))
    title = " to ".join(path.stem for path in images)
    names = [f"{title} {k:03}" for k in range(count)]
    places = [{"place": k} for k in range(count)]
    making.save(between, names, title=title, columns=frames, one_seed=True, own=places)
    moving = [*again]
    for suffix in [name for name, wanted in ((".gif", gif), (".webp", webp)) if wanted]:
        making.writer.animation(moving, title, suffix)


def edit(
    image: Picture,
    asked: Asked,
    target: Annotated[str, typer.Option("--to", parser=meant, help="What it should be.")],
    source: Annotated[str, typer.Option("--from", parser=meant, help="What it is.")] = "",
    strength: Annotated[
        str, typer.Option(help="How far to turn, 0 not at all; one or several, as 0.1,0.2.")
    ] = "0.35",
) -> None:
    """Turn a picture towards what one caption adds to another (text diff)."""
    from unclip import edit as edits
    from unclip.images import load_image

    strengths, given = numbers("--strength", strength), {"source": source}
    picture = load_image(image)
    by: dict[str, Any] = {"drawn_by": edits.exact, "given": given}
    making = Making("edit", asked, len(strengths), source=image.name, **by)
    turned = edits.text_diff(
        making.pipe, picture, target, source, strengths, asked.seed, options=making.options
    )
    names, title = [f"{image.stem} {target} {s:g}" for s in strengths], f"{image.stem} {target}"
    making.save(
        turned,
        names,
        prompts=[target] * len(names),
        title=title,
        columns=len(names),
        one_seed=True,
        own=[{"strength": s} for s in strengths],
    )


def mix(
    asked: Asked,
    image: Annotated[
        list[str] | None, typer.Option(metavar="IMAGE[:WEIGHT]", help="As cat.png:0.7; repeatable.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="TEXT[:WEIGHT]", help="As 'a hat:0.5'; repeatable.")
    ] = None,
    n: N = 1,
    negative: Negative = None,
    prior: Prior = None,
) -> None:
    """Make pictures of the mean of pictures and texts in CLIP's space."""
    from unclip import edit as edits
    from unclip.images import load_image

    named = [weighed(part) for part in image or ()]
    said = [weighed(meant(part)) for part in text or ()]
    parts: list[Any] = [*(load_image(path) for path, _ in named), *(words for words, _ in said)]
    weights = [weight for _, weight in (*named, *said)]
    title = " ".join([*(Path(path).stem for path, _ in named), *(words for words, _ in said)])
    given = {"images": [(Path(path).name, weight) for path, weight in named], "texts": said}
    source = ", ".join(name for name, _ in given["images"]) or None
    more: dict[str, Any] = {"given": given, "negative_prompt": negative, "prior": prior}
    making = Making("mix", asked, n, source=source, **more)
    making.options = making.pipe.varied(making.options)
    mixed = edits.mix(making.pipe, parts, weights, n, asked.seed, options=making.options)
    places = [{"place": k} for k in range(n)]  # texts are embedded by the first's seed
    prompt = ", ".join(words for words, _ in said)
    making.save(mixed, [f"{title} mix"] * n, prompts=[prompt] * n, own=places)


def inpaint(
    image: Picture,
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="White is drawn anew.")],
    asked: Asked,
    prompt: NewPrompt = None,
    strength: Annotated[float, typer.Option(help=STRENGTH)] = 1.0,
    repeats: Annotated[
        int, typer.Option(min=1, help="Turns at each step: parts agree better, and it takes longer")
    ] = 1,
    n: N = 1,
    negative: Negative = None,
    prior: Prior = None,
) -> None:
    """Draw a part of a picture anew and keep the rest."""
    more = {"negative_prompt": negative, "prior": prior}
    _anew(image, mask, asked, prompt, strength, n, repeats, **more)


def redraw(
    image: Picture,
    asked: Asked,
    prompt: NewPrompt = None,
    strength: Annotated[float, typer.Option(help=STRENGTH)] = 0.6,
    n: N = 1,
    negative: Negative = None,
    prior: Prior = None,
) -> None:
    """Draw all of a picture anew, from so much of its noise (image to image)."""
    _anew(image, None, asked, prompt, strength, n, negative_prompt=negative, prior=prior)


def _anew(
    image: Path,
    mask: Path | None,
    asked: Asked,
    prompt: str | None,
    strength: float,
    n: int,
    repeats: int = 1,
    **more: Any,
) -> None:
    from unclip import edit as edits
    from unclip.images import load_image

    picture, shape = load_image(image), None if mask is None else load_image(mask)
    given = {"mask": mask and mask.name, "strength": strength, "repeats": repeats}
    more["given"] = {**given, "as_it_is": prompt is None}
    verb, done = ("redraw", "redrawn") if mask is None else ("inpaint", "inpainted")
    by = partial(edits.anew, strength=strength)
    making = Making(verb, asked, n, source=image.name, drawn_by=by, **more)
    how: dict[str, Any] = {"repeats": repeats, "options": making.options}
    drawn = edits.inpaint(making.pipe, picture, shape, prompt, strength, n, asked.seed, **how)
    making.save(drawn, [f"{image.stem} {prompt or done}"] * n, prompts=[prompt or ""] * n)
