"""Train scripts as people start them: exit codes, and one process equal to two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from processes import free_port, together
from tiny_task import TinyConfig
from torch.testing import assert_close

from unclip.config import load_config, save_config
from unclip.training.fit import fit, learning_rate
from unclip.training.launch import start_accelerator

TESTS = Path(__file__).parent
ACCELERATE = TESTS.parent / "configs" / "accelerate"
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
    tiny_task.start(*arguments)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_lines(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    for a, b in zip(one, two, strict=True):
        for name in {"loss", "absolute", "odd", "grad_norm"} & {*a}:
            assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def begin_two(path: str) -> None:
    """Train with a beginning that only the first process makes."""
    settings = load_config(path, [], TinyConfig)
    accelerator = start_accelerator("fp32")
    task = tiny_task.TinyTask(settings)

    def begin() -> None:
        print(f"begun by {accelerator.process_index} on {next(task.model.parameters()).device}")
        torch.nn.init.constant_(task.model.lift.weight, 0.5)  # type: ignore[union-attr, arg-type]

    def batches(step: int) -> Any:
        return tiny_task.stream(settings, step, accelerator.process_index, 2)

    fit(task, batches, settings.train, settings, accelerator, begin)
    print(f"ends with {task.model.lift.weight.mean():.4f}")  # type: ignore[union-attr, operator]


def start_two(*arguments: str) -> str:
    out = together(tiny_task.start, *arguments)
    assert out.count("world 2") == 1
    return out


def torchrun(*arguments: str) -> str:
    """Two processes on this machine, started again up to once."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/training.md
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "--max-restarts", "1", str(TESTS / "tiny_task.py")]
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_equal_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The skipped steps are not finite on one of the two processes only."""
    path = write(tmp_path)
    start(path, f"train.out={tmp_path / 'one'}")
    assert capsys.readouterr().out.count("world 1") == 1
    start_two(path, f"train.out={tmp_path / 'two'}")
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in two] == list(range(1, 9))
    assert [line["skipped"] for line in two] == [0, 0, 0, 1, 1, 0, 0, 0]
    assert_same_lines(one, two)
    train = load_config(path, [], TinyConfig).train
    assert [line["lr"] for line in two] == [learning_rate(step, train) for step in range(8)]


def test_eight_at_once_or_in_two_parts_or_on_two_processes_train_alike(tmp_path: Path) -> None:
    path = write(tmp_path)
    more = ["train.steps=24", "bad_from=100", "bad_until=100"]
    start(path, f"train.out={tmp_path / 'whole'}", "train.accumulate=1", *more)
    start(path, f"train.out={tmp_path / 'parts'}", "train.accumulate=2", *more)
    start_two(path, f"train.out={tmp_path / 'two'}", "train.accumulate=1", *more)
    whole = lines(tmp_path / "whole")
    assert [line["step"] for line in whole] == list(range(1, 25))
    assert_same_lines(whole, lines(tmp_path / "parts"))
    assert_same_lines(whole, lines(tmp_path / "two"))


@pytest.mark.parametrize("first", [1, 2])
def test_another_number_of_processes_continues_a_run(tmp_path: Path, first: int) -> None:
    path = write(tmp_path)
    start(path, f"train.out={tmp_path / 'straight'}", "train.decay=constant")
    for processes, steps in [(first, 4), (3 - first, 8)]:
        begin = start_two if processes == 2 else start
        begin(path, f"train.out={tmp_path / 'run'}", f"train.steps={steps}", "train.decay=constant")
    straight, changed = lines(tmp_path / "straight"), lines(tmp_path / "run")
    assert [line["processes"] for line in changed] == [first] * 4 + [3 - first] * 4
    assert_same_lines(straight, changed)


def test_a_launcher_that_starts_again_after_a_kill_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """torchrun kills the other process too and starts both anew."""
    path = write(tmp_path)
    start_two(path, f"train.out={tmp_path / 'a'}")
    out = torchrun(path, f"train.out={tmp_path / 'b'}", "kill_at=6")
    assert out.count("world 2") == 2
    a, b = (tmp_path / name / "checkpoints" / "step-8" for name in "ab")
    for file in (path for path in a.rglob("*") if path.is_file()):
        assert file.read_bytes() == (b / file.relative_to(a)).read_bytes(), file


def launch(config: str, *arguments: str) -> subprocess.Popen[str]:
    """accelerate's own launcher with one of its files, on a machine without GPUs."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / config)]
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_understands_its_files(path: Path) -> None:
    config = load_config_from_file(str(path)).to_dict()
    given = yaml.safe_load(path.read_text())
    assert {key: config[key] for key in given} == given
    assert config["mixed_precision"] == "no"  # or it would stand against train.precision


@pytest.mark.parametrize(
    ("config", "nodes", "processes"),
    [
        ("one_gpu.yaml", 1, 1),
        ("ddp_8.yaml", 1, 2),
        ("fsdp2_8.yaml", 1, 2),
        ("two_nodes.yaml", 2, 2),
    ],
)
def test_accelerate_files_train(tmp_path: Path, config: str, nodes: int, processes: int) -> None:
    """Two machines are two launchers here, each with its own process."""
    path = write(tmp_path)
    start(path, f"train.out={tmp_path / 'here'}")
    count = ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    task = [str(TESTS / "tiny_task.py"), path, f"train.out={tmp_path / 'there'}"]
    agents = [
        launch(config, *count, *(["--machine_rank", str(rank)] if nodes > 1 else []), *task)
        for rank in range(nodes)
    ]
    outputs = [agent.communicate(timeout=300) for agent in agents]
    for agent, (_, errors) in zip(agents, outputs, strict=True):
        assert agent.returncode == 0, errors
    out = "".join(out for out, _ in outputs)
    assert out.count(f"world {processes}") == 1
    # A linear layer of 40 numbers, a convolution of 24 and one of 4, whose single row is rank 0's.
    assert ("holds 40 of 68" if config == "fsdp2_8.yaml" else "holds 68 of 68") in out
    assert_same_lines(lines(tmp_path / "here"), lines(tmp_path / "there"))


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


def test_what_the_launcher_says_and_the_configuration_decides_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`accelerate launch --mixed_precision bf16 --gradient_accumulation_steps 4` was ignored, or
    the second, given as a variable, divided every gradient once more."""
    start(write(tmp_path), "train.steps=4", "bad_from=99", f"train.out={tmp_path / 'plain'}")
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    start(write(tmp_path), "train.steps=4", "bad_from=99")
    shown = capsys.readouterr().err
    assert "train.precision" in shown and "train.accumulate" in shown
    assert_same_lines(lines(tmp_path / "plain"), lines(tmp_path / "run"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SystemExit) as exit:
        start(write(tmp_path))
    assert exit.value.code == 2 and "deepspeed" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
def test_a_run_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """It was a traceback, after the encoder and the data had been opened."""
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit:
        start(write(tmp_path), f"train.out={tmp_path / place}", "bad_from=99")
    shown = capsys.readouterr().err
    assert exit.value.code == 2 and "train.out" in shown and place in shown


def test_a_deterministic_run_sets_what_gpus_need_and_is_the_same_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    path = write(tmp_path)
    start(path, f"train.out={tmp_path / 'a'}")
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        start(path, f"train.out={tmp_path / 'b'}", "train.deterministic=true")
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    a, b = (lines(tmp_path / name) for name in "ab")
    assert [line.get("loss") for line in a] == [line.get("loss") for line in b]
    assert torch.get_float32_matmul_precision() == "highest"  # a CPU keeps its bits


def test_a_run_is_begun_once_and_all_processes_go_on_from_there(tmp_path: Path) -> None:
    """Each fitted its own draft, on the CPU, and all but the first one's were thrown away."""
    settings = load_config(write(tmp_path), ["train.steps=1", "train.lr=1e-12"], TinyConfig)
    path = tmp_path / "once.yaml"
    save_config(settings, path)
    printed = together(begin_two, str(path))
    assert printed.count("begun by 0 on cpu") == 1 and "begun by 1" not in printed
    assert printed.count("ends with 0.5000") == 2
