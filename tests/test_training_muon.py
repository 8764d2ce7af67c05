"""Muon: matrices and kernels move by orthogonal steps, everything else as with AdamW."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.testing import assert_close

from unclip.training.optimizer import OptimizerName, build_optimizer

LR, DECAY = 0.01, 0.1


def optimizer(model: nn.Module, name: OptimizerName = "muon") -> torch.optim.Optimizer:
    return build_optimizer(model, name, LR, (0.9, 0.999), 1e-8, DECAY)


def stepped(model: nn.Module, name: OptimizerName = "muon", steps: int = 1) -> nn.Module:
    """A copy after steps on gradients that depend on the step alone."""
    model = copy.deepcopy(model)
    chosen = optimizer(model, name)
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g))
        chosen.step()
    return model


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6))


def test_a_step_is_orthogonal_and_as_long_as_adamws() -> None:
    model = network()
    moved = stepped(model)
    for k, longest in ((0, 12), (1, 36)):
        before, after = (m[k].weight.detach().flatten(1) for m in (model, moved))
        step = (before * (1 - LR * DECAY) - after) / (LR * 0.2 * longest**0.5)
        spread = torch.linalg.svdvals(step)
        assert spread.min() > 0.5 and spread.max() < 1.4  # five rounds of Newton-Schulz
        rms = (before - after).square().mean().sqrt()
        assert 0.1 * LR < rms < 0.3 * LR


def test_gains_and_biases_move_as_with_adamw() -> None:
    model = network()
    muon, adamw = (stepped(model, name, 3) for name in ("muon", "adamw"))
    for (name, a), b in zip(muon.named_parameters(), adamw.parameters(), strict=True):
        assert torch.equal(a, b) == (a.ndim == 1), name


def test_a_kernel_is_the_same_matrix_however_it_lies_in_memory() -> None:
    plain = network()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    a, b = (stepped(model, steps=4)[1].weight for model in (plain, last))
    assert not b.is_contiguous()
    assert_close(a.contiguous(), b.contiguous(), rtol=0, atol=0.02 * LR)  # in bfloat16 inside


def test_the_learning_rate_of_the_groups_is_that_of_the_step() -> None:
    model = network()
    still = copy.deepcopy(model)
    chosen = optimizer(model)
    for group in chosen.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    chosen.step()
    assert_close(model.state_dict(), still.state_dict(), rtol=0, atol=0)
