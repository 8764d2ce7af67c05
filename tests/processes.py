"""Several processes of one training at once, forked from one that has imported everything.

To import torch and the rest takes a process seconds, a launcher and two of its own three times as
long. Tests of the launchers themselves start them; all others use this.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
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
    [f"unclip.training.{name}" for name in ("launch", "prior", "decoder", "upsampler", "embed")]
)
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

    `work` is a function of a module. `environment` is what a launcher would say besides.
    """
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        **(environment or {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(processes)]
        ranks = [{**common, "RANK": str(k), "LOCAL_RANK": str(k)} for k in range(processes)]
        running = [
            CONTEXT.Process(target=_one, args=(work, arguments, rank, output))
            for rank, output in zip(ranks, outputs, strict=True)
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
