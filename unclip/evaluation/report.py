"""An evaluation for readers: tables in markdown, and one HTML page that opens from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from unclip.evaluation.drawings import ROWS, Group
from unclip.evaluation.evaluate import Evaluation
from unclip.images import to_html
from unclip.text import markdown_table

SHOWN = 24  # captions of a group on the page
Table = tuple[str, str, list[str], list[list[str]]]  # title, what it says, header, rows
Columns = Mapping[str, tuple[str, float, int]]  # measure → head of its column, factor, digits

PERCENT, THOUSANDTHS = 100, 1000
COLUMNS: Columns = {
    "same": ("same", PERCENT, 0),
    "same5": ("same of 5", PERCENT, 0),
    "style": ("style", PERCENT, 0),
    "realistic": ("realistic", PERCENT, 0),
    "kernel": ("kernel", THOUSANDTHS, 0),
    "copies": ("copies", PERCENT, 0),
    "density": ("density", 1, 2),
    "coverage": ("coverage", PERCENT, 0),
    "frechet": ("Fréchet", 1, 1),
}
JUDGED: Columns = {
    "top1": ("name top-1", PERCENT, 1),
    "top5": ("top-5", PERCENT, 1),
    "nearest": ("own z nearest", PERCENT, 1),
    "cosine": ("cosine to it", 1, 3),
}
UPSCALED: Columns = {
    "pictures": ("N", 1, 0),
    "psnr": ("PSNR dB", 1, 2),
    "psnr_bicubic": ("bicubic's", 1, 2),
    "gradient": ("gradient / real", 1, 2),
    "gradient_bicubic": ("bicubic's", 1, 2),
}
MEANING = """\
**same**, of 5: % whose nearest training picture, or one of five, has the name asked for; a
picture's own real one is left out. **style**: % in which a linear probe, fitted on other real
pictures, finds the style asked for. **realistic**: % as near to some other training picture as
that one's third neighbour is. **kernel**: kernel distance × 1000, from other training pictures.
**copies**: % nearer to a training picture than 95 % of real held-out ones are. **density**,
**coverage**: among as many other training pictures, within their fifth neighbour. **Fréchet**:
distance of Gaussians in these features; it falls as pictures grow in number. Name alone: captions
without a style; there no picture is left out.""".replace("\n", " ")


def tables(scores: Mapping[str, Any]) -> list[Table]:
    """Everything that was measured, as titled tables."""
    found: list[Table] = []
    for network, groups in scores["tables"].items():
        about = f"In features of {scores['features'][network]}. {MEANING}"
        for group, rows in groups.items():
            title = f"{group}, {scores['captions'][group]} captions, by {network}"
            found.append((title.capitalize(), about, *lines_of(COLUMNS, _titled(rows))))
            about = ""
    for judge, data in scores["retrieval"].items():
        about = f"Among {data['names']} names, of which {data['twins']} have a twin."
        if judge == "own":
            about += " This is the stack's own CLIP, which grades its own work."
        for group, rows in data["groups"].items():
            title = f"{group}, named by the {judge} CLIP".capitalize()
            found.append((title, about, *lines_of(JUDGED, _titled(rows))))
            about = ""
    variety = {name: line for name, line in scores["variety"].items() if line}
    if variety:
        head = ["network", "over seeds", "in the data", "names"]
        lines = [
            [name, f"{x['drawn']:.3f}", f"{x['data']:.3f}", f"{x['names']:.0f}"]
            for name, x in variety.items()
        ]
        about = "Mean cosine distance between pictures of one name, without a style."
        found.append(("Variety", about, head, lines))
    if "prior" in scores:
        about = "Its embeddings alone, over seeds of names without a style; in the prior's scale."
        lines = [[name, f"{value:.3g}"] for name, value in scores["prior"].items()]
        found.append(("Does the prior draw?", about, ["measure", ""], lines))
    if scores["upsamplers"]:
        about = "From real pictures shrunk with bicubic; gradient energy below 1 is a blur."
        found.append(("Upsamplers", about, *lines_of(UPSCALED, scores["upsamplers"])))
    return found


def _titled(rows: Mapping[str, Any]) -> dict[str, Any]:
    return {ROWS[row]: line for row, line in rows.items()}


def lines_of(
    columns: Columns, rows: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Header and cells; a column that no row has is left out."""
    kept = [key for key in columns if any(key in line for line in rows.values())]
    cells = [
        [title, *(_cell(line.get(key), *columns[key][1:]) for key in kept)]
        for title, line in rows.items()
    ]
    return ["", *(columns[key][0] for key in kept)], cells


def _cell(value: float | None, factor: float, digits: int) -> str:
    return "–" if value is None else f"{value * factor:.{digits}f}"


def markdown(found: Sequence[Table]) -> str:
    """Tables for a terminal or a model card."""
    parts = []
    for title, about, header, rows in found:
        text = f"{about}\n\n" if about else ""
        parts.append(f"### {title}\n\n{text}{markdown_table(header, rows)}")
    return "\n\n".join(parts)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }}
table {{ border-collapse: collapse; margin: .6em 0 1.6em }}
th, td {{ padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
.grid td, .grid th {{ text-align: center; font-size: 12px; padding: 3px }}
.grid img {{ min-width: 96px; image-rendering: pixelated; display: block; margin: auto }}
.wide {{ overflow-x: auto }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def page(evaluation: Evaluation, title: str) -> str:
    """Tables and grids in one file: pictures are data URIs, nothing is loaded from elsewhere.

    The pictures are the first ones of a fixed shuffled order, none selected.
    """
    body = []
    for name, about, header, rows in tables(evaluation.scores):
        body.append(f"<h2>{escape(name)}</h2>")
        body.append(f"<p>{_bold(escape(about))}</p>" if about else "")
        head = "".join(f"<th>{escape(x)}</th>" for x in header)
        lines = ["".join(f"<td>{escape(x)}</td>" for x in row) for row in rows]
        body.append(_html_table(head, lines))
    for group in evaluation.groups:
        pictures = evaluation.pictures[group.name]
        if pictures:
            body.append(f"<h2>Pictures: {escape(group.name)}, the first ones, none selected</h2>")
            body.append(_grid(group, pictures))
    for span, tiles in evaluation.upscaled.items():
        body.append(f"<h2>Upsampled, {escape(span)} px</h2>")
        head = "".join(f"<th>{x}</th>" for x in ("bicubic", "upsampler", "real"))
        lines = [
            "".join(f"<td>{to_html(x, span)}</td>" for x in tiles[k : k + 3])
            for k in range(0, len(tiles), 3)
        ]
        body.append(_html_table(head, lines, "grid"))
    return PAGE.format(title=escape(title), body="\n".join(body))


def _grid(group: Group, pictures: Mapping[str, Sequence[Image.Image]]) -> str:
    """A caption a line, a row of the table a column; of a name alone the seeds are columns."""
    if list(pictures) == ["product"]:
        seeds = max(1, len(group) // max(1, len(set(group.names))))
        columns = {f"sample {k + 1}": list(pictures["product"][k::seeds]) for k in range(seeds)}
        captions = list(group.captions[::seeds])
    else:
        columns = {ROWS[row]: list(images) for row, images in pictures.items()}
        captions = list(group.captions)
    head = "<th></th>" + "".join(f"<th>{escape(x)}</th>" for x in columns)
    lines = [
        f"<td>{escape(caption)}</td>"
        + "".join(f"<td>{to_html(images[k], caption)}</td>" for images in columns.values())
        for k, caption in enumerate(captions[:SHOWN])
    ]
    return _html_table(head, lines, "grid")


def _html_table(head: str, lines: Sequence[str], kind: str = "") -> str:
    rows = "".join(f"<tr>{line}</tr>\n" for line in [head, *lines])
    return f'<div class="wide"><table class="{kind}">\n{rows}</table></div>'


def _bold(text: str) -> str:
    parts = text.split("**")
    return "".join(f"<b>{x}</b>" if k % 2 else x for k, x in enumerate(parts))
