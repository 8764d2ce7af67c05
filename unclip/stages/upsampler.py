"""From small pictures to large ones, through one upsampler after the other (Section 2.1).

B pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unclip.conditioning import Cond
from unclip.images import resize
from unclip.stages.stage import Draw, Stage


def route(upsamplers: Sequence[Stage], low: int, high: int) -> list[Stage] | None:
    """The stages that lead from pictures of `low` pixels to `high`, in order; None if none do."""
    if low == high:
        return []
    last = next((stage for stage in upsamplers if stage.side == high), None)
    before = None if last is None else route(upsamplers, low, last.low)
    return None if last is None or before is None else [*before, last]


def enlarge(
    chosen: Sequence[Stage], x: Tensor, generators: Sequence[torch.Generator], draw: Draw
) -> Tensor:
    """Send pictures through upsamplers. **Shapes**: x (B, 3, R, R) → (B, 3, R', R')."""
    for stage in chosen:
        x = draw(stage, Cond(low_res=resize(x, stage.side)), generators).clamp(-1, 1)
    return x
