"""A stage: a network with the process it was trained on, its sampling defaults and its encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from unclip.clip.fingerprint import Fingerprint
from unclip.conditioning import Cond, TextEncoding
from unclip.diffusion.guidance import Guided
from unclip.diffusion.process import GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig, denoise
from unclip.diffusion.tiling import Tiled
from unclip.files.folder import WEIGHTS_LAST, write_stage
from unclip.files.tensors import write_tensors
from unclip.models.layers import statistics
from unclip.progress import Progress, steps_of
from unclip.randomness import noise_of
from unclip.stages.kinds import kind_of

# Pictures that go through a network together on a CPU, as many as its caches bear: 16 at 64 px, one
# from 256 px up. An accelerator takes four times as many.
CHUNK_PIXELS = 2**16
CHUNK_EMBEDDINGS = 64

AfterRows = Callable[[Tensor, int | None, slice], Tensor]  # see `Stage.draw`
Preview = Callable[[str, slice, Tensor], object]  # see `Options`


class Draw(Protocol):
    """How a stage is drawn from by whoever holds the options: one sample for each generator."""

    def __call__(
        self, stage: Stage, cond: Cond, generators: Sequence[torch.Generator], /, **more: Any
    ) -> Tensor:
        """`more` are `Stage.draw`'s negative, x_T, after, levels and repeats."""


def together(shape: Sequence[int], device: torch.device) -> int:
    """How many samples of this shape go through a network together."""
    return CHUNK_EMBEDDINGS if len(shape) == 1 else chunk_size(shape[-1], device)


def chunk_size(side: int, device: torch.device) -> int:
    """How many pictures of this side go through a network together."""
    return max(1, CHUNK_PIXELS * (1 if device.type == "cpu" else 4) // side**2)


@dataclass
class Stage:
    """One diffusion stage. `encoder` is the CLIP it was trained with; upsamplers have none.

    `last` is a second network for the final sampling step, which Karlo's upsampler has.
    """

    name: str
    network: Any
    diffusion: GaussianDiffusion
    sampling: SamplingConfig
    encoder: Fingerprint | None = None
    last: Any = None

    @property
    def config(self) -> Any:
        """The network's configuration."""
        return self.network.config

    @property
    def kind(self) -> str:
        """prior, decoder or upsampler."""
        return kind_of(self.config).name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (D,) for embeddings, (3, R, R) for pictures."""
        return kind_of(self.config).shape(self.config)

    @property
    def side(self) -> int:
        """Of the pictures that are drawn, in pixels."""
        return self.shape[-1]

    @property
    def low(self) -> int:
        """The side of the pictures that an upsampler enlarges, in pixels."""
        return self.config.low

    @property
    def width(self) -> int:
        """Of the CLIP embeddings that a prior draws and a decoder is told."""
        return self.config.embed

    @property
    def reads_text(self) -> bool:
        """Whether the network is told a caption."""
        return getattr(self.config, "text_width", None) is not None

    def embeddings(self, drawn: Tensor) -> Tensor:
        """Raw CLIP embeddings of what a prior drew. **Shapes**: (B, D) → (B, D)."""
        return self.network.scale.inverse(drawn)

    @torch.no_grad()
    def guess(
        self,
        cond: Cond,
        config: SamplingConfig,
        *,
        null_text: TextEncoding | None = None,
        negative: Cond | None = None,
        dtype: torch.dtype = torch.float32,
        tile: int | None = None,
    ) -> Guided:
        """The network's guesses of x_0 under these conditions; see `draw`."""
        network, last = self.network, self.last
        if tile is not None and cond.low_res is not None and tile < cond.low_res.shape[-1]:
            network, last = Tiled(network, tile), last and Tiled(last, tile)
        return Guided(
            self.diffusion,
            network,
            cond,
            config,
            null_text=null_text,
            negative=negative,
            last=last,
            dtype=dtype,
        )

    def draw(
        self,
        cond: Cond,
        shape: tuple[int, ...],
        config: SamplingConfig,
        generators: Sequence[torch.Generator],
        *,
        null_text: TextEncoding | None = None,
        negative: Cond | None = None,
        x_T: Tensor | None = None,
        after: AfterRows | None = None,
        levels: int | None = None,
        repeats: int = 1,
        dtype: torch.dtype = torch.float32,
        tile: int | None = None,
        progress: Progress = False,
        preview: Preview | None = None,
    ) -> Tensor:
        """One sample for each generator, in chunks; a sample's chunk-mates don't change it.

        Guidance leads away from `negative` or, without one, from no condition. The trajectory is
        float32; the network computes in `dtype`. `after(x, t, rows)` may put other x in the place
        of those rows of the batch that a step has led to timestep t, None for x_0. `levels` and
        `repeats` are `denoise`'s. `tile` runs an upsampler on tiles of that many pixels where the
        picture is larger. `preview` is told after each step what it takes those rows for.

        **Shapes**: cond and negative have B rows, null_text one; shape is that of one sample;
        generators B; x_T (B, *shape) replaces the noise that these would draw → (B, *shape).
        """
        chunk = together(shape, cond.device)
        starts = range(0, len(generators), chunk)
        total = config.steps * len(starts)
        parts = []
        with steps_of(self.name, total, progress) as step_done:
            for start in starts:
                rows = slice(start, start + chunk)
                guess = self.guess(
                    cond.rows(rows),
                    config,
                    null_text=null_text,
                    negative=None if negative is None else negative.rows(rows),
                    dtype=dtype,
                    tile=tile,
                )
                own = generators[rows]
                x = noise_of(own, shape) if x_T is None else x_T[rows]
                x = x.to(cond.device, torch.float32)
                enter = None if after is None else _in_rows(after, rows)
                for step in denoise(
                    guess, self.diffusion, config, x, own, enter, levels=levels, repeats=repeats
                ):
                    x = step.x
                    step_done()
                    if preview is not None:
                        preview(self.name, rows, step.x0)
                parts.append(x)
        return torch.cat(parts)

    def describe(self) -> dict[str, Any]:
        """What its `config.json` says."""
        power = self.diffusion.power if self.diffusion is not None else {}
        return {
            "kind": self.kind,
            "model": self.config.model_dump(mode="json"),
            "diffusion": self._process(),
            "sampling": self.sampling.model_dump(mode="json"),
            "clip": self.encoder.model_dump(mode="json") if self.encoder else None,
            **({"power": power} if power else {}),
        }

    def _process(self) -> dict[str, Any] | None:
        return self.diffusion.config.model_dump(mode="json")

    def save(
        self,
        folder: Path,
        tensors: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write `folder/<name>/`; `tensors` stand in for our network's (their averages, say)."""
        tensors = self.network.state_dict() if tensors is None else tensors
        exact = statistics(self.network)
        write_stage(folder, self.name, self.describe(), tensors, dtype, exact)
        if self.last is not None:
            last = self.last.state_dict()
            write_tensors(folder / self.name / WEIGHTS_LAST, last, dtype, exact)


def _in_rows(after: AfterRows, rows: slice) -> Callable[[Tensor, int | None], Tensor]:
    return lambda x, t: after(x, t, rows)
