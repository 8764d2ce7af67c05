"""Trackers: told what metrics.jsonl and samples/ hold, checked before anything is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training_fit import lines
from test_training_launch import write
from tiny_task import start

from unclip.errors import ConfigError
from unclip.training.trackers import check_tracker


def test_tensorboard_holds_the_run_once_also_when_it_was_continued(tmp_path: Path) -> None:
    said = ["bad_from=99", "train.log_every=1", "train.tracker=tensorboard"]
    start(write(tmp_path), "train.steps=4", *said)
    start(write(tmp_path), "train.steps=8", *said)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = lines(tmp_path / "run")
    for name in ("loss", "grad_norm", "lr"):
        scalars = board.Scalars(f"train/{name}")
        assert [x.step for x in scalars] == [line["step"] for line in logged]
        assert [x.value for x in scalars] == pytest.approx([line[name] for line in logged])
    assert board.Images("samples")[-1].step == 8


class Recorded:
    """Stands for wandb and for mlflow as far as accelerate calls them."""

    def __init__(self, fails_at: float = float("inf")) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails_at, self.id, self.info = fails_at, "abc", SimpleNamespace(run_id="abc")
        self.config = SimpleNamespace(update=self._note("settings"))

    def _note(self, what: str) -> Any:
        return lambda *given, **named: self.calls.append((what, (given, named)))

    def log(self, values: dict[str, Any], step: int) -> None:
        if step >= self.fails_at:
            raise ConnectionError("no route to host")
        self.calls.append(("log", (step, values)))

    def named(self, what: str) -> list[Any]:
        return [given for name, given in self.calls if name == what]


def pretended_wandb(monkeypatch: pytest.MonkeyPatch, run: Recorded) -> None:
    module: Any = ModuleType("wandb")
    module.config, module.Image = run.config, lambda image: image
    run.finish = run._note("finish")  # type: ignore[attr-defined]

    def init(**named: Any) -> Recorded:
        run.calls.append(("init", named))
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_wandb_is_told_settings_numbers_and_pictures_and_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Recorded()
    pretended_wandb(monkeypatch, run)
    said = ["bad_from=99", "train.log_every=2", "train.tracker=wandb"]
    start(write(tmp_path), "train.steps=4", *said)
    start(write(tmp_path), "train.steps=8", *said)
    first, second = run.named("init")
    assert (first["id"], second["id"], first["resume"]) == (None, "abc", "allow")
    (settings,) = run.named("settings")
    assert settings[0][0]["train.steps"] == 4
    told = {step: values for step, values in run.named("log") if "train/loss" in values}
    assert {k: v["train/loss"] for k, v in told.items()} == {
        line["step"]: line["loss"] for line in lines(tmp_path / "run")
    }
    pictures = [values["samples"][0] for _, values in run.named("log") if "samples" in values]
    assert pictures[-1] == str(tmp_path / "run" / "samples" / "step-8.png")
    assert len(run.named("finish")) == 2


def test_mlflow_is_told_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorded()
    module: Any = ModuleType("mlflow")
    module.utils = SimpleNamespace(
        validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    )
    module.search_experiments = lambda **named: [SimpleNamespace(experiment_id="0")]

    def start_run(**named: Any) -> Recorded:
        run.calls.append(("init", named))
        return run

    module.start_run, module.log_metrics = start_run, run.log
    for name in ("log_params", "log_artifact", "end_run"):
        setattr(module, name, run._note(name))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for steps in (4, 8):
        start(write(tmp_path), f"train.steps={steps}", "bad_from=99", "train.tracker=mlflow")
    assert [named["run_id"] for named in run.named("init")] == [None, "abc"]
    assert len(run.named("log_params")) == 1 and len(run.named("end_run")) == 2
    assert run.named("log_artifact")[-1][1]["local_path"].endswith("step-8.png")
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"mlflow": "abc"}


def test_a_tracker_that_fails_costs_a_warning_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Recorded(fails_at=2)
    pretended_wandb(monkeypatch, run)
    said = ["bad_from=99", "train.log_every=1", "train.tracker=wandb"]
    start(write(tmp_path), "train.steps=4", *said)
    shown = capsys.readouterr().err
    assert shown.count("no route to host") == 1 and "told no more" in shown
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_one_that_is_not_installed_or_broken_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SystemExit) as exit:
        start(write(tmp_path), "train.tracker=mlflow")
    shown = capsys.readouterr().err
    assert exit.value.code == 2 and "pip install mlflow" in shown
    assert not (tmp_path / "run" / "config.yaml").exists()
    (tmp_path / "wandb.py").write_text("raise TypeError('Descriptors')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="Descriptors"):
        check_tracker("wandb")
