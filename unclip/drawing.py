"""Drawing pictures: prior, decoder and upsamplers one after the other, in groups (Section 2).

B pictures, D CLIP embedding, R the decoder's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unclip import randomness
from unclip.conditioning import Cond, TextEncoding
from unclip.diffusion.inpainting import Kept
from unclip.diffusion.sampling import SamplingConfig
from unclip.diffusion.schedulers import check_sampler
from unclip.errors import ConfigError
from unclip.images import pad_to_square, resize, to_pil, to_tensor
from unclip.options import Options
from unclip.reader import Reader
from unclip.stages.decoder import levels
from unclip.stages.prior import draw_embeddings
from unclip.stages.resident import resident
from unclip.stages.stage import Draw, Stage, together
from unclip.stages.upsampler import enlarged, way_up


@dataclass(frozen=True)
class Start:
    """What the decoder starts from where it is not noise of its own.

    `x_T` stands at timestep levels - 1, at the noisiest where that is None. Of `kept`, one picture,
    the rest is drawn, with `repeats` turns a step (see `denoise`).

    **Shapes**: x_T (B, 3, R, R) for B pictures.
    """

    x_T: Tensor | None = None
    levels: int | None = None
    kept: Kept | None = None
    repeats: int = 1

    @classmethod
    def of(
        cls, given: Start | Tensor | None, decoder: Stage, config: SamplingConfig, count: int
    ) -> Start:
        """One x_T for each of `count` pictures, or one for all, as `invert` gives them.

        **Raises**: `ConfigError` for another shape, or a sampling that can't start so.
        """
        start = cls() if given is None else given
        if not isinstance(start, Start):
            shape = tuple(getattr(start, "shape", ()))
            if shape[1:] != decoder.shape or shape[0] not in (1, count):
                raise ConfigError(
                    f"x_T of shape {shape}; this decoder takes {(count, *decoder.shape)} for "
                    f"{count} pictures, or a first side of 1"
                )
            start = cls(start.expand(count, -1, -1, -1), levels(decoder))
        check_sampler(decoder.diffusion, config.sampler, config.steps, start.levels)
        if start.repeats < 1 or (start.repeats > 1 and config.sampler not in ("ddpm", "ddim")):
            raise ConfigError(
                f"repeats = {start.repeats} with {config.sampler}: must be at least 1, and only "
                "ddpm and ddim can do more than that"
            )
        return start


@dataclass(frozen=True)
class Drawing:
    """What draws a call's pictures, and how many of which the best are kept.

    `draw` knows the options of every stage; `upsamplers` lead from the decoder's size to the one
    asked for. Without a prior there must be embeddings, without an encoder no captions.
    `by` says what stands in the prior's place (see `PriorName`), `negative` what to lead away from.
    """

    prior: Stage | None
    decoder: Stage
    upsamplers: Sequence[Stage]
    draw: Draw
    reader: Reader
    prior_candidates: int
    candidates: int
    by: str = "diffusion"
    negative: str | None = None
    start: Start = Start()

    def pictures(
        self, prompts: Sequence[str], z_image: Tensor | None, seeds: Sequence[int]
    ) -> Iterator[Image]:
        """A picture for each seed, the prompts' own in equal numbers, prompt-major.

        As many as the decoder takes together go through all stages before the next do, so that
        memory doesn't grow with their number. **Shapes**: z_image (B, D) for B seeds.
        """
        device, n = self.reader.device, len(seeds) // len(prompts)
        group = together(self.decoder.shape, device)
        for start in range(0, len(seeds), group):
            own = seeds[start : start + group]
            index = torch.arange(start, start + len(own)) // n  # of the prompts
            text = None
            if self.reader.clip is not None:
                read = self.reader.text(prompts[int(index[0]) : int(index[-1]) + 1])
                text = read.rows(index - index[0])
            z = None if z_image is None else z_image[start : start + group].to(device)
            yield from self._rows(slice(start, start + group))._best(z, text, own)

    def _rows(self, rows: slice) -> Drawing:
        """The same for some of the pictures."""
        x_T = self.start.x_T
        return self if x_T is None else replace(self, start=replace(self.start, x_T=x_T[rows]))

    def _best(
        self, z_image: Tensor | None, text: TextEncoding | None, seeds: Sequence[int]
    ) -> Iterator[Image]:
        """Finish `candidates` for each picture and keep the best by CLIP score."""
        first = self._finish(z_image, text, [torch.Generator().manual_seed(s) for s in seeds])
        if self.candidates == 1 or text is None:
            yield from first
            return
        rounds = [list(first)]
        for j in range(1, self.candidates):
            generators = [randomness.generator(s, "candidate", j) for s in seeds]
            rounds.append(list(self._finish(z_image, text, generators)))
        z_text = text.embed.float()
        scores = [cosine_similarity(self.reader.images(r).float(), z_text) for r in rounds]
        best = torch.stack(scores).argmax(0).tolist()  # of (candidates, B)
        yield from (rounds[j][k] for k, j in enumerate(best))

    def _finish(
        self,
        z_image: Tensor | None,
        text: TextEncoding | None,
        generators: Sequence[torch.Generator],
    ) -> Iterator[Image]:
        """A picture for each generator, as soon as the last stage has drawn it."""
        negative = None
        if self.negative is not None:
            negative = self.reader.text([self.negative]).repeat(len(generators))
        # What the prior makes of what is not wanted, by the same noise: with the same text it is
        # the same embedding, because neither is guided then.
        away = None if negative is None else self._embed(negative, _anew(generators), negative)
        if z_image is None:
            assert text is not None
            z_image = self._embed(text, generators, negative)
        start, kept = self.start, self.start.kept
        if kept is not None:
            kept = kept.repeat(len(generators), self.reader.device)
        at = None if kept is None else kept.at(self.decoder.side)
        shown = None
        if at is not None and self.decoder.config.inpaint:
            shown, at = at.shown(), None  # it draws what goes with that, nothing is put back
        cond = self._cond(z_image, text, shown)
        x = self.draw(
            self.decoder,
            cond,
            generators,
            negative=None if away is None else self._cond(away, negative, shown),
            x_T=start.x_T,
            after=None if at is None else at.after(self.decoder.diffusion, generators),
            levels=start.levels,
            repeats=start.repeats,
        ).clamp(-1, 1)  # (B, 3, R, R)
        larger = enlarged(self.upsamplers, x, generators, self.draw, kept)
        if kept is not None:
            side = self.upsamplers[-1].side if self.upsamplers else self.decoder.side
            final = kept.at(side)
            larger = (final.rows(slice(k, k + 1)).paste(y[None])[0] for k, y in enumerate(larger))
        yield from map(to_pil, larger)

    def _embed(
        self,
        text: TextEncoding,
        generators: Sequence[torch.Generator],
        negative: TextEncoding | None,
    ) -> Tensor:
        """z_image of text. **Shapes**: B captions and generators → (B, D)."""
        count = self.prior_candidates
        return draw_embeddings(self.prior, text, generators, count, self.draw, negative, self.by)

    def _cond(self, z_image: Tensor, text: TextEncoding | None, known: Tensor | None) -> Cond:
        keep = None
        if self.by == "none":
            keep = torch.zeros(len(z_image), dtype=torch.bool, device=z_image.device)
        return Cond(image_embed=z_image, keep_image=keep, text=text, known=known)


def _anew(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    """Generators that draw what these have drawn since they were seeded."""
    return [torch.Generator().manual_seed(own.initial_seed()) for own in generators]


def drawer(opts: Options, stages: Sequence[Stage], reader: Reader, dtype: torch.dtype) -> Draw:
    """How each stage draws under these options, its weights on the device while it does.

    **Raises**: `ConfigError` for options that a stage can't follow.
    """
    sampling = opts.resolve(stages)

    def draw(
        stage: Stage, cond: Cond, generators: Sequence[torch.Generator], /, **more: Any
    ) -> Tensor:
        null_text = None if cond.text is None else reader.null_text()
        with resident([stage.network, stage.last], reader.device):
            return stage.draw(
                cond,
                stage.shape,
                sampling[stage.name],
                generators,
                null_text=null_text,
                dtype=dtype,
                tile=opts.tile,
                progress=opts.progress,
                preview=opts.preview,
                **more,
            )

    return draw


def upscaled(
    upsamplers: Sequence[Stage],
    picture: Image,
    size: int | None,
    seed: int,
    draw: Draw,
    device: torch.device,
) -> Image:
    """A picture, padded to a square, after those upsamplers that lead from its size to `size`."""
    square = pad_to_square(picture)
    low, chosen = way_up(upsamplers, square.width, size)
    x = resize(to_tensor(square)[None].to(device), low)  # (1, 3, low, low)
    generators = [torch.Generator().manual_seed(seed)]
    return to_pil(next(enlarged(chosen, x, generators, draw)))
