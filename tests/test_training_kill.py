"""The real trainers, killed at random moments: the same command again ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS, KILLS = 60, 3
TRAIN = [f"train.steps={STEPS}", "train.save_every=7", "train.sample_every=20", "train.log_every=1"]
WIDTHS = ["model.embed=16", "model.text_width=16"]
UNET = ["model.unet.channels=16", "model.unet.groups=4", "model.unet.blocks=1"]
OVERRIDES = {
    "clip": [
        "model.vision_cfg.layers=1",
        "model.text_cfg.layers=1",
        "train.batch=8",
        "train.warmup=5",
    ],
    "prior": [*WIDTHS, "model.context=12", "model.transformer.layers=1", "train.batch=8"],
    "decoder": [*WIDTHS, *UNET, "model.unet.head_channels=16", "train.batch=4"],
    "upsampler_64": [*UNET, "train.batch=4"],
}


def start(stage: str, clip: Path, out: Path) -> subprocess.Popen[str]:
    trainer = ROOT / "train" / f"{stage.split('_')[0]}.py"
    config = ROOT / "configs" / "shapes" / f"{stage}.yaml"
    arguments = [*OVERRIDES[stage], *TRAIN, f"train.out={out}"]
    if stage in {"prior", "decoder"}:
        arguments.append(f"clip={clip}")
    return subprocess.Popen(
        [sys.executable, str(trainer), str(config), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize("stage", OVERRIDES)
def test_a_trainer_killed_at_random_moments_ends_with_the_same_bytes(
    stage: str, model_folder: Path, tmp_path: Path
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    began = time.monotonic()
    finish(start(stage, model_folder, straight))
    whole = time.monotonic() - began
    moments = random.Random(stage)
    steps = []  # how far each attempt had come
    for _ in range(KILLS):
        process = start(stage, model_folder, killed)
        time.sleep(whole * moments.uniform(0.4, 0.9))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        log = killed / "metrics.jsonl"
        steps.append(len(log.read_text().splitlines()) if log.is_file() else 0)
        if process.returncode == 0:  # finished before its moment
            break
    assert any(0 < step < STEPS for step in steps), steps
    finish(start(stage, model_folder, killed))
    last = straight / "checkpoints" / f"step-{STEPS}"
    files = [path.relative_to(last) for path in last.rglob("*") if path.is_file()]
    assert len(files) >= 4
    for file in files:
        other = killed / "checkpoints" / f"step-{STEPS}" / file
        assert other.read_bytes() == (last / file).read_bytes(), file
