"""How exactly an accelerator computes: what torch leaves to its users."""

from __future__ import annotations

import os

import torch


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Half precision on accelerators, with three digits where bfloat16 has two; else float32."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


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
