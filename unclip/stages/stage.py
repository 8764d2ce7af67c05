"""A stage: a network with the process it was trained on, its sampling defaults and its encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.clip.fingerprint import Fingerprint
from unclip.conditioning import Cond, TextEncoding
from unclip.diffusion.guidance import Guided
from unclip.diffusion.inpainting import Kept
from unclip.diffusion.process import GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig, denoise
from unclip.diffusion.tiling import Tiled
from unclip.errors import CheckpointError
from unclip.files.folder import WEIGHTS_LAST, write_stage
from unclip.files.tensors import write_tensors
from unclip.models.layers import statistics
from unclip.progress import Progress, steps_of
from unclip.randomness import noise_of
from unclip.stages.kinds import kind_of
from unclip.stages.resident import resident

# Pictures that go through a network together on a CPU, as many as its caches bear: 16 at 64 px, one
# from 256 px up. An accelerator takes four times as many.
CHUNK_PIXELS = 2**16
CHUNK_EMBEDDINGS = 64

Preview = Callable[[str, slice, Tensor], object]  # see `Options`


@dataclass(frozen=True)
class Start:
    """What samples start from where it is not noise of their own, and what is kept of them.

    `x_T` stands at timestep levels - 1, at the noisiest where that is None. Of `kept`, which may be
    of another size, the rest is drawn, with `repeats` turns a step (see `denoise`).

    **Shapes**: x_T (B, 3, R, R) and B rows of `kept` for B samples.
    """

    x_T: Tensor | None = None
    levels: int | None = None
    kept: Kept | None = None
    repeats: int = 1

    def rows(self, index: slice) -> Start:
        """The same for the chosen samples."""
        x_T = None if self.x_T is None else self.x_T[index]
        return replace(self, x_T=x_T, kept=None if self.kept is None else self.kept.rows(index))


@dataclass(frozen=True)
class Manner:
    """How a stage is run, whatever it draws.

    The network computes in `dtype`; `tile` runs an upsampler on tiles of that many pixels where the
    picture is larger. `progress` and `preview` are told of each step (see `Options`).
    """

    dtype: torch.dtype = torch.float32
    tile: int | None = None
    progress: Progress = False
    preview: Preview | None = None


OWN_NOISE, PLAIN = Start(), Manner()


def chunks(count: int, shape: Sequence[int], device: torch.device) -> list[slice]:
    """Which of so many samples of this shape go through a network together."""
    size = CHUNK_EMBEDDINGS
    if len(shape) > 1:
        size = max(1, CHUNK_PIXELS * (1 if device.type == "cpu" else 4) // shape[-1] ** 2)
    return [slice(first, first + size) for first in range(0, count, size)]


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
        how: Manner = PLAIN,
    ) -> Guided:
        """The network's guesses of x_0 under these conditions; see `draw`."""
        network, last, tile = self.network, self.last, how.tile
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
            dtype=how.dtype,
        )

    def draw(
        self,
        cond: Cond,
        config: SamplingConfig,
        generators: Sequence[torch.Generator],
        *,
        null_text: TextEncoding | None = None,
        negative: Cond | None = None,
        start: Start = OWN_NOISE,
        how: Manner = PLAIN,
    ) -> Tensor:
        """One sample for each generator, in chunks; a sample's chunk-mates don't change it.

        Guidance leads away from `negative` or, without one, from no condition. The trajectory is
        float32, whatever the network computes in.

        **Shapes**: cond and negative have B rows, null_text one; generators B → (B, D), or (B, 3,
        H, W) of the decoder's size or the size of low_res.
        """
        shape = self.shape if cond.low_res is None else cond.low_res.shape[1:]
        parts, together = [], chunks(len(generators), shape, cond.device)
        kept = None if start.kept is None else start.kept.at(self.side)
        with steps_of(self.name, config.steps * len(together), how.progress) as step_done:
            for rows in together:
                own = generators[rows]
                guess = self.guess(
                    cond.rows(rows),
                    config,
                    null_text=null_text,
                    negative=None if negative is None else negative.rows(rows),
                    how=how,
                )
                x = noise_of(own, shape) if start.x_T is None else start.x_T[rows]
                x = x.to(cond.device, torch.float32)
                after = None if kept is None else kept.rows(rows).after(self.diffusion, own)
                levels, repeats = start.levels, start.repeats
                for step in denoise(
                    guess, self.diffusion, config, x, own, after, levels=levels, repeats=repeats
                ):
                    x = step.x
                    step_done()
                    if how.preview is not None:
                        how.preview(self.name, rows, step.x0)
                parts.append(x)
        return torch.cat(parts)

    def describe(self) -> dict[str, Any]:
        """What its `config.json` says."""
        power = self.diffusion.power if self.diffusion is not None else {}
        return {
            "kind": self.kind,
            "model": self.config.model_dump(mode="json"),
            "diffusion": self.diffusion and self.diffusion.config.model_dump(mode="json"),
            "sampling": self.sampling.model_dump(mode="json"),
            "clip": self.encoder.model_dump(mode="json") if self.encoder else None,
            **({"power": power} if power else {}),
        }

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
        else:  # one saved here before would be taken for ours
            (folder / self.name / WEIGHTS_LAST).unlink(missing_ok=True)


@dataclass(frozen=True)
class Draw:
    """How a call draws from any of its stages, whose weights are on `device` while they are at
    work: `sampling` by their names, `null_text` for those that are told a text."""

    sampling: Mapping[str, SamplingConfig]
    null_text: Callable[[], TextEncoding | None]
    device: torch.device
    how: Manner

    def __call__(
        self,
        stage: Stage,
        cond: Cond,
        generators: Sequence[torch.Generator],
        negative: Cond | None = None,
        start: Start = OWN_NOISE,
    ) -> Tensor:
        """One sample for each generator; see `Stage.draw`.

        **Raises**: `CheckpointError` for numbers that are not finite, which no picture would show.
        """
        null_text = None if cond.text is None else self.null_text()
        with resident([stage.network, stage.last], self.device):
            drawn = stage.draw(
                cond,
                self.sampling[stage.name],
                generators,
                null_text=null_text,
                negative=negative,
                start=start,
                how=self.how,
            )
        if not bool(drawn.isfinite().all()):
            raise CheckpointError(
                f"the {stage.name} drew numbers that are not finite: its weights are damaged, or "
                "half precision can't hold what they give; draw in float32 (--dtype fp32)"
            )
        return drawn
