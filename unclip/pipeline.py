"""UnCLIP: CLIP text → prior → CLIP image embedding → decoder → upsamplers (Section 2).

B pictures, D CLIP embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from unclip import edit
from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import Fingerprint, check_same_encoder
from unclip.diffusion.sampling import SamplingConfig
from unclip.drawing import Drawing, Start, drawer, upscaled
from unclip.errors import CheckpointError, ConfigError
from unclip.files.disk import from_home
from unclip.files.folder import update_index
from unclip.hub import push
from unclip.inputs import Picture, as_number, as_pictures, as_seeds
from unclip.options import OF_TEXT, PICTURES_ONLY, Options
from unclip.precision import default_dtype
from unclip.reader import NO_CLIP, Reader
from unclip.sources import Source
from unclip.stages.lora import read_loras
from unclip.stages.prior import check_prior, draw_embeddings
from unclip.stages.stage import Draw, Stage
from unclip.stages.upsampler import route


class UnCLIP:
    """The stack. Stages may be missing: then what needs them says so.

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

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | Source,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        upsampler_1024: str | Path | None = None,
        offload: bool = False,
        variant: str | None = None,
        lora: Sequence[str | Path] = (),
    ) -> UnCLIP:
        """Load a model folder, a run folder (its newest checkpoint) or one in Karlo's layout.

        `folder` is on this machine or a hub id such as `kakaobrain/karlo-v1-alpha`; `variant` the
        copy of the weights to read where there are several, such as fp16. Without `dtype` networks
        compute in half precision on an accelerator, in float32 on a CPU.
        `upsampler_1024` is a folder from which that stage is taken. With `offload` weights stay in
        main memory and only the stage at work is on `device`. `lora` are folders, runs or hub ids
        of low-rank changes of its stages, which are merged into the weights as these are read.

        **Raises**: `CheckpointError` naming the file that is missing, damaged or from elsewhere.
        """
        dtype = default_dtype(device) if dtype is None else dtype
        source = folder if isinstance(folder, Source) else Source(folder, variant)
        source.change(read_loras(lora))
        if upsampler_1024 is not None:
            source.stages["upsampler_1024"] = Source(upsampler_1024).stage("upsampler_1024")
        clip, stages = source.load("cpu" if offload else device, dtype)
        return cls(
            clip,
            stages.get("prior"),
            stages.get("decoder"),
            [stage for stage in stages.values() if stage.kind == "upsampler"],
            device,
            dtype,
            source.prior_candidates,
            stages.get("ar_prior"),
        )

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        push_to_hub: str | None = None,
        **more: Any,
    ) -> None:
        """Write every stage as a model folder, in `dtype` or as they are.

        `push_to_hub` is a name on the hub (owner/name) to which it is then sent, with `more` as
        keywords of `hub.push`: private, revision, licence, notes, token.
        """
        folder = from_home(folder)
        if self.clip is not None:
            self.clip.save(folder, dtype)
        for stage in self.stages:
            stage.save(folder, dtype=dtype)
        update_index(folder, prior_candidates=self.prior_candidates)
        if push_to_hub is not None:
            push(folder, push_to_hub, **more)

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

    def text_to_image(
        self, prompt: str | Sequence[str], n: int = 1, seed: int | None = 0, **options: Any
    ) -> list[Image.Image]:
        """n pictures for each prompt, prompt-major; see `Options` for the rest."""
        return list(self.iterate(prompt, n, seed, **options))

    def image_from_embedding(
        self,
        z_image: Any,
        text: str | Sequence[str] | None = None,
        n: int = 1,
        seed: int | None = 0,
        **options: Any,
    ) -> list[Image.Image]:
        """n pictures for each raw CLIP image embedding, with an optional caption for each.

        **Shapes**: z_image (B, D). **Raises**: `ConfigError` for another width, `DataError` for
        numbers that are not finite.
        """
        if z_image is None:
            raise ConfigError("no embeddings; to make pictures of a text call text_to_image")
        return list(self.iterate(text, n, seed, z_image=z_image, **options))

    def variations(
        self,
        image: Picture | Sequence[Picture],
        n: int = 1,
        seed: int | None = 0,
        inverted: bool = False,
        **options: Any,
    ) -> list[Image.Image]:
        """n pictures with the same CLIP embedding as a given one (Section 3.1); see `varied`.

        `inverted`: from its x_T as well, and the less like it the larger `eta`; 0 `reconstruct`s.
        """
        if inverted:
            return edit.vary(self, image, n, seed, **options)
        return list(self.iterate(n=n, seed=seed, image=as_pictures(image), **options))

    # Section 3: pictures as pairs (z_image, x_T), and parts of pictures.
    invert, noise, redraw = edit.invert, edit.noise, edit.redraw
    reconstruct, interpolate, text_diff = edit.reconstruct, edit.interpolate, edit.text_diff
    mix, inpaint = edit.mix, edit.inpaint

    def with_decoder_sampling(self, sampling: SamplingConfig) -> Self:
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
        n = as_number("n", n, 1)
        if opts.size is not None and opts.size not in self.sizes:
            raise ConfigError(f"size {opts.size}: this model makes pictures of {self.sizes} pixels")
        if z_image is not None and opts.prior is not None:
            raise ConfigError(f"prior = {opts.prior!r} has no effect where embeddings are given")
        by, prior = self._prior(opts) if z_image is None or opts.negative_prompt else ("", None)
        nothing = () if z_image is None else ""
        prompts = self.reader.prompts(nothing if prompt is None else prompt)
        if z_image is not None:
            z_image = z_image.float().repeat_interleave(n, 0)  # (B n, D)
            prompts *= len(z_image) // n if len(prompts) == 1 else 1
            if len(prompts) * n != len(z_image):
                raise ConfigError(f"{len(prompts)} captions for {len(z_image) // n} embeddings")
            if opts.candidates > 1 and prompt is None:
                raise ConfigError("candidates are ranked against a caption, and there is none")
        told = prompt is not None or opts.negative_prompt is not None or decoder.reads_text
        if self.clip is None and (z_image is None or told):
            raise CheckpointError(NO_CLIP)
        start = Start.of(x_T, decoder, opts.sampling(decoder), count := n * len(prompts))
        drawing = Drawing(
            prior,
            decoder,
            route(self.upsamplers, decoder.side, opts.size or self.sizes[-1]) or [],
            self._drawing(opts),
            self.reader,
            opts.prior_candidates or self.prior_candidates,
            opts.candidates,
            by,
            opts.negative_prompt,
            start,
        )
        return drawing.pictures(prompts, z_image, as_seeds(seed, count))

    def text_to_embedding(
        self, prompt: str | Sequence[str], n: int = 1, seed: int | None = 0, **options: Any
    ) -> Tensor:
        """n raw CLIP image embeddings for each prompt, prompt-major, of which pictures can be made.

        **Shapes**: B prompts → (B n, D) float32.
        """
        opts = Options.of(options, PICTURES_ONLY, meant_for="prior")
        prompts, n = self.reader.prompts(prompt), as_number("n", n, 1)
        (by, prior), count = self._prior(opts), opts.prior_candidates or self.prior_candidates
        if by == "none":
            raise ConfigError("prior = 'none' makes no embeddings")
        negative = None
        if opts.negative_prompt is not None:
            negative = self.reader.text([opts.negative_prompt]).repeat(n * len(prompts))
        draw, text = self._drawing(opts), self.reader.text(prompts).repeat(n)
        generators = [torch.Generator().manual_seed(s) for s in as_seeds(seed, n * len(prompts))]
        return draw_embeddings(prior, text, generators, count, draw, negative, by)

    def upscale(self, image: Picture, seed: int | None = 0, **options: Any) -> Image.Image:
        """Send a picture, padded to a square, through the upsamplers.

        It is first resized to the input of the stage that begins: the one with the largest input
        not above the picture's side.
        """
        opts = Options.of(options, OF_TEXT, meant_for="upsampler")
        if not self.upsamplers:
            raise CheckpointError("this model has no upsampler, which is needed to upscale")
        draw, pictures = self._drawing(opts), as_pictures(image)
        if len(pictures) != 1:
            raise ConfigError(f"{len(pictures)} pictures to upscale; give one at a time")
        own = as_seeds(seed, 1)[0]
        return upscaled(self.upsamplers, pictures[0], opts.size, own, draw, self.device)

    def _drawing(self, opts: Options) -> Draw:
        return drawer(opts, self.stages, self.reader, self.dtype)

    def _prior(self, opts: Options) -> tuple[str, Stage | None]:
        """How text becomes an embedding, and the stage for that."""
        only = self.ar_prior if self.prior is None else None
        by = opts.prior or ("diffusion" if only is None else "ar")
        stage = self.ar_prior if by == "ar" else self.prior
        check_prior(by, stage, self.decoder)
        return by, stage

    def need(self, name: str, purpose: str) -> Stage:
        """A stage by name. **Raises**: `CheckpointError` saying what it is needed for."""
        stage: Stage | None = getattr(self, name)
        if stage is None:
            raise CheckpointError(f"this model has no {name}, which is needed for {purpose}")
        return stage
