"""The moving average of the weights, from which everything is sampled (Appendix C)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unclip.errors import CheckpointError
from unclip.training.sharding import part, put


class EMA:
    """A float32 exponential moving average of a model's trainable parameters.

    The decay of update k is min(decay, (1 + k) / (10 + k)), so that the random initial weights
    are forgotten early.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for _, p in trained), "train float32 weights"
        self.names = [name for name, _ in trained]
        self._live = [p for _, p in trained]
        self._average = [p.detach().clone() for _, p in trained]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the live weights after optimizer step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [part(p.detach()) for p in self._live]
        torch._foreach_lerp_([part(a) for a in self._average], live, 1 - decay)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the averaged weights, in eval mode; afterwards all is as before."""
        modes = [(module, module.training) for module in model.modules()]
        self._swap()
        model.eval()
        try:
            yield model
        finally:
            self._swap()
            for module, training in modes:
                module.training = training

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return dict(zip(self.names, self._average, strict=True))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Take over averages by parameter name; other names are ignored.

        **Raises**: `CheckpointError` naming the first that is missing or of another shape.
        """
        for name, average in self.tensors().items():
            if name not in tensors or tensors[name].shape != average.shape:
                raise CheckpointError(f"{what} has no average of {name} of the right shape")
            put(average, tensors[name])

    @torch.no_grad()
    def _swap(self) -> None:
        # Values change places: whoever holds a weight's memory, as FSDP does, sees the average.
        for live, average in zip(self._live, self._average, strict=True):
            kept = part(live).clone()
            part(live).copy_(part(average))
            part(average).copy_(kept)
