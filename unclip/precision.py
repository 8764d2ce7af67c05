"""What frozen networks compute in where nobody says."""

from __future__ import annotations

import torch


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Half precision on accelerators, with three digits where bfloat16 has two; else float32."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16
