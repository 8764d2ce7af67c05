"""Muon for matrices and kernels, AdamW for the rest (Jordan et al. 2024; Liu et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer of torch's two; the learning rate means what it does to AdamW.

    Muon moves a matrix by its momentum made orthogonal, which takes about as large a step in
    every direction. A convolution's kernel is the matrix of its output channels by all that each of
    them reads. The state is kept by the model's own parameters.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        rest: Sequence[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        groups = [{"params": list(matrices)}, {"params": list(rest)}]
        super().__init__([group for group in groups if group["params"]], {"lr": lr})
        self._matrices = [(p, nn.Parameter(_flat(p, p.detach()))) for p in matrices]
        self._inner: list[torch.optim.Optimizer] = []
        if matrices:
            flat = [flat for _, flat in self._matrices]
            self._inner.append(
                torch.optim.Muon(flat, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if rest:
            self._inner.append(torch.optim.AdamW(rest, lr, betas, eps, 0.0, fused=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both, with the learning rates that the groups have now."""
        for p, flat in self._matrices:
            flat.data = _flat(p, p.detach())  # the same memory
            flat.grad = None if p.grad is None else _flat(p, p.grad)
        for group, inner in zip(self.param_groups, self._inner, strict=True):
            own = inner.param_groups[0]
            own["lr"] = group["lr"]
            for p, stands_for in zip(group["params"], own["params"], strict=True):
                inner.state[stands_for] = self.state[p]  # one and the same dict
            inner.step()


def _flat(parameter: nn.Parameter, x: Tensor) -> Tensor:
    """A parameter or its gradient as a matrix, without a copy where it is laid out alike."""
    if parameter.ndim == 4 and not parameter.is_contiguous():  # channels last
        x = x.movedim(1, -1)
    return x.flatten(1)
