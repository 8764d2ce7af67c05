"""The training loop: exact resume, exact arithmetic, and what happens when things go wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import tiny_upsampler
from filelock import FileLock
from parity import randomise
from PIL import Image
from pydantic import ValidationError
from test_tasks import tiny
from tiny_task import TinyBatch, TinyConfig, TinyTask, stream
from torch import nn
from torch.testing import assert_close

from unclip.config import save_config
from unclip.data.open import DataConfig
from unclip.errors import CheckpointError, ConfigError, DivergedError
from unclip.files.checkpoints import newest_checkpoint
from unclip.files.find import resolve_folder
from unclip.files.folder import read_stage_config, write_stage
from unclip.files.tensors import TensorFile
from unclip.training.fit import TrainConfig, fit, learning_rate
from unclip.training.optimizer import build_optimizer
from unclip.training.run import open_run, stop_signal
from unclip.training.start import start_from


def config(out: Path, task: dict[str, Any] | None = None, **train: Any) -> TinyConfig:
    values: dict[str, Any] = {
        "out": str(out), "steps": 12, "batch": 8, "lr": 1e-2, "warmup": 2, "weight_decay": 0.1,
        "ema": 0.9, "seed": 3, "save_every": 5, "sample_every": 100, "log_every": 4,
    }  # fmt: skip
    return TinyConfig(train=TrainConfig(**{**values, **train}), **(task or {}))


def run(
    settings: TinyConfig, task: TinyTask | None = None, begin: Callable[[], None] | None = None
) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the first
    precision = {"fp32": "no", "bf16": "bf16"}[settings.train.precision]
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    task = task or TinyTask(settings)
    return fit(task, lambda s: stream(settings, s), settings.train, settings, accelerator, begin)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_checkpoint(a: Path, b: Path) -> None:
    names = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_equals_an_uninterrupted_one_byte_for_byte(
    tmp_path: Path, optimizer: str
) -> None:
    dropout, train = {"dropout": 0.3}, {"accumulate": 2, "optimizer": optimizer}
    straight = run(config(tmp_path / "a", dropout, **train))
    with pytest.raises(RuntimeError, match="crash"):
        run(config(tmp_path / "b", {**dropout, "crash_at": 7}, **train))
    assert resolve_folder(tmp_path / "b").name == "step-5"
    (tmp_path / "b" / "config.yaml").write_text((tmp_path / "a" / "config.yaml").read_text())
    torch.manual_seed(99)
    resumed = run(config(tmp_path / "b", dropout, **train))
    assert straight.name == resumed.name == "step-12"
    assert_same_checkpoint(straight, resumed)


def test_finished_run_does_nothing_more(tmp_path: Path) -> None:
    first = run(config(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert run(config(tmp_path)) == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_stops_and_the_run_continues(
    tmp_path: Path, number: signal.Signals
) -> None:
    class Interrupted(TinyTask):
        def loss(self, model: nn.Module, batch: TinyBatch, step: int) -> dict[str, torch.Tensor]:
            if step == 6:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # torchrun passes on what SLURM told everyone
            return super().loss(model, batch, step)

    settings = config(tmp_path / "a")
    handler = signal.getsignal(number)
    assert run(settings, Interrupted(settings)).name == "step-7"
    assert signal.getsignal(number) == handler
    straight = run(config(tmp_path / "b"))
    assert_same_checkpoint(run(settings), straight)


def test_a_signal_after_some_time_acts_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unclip.training.run.REPEATS", 0.0)
    reached: list[int] = []
    usual = signal.signal(signal.SIGUSR1, lambda number, frame: reached.append(number))
    try:
        with stop_signal() as stopped:
            signal.raise_signal(signal.SIGUSR1)
            assert stopped.is_set() and not reached
            time.sleep(0.01)
            signal.raise_signal(signal.SIGUSR1)
            assert reached == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, usual)


def test_what_may_add_in_any_order_does_so_in_previews_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The autoregressive prior's drawings need sums that torch has no order for on GPUs."""
    asked = []

    class Watched(TinyTask):
        def loss(self, model: nn.Module, batch: TinyBatch, step: int) -> dict[str, torch.Tensor]:
            asked.append(("loss", torch.are_deterministic_algorithms_enabled()))
            return super().loss(model, batch, step)

        def preview(self, model: nn.Module) -> Image.Image | None:
            asked.append(("preview", torch.are_deterministic_algorithms_enabled()))
            return super().preview(model)

    torch.use_deterministic_algorithms(True)
    try:
        settings = config(tmp_path, steps=2)
        run(settings, Watched(settings))
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(asked) == {("loss", True), ("preview", False)}


def test_previews_change_nothing(tmp_path: Path) -> None:
    """One preview per step or almost none: the same weights, with dropout drawing numbers."""
    dropout = {"dropout": 0.3}
    often = run(config(tmp_path / "often", dropout, sample_every=1))
    seldom = run(config(tmp_path / "seldom", dropout))
    assert_same_checkpoint(often, seldom)
    names = {path.name for path in (tmp_path / "often" / "samples").iterdir()}
    assert names == {f"step-{n}.png" for n in range(13)}
    names = {path.name for path in (tmp_path / "seldom" / "samples").iterdir()}
    assert names == {"step-0.png", "step-12.png"}


def test_learning_rate_is_a_closed_form(tmp_path: Path) -> None:
    cosine = config(tmp_path, steps=110, warmup=10, lr=2.0).train
    assert learning_rate(0, cosine) == 0.2
    assert learning_rate(9, cosine) == 2.0
    assert learning_rate(10, cosine) == 2.0
    assert math.isclose(learning_rate(60, cosine), 1.0)
    assert 0 < learning_rate(109, cosine) < 1e-3
    constant = config(tmp_path, steps=110, warmup=0, lr=2.0, decay="constant").train
    assert {learning_rate(step, constant) for step in range(110)} == {2.0}
    cooled = constant.model_copy(update={"cooldown": 40})
    assert {learning_rate(step, cooled) for step in range(10, 71)} == {2.0}
    assert learning_rate(90, cooled) == 1.0 and learning_rate(109, cooled) == 0.05
    with pytest.raises(ValueError, match="cooldown needs"):
        config(tmp_path, decay="cosine", cooldown=10)
    assert learning_rate(0, config(tmp_path, steps=1, warmup=1, lr=2.0).train) == 2.0


def test_update_equals_plain_adamw(tmp_path: Path) -> None:
    """Against a loop written with torch alone: clipping, learning rate, decay on matrices only."""
    settings = config(tmp_path, steps=4, clip_grad=0.5)
    task, oracle = TinyTask(settings), TinyTask(settings)
    matrices = [p for p in oracle.model.parameters() if p.ndim >= 2]
    others = [p for p in oracle.model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    batches = stream(settings, 0)
    for step in range(4):
        oracle.loss(oracle.model, next(batches), step)["loss"].mean().backward()
        nn.utils.clip_grad_norm_(oracle.model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.train)
        optimizer.step()
        optimizer.zero_grad()
    run(settings, task)
    for p, q in zip(task.model.parameters(), oracle.model.parameters(), strict=True):
        assert_close(p, q)


def test_weight_decay_acts_on_matrices_only(tmp_path: Path) -> None:
    settings = config(tmp_path)
    optimizer = build_optimizer(TinyTask(settings).model, "adamw", 0.1, (0.9, 0.999), 1e-8, 0.1)
    decay = {p.ndim: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {2: 0.1, 4: 0.1, 1: 0.0}


def test_accumulation_equals_the_full_batch(tmp_path: Path) -> None:
    whole = run(config(tmp_path / "a", log_every=1))
    parts = run(config(tmp_path / "b", log_every=1, accumulate=4))
    for a, b in zip(lines(tmp_path / "a"), lines(tmp_path / "b"), strict=True):
        assert_close(a["loss"], b["loss"], rtol=1e-5, atol=1e-6)
        assert_close(a["grad_norm"], b["grad_norm"], rtol=1e-4, atol=1e-6)
    a, b = (TensorFile(path / "training" / "weights.safetensors") for path in (whole, parts))
    assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_metrics_have_every_entry_and_no_step_twice(tmp_path: Path) -> None:
    settings = config(tmp_path, log_every=2)
    with pytest.raises(RuntimeError, match="crash"):
        run(settings.model_copy(update={"crash_at": 9}))
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8]
    text = (tmp_path / "config.yaml").read_text().replace("crash_at: 9", "crash_at: 1000000")
    (tmp_path / "config.yaml").write_text(text)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # torn by a kill
    run(settings)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8, 10, 12]
    assert set(lines(tmp_path)[0]) == {
        "step", "images", "loss", "absolute", "grad_norm", "lr", "images_per_second", "data_wait",
        "processes",
        "skipped", "odd", "precision",
    }  # fmt: skip
    assert lines(tmp_path)[1]["images"] == 32
    assert lines(tmp_path)[0]["lr"] == learning_rate(1, settings.train)
    assert not (tmp_path / "tensorboard").exists()


def test_steps_that_are_not_finite_are_skipped(tmp_path: Path) -> None:
    bad = {"bad_from": 4, "bad_until": 8}
    path = run(config(tmp_path / "a", bad, save_every=1, keep=20))
    checkpoints = path.parent
    for name in ("prior/model", "training/weights", "training/optimizer"):
        before, after, later = (
            (checkpoints / f"step-{n}" / f"{name}.safetensors").read_bytes() for n in (4, 8, 9)
        )
        assert before == after != later
    logged = {line["step"]: line for line in lines(tmp_path / "a")}
    assert logged[8]["skipped"] == 4
    assert logged[8]["grad_norm"] is None
    assert logged[12]["skipped"] == 0
    assert math.isfinite(logged[12]["loss"])


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    nine = {"bad_from": 1, "bad_until": 10}
    assert run(config(tmp_path / "a", nine)).name == "step-12"
    with pytest.raises(DivergedError, match=r"10 steps in a row, up to step 11"):
        run(config(tmp_path / "b", {"bad_from": 1}))


def test_too_many_steps_that_are_not_finite_end_the_run_resumed_or_not(tmp_path: Path) -> None:
    """Never two in a row, but more than one in a hundred over a thousand steps."""
    bad = {"bad_from": 0, "bad_every": 3}
    ten = run(config(tmp_path / "a", {**bad, "bad_until": 30}, steps=40))
    state = json.loads((ten / "training" / "state.json").read_text())
    assert state["skipped"] == [*range(1, 31, 3)]
    with pytest.raises(DivergedError, match=r"11 of the last 31 steps, up to step 31"):
        run(config(tmp_path / "b", bad, steps=40))
    assert resolve_folder(tmp_path / "b").name == "step-30"
    with pytest.raises(DivergedError, match=r"11 of the last 31 steps, up to step 31"):
        run(config(tmp_path / "b", bad, steps=40))


def test_steps_skipped_long_ago_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unclip.training.checkpoint.WINDOW", 100)
    bad = {"bad_from": 0, "bad_every": 11}  # ten in any hundred
    last = run(config(tmp_path, bad, steps=140, save_every=70, log_every=70))
    assert json.loads((last / "training" / "state.json").read_text())["skipped"][0] > 40


def test_a_run_says_where_its_pictures_and_its_weights_are_and_how_far_it_is_each_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(tmp_path / "soon"))
    said, drawn = capsys.readouterr()
    begun, done = said.splitlines()
    assert begun.startswith(f"{tmp_path / 'soon' / 'samples' / 'step-0.png'} shows") and not drawn
    assert done == f"trained to step 12; its weights are in {tmp_path / 'soon'}"
    monkeypatch.setattr("unclip.training.log.NEWS_EVERY", 0.0)
    run(config(tmp_path / "late"))
    said, drawn = capsys.readouterr()
    steps = [line.partition(":")[0] for line in said.splitlines()[1:-1]]
    assert steps == [f"step {step} of 12" for step in (4, 8, 12)]
    assert f"loss {lines(tmp_path / 'late')[-1]['loss']:.4g}" in said and drawn == ""


def test_entries_are_averaged_over_the_samples_that_have_them(tmp_path: Path) -> None:
    """Here the odd ones; a skipped step counts in no mean."""
    settings = config(tmp_path, {"bad_from": 1, "bad_until": 2}, steps=3, log_every=3, lr=1e-12)
    task = TinyTask(settings)
    ids = torch.tensor([k for k in range(24) if k % 2 and k // 8 != 1])
    want = task.loss(task.model, TinyBatch(ids), 0)["loss"].mean().item()
    run(settings, task)
    assert_close(lines(tmp_path)[0]["odd"], want, rtol=1e-5, atol=0)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    class Broken(TinyTask):
        def loss(self, model: nn.Module, batch: TinyBatch, step: int) -> dict[str, torch.Tensor]:
            if step == 7:
                self.model.out.bias.data.fill_(torch.inf)
            return super().loss(model, batch, step)

    settings = config(tmp_path, steps=10)
    with pytest.raises(DivergedError, match=r"out.bias is not finite at step 10, which is not"):
        run(settings, Broken(settings))
    assert resolve_folder(tmp_path).name == "step-5"
    assert run(settings).name == "step-10"


def test_a_run_folder_has_one_training_at_a_time(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"), pytest.raises(ConfigError, match="another training"):
        run(config(tmp_path))
    assert not (tmp_path / "checkpoints").exists()
    run(config(tmp_path))


class Killed(BaseException):
    """Like SIGKILL, it is caught nowhere."""


def kill_at(event: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kill before the event-th change that a save makes on disk; in the midst of a removal."""
    events: list[str] = []
    undone = os.fsync, os.replace, os.rename, shutil.rmtree

    def count(name: str) -> bool:
        events.append(name)
        return len(events) - 1 == event

    def change(name: str, usual: Callable[..., None]) -> Callable[..., None]:
        def changed(*arguments: Any, **options: Any) -> None:
            if count(name):
                raise Killed
            usual(*arguments, **options)

        return changed

    def remove(folder: Path, **options: Any) -> None:
        if count("rmtree"):
            next(path for path in Path(folder).rglob("*") if path.is_file()).unlink()
            raise Killed
        undone[3](folder, **options)

    monkeypatch.setattr(os, "fsync", change("fsync", undone[0]))
    monkeypatch.setattr(os, "replace", change("replace", undone[1]))
    monkeypatch.setattr(os, "rename", change("rename", undone[2]))
    monkeypatch.setattr(shutil, "rmtree", remove)
    return events


def test_a_run_killed_at_any_point_of_a_save_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    steps: dict[str, Any] = {"steps": 6, "save_every": 2, "sample_every": 6}
    with pytest.MonkeyPatch.context() as patch:
        events = kill_at(-1, patch)
        straight = run(config(tmp_path / "straight", **steps))
    assert {*events} == {"fsync", "replace", "rename", "rmtree"}
    for event in range(len(events)):
        out = tmp_path / str(event)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            seen = kill_at(event, patch)
            run(config(out, **steps))
        saves = seen[:event].count("rename")
        newest = newest_checkpoint(out, training=True)
        assert (newest.name if newest else "step-0") == f"step-{2 * saves}"
        assert_same_checkpoint(run(config(out, **steps)), straight)


def test_a_full_disk_is_explained_and_costs_nothing_that_was_saved(tmp_path: Path) -> None:
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TinyTask):
        def loss(self, model: nn.Module, batch: TinyBatch, step: int) -> dict[str, torch.Tensor]:
            if step == 7:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, usual[1]))
            return super().loss(model, batch, step)

    settings = config(tmp_path / "a", log_every=100)
    try:
        with pytest.raises(CheckpointError, match=r"step-10 could not be written: .*Make room"):
            run(settings, Full(settings))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-5"]
    assert_same_checkpoint(run(settings), run(config(tmp_path / "b")))


def test_no_room_for_a_preview_is_explained(tmp_path: Path) -> None:
    class Full(TinyTask):
        def preview(self, model: nn.Module) -> Image.Image:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = config(tmp_path)
    with pytest.raises(CheckpointError, match=r"can't be written to: No space left.*Make room"):
        run(settings, Full(settings))


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    straight = run(config(tmp_path / "a"))
    run(config(tmp_path / "b"))
    damaged = tmp_path / "b" / "checkpoints" / "step-12" / "training" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged checkpoint: .*step-12.*optimizer"):
        again = run(config(tmp_path / "b"))
    assert_same_checkpoint(straight, again)


def test_run_with_only_damaged_checkpoints_is_not_started_over(tmp_path: Path) -> None:
    run(config(tmp_path))
    for manifest in tmp_path.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match="every checkpoint"):
        run(config(tmp_path))


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-3.tmp").mkdir(parents=True)  # left by a kill
    run(config(tmp_path, save_every=2, keep=3))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-10", "step-12", "step-8"]


def test_another_configuration_needs_another_folder(tmp_path: Path) -> None:
    run(config(tmp_path))
    with pytest.raises(
        ConfigError, match=r"train\.lr = 0\.01, not 0\.02; choose another train.out"
    ):
        run(config(tmp_path, lr=0.02))
    with pytest.raises(ConfigError, match=r"dropout = 0\.0, not 0\.5"):
        run(config(tmp_path, {"dropout": 0.5}))


def test_a_run_of_another_stage_is_called_that(tmp_path: Path) -> None:
    """All keys of the one were unknown to the other, and listed."""
    run(config(tmp_path))
    save_config(tiny("upsampler_64", ""), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="trains the stage upsampler, not prior; choose another"):
        open_run(tmp_path, tiny("prior", "clip"))


class Fed(TinyConfig):
    data: DataConfig


def test_workers_of_the_loader_may_change_with_the_machine(tmp_path: Path) -> None:
    """They change nothing that is computed."""

    def fed(workers: int, steps: int) -> Fed:
        data = DataConfig(train="shapes", resolution=16, workers=workers)
        return Fed(train=config(tmp_path, steps=steps).train, data=data)

    run(fed(12, 5))
    assert run(fed(0, 12)).name == "step-12"
    with pytest.raises(ConfigError, match=r"data\.resolution = 16, not 32"):
        run(fed(0, 12).model_copy(update={"data": DataConfig(train="shapes", resolution=32)}))


def test_a_setting_that_an_older_run_does_not_know_has_its_default_there(tmp_path: Path) -> None:
    run(config(tmp_path, steps=5))
    text = (tmp_path / "config.yaml").read_text()
    assert "  optimizer: adamw\n" in text
    (tmp_path / "config.yaml").write_text(text.replace("  optimizer: adamw\n", ""))
    assert run(config(tmp_path)).name == "step-12"
    with pytest.raises(ConfigError, match=r"train\.optimizer = 'adamw', not 'adamw8bit'"):
        run(config(tmp_path, optimizer="adamw8bit"))


def test_length_and_intervals_may_change(tmp_path: Path) -> None:
    run(config(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    free = {"steps": 14, "save_every": 7, "sample_every": 7, "log_every": 7, "keep": 5}
    assert run(config(tmp_path / "new", **free)).name == "step-14"
    assert "steps: 14" in (tmp_path / "new" / "config.yaml").read_text()


def test_training_starts_from_given_weights(tmp_path: Path) -> None:
    first = run(config(tmp_path / "a"))
    again = config(tmp_path / "b", init=str(tmp_path / "a"), steps=1, lr=1e-12)
    second = run(again)
    averaged = TensorFile(first / "prior" / "model.safetensors")
    assert_close(TensorFile(second / "training" / "weights.safetensors"), averaged)
    # A second start resumes instead of starting from them again.
    longer = again.train.model_copy(update={"steps": 3})
    assert run(again.model_copy(update={"train": longer})).name == "step-3"


def test_only_the_parameters_asked_for_are_trained_and_a_resumed_run_keeps_to_that(
    tmp_path: Path,
) -> None:
    first = run(config(tmp_path / "a"))
    begun = TensorFile(first / "prior" / "model.safetensors")
    change = {"init": str(tmp_path / "a"), "only": ["mix.*", "*.bias"]}
    straight = run(config(tmp_path / "b", **change))
    with pytest.raises(RuntimeError, match="crash"):
        run(config(tmp_path / "c", {"crash_at": 7}, **change))
    (tmp_path / "c" / "config.yaml").write_text((tmp_path / "b" / "config.yaml").read_text())
    assert_same_checkpoint(straight, run(config(tmp_path / "c", **change)))
    for weights in ("prior/model.safetensors", "training/weights.safetensors"):
        ended = TensorFile(straight / weights)
        moved = {name for name in ended if not torch.equal(ended[name], begun[name])}
        assert moved == {"mix.weight", "lift.bias", "out.bias"}
    with pytest.raises(ConfigError, match=r"called 'mid.\*'; they are called lift.\*, mix.\*, out"):
        run(config(tmp_path / "d", init=str(tmp_path / "a"), only=["mid.*"]))
    with pytest.raises(ValidationError, match="only needs init"):
        config(tmp_path / "e", only=["mix.*"])


def test_parameters_may_begin_anew_among_given_weights(tmp_path: Path) -> None:
    first = run(config(tmp_path / "a"))
    begun = TensorFile(first / "prior" / "model.safetensors")
    fresh = TinyTask(config(tmp_path / "a")).model.state_dict()
    change = {"init": str(tmp_path / "a"), "anew": ["mix.*", "*.bias"], "lr": 1e-12}
    one = TensorFile(run(config(tmp_path / "b", steps=1, **change)) / "prior/model.safetensors")
    for name in begun:
        anew = name in {"mix.weight", "lift.bias", "out.bias"}
        assert_close(one[name], fresh[name] if anew else begun[name])
        assert torch.equal(begun[name], fresh[name]) == (name == "scale")
    # A second start resumes instead of beginning anew again.
    two = TensorFile(run(config(tmp_path / "b", steps=2, **change)) / "prior/model.safetensors")
    assert_close(two, one)
    with pytest.raises(ConfigError, match=r"train.anew: no parameter .* called 'mid.\*'"):
        run(config(tmp_path / "d", init=str(tmp_path / "a"), anew=["mid.*"]))
    with pytest.raises(ValidationError, match="anew needs init"):
        config(tmp_path / "e", anew=["mix.*"])


def test_a_model_is_made_ready_once_and_not_for_given_weights(tmp_path: Path) -> None:
    calls: list[int] = []
    settings = [
        config(tmp_path / "a", steps=2),
        config(tmp_path / "a", steps=4),  # goes on with the first
        config(tmp_path / "b", steps=2, init=str(tmp_path / "a")),
    ]
    for number, one in enumerate(settings):
        run(one, begin=lambda number=number: calls.append(number))
    assert calls == [0]


def test_weights_to_start_from_must_be_of_the_same_stage(tmp_path: Path) -> None:
    write_stage(tmp_path / "w", "decoder", {}, {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no stage 'prior' in .*, which has decoder"):
        run(config(tmp_path / "a", init=str(tmp_path / "w")))
    write_stage(tmp_path / "w", "prior", {}, {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="does not fit TinyModel"):
        run(config(tmp_path / "b", init=str(tmp_path / "w")))


def test_an_upsampler_may_start_from_the_one_of_another_size(tmp_path: Path) -> None:
    first, second = tiny_upsampler(32), tiny_upsampler(64)
    first.save(tmp_path / "w")
    network = second.network.requires_grad_(False)
    randomise(network, seed=9)
    start_from(second, tmp_path / "w")
    assert_close(network.state_dict(), first.network.state_dict())


@pytest.mark.bf16
def test_low_precision_is_close_and_keeps_float32_weights(tmp_path: Path) -> None:
    run(config(tmp_path / "a"))
    settings = config(tmp_path / "b", precision="bf16")
    task = TinyTask(settings)
    low = run(settings, task)
    a, b = (lines(tmp_path / name)[0]["loss"] for name in "ab")
    assert a != b
    assert_close(a, b, rtol=0.02, atol=0)
    for tensor in TensorFile(low / "training" / "weights.safetensors").values():
        assert tensor.dtype == torch.float32
    assert "autocast" not in repr(task.model.forward)
    assert_close(task.model(torch.ones(1, 4)), task.model.eval()(torch.ones(1, 4)), rtol=0, atol=0)


def test_checkpoint_is_a_model_folder(tmp_path: Path) -> None:
    path = run(config(tmp_path))
    assert resolve_folder(tmp_path) == path
    assert read_stage_config(path, "prior") == {"width": 8}
    averaged = TensorFile(path / "prior" / "model.safetensors")
    live = TensorFile(path / "training" / "weights.safetensors")
    assert averaged.keys() == live.keys()
    assert not torch.equal(averaged["lift.weight"], live["lift.weight"])
    assert torch.equal(averaged["scale"], live["scale"])
    optimizer = TensorFile(path / "training" / "optimizer.safetensors")
    assert optimizer["step.mix.weight"] == 12
    assert optimizer["exp_avg.mix.weight"].shape == live["mix.weight"].shape


@pytest.mark.parametrize(
    "wrong", [{"keep": 1}, {"ema": 1.0}, {"lr": 0}, {"batch": 0}, {"seed": 2**64}]
)
def test_values_that_make_no_sense_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config(tmp_path, **wrong)
