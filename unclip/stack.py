"""Stages and their encoder as one model, which draws what a call asks for (Section 2).

B pictures, D CLIP embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import Fingerprint, check_same_encoder
from unclip.diffusion.sampling import SamplingConfig
from unclip.drawing import Drawing
from unclip.errors import CheckpointError, ConfigError
from unclip.images import pad_to_square, resize, to_pil, to_tensor
from unclip.inputs import Picture, as_number, as_picture, as_prompts, as_seeds
from unclip.options import OF_TEXT, PICTURES_ONLY, Options
from unclip.reader import NO_CLIP, Reader
from unclip.stages.decoder import started
from unclip.stages.prior import FromText, check_prior
from unclip.stages.stage import Draw, Manner, Stage, Start
from unclip.stages.upsampler import enlarged, route, way_up

AnyStack = TypeVar("AnyStack", bound="Stack")


class Stack:
    """A model's stages and encoder. Some may be missing: then what needs them says so.

    Image k of a call uses one float32 CPU generator seeded `seed + k` through all stages.

    **Raises**: `CheckpointError` if stages were trained with different CLIP encoders.
    """

    def __init__(
        self,
        clip: FrozenCLIP | None = None,
        prior: Stage | None = None,
        decoder: Stage | None = None,
        upsamplers: Sequence[Stage] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        prior_candidates: int = 2,
        ar_prior: Stage | None = None,
    ):
        self.clip, self.prior, self.ar_prior, self.decoder = clip, prior, ar_prior, decoder
        self.upsamplers = sorted(upsamplers, key=lambda stage: stage.side)
        self.device, self.dtype = torch.device(device), dtype
        self.prior_candidates = prior_candidates  # unless a call says otherwise
        for stage in (prior, ar_prior, decoder):
            if stage is not None and stage.encoder is not None and self.encoder is not None:
                check_same_encoder(self.encoder, stage.encoder, stage.name)

    @property
    def stages(self) -> list[Stage]:
        """The stages that are there, in order."""
        priors = (self.prior, self.ar_prior)
        return [s for s in (*priors, self.decoder, *self.upsamplers) if s is not None]

    @property
    def reader(self) -> Reader:
        """The encoder at work."""
        return Reader(self.clip, self.device)

    @property
    def encoder(self) -> Fingerprint | None:
        """Which CLIP encoder this model's embeddings come from."""
        if self.clip is not None:
            return self.clip.fingerprint
        return next((s.encoder for s in self.stages if s.encoder is not None), None)

    @property
    def sizes(self) -> list[int]:
        """The sides of the pictures that this model makes of text or embeddings, in pixels."""
        if self.decoder is None:
            return []
        own, highs = self.decoder.side, [stage.side for stage in self.upsamplers]
        return [own, *(high for high in highs if high > own and route(self.upsamplers, own, high))]

    def encode_text(self, prompts: str | Sequence[str]) -> Tensor:
        """Raw CLIP text embeddings. **Shapes**: B prompts → (B, D)."""
        return self.reader.text(self.reader.prompts(prompts)).embed

    def encode_image(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Raw CLIP image embeddings of pictures, padded to squares. **Shapes**: → (B, D)."""
        return self.reader.images(images)

    def with_decoder_sampling(self: AnyStack, sampling: SamplingConfig) -> AnyStack:
        """The same model with other defaults for drawing from its decoder."""
        other = copy(self)
        other.decoder = replace(self.need("decoder", "pictures"), sampling=sampling)
        return other

    def varied(self, options: Options) -> Options:
        """Options for variations: `eta` 1 where DDIM samples the decoder and none is given."""
        return options.fresh(1.0, self.need("decoder", "pictures"))

    def iterate(
        self,
        prompt: str | Sequence[str] | None = None,
        n: int = 1,
        seed: int | Sequence[int] | None = 0,
        *,
        image: Picture | Sequence[Picture] | None = None,
        z_image: Any = None,
        x_T: Tensor | Start | None = None,
        **options: Any,
    ) -> Iterator[Image.Image]:
        """What `text_to_image` makes or, given z_image, `image_from_embedding`, or of an image
        `variations`, one by one.

        Memory does not grow with their number: as many as the decoder takes together go through the
        stages before the next do. Everything is checked before the first is asked for.

        `x_T` is what the decoder starts from, as `invert` and `noise` give it, one for all or each.

        **Shapes**: z_image (B, D), x_T (B n, 3, R, R). **Raises**: as those do.
        """
        opts, decoder = Options.of(options), self.need("decoder", "pictures")
        if image is not None:
            opts, z_image = self.varied(opts), self.encode_image(image)
        elif z_image is not None:
            z_image = self.reader.embeddings(z_image, decoder, self.stages)
        n, negative = as_number("n", n, 1), opts.negative_prompt
        if opts.size is not None and opts.size not in self.sizes:
            raise ConfigError(f"size {opts.size}: this model makes pictures of {self.sizes} pixels")
        if z_image is not None and opts.prior is not None:
            raise ConfigError(f"prior = {opts.prior!r} has no effect: no text becomes an embedding")
        draw, from_text = self._draw(opts), None
        if z_image is None or negative is not None:
            from_text = self._from_text(opts, draw)
        nothing = () if z_image is None else ""
        prompts = self.reader.prompts(nothing if prompt is None else prompt)
        if z_image is not None:
            z_image = z_image.float().repeat_interleave(n, 0)  # (B n, D)
            prompts *= len(z_image) // n if len(prompts) == 1 else 1
            if len(prompts) * n != len(z_image):
                raise ConfigError(f"{len(prompts)} captions for {len(z_image) // n} embeddings")
            if opts.candidates > 1 and prompt is None:
                raise ConfigError("candidates are ranked against a caption, and there is none")
        told = prompt is not None or negative is not None or decoder.reads_text
        if self.clip is None and (z_image is None or told):
            raise CheckpointError(NO_CLIP)
        start = started(x_T, decoder, opts.sampling(decoder), count := n * len(prompts))
        above = route(self.upsamplers, decoder.side, opts.size or self.sizes[-1]) or []
        drawn_from = [decoder, *above]
        if from_text is not None and (z_image is None or draw.sampling[decoder.name].guidance != 1):
            drawn_from += from_text.drawn_from  # beside embeddings, for what they are led away from
        opts.check_used(drawn_from, self.stages, draw.sampling)
        drawing = Drawing(from_text, decoder, above, draw, self.reader, opts.candidates, start)
        return drawing.pictures(prompts, z_image, as_seeds(seed, count))

    def text_to_embedding(
        self, prompt: str | Sequence[str], n: int = 1, seed: int | None = 0, **options: Any
    ) -> Tensor:
        """n raw CLIP image embeddings for each prompt, prompt-major, of which pictures can be made.

        **Shapes**: B prompts → (B n, D) float32.
        """
        opts = Options.of(options, PICTURES_ONLY, meant_for="prior")
        prompts, n = self.reader.prompts(prompt), as_number("n", n, 1)
        draw = self._draw(opts)
        from_text = self._from_text(opts, draw)
        if from_text.by == "none":
            raise ConfigError("prior = 'none' makes no embeddings")
        opts.check_used(from_text.drawn_from, self.stages, draw.sampling)
        text = self.reader.text(prompts).repeat(n)
        generators = [torch.Generator().manual_seed(s) for s in as_seeds(seed, n * len(prompts))]
        return from_text(text, generators)

    def upscale(self, image: Picture, seed: int | None = 0, **options: Any) -> Image.Image:
        """Send a picture, padded to a square, through the upsamplers.

        It is first resized to the input of the stage that begins: the one with the largest input
        not above the picture's side.
        """
        opts = Options.of(options, OF_TEXT, meant_for="upsampler")
        if not self.upsamplers:
            raise CheckpointError("this model has no upsampler, which is needed to upscale")
        draw, square = self._draw(opts), pad_to_square(as_picture(image))
        low, chosen = way_up(self.upsamplers, square.width, opts.size)
        opts.check_used(chosen, self.stages, draw.sampling)
        x = resize(to_tensor(square)[None].to(self.device), low)  # (1, 3, low, low)
        generators = [torch.Generator().manual_seed(as_seeds(seed, 1)[0])]
        return to_pil(next(enlarged(chosen, x, generators, draw)))

    def _draw(self, opts: Options) -> Draw:
        """**Raises**: `ConfigError` for options that a stage can't follow."""
        how = Manner(self.dtype, opts.tile, opts.progress, opts.preview)
        return Draw(opts.resolve(self.stages), self.reader.null_text, self.device, how)

    def _from_text(self, opts: Options, draw: Draw) -> FromText:
        """How text becomes an embedding under these options."""
        only = self.ar_prior if self.prior is None else None
        by = opts.prior or ("diffusion" if only is None else "ar")
        stage = self.ar_prior if by == "ar" else self.prior
        check_prior(by, stage, self.decoder)
        away = opts.negative_prompt
        negative = None if away is None else self.reader.text(as_prompts([away]))
        return FromText(by, stage, opts.prior_candidates or self.prior_candidates, draw, negative)

    def need(self, name: str, purpose: str) -> Stage:
        """A stage by name. **Raises**: `CheckpointError` saying what it is needed for."""
        stage: Stage | None = getattr(self, name)
        if stage is None:
            raise CheckpointError(f"this model has no {name}, which is needed for {purpose}")
        return stage
