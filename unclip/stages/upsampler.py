"""From small pictures to large ones, through one upsampler after the other (Section 2.1).

B pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unclip.conditioning import Cond
from unclip.diffusion.inpainting import Kept
from unclip.errors import ConfigError
from unclip.images import resize
from unclip.stages.stage import Draw, Stage, Start, chunks


def route(upsamplers: Sequence[Stage], low: int, high: int) -> list[Stage] | None:
    """The stages that lead from pictures of `low` pixels to `high`, in order; None if none do."""
    if low == high:
        return []
    last = next((stage for stage in upsamplers if stage.side == high), None)
    before = None if last is None else route(upsamplers, low, last.low)
    return None if last is None or before is None else [*before, last]


def way_up(
    upsamplers: Sequence[Stage], side: int, size: int | None = None
) -> tuple[int, list[Stage]]:
    """How a picture of any side gets to `size`, by default the largest: the side that it is first
    resized to, the largest input not above its own, and the stages from there.

    **Raises**: `ConfigError` naming the sizes that it can get to.
    """
    goals = [stage.side for stage in upsamplers if stage.side > side]
    goal = size or upsamplers[-1].side
    if goal not in goals:
        possible = f"can be upscaled to {goals}" if goals else "is too large to upscale"
        raise ConfigError(f"size {goal}: with this model a picture of {side} pixels {possible}")
    lows = sorted(
        {stage.low for stage in upsamplers}, key=lambda low: (low > side, abs(low - side))
    )
    return next((low, r) for low in lows if low < goal and (r := route(upsamplers, low, goal)))


def enlarged(
    chosen: Sequence[Stage],
    x: Tensor,
    generators: Sequence[torch.Generator],
    draw: Draw,
    kept: Kept | None = None,
) -> Iterator[Tensor]:
    """Pictures after these upsamplers, each as soon as the last one has drawn it: of large pictures
    only those are in memory that it takes together. What is kept is put back to the bit.

    **Shapes**: x (B, 3, R, R), kept B rows → (3, R', R') B times.
    """

    def through(stages: Sequence[Stage], x: Tensor, rows: slice) -> Tensor:
        start = Start(kept=None if kept is None else kept.rows(rows))
        for stage in stages:
            cond = Cond(low_res=resize(x, stage.side))
            x = draw(stage, cond, generators[rows], start=start).clamp(-1, 1)
        return x

    x = through(chosen[:-1], x, slice(None))
    for rows in chunks(len(x), chosen[-1].shape if chosen else x.shape[1:], x.device):
        larger = through(chosen[-1:], x[rows], rows)
        yield from larger if kept is None else kept.rows(rows).at(larger.shape[-1]).paste(larger)
