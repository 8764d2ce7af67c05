"""Runs as one page: the curves of metrics.jsonl, and the grids of samples/ through time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.config import flat, read_yaml
from unclip.errors import ConfigError
from unclip.images import to_html
from unclip.text import html_page, html_table
from unclip.training.curves import COLOURS, Curve, chart, short

GRIDS, WIDEST = 12, 1024  # so many of a run's, evenly in time, and pixels of one
TITLES = {
    "loss": "Loss",
    "mse_q0": "Error, the cleanest quarter of time",
    "mse_q1": "Error, second quarter",
    "mse_q2": "Error, third quarter",
    "mse_q3": "Error, the noisiest quarter",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "images_per_second": "Pictures a second",
    "data_wait": "Share of time waiting for data",
    "skipped": "Steps skipped",
}
PLACE = ("step", "images", "processes", "precision")  # of a line, or what it was made with
STYLE = """\
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1em }
figure { margin: 0 } figcaption { font-size: 13px } svg { width: 100%; height: auto }
.run::before { content: "●"; color: var(--own); margin-right: .3em }
.through { width: auto } .through td:first-child, .through th:first-child { width: 6em }
.through img { max-width: 100%; min-width: 50%; image-rendering: pixelated; display: block }
pre { overflow-x: auto }"""


@dataclass(frozen=True)
class Run:
    """What a training has written to its folder, so far."""

    folder: Path
    lines: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """**Raises**: `ConfigError` for a folder that no training has written a line to."""
        lines = _lines(folder / "metrics.jsonl")
        if not lines:
            raise ConfigError(
                f"{folder} has no metrics.jsonl with a line in it; name a training's train.out, "
                "once it has made train.log_every steps"
            )
        config = folder / "config.yaml"
        settings = flat(read_yaml(config)) if config.is_file() else {}
        return cls(folder, lines, _lines(folder / "val.jsonl"), settings)

    @property
    def steps(self) -> int:
        """How many it will have made in the end, as far as is known."""
        return self.config.get("train.steps", self.lines[-1]["step"])

    @property
    def ended(self) -> bool:
        return self.lines[-1]["step"] >= self.steps

    @cached_property
    def grids(self) -> list[tuple[int, Path]]:
        """Steps and files, some of the oldest to the newest."""
        files = [(int(file.stem[5:]), file) for file in self.folder.glob("samples/step-*.png")]
        files.sort()
        last = len(files) - 1
        if last < GRIDS:
            return files
        return [files[round(k * last / (GRIDS - 1))] for k in range(GRIDS)]

    def points(self, name: str, held_out: bool = False) -> list[tuple[float, float]]:
        """A measure's values by pictures seen; where it was not finite, nan."""
        batch = self.lines[-1]["images"] / self.lines[-1]["step"]
        lines = self.held_out if held_out else self.lines
        return [
            (line["step"] * batch, math.nan if line[name] is None else line[name])
            for line in lines
            if name in line
        ]

    def measures(self) -> list[str]:
        """The names of what changes in the course of it."""
        names = {name: None for line in (*self.lines, *self.held_out) for name in line}
        return [name for name in names if name not in PLACE and name != "n"]

    def summary(self) -> dict[str, str]:
        """How far it is and how it goes."""
        last, done = self.lines[-1], self.lines[-1]["step"]
        spent = sum(
            (line["images"] - before["images"]) / line["images_per_second"]
            for before, line in zip([{"images": 0}, *self.lines], self.lines, strict=False)
        )
        rate = last["images"] / spent
        left = (self.steps - done) * last["images"] / done / rate
        when = time.localtime((self.folder / "metrics.jsonl").stat().st_mtime)
        return {
            "steps": f"{done:,} of {self.steps:,}",
            "pictures seen": f"{last['images']:,}",
            "trained for": _hours(spent),
            "still": "–" if self.ended else f"{_hours(left)}, if it goes on",
            "last line": time.strftime("%d %b, %H:%M", when),
            "pictures a second": short(rate),
            "steps skipped": str(sum(line["skipped"] for line in self.lines)),
            "processes": f"{last['processes']}, in {last.get('precision', 'fp32')}",
        }


def page(folders: Sequence[Path], every: int | None = None) -> tuple[str, bool]:
    """One page of one run, or of several beside each other, and whether one still goes on.

    While one does, a browser opens it again `every` so many seconds.

    **Raises**: `ConfigError` for a folder that is no run's.
    """
    runs = [Run.read(folder) for folder in dict.fromkeys(folders)]
    own = {run: f"--own: {COLOURS[k % len(COLOURS)]}" for k, run in enumerate(map(_name, runs))}
    named = [f'<span class="run" style="{how}">{escape(name)}</span>' for name, how in own.items()]
    said = [run.summary() for run in runs]
    rows = [[fact, *(facts[fact] for facts in said)] for fact in said[0]]
    body = [html_table(["", *named], rows), _charts(runs)]
    if len(runs) > 1:
        body.append(_differences(runs, named))
    for name, run in zip(named, runs, strict=True):
        if run.grids:
            body.append(f"<h2>{name}: samples through time</h2>{_grids(run)}")
    for name, run in zip(named, runs, strict=True):
        text = "\n".join(f"{key}: {value}" for key, value in run.config.items())
        body.append(f"<details><summary>{name}: settings</summary><pre>{escape(text)}</pre>")
        body.append("</details>")
    going = not all(run.ended for run in runs)
    again = f'<meta http-equiv="refresh" content="{every}">' if every and going else ""
    head = f"<style>{STYLE}</style>{again}"
    title = _name(runs[0]) if len(runs) == 1 else f"{len(runs)} trainings"
    return html_page(title, "\n".join(body), head), going


def _name(run: Run) -> str:
    return str(run.folder)


def _charts(runs: Sequence[Run]) -> str:
    """A figure a measure, a colour a run."""
    found = dict.fromkeys([*TITLES, *(name for run in runs for name in run.measures())])
    charts = []
    for name in found:
        curves = [
            Curve(_name(run), COLOURS[k % len(COLOURS)], run.points(name, held_out), held_out)
            for held_out in (False, True)
            for k, run in enumerate(runs)
        ]
        if any(value for curve in curves for _, value in curve.points):
            charts.append(chart(TITLES.get(name, name), curves))
    about = "Over the pictures that were seen: means, and how far they vary; dashed: held-out data."
    return f'<p>{about}</p><div class="charts">{"".join(charts)}</div>'


def _differences(runs: Sequence[Run], named: Sequence[str]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [
        [escape(key), *(escape(str(run.config.get(key, "–"))) for run in runs)]
        for key in keys
        if len({str(run.config.get(key)) for run in runs}) > 1
    ]
    return f"<h2>In which settings they differ</h2>{html_table(['', *named], rows)}"


def _grids(run: Run) -> str:
    rows = []
    for step, file in run.grids:
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError:  # it is being written
            continue
        image.thumbnail((WIDEST, 8 * WIDEST))
        rows.append([f"step {step:,}", to_html(image, f"Samples at step {step}", "webp")])
    return html_table([], rows, "through")


def _lines(file: Path) -> list[dict[str, Any]]:
    """Of a file to which one is perhaps being added."""
    if not file.is_file():
        return []
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole if line]


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
