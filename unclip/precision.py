"""What networks compute in where nobody says, and how exactly: what torch leaves to its users."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]

CPU_UNITS = ("avx512_bf16", "amx_bf16")  # without them a CPU emulates bf16, several times slower


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device has units for bfloat16, and torch uses them.

    Older GPUs emulate it, like older CPUs. ATEN_CPU_CAPABILITY can keep torch from a CPU's units.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    used = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")
    return used and any(map(torch.cpu.get_capabilities().get, CPU_UNITS))


def resolve_precision(asked: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `train.precision` stands for on a device; `auto` is bf16 where it computes in that."""
    if asked != "auto":
        return asked
    return "bf16" if computes_in_bf16(device) else "fp32"


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Half precision on accelerators, with three digits where bfloat16 has two; else float32."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


def widest(device: torch.device) -> torch.dtype:
    """Of the types that a device adds numbers in; Apple's have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def allow_tf32(device: torch.device) -> None:
    """Have a GPU multiply float32 matrices by its tensor cores, as torch lets it convolve: ten of
    the mantissa's bits, eight times as fast. A CPU keeps its bits.
    """
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")


def compute_deterministically() -> None:
    """Have accelerators add in one order, and refuse what they can't; before they are first used.

    Slower, by an amount that depends on the network.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)


@contextmanager
def any_order() -> Iterator[None]:
    """Let accelerators add as they like again, for what leaves no trace in what is trained."""
    asked = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked)
