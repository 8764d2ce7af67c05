"""What a run tells: metrics.jsonl, a tracker if one is named, a progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from unclip.precision import widest
from unclip.progress import progress_bar
from unclip.training.run import on_main
from unclip.training.trackers import Tracker, TrackerName

NEWS_EVERY = 60.0  # seconds between lines that stand for a bar where there is no terminal


class RunLog:
    """Means over the steps since the last line; only rank 0 writes.

    A line of metrics.jsonl holds step and images (both counted from the start of training), the
    mean of every loss entry over the samples of all processes that have it, grad_norm and lr of its
    last step, images_per_second, data_wait (the share of time spent waiting for data), skipped
    (steps left out as non-finite), processes, and precision; one of val.jsonl what held-out data
    cost at a preview.
    """

    def __init__(
        self,
        run: Path,
        *,
        start: int,
        steps: int,
        batch: int,
        accelerator: Accelerator,
        tracker: TrackerName,
        settings: dict[str, Any],
    ) -> None:
        self.accelerator = accelerator
        self.batch = batch
        self.precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
        self._tracker: Tracker | None = None
        self._bar: Any = None
        self._news = time.monotonic() + NEWS_EVERY
        self._path, self._held_out = run / "metrics.jsonl", run / "val.jsonl"
        if accelerator.is_main_process:
            _keep_until(self._path, start)
            _keep_until(self._held_out, start)
            self._bar = progress_bar(total=steps, done=start, unit="step")

        def track() -> None:
            if tracker != "none":
                self._tracker = Tracker(tracker, run, start, settings)

        on_main(accelerator, track)
        self._clear()

    def add(self, entries: dict[str, Tensor], wait: float, skipped: bool) -> None:
        """Take note of one finished step; a skipped one does not count in the means.

        **Shapes**: each entry (2,), the sum over samples and how many they were.
        """
        self._steps += 1
        self._wait += wait
        self._skipped += skipped
        if not skipped:
            for name, value in entries.items():
                self._sums[name] = self._sums.get(name, 0) + value.to(widest(value.device))
        if self._bar is not None:
            self._bar.update()

    def write(self, step: int, grad_norm: float, lr: float) -> None:
        """Write a line after `step` finished steps; every process must call this."""
        means = means_of(self._sums, self.accelerator)
        seconds = time.perf_counter() - self._since
        line = {
            "step": step,
            "images": step * self.batch,
            **means,
            "grad_norm": grad_norm,
            "lr": lr,
            "images_per_second": self._steps * self.batch / seconds,
            "data_wait": self._wait / seconds,
            "skipped": self._skipped,
            "processes": self.accelerator.num_processes,
        }
        self._clear()
        if self._bar is None:
            return
        _append(self._path, line, precision=self.precision)
        told = ", ".join(f"{name} {line[name]:.4g}" for name in ("loss", "lr") if name in line)
        self._bar.set_postfix_str(told, refresh=False)
        if self._bar.disable and time.monotonic() > self._news:
            self._news = time.monotonic() + NEWS_EVERY
            self.say(f"step {step} of {self._bar.total}: {told}")
        if self._tracker is not None:
            self._tracker.log({f"train/{name}": value for name, value in line.items()}, step)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Leave out of images_per_second what is no training."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def write_held_out(self, step: int, scores: dict[str, float]) -> None:
        """Write a line of what held-out data cost."""
        if self._bar is not None and scores:
            _append(self._held_out, {"step": step, "images": step * self.batch, **scores})
        if self._tracker is not None:
            self._tracker.log({f"val/{name}": value for name, value in scores.items()}, step)

    def show(self, file: Path, step: int) -> None:
        """Tell the tracker of a grid of samples."""
        if self._tracker is not None:
            self._tracker.show(file, step)

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._bar is not None:
            self._bar.write(text)

    def close(self) -> None:
        """Flush everything."""
        for part in (self._bar, self._tracker):
            if part is not None:
                part.close()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = self._skipped = 0
        self._wait = 0.0
        self._since = time.perf_counter()


def add_up(sums: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
    """Add a batch's entries to their sums; nan marks samples that one does not apply to.

    **Shapes**: each entry (B,), each sum (2,): over samples, and how many they were.
    """
    for name, value in losses.items():
        value = value.detach().float()
        applies = ~value.isnan() | (name == "loss")
        total = torch.where(applies, value, 0).sum()
        sums[name] = sums.get(name, 0) + torch.stack([total, applies.sum()])


def means_of(sums: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Means over the samples of all processes, each of which must call this."""
    names = sorted(sums)
    if not names:
        return {}
    stacked = torch.stack([sums[name] for name in names])  # (n, 2)
    totals, counts = accelerator.reduce(stacked, reduction="sum").T.tolist()
    return {name: s / c for name, s, c in zip(names, totals, counts, strict=True) if c}


def _append(path: Path, line: dict[str, float], **more: str) -> None:
    finite = {k: v if math.isfinite(v) else None for k, v in line.items()}  # JSON has no NaN
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**finite, **more}) + "\n")


def _keep_until(path: Path, start: int) -> None:
    """Drop the lines of steps that will be run again."""
    if path.exists():
        kept = [
            line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= start
        ]
        path.write_text("".join(line + "\n" for line in kept if start), encoding="utf-8")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the last line of a killed run may be torn
        return math.inf
