"""The optimizer of a training, by name (Appendix C): AdamW, in eight bits, or beside Muon."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from unclip.errors import ConfigError
from unclip.training.muon import MuonAdamW

OptimizerName = Literal["adamw", "adamw8bit", "muon"]


def build_optimizer(
    model: nn.Module,
    name: OptimizerName,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW; weight decay acts on matrices and kernels, not on gains and biases.

    `adamw8bit` keeps its moments in a byte each (Dettmers et al. 2021), those of small tensors
    excepted. `muon` is AdamW for gains and biases only (see `MuonAdamW`).

    **Raises**: `ConfigError` if the first is asked for without bitsandbytes, or either of a sharded
    model.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    matrices, rest = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    groups = [
        {"params": part, "weight_decay": decay}
        for part, decay in ((matrices, weight_decay), (rest, 0.0))
        if part
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, betas, eps, fused=True)
    if any(isinstance(p, DTensor) for p in params):
        raise ConfigError(f"train.optimizer = {name} can't be shared out; use adamw")
    if name == "muon":
        return MuonAdamW(matrices, rest, lr, betas, eps, weight_decay)
    # On CPUs with bf16 its import warns of a kernel for four bits that it could download.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "train.optimizer = adamw8bit needs bitsandbytes: pip install 'unclip[8bit]'"
        ) from None
    except Exception as error:  # an installation that is broken
        raise ConfigError(f"train.optimizer = adamw8bit: bitsandbytes fails: {error}") from None
    for p in params:
        p.data = p.data.contiguous()  # it does so itself, but at the first step
    return AdamW8bit(groups, lr, betas, eps)
