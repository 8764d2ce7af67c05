"""Whether a training computes in bfloat16 or in float32, where it is told to find out by itself."""

from __future__ import annotations

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
