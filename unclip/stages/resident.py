"""Weights on a device for as long as they are needed there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def resident(modules: Iterable[nn.Module | None], device: torch.device) -> Iterator[None]:
    """Have weights on a device inside the block; those that were elsewhere stay there as well.

    For weights that don't change: nothing is copied back.
    """
    stores: list[dict[str, Any]] = [
        store
        for module in modules
        for part in (module.modules() if module is not None else ())
        for store in (part._parameters, part._buffers)
    ]
    homes = [
        (store, name, x)
        for store in stores
        for name, x in store.items()
        if x is not None and x.device != device
    ]
    try:
        for store, name, x in homes:
            there = x.data.to(device)
            store[name] = nn.Parameter(there, False) if isinstance(x, nn.Parameter) else there
        yield
    finally:
        for store, name, x in homes:
            store[name] = x
