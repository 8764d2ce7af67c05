"""`unclip watch`: a page of runs, from what they have written so far."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unclip.cli import main
from unclip.errors import ConfigError
from unclip.training.curves import BOTTOM, BUCKETS, HIGH, LEFT, RIGHT, TOP, WIDE, Curve, chart
from unclip.training.watch import page


def line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "images": step * 8, "loss": 1 / step, "grad_norm": None if step == 2 else 0.5,
        "lr": 1e-3, "images_per_second": 4.0, "data_wait": 0.1, "skipped": 0, "processes": 1,
        "precision": "fp32",
    } | more  # fmt: skip


def made(folder: Path, steps: int, of: int, **settings: Any) -> Path:
    """A run's folder as `fit` leaves it, with a line that is being written."""
    (folder / "samples").mkdir(parents=True)
    written = [json.dumps(line(step)) + "\n" for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(written) + '{"step": 99, "lo')
    how = "".join(f"  {key}: {value}\n" for key, value in (settings | {"steps": of}).items())
    (folder / "config.yaml").write_text(f"train:\n{how}")
    for step in range(steps + 1):
        Image.new("RGB", (16, 8), (step % 256, 0, 0)).save(folder / "samples" / f"step-{step}.png")
    return folder


def test_a_page_says_how_far_a_run_is_and_opens_from_disk(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", steps=30, of=90)
    with pytest.raises(SystemExit) as exit:
        main(["watch", str(folder), "--out", str(tmp_path / "page.html")])
    assert exit.value.code == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "30 of 90" in text and "240" in text
    assert "1 min" in text and "2 min, if it goes on" in text  # 240 pictures, 4 a second
    for title in ("Loss", "Gradient norm", "Learning rate", "Pictures a second"):
        assert f"<b>{title}</b>" in text
    assert "Steps skipped" not in text  # all 0
    assert not re.search(r"(src|href)=.(?!data:)", text) and "refresh" not in text
    shown = [int(step) for step in re.findall(r"Samples at step (\d+)", text)]
    assert len(shown) == 12 and shown[0] == 0 and shown[-1] == 30 and shown == sorted(shown)


def test_several_runs_share_charts_and_their_settings_are_compared(tmp_path: Path) -> None:
    runs = [made(tmp_path / "a", 4, of=8, lr=1), made(tmp_path / "b", 8, of=8, lr=2)]
    (runs[1] / "val.jsonl").write_text('{"step": 8, "loss": 0.25, "top1": 0.5}\n')
    text, going = page(runs, every=30)
    assert going and '<meta http-equiv="refresh" content="30">' in text
    figure = re.search(r"<b>Loss</b>.*?</figure>", text)
    assert figure and figure[0].count("<polyline") == 3 and figure[0].count("dasharray") == 1
    assert "<b>top1</b> 0.5" in text
    compared = text[text.index("differ") : text.index("samples through time")]
    assert "train.lr" in compared and "train.steps" not in compared
    ended, going = page(runs[1:], every=30)
    assert not going and "refresh" not in ended


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        page([tmp_path])


def corners(svg: str) -> list[tuple[float, float]]:
    points = re.search(r"<polyline[^>]* points=\"([^\"]*)\"", svg)
    assert points
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points[1].split())]


def test_a_curve_spans_its_chart_and_passes_over_what_is_not_finite() -> None:
    drawn = corners(chart("x", [Curve("a", "red", [(0, 0.0), (50, math.nan), (100, 1.0)])]))
    assert [x for x, _ in drawn] == [LEFT, WIDE - RIGHT]
    many = corners(chart("x", [Curve("a", "red", [(k, math.sin(k)) for k in range(10_000)])]))
    assert BUCKETS <= len(many) <= BUCKETS + 1
    assert all(TOP <= y <= HIGH - BOTTOM for _, y in many)


def test_a_wide_range_is_drawn_by_its_logarithm() -> None:
    """Equal factors are equal heights; the highest few lie on the edge."""
    points = [(k, 10.0**-k) for k in range(61)]
    heights = [y for _, y in corners(chart("x", [Curve("a", "red", points)]))][3:]
    steps = [b - a for a, b in itertools.pairwise(heights)]
    assert max(steps) - min(steps) < 0.2 and min(steps) > 2
    assert chart("x", [Curve("a", "red", [(1, math.nan)])]) == ""
