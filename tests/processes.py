"""Several processes of one training at once, forked from one that has imported everything.

To import torch and the rest takes a process seconds, a launcher and two of its own three times as
long. Tests of the launchers themselves start them; all others use this.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [f"unclip.training.{name}" for name in ("clip", "prior", "decoder", "upsampler", "embed")]
    + ["unclip.training.launch", "open_clip", "torch.utils.tensorboard"]
)
ROOT = Path(__file__).parents[1]
TIMEOUT = 300.0  # seconds

# Below the ports that a system gives away by itself, and other ones for each of our processes.
_ports = itertools.count(20_000 + os.getpid() % 300 * 40)


def free_port() -> int:
    """A port of this machine that nothing listens to, and that nothing else is told of."""
    for port in _ports:
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("count has no end")


def together(
    work: Callable[..., object],
    *arguments: Any,
    processes: int = 2,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Call `work(*arguments)` in processes that find each other as torchrun's do; what they print.

    `work` is a function of a module, `script` for example. `environment` is what a launcher would
    say besides. One process alone is told nothing of others.
    """
    told = [dict(environment or {}) for _ in range(processes)]
    if processes > 1:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        for rank, own in enumerate(told):
            told[rank] = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **own}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(processes)]
        running = [
            CONTEXT.Process(target=_one, args=(work, arguments, own, output))
            for own, output in zip(told, outputs, strict=True)
        ]
        for process in running:
            process.start()
        end, left = time.monotonic() + TIMEOUT, set(running)
        try:
            while left and time.monotonic() < end and not any(p.exitcode for p in running):
                wait([process.sentinel for process in left], timeout=1)
                left = {process for process in left if process.is_alive()}
        finally:
            for process in left:
                process.kill()
            for process in running:
                process.join()
        printed = "".join(output.read_text() for output in outputs)
    assert [process.exitcode for process in running] == [0] * processes, printed
    return printed


def script(name: str, *arguments: str) -> None:
    """Be `python name arguments` in the repository."""
    os.chdir(ROOT)
    sys.argv = [name, *arguments]
    runpy.run_path(name, run_name="__main__")


def _one(
    work: Callable[..., object], arguments: Any, environment: Mapping[str, str], output: Path
) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    import torch

    torch.set_num_threads(1)
    try:
        work(*arguments)
    finally:
        sys.stdout.flush()
