"""LoRA: low-rank changes W + BA of a network's linear layers (Hu et al. 2021).

r rank, I and O a layer's inputs and outputs.

A change is a parametrization of the weight, so that whatever reads it sees the sum, and what is
trained computes what the merged weights will.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize

from unclip.models.layers import Draft

KNOWN_BY = 8  # of a weight's numbers, by which it is recognised
ROUNDING = 0.01  # how far these may be off, as a share: bfloat16 keeps them to 0.4 %


class LowRank(nn.Module):
    """The change of one weight; none at first. `base` are some of that weight's own numbers.

    **Shapes**: a (r, I), b (O, r), base (8,).
    """

    base: Tensor

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(weight.new_empty(rank, inputs))
        self.b = nn.Parameter(weight.new_zeros(outputs, rank))
        nn.init.normal_(self.a, std=inputs**-0.5)
        self.register_buffer("base", known_by(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """**Shapes**: (O, I) → (O, I)."""
        return changed(weight, self.a, self.b)


def changed(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + BA. **Shapes**: (O, I), (r, I), (O, r) → (O, I)."""
    return weight + b @ a


def known_by(weight: Tensor) -> Tensor:
    """Some of a weight's numbers. **Shapes**: (O, I) → (8,) float32."""
    return weight.detach().flatten()[:KNOWN_BY].float().clone()


def is_known(weight: Tensor, base: Tensor) -> bool:
    """Whether a weight is the one that a change was made for, in whatever precision."""
    off = (known_by(weight).cpu() - base.float().cpu()).norm()
    return bool(off <= ROUNDING * base.float().norm().cpu())


def adapt(network: nn.Module, rank: int) -> nn.Module:
    """Freeze a network but for a change of each of its linear layers, a `LowRank`.

    Returns the changes alone, as a tree with the layers' names. What is fitted before a network is
    trained (`Draft`) stays as it is, and so do layers that are no larger than the rank.
    """
    network.requires_grad_(False)
    tree = nn.Module()
    for name, layer in list(_layers(network, rank)):
        change = LowRank(layer.weight, rank)
        parametrize.register_parametrization(layer, "weight", change)
        place = tree
        *parts, last = name.split(".")
        for part in parts:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, change)
    return tree


def _layers(network: nn.Module, rank: int) -> Iterator[tuple[str, nn.Linear]]:
    modules = dict(network.named_modules())
    fitted = tuple(f"{name}." for name, part in modules.items() if isinstance(part, Draft))
    for name, layer in modules.items():
        large = isinstance(layer, nn.Linear) and min(layer.weight.shape) > rank
        if large and not name.startswith(fitted):
            yield name, layer
