"""Trackers of experiments, which accelerate brings, told what metrics.jsonl and samples/ hold."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import tracking
from PIL import Image

from unclip.errors import ConfigError, UnclipWarning

TrackerName = Literal["none", "tensorboard", "wandb", "mlflow"]
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
PROJECT = "unclip"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says another
IDS = "trackers.json"  # in a run's folder: which of a tracker's runs it is, to be gone on with


def check_tracker(name: TrackerName) -> None:
    """**Raises**: `ConfigError` for a tracker that is not installed, or can't be imported."""
    if name == "none":
        return
    try:
        importlib.import_module(MODULES[name])
    except Exception as error:  # whatever versions that don't fit each other provoke
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        said = "it is not installed" if missing else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"train.tracker = {name}: {said}; pip install {name}, or train.tracker=none "
            "(metrics.jsonl is always written, and `unclip watch` draws it)"
        ) from None


class Tracker:
    """A run as a tracker has it. Only rank 0 has one.

    One that fails in the middle of a training costs a warning and is told no more.

    **Raises**: `ConfigError` if the tracker can't be started.
    """

    def __init__(self, name: TrackerName, run: Path, start: int, settings: dict[str, Any]) -> None:
        self.name = name
        self._ids = run / IDS
        known = self._known().get(name) if start else None
        try:
            self._tracker: Any = _accelerates(name, run, start, known)
            self._tracker.start()
            if known is None and name != "tensorboard":  # which makes runs of their own of them
                self._tracker.store_init_configuration(settings)
        except Exception as error:
            said = " ".join(str(error).split())
            hint = "; WANDB_MODE=offline needs no account" if name == "wandb" else ""
            raise ConfigError(f"train.tracker = {name} can't be started: {said}{hint}") from None
        if name != "tensorboard":
            own = self._tracker.tracker
            known = own.id if name == "wandb" else own.info.run_id
            self._ids.write_text(json.dumps(self._known() | {name: known}), encoding="utf-8")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        self._tell(lambda tracker: tracker.log(dict(values), step=step))

    def show(self, file: Path, step: int) -> None:
        """A grid of samples."""

        def tell(tracker: Any) -> None:
            if self.name == "mlflow":  # has files, and no pictures by step
                tracker.log_artifact(str(file), "samples")
            elif self.name == "wandb":
                tracker.log_images({"samples": [str(file)]}, step=step)
            else:
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("RGB"))[None]
                tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")

        self._tell(tell)

    def close(self) -> None:
        """Send everything."""
        self._tell(lambda tracker: tracker.finish())

    def _tell(self, tell: Callable[[Any], object]) -> None:
        if self._tracker is None:
            return
        try:
            tell(self._tracker)
        except Exception as error:
            self._tracker = None
            warnings.warn(
                f"train.tracker = {self.name} failed and is told no more "
                f"({type(error).__name__}: {error}); metrics.jsonl goes on",
                UnclipWarning,
                stacklevel=3,
            )

    def _known(self) -> dict[str, str]:
        return json.loads(self._ids.read_text(encoding="utf-8")) if self._ids.is_file() else {}


def _accelerates(name: TrackerName, run: Path, start: int, known: str | None) -> Any:
    """Not started yet; `known` is the id of the run that it goes on with."""
    if name == "tensorboard":  # in run/tensorboard; what will be done again is taken back
        return tracking.TensorBoardTracker(name, run, purge_step=start + 1)
    if name == "mlflow":
        return tracking.MLflowTracker(PROJECT, run_id=known, run_name=run.name)
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return tracking.WandBTracker(project, dir=run, name=run.name, id=known, resume="allow")
