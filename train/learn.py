"""Train every stage on coloured shapes in minutes, then score pictures by their pixels.

    make learn      or      python train/learn.py --out runs/shapes [--fresh]

Each stage is the same command that trains on any other data; the captions that are scored never
occurred in training. B pictures, D CLIP embedding, R a picture's side.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unclip.assemble import assemble
from unclip.conditioning import Cond
from unclip.config import read_yaml
from unclip.data.shapes import Scene, Shapes, render, score
from unclip.errors import exit_on_error
from unclip.files.checkpoints import checkpoint_step, newest_checkpoint
from unclip.files.disk import check_writable
from unclip.images import gradient_energy, grid, psnr, resize, to_pil, to_tensor
from unclip.pipeline import UnCLIP
from unclip.stages.stage import Stage

CONFIGS = Path("configs/shapes")
FIGURES = ("colour", "shape", "position", "size", "binding", "exact")
SEEDS = 2  # pictures for each caption of one object
PAIRS = 120  # captions of two objects, one picture each
ENLARGED = 48  # of each kind are also scored after upsampling
RESTORED = 64  # pictures on which upsamplers are compared with bicubic


@dataclass(frozen=True)
class Step:
    """One training command. `reads_clip`: its configuration names the encoder."""

    name: str
    script: str
    reads_clip: bool = False

    @property
    def config(self) -> Path:
        """What it trains."""
        return CONFIGS / f"{self.name}.yaml"

    def command(self, out: Path) -> list[str]:
        """What is run, and what a person would type."""
        overrides = [f"train.out={out / self.name}"]
        if self.reads_clip:
            overrides.append(f"clip={out / 'clip'}")
        return [f"train/{self.script}.py", str(self.config), *overrides]


STEPS = (
    Step("clip", "clip"),
    Step("prior", "prior", reads_clip=True),
    Step("decoder", "decoder", reads_clip=True),
    Step("upsampler_64", "upsampler"),
    Step("upsampler_128", "upsampler"),
)


def train(step: Step, out: Path, seconds: dict[str, float]) -> None:
    """Run one stage's command to its end, adding to `seconds`; it resumes where it stopped.

    **Raises**: `SystemExit` with the command's exit code, or 130 if it was stopped.
    """
    command = step.command(out)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    usual = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the command got it as well, and saves before it ends
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, usual)
        seconds[step.name] = seconds.get(step.name, 0.0) + time.perf_counter() - start
        write(out, seconds=seconds)
    if code:
        print(f"{step.name}: exit code {code}; the same command tries again, --fresh starts over")
        raise SystemExit(code)
    newest = newest_checkpoint(out / step.name, training=False)
    done = 0 if newest is None else checkpoint_step(newest)
    if done != read_yaml(step.config)["train"]["steps"]:
        print(f"{step.name} stopped at step {done}; the same command continues from there")
        raise SystemExit(130)


def gather(out: Path) -> UnCLIP:
    """The stages' newest averaged weights in one model folder, `out/model`."""
    shutil.rmtree(out / "model", ignore_errors=True)
    clip, prior, decoder, *upsamplers = (out / step.name for step in STEPS)
    assemble(out / "model", clip, prior, decoder, upsamplers)
    return UnCLIP.from_pretrained(out / "model")


def held_out(count: int, objects: int) -> list[Scene]:
    """The first scenes of so many objects, spread over the validation set."""
    data = Shapes(32, "val")
    scenes = [data.scene(k) for k in range(len(data))]
    scenes = [scene for scene in scenes if len(scene.objects) == objects]
    return scenes[:: max(1, len(scenes) // count)][:count]


def score_pictures(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """One row of the table: how well pictures show scenes, in percent, from their pixels."""
    figures = score(torch.stack([to_tensor(picture) for picture in pictures]), scenes)
    return {name: 100 * value for name, value in figures.items()}


def from_text(model: UnCLIP, out: Path) -> dict[str, dict[str, float]]:
    """Score pictures drawn from held-out captions, at the decoder's size and at full size."""
    singles, pairs = held_out(1000, 1), held_out(PAIRS, 2)
    kinds = {
        "one object": [scene for scene in singles for _ in range(SEEDS)],
        "two objects": pairs,
    }
    rows: dict[str, dict[str, float]] = {}
    shown: list[tuple[Image.Image, str]] = []
    for kind, scenes in kinds.items():
        captions = [scene.caption for scene in scenes]
        small = model.text_to_image(captions, size=model.sizes[0], progress=True)
        rows[f"{kind}, {model.sizes[0]} px"] = score_pictures(small, scenes)
        stride = max(1, len(scenes) // ENLARGED)
        some, asked = small[::stride][:ENLARGED], scenes[::stride][:ENLARGED]
        large = [model.upscale(picture) for picture in some]
        rows[f"{kind}, {model.sizes[-1]} px"] = score_pictures(large, asked)
        shown += [(x, scene.caption) for x, scene in zip(large, asked, strict=True)][:24]
    sheet = grid([x for x, _ in shown], columns=8, captions=[caption for _, caption in shown])
    sheet.save(out / "samples.png")
    return rows


def from_embeddings(model: UnCLIP) -> dict[str, dict[str, float]]:
    """Score what the decoder draws from real pictures' embeddings, without a caption."""
    rows = {}
    for kind, objects in (("one object", 1), ("two objects", 2)):
        scenes = held_out(ENLARGED, objects)
        real = [to_pil(render(scene, model.sizes[0])) for scene in scenes]
        z_image = model.encode_image(real)
        drawn = model.image_from_embedding(z_image, size=model.sizes[0], progress=True)
        rows[f"{kind}, from the embedding alone"] = score_pictures(drawn, scenes)
    return rows


def restore(stage: Stage, out: Path, count: int = RESTORED) -> dict[str, float]:
    """Compare an upsampler with bicubic on held-out pictures; mean PSNR in dB.

    `gradient energy` is the restored pictures' sharpness over the real ones'.
    """
    scenes = held_out(count // 2, 1) + held_out(count // 2, 2)
    real = torch.stack([render(scene, stage.side) for scene in scenes])  # (B, 3, R, R)
    bicubic = resize(resize(real, stage.low), stage.side).clamp(-1, 1)
    generators = [torch.Generator().manual_seed(k) for k in range(len(bicubic))]
    restored = stage.draw(Cond(low_res=bicubic), stage.sampling, generators).clamp(-1, 1)
    rows = [x[k] for k in (0, 1, -1, -2) for x in (bicubic, restored, real)]
    grid([to_pil(x) for x in rows], columns=3).save(out / f"{stage.name}.png")
    return {
        "bicubic": float(psnr(bicubic, real).mean()),
        "upsampler": float(psnr(restored, real).mean()),
        "gradient energy": float(gradient_energy(restored).sum() / gradient_energy(real).sum()),
    }


def evaluate(model: UnCLIP, out: Path) -> dict[str, Any]:
    """Every figure that `make learn` reports."""
    real = held_out(1000, 1) + held_out(PAIRS, 2)
    truth = score_pictures([to_pil(render(scene, model.sizes[0])) for scene in real], real)
    return {
        "pictures": {
            **from_text(model, out),
            **from_embeddings(model),
            "real pictures": truth,
        },
        "upsamplers": {stage.name: restore(stage, out) for stage in model.upsamplers},
    }


def table(results: dict[str, Any]) -> str:
    """The report as text: accuracies in percent, PSNR in dB, times in minutes."""
    head = f"{'from held-out captions, %':<40}" + "".join(f"{name:>10}" for name in FIGURES)
    lines = [head, "-" * len(head)]
    for name, row in results["pictures"].items():
        cells = [f"{row[key]:.1f}" if key in row else "–" for key in FIGURES]
        lines.append(f"{name:<40}" + "".join(f"{cell:>10}" for cell in cells))
    lines += ["", f"{'upsampler, PSNR in dB':<40}{'bicubic':>10}{'model':>10}{'sharpness':>10}"]
    for name, row in results["upsamplers"].items():
        cells = [
            f"{row['bicubic']:.2f}",
            f"{row['upsampler']:.2f}",
            f"{row['gradient energy']:.2f}",
        ]
        lines.append(f"{name:<40}" + "".join(f"{cell:>10}" for cell in cells))
    lines += [
        "",
        "minutes: " + ", ".join(f"{k} {v / 60:.1f}" for k, v in results["seconds"].items()),
    ]
    lines.append(f"in all {sum(results['seconds'].values()) / 60:.1f} minutes")
    return "\n".join(lines)


def write(out: Path, **entries: Any) -> dict[str, Any]:
    """Set entries of `out/results.json`, which keeps the times of an interrupted run."""
    path = out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    results.update(entries)
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def learn(out: Path, fresh: bool) -> None:
    """Train what is not yet trained, then sample and score."""
    check_writable(out, "--out")
    if fresh:
        for name in (*(step.name for step in STEPS), "model"):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / "results.json").unlink(missing_ok=True)
    seconds: dict[str, float] = write(out).get("seconds", {})
    total = len(STEPS) + 1
    for number, step in enumerate(STEPS, 1):
        print(f"\n[{number}/{total}] {step.name}: python {' '.join(step.command(out))}", flush=True)
        train(step, out, seconds)
    print(f"\n[{total}/{total}] scoring pictures of captions that were held out", flush=True)
    start = time.perf_counter()
    figures = evaluate(gather(out), out)
    seconds["scoring"] = time.perf_counter() - start
    results = write(out, **figures, seconds=seconds)
    print(f"\n{table(results)}\n\nsamples in {out / 'samples.png'}, figures in {out}/results.json")
    print(f'next: python sample.py text "a large blue cross at the top" --model {out / "model"}')


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train all stages on coloured shapes and score.")
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"), help="run folder")
    parser.add_argument("--fresh", action="store_true", help="forget what was trained before")
    given = parser.parse_args()
    with exit_on_error():
        learn(given.out, given.fresh)


if __name__ == "__main__":
    main()
