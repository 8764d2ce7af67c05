"""The real trainers over many steps: killed at random moments, and without growing."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from test_tasks import tiny

from unclip.training.decoder import train_decoder
from unclip.training.fit import _Trainer

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


def written(log: Path) -> int:
    """The last step in a run's log, of which a line may be half written."""
    whole = log.read_text().rpartition("\n")[0] if log.is_file() else ""
    lines = whole.splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", OVERRIDES)
def test_a_trainer_killed_at_random_moments_ends_with_the_same_bytes(
    stage: str, model_folder: Path, tmp_path: Path
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(start(stage, model_folder, straight))
    moments = random.Random(stage)
    log = killed / "metrics.jsonl"
    for step in sorted(moments.sample(range(2, STEPS - 10), KILLS)):
        process = start(stage, model_folder, killed)
        while process.poll() is None and written(log) < step:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before its moment"
    finish(start(stage, model_folder, killed))
    last = straight / "checkpoints" / f"step-{STEPS}"
    files = [path.relative_to(last) for path in last.rglob("*") if path.is_file()]
    assert len(files) >= 4
    for file in files:
        other = killed / "checkpoints" / f"step-{STEPS}" / file
        assert other.read_bytes() == (last / file).read_bytes(), file


def held() -> tuple[int, int, int]:
    """Resident bytes, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), *(
        len(list(Path("/proc/self", what).iterdir())) for what in ("fd", "task")
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux")
def test_five_hundred_steps_with_saves_and_samples_do_not_grow(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = ["train.steps=500", "train.save_every=20", "train.sample_every=20", "data.workers=1"]
    run = tiny("decoder", model_folder, f"train.out={tmp_path}", *often)
    seen = []
    plain = _Trainer._save

    def save(trainer: _Trainer) -> None:
        plain(trainer)
        seen.append(held())

    monkeypatch.setattr(_Trainer, "_save", save)
    train_decoder(run, Accelerator(cpu=True))
    assert len(seen) == 25
    settled, end = seen[5:10], seen[-5:]
    memory, files, threads = (
        (max(row[k] for row in settled), max(row[k] for row in end)) for k in range(3)
    )
    assert memory[1] < memory[0] + 10e6
    assert files[1] <= files[0]
    assert threads[1] <= threads[0]
    assert not multiprocessing.active_children()  # the loader's workers have gone
