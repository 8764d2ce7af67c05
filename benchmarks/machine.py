"""This machine's best arithmetic, and this process's memory.

Needs torch alone, so that a peer's environment can use it too.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

MB = 1e6


def reset_peak() -> bool:
    """Start the process's memory peak anew; False where the system can't."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory(key: str) -> int:
    """Bytes of `VmRSS` (now), `RssAnon` (what is mapped left out) or `VmHWM` (the peak since it was
    last reset)."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # since the start


def machine_peak(
    seconds: float = 0.5, dtype: torch.dtype = torch.float32, matmul: bool = True
) -> tuple[float, str]:
    """The best GFLOP/s of a few channels-last convolutions and, with `matmul`, a matrix product."""
    last = torch.channels_last

    def tensor(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, dtype=dtype)
        return x.to(memory_format=last) if x.ndim == 4 else x

    weight, wide = tensor(256, 256, 3, 3), tensor(64, 64, 3, 3)
    a, x, y = tensor(2048, 2048), tensor(1, 256, 64, 64), tensor(1, 64, 256, 256)
    work: dict[str, tuple[Callable[[], Any], float]] = {
        "3x3 conv, 256 channels at 64 px": (
            lambda: F.conv2d(x, weight, padding=1),
            2 * 9 * 256**2 * 64**2,
        ),
        "3x3 conv, 64 channels at 256 px": (
            lambda: F.conv2d(y, wide, padding=1),
            2 * 9 * 64**2 * 256**2,
        ),
    }
    if matmul:
        work["matmul 2048"] = (lambda: a @ a, 2 * 2048**3)
    best, what = 0.0, ""
    for name, (job, flops) in work.items():
        job()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            begun = time.perf_counter()
            job()
            rate = flops / (time.perf_counter() - begun) / 1e9
            if rate > best:
                best, what = rate, name
    return best, what
