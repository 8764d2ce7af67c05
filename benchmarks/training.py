"""Training steps: ours beside DALLE2-pytorch's decoder; each stage's share of the machine's best.

See benchmarks/README.md. Steps are those of the trainers themselves, `fit` and all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from machine import MB, machine_peak
from torch import Tensor
from training_worker import commanded

from unclip.clip.encoder import FrozenCLIP
from unclip.conditioning import Cond
from unclip.config import Config, load_config, parse_config
from unclip.data.open import open_dataset
from unclip.data.sample import Batch
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.errors import exit_on_error
from unclip.files.disk import write_json
from unclip.images import resize
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.precision import resolve_precision
from unclip.text import markdown_table
from unclip.training.counting import flop_counter
from unclip.training.decoder import DecoderRun, DecoderTask
from unclip.training.fit import TrainConfig, fit
from unclip.training.prior import PriorRun, PriorTask
from unclip.training.upsampler import UpsamplerRun, UpsamplerTask

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
STAGES = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")
EMBED = 512  # of the CLIP that both decoders of the comparison are made for
CAPTION = "a red apple emoji in fluent style"
LONG = 1_000_000


class Given:
    """A task whose data are one batch, ready: drawing and degrading pictures isn't measured."""

    def __init__(self, task: Any) -> None:
        self.name, self.model, self.loss, self.save = task.name, task.model, task.loss, task.save

    def preview(self, model: Any) -> None:
        """Nothing: it isn't a training step."""


class FromEmbeddings:
    """Our decoder as the peer's trains: from CLIP image embeddings, with a learned variance."""

    name = "decoder"

    def __init__(self) -> None:
        model = {
            "resolution": 64,
            "embed": EMBED,
            "text_width": None,
            "context_width": 256,
            "learned_variance": True,
            "scale": {"kind": "raw"},
            "unet": {
                "channels": 64,
                "multiple": [1, 2, 3, 4],
                "blocks": 2,
                "attention": [False, False, True, True],
                "mid_attention": True,
                "groups": 8,
            },
        }
        diffusion = {"schedule": "cosine", "target": "eps", "learned_variance": True}
        self.model = Decoder(parse_config(model, DecoderConfig, "model"))
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.diffusion = GaussianDiffusion(parse_config(diffusion, DiffusionConfig, "diffusion"))

    def loss(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        """**Shapes**: → (B,)."""
        g = torch.Generator().manual_seed(step)
        t = torch.randint(1000, (len(batch),), generator=g)
        noise = torch.randn(batch.images.shape, generator=g)
        z = torch.randn(len(batch), EMBED, generator=g)
        dropped = torch.rand(len(batch), generator=g) < 0.1
        cond = Cond(image_embed=z, keep_image=~dropped)
        return self.diffusion.loss(model, batch.images, cond, t, noise)

    def save(self, model: Any, folder: Path) -> None:
        """Never called: steps end with the process."""


def work(name: str, batch: int, precision: str) -> None:
    """Be the worker that trains `name`."""
    torch.manual_seed(0)
    if name == "ours":
        task: Any = FromEmbeddings()
        count, side, captions = batch, 64, [""] * batch
    else:
        task, run = emoji(name)
        precision = resolve_precision(run.train.precision, torch.device("cpu"))
        count = run.train.batch
        side, captions = run.data.crop or run.data.resolution, [CAPTION] * count
    images = 2 * torch.rand(count, 3, side, side) - 1
    ready = Batch(captions, torch.arange(count), images)
    if isinstance(task, UpsamplerTask):
        low = resize(images, side * task.run.model.low // task.run.model.high)
        ready = replace(ready, low_res=low)
    with flop_counter() as counter, torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
        task.loss(task.model, ready, 0)["loss"].mean().backward()
    task.model.zero_grad()
    parameters = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    facts = {
        "parameters": parameters,
        "flops": counter.get_total_flops(),
        "batch": count,
        "precision": precision,
    }

    def batches(step: int) -> Iterator[Batch]:
        for _ in commanded(facts):
            yield ready

    with tempfile.TemporaryDirectory() as out:
        train = TrainConfig(
            out=out,
            steps=LONG,
            batch=count,
            lr=1e-4,
            precision=precision,
            save_every=LONG,
            sample_every=LONG,
            log_every=LONG,
        )
        accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=True)
        fit(Given(task), batches, train, Resolved(train=train), accelerator)


class Resolved(Config):
    """What `fit` keeps in the run folder."""

    train: TrainConfig


def emoji(name: str) -> tuple[Any, Any]:
    """A stage of the shipped model as it trains, and its configuration; weights are new."""
    from unclip.training.clip import (  # found by the workers only: it isn't installed
        ClipRun,
        ClipTask,
    )

    schema = {"clip": ClipRun, "prior": PriorRun, "decoder": DecoderRun}.get(name, UpsamplerRun)
    untaught = ["teacher=null"] if name == "clip" else []  # it would read for minutes first
    run: Any = load_config(ROOT / "configs" / "emoji" / f"{name}.yaml", untaught, schema)
    if isinstance(run, ClipRun):
        return ClipTask(run, open_dataset(run.data.train, run.data.resolution), None), run
    if isinstance(run, UpsamplerRun):
        return UpsamplerTask(run), run
    clip = FrozenCLIP.load(ROOT / "weights" / "emoji")
    return (PriorTask if name == "prior" else DecoderTask)(run, clip), run


class Worker:
    """A process that waits for the word to make a step."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.facts = self._hear()
        self.steps: list[dict[str, Any]] = []

    def step(self) -> None:
        """One training step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self._hear())

    def end(self) -> None:
        """Let go of it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{' '.join(self.process.args)} ended by itself")  # type: ignore[arg-type]


def measure(commands: dict[str, Sequence[str]], repeat: int) -> dict[str, dict[str, Any]]:
    """Step by turns, `repeat` times after one to warm up; the machine's best before each turn."""
    workers = {name: Worker(command) for name, command in commands.items()}
    best: dict[str, float] = {}
    for turn in range(repeat + 1):
        for worker in workers.values():
            precision = worker.facts.get("precision", "fp32")
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            rate = machine_peak(0.3, dtype, matmul=False)[0]
            best[precision] = max(best.get(precision, 0.0), rate)
            worker.step()
        print(f"turn {turn} of {repeat}", file=sys.stderr, flush=True)
    results = {}
    for name, worker in workers.items():
        worker.end()
        facts, seconds = worker.facts, [step["seconds"] for step in worker.steps[1:]]
        results[name] = {
            **facts,
            "seconds": statistics.median(seconds),
            "gflops": facts["flops"] / statistics.median(seconds) / 1e9,
            "peak": max(step["peak"] for step in worker.steps),
            "machine_gflops": best[facts.get("precision", "fp32")],
        }
    return results


def report(results: dict[str, dict[str, Any]]) -> str:
    """One row for each worker."""
    rows = [
        [
            name,
            f"{r['parameters'] / 1e6:.1f}",
            r.get("precision", "fp32"),
            f"{r['seconds']:.2f}",
            f"{r['flops'] / 1e9:.0f}",
            f"{r['gflops']:.0f}",
            f"{r['machine_gflops']:.0f}",
            f"{r['gflops'] / r['machine_gflops']:.0%}",
            f"{r['peak'] / MB:.0f}",
        ]
        for name, r in results.items()
    ]
    header = ["training step", "M parameters", "precision", "seconds", "GFLOP", "GFLOP/s"]
    return markdown_table([*header, "machine's best", "share", "peak MB"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save, print."""
    parser = argparse.ArgumentParser(description="What a training step costs.")
    parser.add_argument("--peer", help="the Python of an environment that has dalle2-pytorch")
    parser.add_argument("--batch", type=int, default=8, help="of the comparison with the peer")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="there too")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--out", default=FOLDER / "results" / "training.json", type=Path)
    given = parser.parse_args(argv)
    with exit_on_error():
        if given.work:
            work(given.work, given.batch, given.precision)
            return
        same = [str(given.batch), given.precision]
        me = [sys.executable, __file__]
        data = json.loads(given.out.read_text()) if given.out.exists() else {}
        if given.peer:
            peer = [given.peer, str(FOLDER / "training_worker.py"), *same]
            ours = [*me, "--work", "ours", "--batch", same[0], "--precision", same[1]]
            commands = {"ours": ours, "DALLE2-pytorch": peer}
            both = data[f"beside the peer, {given.precision}"] = measure(commands, given.repeat)
            print(report(both))
            rate, peak = (
                both["ours"][key] / both["DALLE2-pytorch"][key] for key in ("gflops", "peak")
            )
            print(f"\nGFLOP/s {rate:.2f} times theirs, peak memory {peak:.2f} times.\n")
        for name in given.stages:
            data[name] = measure({name: [*me, "--work", name]}, given.repeat)[name]
        if given.stages:
            print(report({name: data[name] for name in given.stages}))
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.out, data)


if __name__ == "__main__":
    main()
