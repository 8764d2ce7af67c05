"""Train scripts as people start them: exit codes, and one process equal to two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_task import TinyConfig, run
from torch.testing import assert_close

from unclip.training.launch import main

TESTS = Path(__file__).parent
TEXT = """
train: {out: OUT, steps: 8, batch: 8, accumulate: 2, lr: 1e-2, seed: 0, ema: 0.9,
        save_every: 4, sample_every: 8, log_every: 1}
bad_from: 3
bad_until: 5
"""


def write(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(TEXT.replace("OUT", str(tmp_path / "run")))
    return str(path)


def start(*arguments: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    main(TinyConfig, run, "Train the tiny task.", arguments)


def start_two(*arguments: str) -> str:
    """Two processes on this machine; accelerate's own launcher does the same through torchrun."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(TESTS / "tiny_task.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_equal_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The skipped steps are not finite on one of the two processes only."""
    path = write(tmp_path)
    start(path, f"train.out={tmp_path / 'one'}")
    assert capsys.readouterr().out.count("world 1") == 1
    assert start_two(path, f"train.out={tmp_path / 'two'}").count("world 2") == 1
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["step"] for line in two] == list(range(1, 9))
    assert [line["skipped"] for line in two] == [0, 0, 0, 1, 1, 0, 0, 0]
    for a, b in zip(one, two, strict=True):
        for name in {"loss", "absolute", "grad_norm"} & {*a}:
            assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train.lrr=1"], 2, "unknown key train.lrr = 1 (did you mean 'lr'?) [exit code 2]"),
        (["train.init=absent"], 4, "no model at absent: there is no such folder [exit code 4]"),
        (["train.steps=20", "bad_until=100"], 5, "10 steps in a row"),
    ],
)
def test_errors_have_their_exit_codes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        start(write(tmp_path), *arguments)
    assert stopped.value.code == code
    assert message in capsys.readouterr().err


def test_processes_that_do_not_see_each_other_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would train alone on its share of the data, and all would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        start(write(tmp_path))
    assert "2 processes were launched, but accelerate sees 1" in capsys.readouterr().err


def test_help_says_how_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        start("--help")
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert "section.key=value" in output
    assert "resumes" in output
