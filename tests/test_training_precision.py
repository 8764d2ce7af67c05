"""What `train.precision=auto` stands for, and a run that moves to a machine where it differs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_training_launch import TESTS, lines, start, write

from unclip.precision import computes_in_bf16, resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WITHOUT = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def be_a_cpu(patch: pytest.MonkeyPatch, used: str, *units: str) -> None:
    patch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True))
    patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)


@pytest.mark.parametrize(
    ("used", "units", "expected"),
    [
        ("AVX512", ["avx512_f", "avx512_bf16"], "bf16"),
        ("AVX512", ["avx512_f", "amx_bf16"], "bf16"),
        ("AVX512", ["avx512_f"], "fp32"),
        ("AVX2", ["avx2"], "fp32"),
        ("AVX2", ["avx512_f", "avx512_bf16"], "fp32"),  # it has them, but torch was told not to
        ("DEFAULT", [], "fp32"),
    ],
)
def test_auto_is_bf16_on_cpus_that_compute_in_it(
    monkeypatch: pytest.MonkeyPatch, used: str, units: list[str], expected: str
) -> None:
    be_a_cpu(monkeypatch, used, *units)
    assert resolve_precision("auto", CPU) == expected
    assert [resolve_precision(asked, CPU) for asked in ("fp32", "bf16")] == ["fp32", "bf16"]


@pytest.mark.parametrize("units", [True, False])
def test_auto_is_bf16_on_gpus_that_do_not_emulate_it(
    monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    be_a_cpu(monkeypatch, "AVX2")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: units)
    assert resolve_precision("auto", CUDA) == ("bf16" if units else "fp32")
    assert computes_in_bf16(torch.device("mps"))


@pytest.mark.bf16
def test_a_run_stored_as_auto_goes_on_on_a_machine_with_another_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second half is a process that really does without units for bf16."""
    path = write(tmp_path)
    be_a_cpu(monkeypatch, "AVX512", "avx512_bf16")
    start(path, "train.precision=auto", "train.steps=3", "train.decay=constant")
    assert "train.precision = auto is bf16 on this machine" in capsys.readouterr().out
    script = [sys.executable, str(TESTS / "tiny_task.py"), path]
    done = subprocess.run(
        [*script, "train.precision=auto", "train.decay=constant"],
        env={**os.environ, **WITHOUT, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "train.precision = auto is fp32 on this machine" in done.stdout
    run = tmp_path / "run"
    assert [line["precision"] for line in lines(run)] == ["bf16"] * 3 + ["fp32"] * 5
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["precision"] == "auto"
