"""The group norm of the U-Nets (Wu & He 2018); on accelerators one that keeps their layout.

B batch, C channels, H and W height and width, G groups, c channels a group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GroupNorm(nn.GroupNorm):
    """torch's, parameters and names included.

    CUDA's wants contiguous channels and runs in float32 under autocast: in a channels-last U-Net
    that computes in bf16 it reads and writes 26 bytes an element, and what follows 18 more, until
    the next convolution has its input. This one takes 8, and statistics are float32 all the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """**Shapes**: (B, C, H, W) → same."""
        if x.is_cpu:
            if self.weight.requires_grad and torch.is_grad_enabled() and not x.requires_grad:
                # Behind parts that aren't trained, torch's backward pass crashes where channels
                # come last: it writes the gradient of x, which there is none of.
                x = x.contiguous()
            return super().forward(x)
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Group norm whose result has the layout and the precision of x.

    **Shapes**: x (B, C, H, W); weight, bias (C,) → (B, C, H, W).
    """
    with torch.autocast(x.device.type, enabled=False):  # sums would make float32 copies of x
        if torch.compiler.is_compiling():  # a compiler finds the few passes by itself
            parts = x.float(), groups, weight.float(), bias.float(), eps
            return F.group_norm(*parts).to(x.dtype)
        return _GroupNorm.apply(x, weight, bias, groups, eps)


class _GroupNorm(torch.autograd.Function):
    """Every pass over pictures is one kernel that reads them as they are and computes in float32:
    sums with a `dtype`, and `addcmul` with a float32 operand and `out`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        n = x[0].numel() // groups
        mean = _by_group(_sum(x), groups).sum(2, keepdim=True) / n  # (B, G, 1)
        norm = torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.float32)  # (B, C)
        square = _by_group(norm.square(), groups).sum(2, keepdim=True) / n
        rstd = ((square - mean.square()).clamp(min=0) + eps).rsqrt()  # (B, G, 1)
        scale = rstd * _by_group(weight.float()[None], groups)  # (B, G, c)
        shift = _by_group(bias.float()[None], groups) - mean * scale
        ctx.save_for_backward(x, weight, mean, rstd)
        return torch.addcmul(_spread(shift), x, _spread(scale), out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        groups = mean.shape[1]
        n = x[0].numel() // groups
        product = torch.empty_like(x, dtype=torch.float32)
        torch.addcmul(mean.new_zeros(1, 1, 1, 1), grad, x, out=product)
        along = _by_group(_sum(product), groups)  # (B, G, c), of grad * x
        total = _by_group(_sum(grad), groups)  # of grad
        along = rstd * (along - mean * total)  # of grad * normalised x
        by_weight = _by_group(weight.float()[None], groups)
        a = rstd * by_weight  # (B, G, c)
        b = -rstd.square() * (by_weight * along).sum(2, keepdim=True) / n  # (B, G, 1)
        c = -rstd * (by_weight * total).sum(2, keepdim=True) / n - mean * b
        b, c = (_spread(part.expand_as(a)) for part in (b, c))
        torch.addcmul(c, x, b, out=product)
        by_x = torch.addcmul(product, grad, _spread(a), out=torch.empty_like(x))
        of_weight, of_bias = (part.flatten(1).sum(0).to(weight.dtype) for part in (along, total))
        return by_x, of_weight, of_bias, None, None


def _sum(x: Tensor) -> Tensor:
    """**Shapes**: (B, C, H, W) → (B, C), float32."""
    return x.sum((2, 3), dtype=torch.float32)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """**Shapes**: (B, C) → (B, G, c)."""
    return x.unflatten(1, (groups, -1))


def _spread(x: Tensor) -> Tensor:
    """**Shapes**: (B, G, c) → (B, C, 1, 1)."""
    return x.flatten(1)[:, :, None, None]
