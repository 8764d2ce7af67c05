"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from unclip.errors import CheckpointError
from unclip.training.ema import EMA


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def change(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))


def test_average_equals_torch_once_warmed_up() -> None:
    net = model()
    ema = EMA(net, 0.9)
    oracle = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    oracle.update_parameters(net)  # the first call copies
    for step in range(100, 110):
        change(net)
        ema.update(step)
        oracle.update_parameters(net)
    for name, average in oracle.module.named_parameters():
        assert_close(ema.tensors()[name], average.detach())


def test_decay_warms_up() -> None:
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = EMA(net, 0.5)
    net.weight.data.fill_(1.0)
    expected = 0.0
    for step in range(12):
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + 1 - decay
        assert_close(ema.tensors()["weight"].item(), expected)


def test_swapping_gives_the_average_in_eval_mode_and_takes_it_back() -> None:
    net = model()
    net[1].eval()
    ema = EMA(net, 0.5)
    first = {name: t.clone() for name, t in ema.tensors().items()}
    change(net)
    live = {name: t.clone() for name, t in net.state_dict().items()}
    pointers = [p for p in net.parameters()]
    with pytest.raises(RuntimeError, match="inside"), ema.swapped(net) as averaged:
        assert not any(module.training for module in averaged.modules())
        for name, p in averaged.named_parameters():
            assert torch.equal(p, first[name])
        raise RuntimeError("inside")
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, live[name])
    for name, tensor in ema.tensors().items():
        assert torch.equal(tensor, first[name])
    assert [p is q for p, q in zip(net.parameters(), pointers, strict=True)] == [True] * 6
    assert [module.training for module in net] == [True, False, True]


def test_frozen_parameters_are_left_out() -> None:
    net = model()
    net[0].requires_grad_(False)
    assert [name for name in EMA(net, 0.5).names if name.startswith("0.")] == []


def test_loading_names_what_is_missing() -> None:
    ema = EMA(model(), 0.5)
    tensors = ema.tensors()
    del tensors["2.weight"]
    with pytest.raises(CheckpointError, match=r"here has no average of 2\.weight"):
        ema.load(tensors, "here")
