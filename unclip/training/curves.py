"""Curves as SVG inside of a page: what a run has told over the pictures that it has seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDE, HIGH = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 8, 22  # what the scales take of it
COLOURS = ("#4e79d7", "#d9730d", "#2e9e5b", "#c23b78", "#8a63d2", "#8c7a3f")
BUCKETS = 160  # a line through the means of so many parts of a run; a band shows how far they vary
MOST = 0.97  # of the means lie on the scale
DECADES = 8.0  # a scale is logarithmic where values differ by more than this factor


@dataclass(frozen=True)
class Curve:
    """One run's values of one measure by pictures seen; `dashed` where they are held-out ones."""

    name: str
    colour: str
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True)
class _Scale:
    """From values to pixels: `low` lies at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Values outside of the scale are put onto its nearer end."""
        value = min(max(value, self.low), self.high)
        low, high, x = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (x - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values that lie on it, a handful."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(decades) < 4 else (1,)
            found = [step * 10.0**k for k in decades for step in steps]
        else:
            rough = (self.high - self.low) / 4
            size = 10.0 ** math.floor(math.log10(rough))
            size *= next(step for step in (1, 2, 5, 10) if step * size >= rough)
            found = [size * k for k in range(math.ceil(self.low / size), int(self.high / size) + 1)]
        return [x for x in found if self.low <= x <= self.high]


def chart(title: str, curves: Sequence[Curve]) -> str:
    """Lines through means, with what they are means of as bands; a figure with its own scales.

    Values that are not finite are passed over. Nothing is drawn of a measure without any.
    """
    seen = [x for curve in curves for x, y in curve.points if math.isfinite(y)]
    if not seen:
        return ""
    across = _Scale(0, max(seen) or 1, LEFT, WIDE - RIGHT)
    thinned = [(curve, _thinned(curve.points, across.high / BUCKETS)) for curve in curves]
    thinned = [(curve, buckets) for curve, buckets in thinned if buckets]
    means = [mean for _, buckets in thinned for _, mean, _, _ in buckets]
    up = _vertical(means)
    parts = [_grid(across, up)]
    for curve, buckets in thinned:
        parts += [_band(curve, buckets, across, up), _line(curve, buckets, across, up)]
    last = ", ".join(short(buckets[-1][1]) for _, buckets in thinned)
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {escape(last)}</figcaption>"
        f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{escape(title)}: {last}">'
        f"{''.join(parts)}</svg></figure>"
    )


def short(value: float) -> str:
    """A number of three digits: 0.0372, 27.3, 355k, 2.4e-06."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _vertical(means: Sequence[float]) -> _Scale:
    """Without the highest few, which at a run's beginning would leave no room for the rest."""
    ordered = sorted(means)
    low, high = ordered[0], ordered[int((len(ordered) - 1) * MOST)]
    log = low > 0 and high / low > DECADES
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    if not log and low > 0 and low < high / 2:
        low = 0
    return _Scale(low, high, HIGH - BOTTOM, TOP, log)


def _thinned(points: Iterable[Point], width: float) -> list[tuple[float, float, float, float]]:
    """Where it ends, mean, least and most of each part that is so wide."""
    parts: dict[int, list[Point]] = {}
    for x, y in points:
        if math.isfinite(y):
            parts.setdefault(int(x / width), []).append((x, y))
    values = [(part[-1][0], [y for _, y in part]) for part in parts.values()]
    return [(x, sum(ys) / len(ys), min(ys), max(ys)) for x, ys in values]


def _path(points: Iterable[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _line(curve: Curve, buckets: Sequence[tuple[float, ...]], across: _Scale, up: _Scale) -> str:
    path = _path((across.at(x), up.at(mean)) for x, mean, _, _ in buckets)
    dashes = ' stroke-dasharray="5 3"' if curve.dashed else ""
    return (
        f'<polyline fill="none" stroke="{curve.colour}" stroke-width="1.8"{dashes} points="{path}">'
        f"<title>{escape(curve.name)}</title></polyline>"
    )


def _band(curve: Curve, buckets: Sequence[tuple[float, ...]], across: _Scale, up: _Scale) -> str:
    there = [(across.at(x), up.at(least)) for x, _, least, _ in buckets]
    back = [(across.at(x), up.at(most)) for x, _, _, most in reversed(buckets)]
    return f'<polygon fill="{curve.colour}" opacity="0.15" points="{_path([*there, *back])}"/>'


def _grid(across: _Scale, up: _Scale) -> str:
    rule = 'stroke="currentColor" opacity="0.15"'
    text = 'fill="currentColor" font-size="10" opacity="0.8"'
    parts = []
    for value in up.ticks():
        y = up.at(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDE - RIGHT}" {rule}/>')
        parts.append(
            f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end" {text}>{short(value)}</text>'
        )
    for value in across.ticks():
        x = across.at(value)
        anchor = "middle" if x < WIDE - 30 else "end"
        parts.append(
            f'<text x="{x:.1f}" y="{HIGH - 6}" text-anchor="{anchor}" {text}>{short(value)}</text>'
        )
    return "".join(parts)
