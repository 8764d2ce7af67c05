"""Around the loop: the run folder's configuration, rank 0's decisions, and stopping on a signal."""

from __future__ import annotations

import errno
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from unclip.config import Config, flat, parse_config, read_yaml, save_config
from unclip.errors import CheckpointError, ConfigError, UnclipError
from unclip.files.checkpoints import newest_checkpoint
from unclip.stages.kinds import kind_of_keys

# What may differ between a run and its continuation.
FREE_KEYS = (
    "data.workers",
    *("train.steps", "train.cooldown", "train.save_every", "train.sample_every"),
    *("train.log_every", "train.keep", "train.tracker", "train.out"),
)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SLURM warns with SIGUSR1
REPEATS = 3.0  # seconds

T = TypeVar("T")


def open_run(run: Path, resolved: Config) -> Path | None:
    """The checkpoint to resume from, if any, after comparing configurations; `run` is a folder."""
    newest = newest_checkpoint(run, training=True)
    saved = run / "config.yaml"
    if newest is not None:
        if not saved.is_file():
            raise CheckpointError(f"{run} has checkpoints but no config.yaml")
        data = read_yaml(saved)
        was, now = training_of(data), training_of(resolved.model_dump())
        if was is not None and was != now:
            raise ConfigError(
                f"{run} holds a run that trains the stage {was}, not {now}; choose another "
                "train.out to start a new one"
            )
        before = parse_config(data, type(resolved), str(saved))  # with new defaults
        _check_same(before, resolved, run)
    save_config(resolved, saved)
    return newest


def training_of(data: Mapping[str, Any]) -> str | None:
    """What a configuration trains, by its keys, if these say so."""
    model = data.get("model") or {}
    kind = kind_of_keys(model)
    if kind is not None:
        return kind.name
    if "embed_dim" in model:
        return "clip"
    return "clip_text" if "teacher" in data else None


def _check_same(before: Config, resolved: Config, run: Path) -> None:
    saved, given = (flat(config.model_dump(mode="json")) for config in (before, resolved))
    for key in [*given, *(set(saved) - set(given))]:
        if key in FREE_KEYS:
            continue
        if key not in saved or key not in given or saved[key] != given[key]:
            was, now = saved.get(key, "absent"), given.get(key, "absent")
            raise ConfigError(
                f"{run} holds a run with {key} = {was!r}, not {now!r}; "
                "choose another train.out to start a new one"
            )


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do something on rank 0 only; all processes get its result or raise its error."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except UnclipError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def locked(accelerator: Accelerator, run: Path) -> Iterator[None]:
    """Hold the run folder; the system lets go of it when the process ends, however it ends.

    **Raises**: `ConfigError` if another training holds it.
    """
    lock = FileLock(run / "lock")

    def acquire() -> None:
        run.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"another training is writing to {run}; stop it, or choose another train.out"
            ) from None

    on_main(accelerator, acquire)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def full_disk_explained(run: Path) -> Iterator[None]:
    """**Raises**: `CheckpointError` where the log or a preview finds no room to be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise CheckpointError(
            f"{run} can't be written to: {error.strerror}. Make room, then start the same command "
            "again: it continues from the newest checkpoint"
        ) from None


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that the first SIGTERM, SIGUSR1 or SIGINT sets. Those that follow at once are the
    same one, which torchrun passes on to processes that may have had it already; a later one acts
    as usual."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    usual = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    first = math.inf

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        stopped.set()
        now = time.monotonic()
        first = min(first, now)
        if now - first > REPEATS:
            signal.signal(number, usual[signal.Signals(number)])
            signal.raise_signal(number)

    for number in usual:
        signal.signal(number, handle)
    try:
        yield stopped
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
