"""Random weights in which a swapped or unused tensor shows, and copies of diffusers' weights."""

from __future__ import annotations

from collections import ChainMap
from typing import Any

import torch
from torch import nn

from unclip.files.tensors import load_tensors
from unclip.interop.names import Names, Renamed, to_diffusers


def randomise(model: nn.Module, seed: int, gain: float = 1.0) -> None:
    """Give every parameter its own random values, so that a swapped or unused one shows.

    `gain`: of matrices; below one, a network does not amplify roundings from layer to layer.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
            is_norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            if parameter.ndim == 1:
                parameter.copy_(is_norm + 0.2 * noise)
            else:
                parameter.copy_(gain * noise / fan_in**0.5)


def copy_weights(ours: nn.Module, *sources: tuple[Names, nn.Module]) -> None:
    """Give our network the weights of theirs, all of them, and check that they find their way back.

    What theirs lacks (the statistics of a raw scale) keeps its value.
    """
    own = {name: x.clone() for name, x in ours.state_dict().items()}
    renamed: list[Any] = [
        Renamed(names, theirs.state_dict(), {k: x.shape for k, x in own.items()}, "theirs")
        for names, theirs in sources
    ]
    load_tensors(ours, ChainMap(*renamed, own), "theirs")
    assert set(own) - set().union(*renamed) <= {"scale.mean", "scale.std"}
    for names, theirs in sources:
        back, expected = to_diffusers(names, ours.state_dict()), theirs.state_dict()
        assert back.keys() == expected.keys()
        assert all(torch.equal(back[name], expected[name]) for name in expected)
