"""Text to one picture on this machine: time, peak memory and arithmetic speed of each stage.

See benchmarks/README.md. The pipeline runs as a user runs it; its stages are watched from outside.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from machine import MB, machine_peak, memory, reset_peak
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unclip.clip.encoder import FrozenCLIP
from unclip.errors import exit_on_error
from unclip.files.disk import write_json
from unclip.files.find import resolve_folder
from unclip.pipeline import UnCLIP
from unclip.stages.stage import Stage
from unclip.text import markdown_table

TEXT, PNG, REST = "clip text", "PNG write", "rest"


@dataclass
class Cost:
    """What one stage took in one run; a stage that runs several times adds up."""

    seconds: float = 0.0
    peak: int = 0
    flops: int = 0


class Watch:
    """Costs by stage of whatever runs inside `stage(...)`."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}
        self.counting = False
        self.between = 0  # the memory peak outside the stages

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a block of work; counting arithmetic slows it, so that is a run of its own."""
        cost = self.costs.setdefault(name, Cost())
        self.pause()
        begun = time.perf_counter()
        if self.counting:
            # The counter does not know the CPU's fused attention; the plain one is countable.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                yield
            cost.flops += counter.get_total_flops()
        else:
            yield
        cost.seconds += time.perf_counter() - begun
        cost.peak = max(cost.peak, memory("VmHWM"))
        reset_peak()

    def pause(self) -> None:
        """Note the peak since the last stage ended."""
        self.between = max(self.between, memory("VmHWM"))
        reset_peak()


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Have the stages and the text encoder report to `watch`."""
    plain_draw, plain_text = Stage.draw, FrozenCLIP.encode_text

    def draw(stage: Stage, *args: Any, **options: Any) -> Any:
        with watch.stage(stage.name):
            return plain_draw(stage, *args, **options)

    def encode_text(clip: FrozenCLIP, texts: Sequence[str]) -> Any:
        with watch.stage(TEXT):
            return plain_text(clip, texts)

    with patch.object(Stage, "draw", draw), patch.object(FrozenCLIP, "encode_text", encode_text):
        yield


@dataclass
class Run:
    """One picture: seconds altogether, and the cost of each stage."""

    seconds: float
    costs: dict[str, Cost]

    @property
    def peak(self) -> int:
        """The most memory at any time, in bytes."""
        return max(cost.peak for cost in self.costs.values())


def picture(pipe: UnCLIP, given: argparse.Namespace, counting: bool = False) -> Run:
    """Text to one PNG on disk."""
    watch = Watch()
    watch.counting = counting
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, watched(watch):
        reset_peak()
        images = pipe.text_to_image(given.prompt, size=given.size, candidates=1)
        with watch.stage(PNG):
            images[0].save(Path(folder) / "picture.png")
    seconds = time.perf_counter() - begun
    inside = sum(cost.seconds for cost in watch.costs.values())
    watch.pause()
    watch.costs[REST] = Cost(seconds - inside, watch.between)
    return Run(seconds, watch.costs)


@torch.no_grad()
def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Load, make one picture `repeat` times, count its arithmetic once, find the machine's peak."""
    importlib.import_module("open_clip.model")  # otherwise imported, and counted, by the loading
    imports = memory("VmRSS")
    resettable = reset_peak()
    begun = time.perf_counter()
    pipe = UnCLIP.from_pretrained(given.model)
    load = Cost(time.perf_counter() - begun, memory("VmHWM"))
    runs = [picture(pipe, given) for _ in range(given.repeat)]
    counted = picture(pipe, given, counting=True)
    peak, what = machine_peak()
    stages = {}
    for name in runs[0].costs:
        stages[name] = Cost(
            statistics.median(run.costs[name].seconds for run in runs),
            max(run.costs[name].peak for run in runs),
            counted.costs[name].flops,
        )
    drawn = [stage for stage in pipe.stages if stage.diffusion is not None]
    steps = {stage.name: stage.sampling.steps for stage in drawn}
    return {
        "model": str(given.model),
        "size": given.size or pipe.sizes[-1],
        "threads": torch.get_num_threads(),
        "repeat": given.repeat,
        "bytes_of_weights": sum(f.stat().st_size for f in _weights(given.model)),
        "imports_bytes": imports,
        "peaks_are_per_stage": resettable,
        "load": asdict(load),
        "first_seconds": runs[0].seconds,
        "median_seconds": statistics.median(run.seconds for run in runs),
        "peak_bytes": max(run.peak for run in runs),
        "stages": {name: {**asdict(c), "steps": steps.get(name)} for name, c in stages.items()},
        "machine_gflops": peak,
        "machine_gflops_of": what,
    }


def _weights(model: Path) -> list[Path]:
    return sorted(resolve_folder(model).glob("*/model.safetensors"))


def report(data: dict[str, Any]) -> str:
    """The table, as markdown."""
    base, best = data["imports_bytes"], data["machine_gflops"]
    rows = [["load", "", f"{data['load']['seconds']:.2f}", _megabytes(data["load"], base), *"---"]]
    for name, cost in data["stages"].items():
        rate = cost["flops"] / cost["seconds"] / 1e9 if cost["seconds"] else 0.0
        arithmetic = [f"{cost['flops'] / 1e9:.1f}", f"{rate:.0f}", f"{100 * rate / best:.0f} %"]
        rows.append(
            [
                name,
                str(cost["steps"] or ""),
                f"{cost['seconds']:.2f}",
                _megabytes(cost, base),
                *(arithmetic if cost["flops"] else "---"),
            ]
        )
    total = {"peak": data["peak_bytes"]}
    rows.append(
        ["text to PNG", "", f"{data['median_seconds']:.2f}", _megabytes(total, base), *"---"]
    )
    header = ["stage", "steps", "seconds", "peak MB", "GFLOP", "GFLOP/s", "of the machine's"]
    lines = [
        markdown_table(header, rows),
        "",
        f"{data['model']}, {data['size']} px, {data['threads']} threads; medians of "
        f"{data['repeat']} runs; the first after loading took {data['first_seconds']:.2f} s.",
        f"Peak MB is above the {base / MB:.0f} MB that Python and the imports held; "
        f"{data['peak_bytes'] / MB:.0f} MB with them.",
        f"The machine's best here: {best:.0f} GFLOP/s ({data['machine_gflops_of']}).",
    ]
    if not data["peaks_are_per_stage"]:
        lines.append("This system can't reset a memory peak: peaks are those since the start.")
    return "\n".join(lines)


def _megabytes(cost: dict[str, Any], base: int) -> str:
    return f"{(cost['peak'] - base) / MB:.0f}" if cost["peak"] else "-"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save, print."""
    parser = argparse.ArgumentParser(description="Time and memory from a sentence to a PNG.")
    parser.add_argument("--model", default="weights/emoji", type=Path)
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--size", type=int, help="by default the largest")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/results/speed.json", type=Path)
    given = parser.parse_args(argv)
    if given.repeat < 1:
        parser.error("--repeat must be at least 1")
    with exit_on_error():
        data = measure(given)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.out, data)
        print(report(json.loads(given.out.read_text())))


if __name__ == "__main__":
    main()
