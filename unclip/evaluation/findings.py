"""What an experiment found, for readers: tables, what was left out, and one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from unclip.evaluation.report import Table, markdown
from unclip.files.disk import write_json

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8a5aa8", "#c77d0a", "#444444")
MARGIN, SMALL = 52, 11


@dataclass(frozen=True)
class Findings:
    """`scores` is what the JSON file holds; `notes` say what was left out, and why."""

    scores: Mapping[str, Any]
    tables: Sequence[Table]
    figure: Image.Image | None = None
    notes: Sequence[str] = ()

    @property
    def markdown(self) -> str:
        """The tables and notes."""
        return "\n\n".join([markdown(self.tables), *self.notes])

    def write(self, folder: Path, name: str) -> list[Path]:
        """`name`.json, `name`.md and, where there is a figure, `name`.png."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}{suffix}" for suffix in (".json", ".md", ".png")]
        write_json(paths[0], dict(self.scores))
        paths[1].write_text(self.markdown + "\n", encoding="utf-8")
        if self.figure is None:
            return paths[:2]
        self.figure.save(paths[2], optimize=True)
        return paths


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    across: str,
    up: str,
    size: tuple[int, int] = (560, 340),
) -> Image.Image:
    """Named lines through points, numbers across at equal distances, as 1, 2, 4, 8 want them."""
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(SMALL)
    places = sorted({x for points in lines.values() for x, _ in points})
    heights = [y for points in lines.values() for _, y in points]
    low, high = min(heights), max(heights)
    low, high = (low, high) if high > low else (low - 1, high + 1)
    left, right, top, bottom = MARGIN, size[0] - MARGIN, MARGIN // 2, size[1] - MARGIN

    def at(x: float, y: float) -> tuple[float, float]:
        share = places.index(x) / max(1, len(places) - 1)
        return left + share * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    for k in range(5):
        y = low + k * (high - low) / 4
        draw.line([at(places[0], y), (right, at(places[0], y)[1])], "#dddddd")
        draw.text((4, at(places[0], y)[1] - SMALL / 2), f"{y:.3g}", "black", font)
    for x in places:
        draw.text((at(x, low)[0] - 6, bottom + 6), f"{x:g}", "black", font)
    draw.text((left, size[1] - 2 * SMALL), across, "black", font)
    draw.text((left, 4), up, "black", font)
    for k, (name, points) in enumerate(lines.items()):
        colour, way = COLOURS[k % len(COLOURS)], [at(x, y) for x, y in sorted(points)]
        draw.line(way, colour, 2)
        draw.text((right - 130, top + 4 + k * (SMALL + 4)), name, colour, font)
    return image
