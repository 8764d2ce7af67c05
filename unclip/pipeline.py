"""UnCLIP: CLIP text → prior → CLIP image embedding → decoder → upsamplers (Section 2).

B pictures, D CLIP embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unclip import randomness
from unclip.clip.embeddings import check_raw
from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import Fingerprint, check_same_encoder
from unclip.conditioning import Cond, TextEncoding
from unclip.errors import CheckpointError, ConfigError, DataError
from unclip.files.folder import update_index
from unclip.images import pad_to_square, resize, to_pil, to_rgb, to_tensor
from unclip.options import Options
from unclip.sources import Source
from unclip.stages.prior import draw_embeddings
from unclip.stages.resident import resident
from unclip.stages.stage import Draw, Stage
from unclip.stages.upsampler import enlarge, route


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
    ):
        self.clip, self.prior, self.decoder = clip, prior, decoder
        self.upsamplers = sorted(upsamplers, key=lambda stage: stage.side)
        self.device, self.dtype = torch.device(device), dtype
        self.prior_candidates = prior_candidates  # unless a call says otherwise
        for stage in (prior, decoder):
            if stage is not None and stage.encoder is not None and self.encoder is not None:
                check_same_encoder(self.encoder, stage.encoder, stage.name)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        upsampler_1024: str | Path | None = None,
        offload: bool = False,
    ) -> UnCLIP:
        """Load a model folder, a run folder (its newest checkpoint) or one in Karlo's layout.

        `folder` is on this machine or a hub id such as `kakaobrain/karlo-v1-alpha`.
        `upsampler_1024` is a folder from which that stage is taken. With `offload` weights stay in
        main memory and only the stage at work is on `device`.

        **Raises**: `CheckpointError` naming the file that is missing, damaged or from elsewhere.
        """
        source = Source(folder)
        stored = source.stages
        if upsampler_1024 is not None:
            stored["upsampler_1024"] = Source(upsampler_1024).stage("upsampler_1024")
        home = torch.device("cpu" if offload else device)
        clip = source.clip(dtype)
        if clip is not None:
            if source.published is None:
                _ = clip.fingerprint  # taken in float32 and kept: in bfloat16 it would not match
            clip = clip.to(home, dtype)
        # A file is let go of when its network has been read, so that no two are mapped at once.
        stages = {name: stored.pop(name).load(home, dtype) for name in list(stored)}
        return cls(
            clip,
            stages.get("prior"),
            stages.get("decoder"),
            [stage for stage in stages.values() if stage.kind == "upsampler"],
            device,
            dtype,
            source.prior_candidates,
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write every stage as a model folder, in `dtype` or as they are."""
        folder = Path(folder)
        if self.clip is not None:
            self.clip.save(folder, dtype)
        for stage in self.stages:
            stage.save(folder, dtype=dtype)
        update_index(folder, prior_candidates=self.prior_candidates)

    @property
    def stages(self) -> list[Stage]:
        """The diffusion stages that are there, in order."""
        return [s for s in (self.prior, self.decoder, *self.upsamplers) if s is not None]

    @property
    def encoder(self) -> Fingerprint | None:
        """Which CLIP encoder this model's embeddings come from."""
        if self.clip is not None:
            return self.clip.fingerprint
        trained = [s.encoder for s in (self.prior, self.decoder) if s is not None]
        return next((encoder for encoder in trained if encoder is not None), None)

    @property
    def sizes(self) -> list[int]:
        """The sides of the pictures that this model makes of text or embeddings, in pixels."""
        if self.decoder is None:
            return []
        own, highs = self.decoder.side, [stage.side for stage in self.upsamplers]
        return [own, *(high for high in highs if high > own and route(self.upsamplers, own, high))]

    def encode_text(self, prompts: str | Sequence[str]) -> Tensor:
        """Raw CLIP text embeddings. **Shapes**: B prompts → (B, D)."""
        return self._encode_text(_list(prompts)).embed

    def encode_image(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Raw CLIP image embeddings of pictures, padded to squares. **Shapes**: → (B, D)."""
        images = [images] if isinstance(images, Image.Image) else list(images)
        with self._resident_clip() as clip:
            return clip.encode_pil([_square(image) for image in images])

    def text_to_image(
        self, prompt: str | Sequence[str], n: int = 1, seed: int = 0, **options: Any
    ) -> list[Image.Image]:
        """n pictures for each prompt, prompt-major; see `Options` for the rest."""
        opts, prompts = Options.of(options), _list(prompt)
        prior = self._need("prior", "text to image; without one, make variations of a picture")
        self._check(opts, n)
        text = self._encode_text(prompts).repeat(n)

        def make(generators: list[torch.Generator]) -> list[Image.Image]:
            z_image = self._sample_prior(prior, text, generators, opts)
            return self._decode(z_image, text, generators, opts)

        return self._best(make, text, n * len(prompts), seed, opts)

    def text_to_embedding(
        self, prompt: str | Sequence[str], n: int = 1, seed: int = 0, **options: Any
    ) -> Tensor:
        """n raw CLIP image embeddings for each prompt, prompt-major, of which pictures can be made.

        **Shapes**: B prompts → (B n, D) float32.
        """
        opts, prompts = Options.of(options), _list(prompt)
        prior = self._need("prior", "embeddings of text")
        if n < 1:
            raise ConfigError(f"n = {n}: must be at least 1")
        opts = opts.spread([prior])
        opts.check(self.stages)
        text = self._encode_text(prompts).repeat(n)
        seeds = range(seed, seed + n * len(prompts))
        return self._sample_prior(
            prior, text, [torch.Generator().manual_seed(s) for s in seeds], opts
        )

    def image_from_embedding(
        self,
        z_image: Tensor,
        text: str | Sequence[str] | None = None,
        n: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> list[Image.Image]:
        """n pictures for each raw CLIP image embedding, with an optional caption for each.

        **Shapes**: z_image (B, D). **Raises**: `ConfigError` for another width, `DataError` for
        numbers that are not finite.
        """
        opts = Options.of(options)
        self._check(opts, n)
        decoder = self._need("decoder", "pictures")
        if z_image.ndim != 2 or z_image.shape[1] != decoder.width or not len(z_image):
            raise ConfigError(
                f"embeddings of shape {tuple(z_image.shape)}; this decoder takes (N, "
                f"{decoder.width})"
            )
        if not bool(z_image.isfinite().all()):
            raise DataError("embeddings must be finite, and some numbers are not")
        if not decoder.config.scale.normalizes:
            mend = "multiply them by that, or embed the pictures again (`unclip embed`)"
            check_raw(z_image, self._usual_norm, "these embeddings", mend)
        captions = _list("" if text is None else text)
        if len(captions) == 1:
            captions = captions * len(z_image)
        if len(captions) != len(z_image):
            raise ConfigError(f"{len(captions)} captions for {len(z_image)} embeddings")
        encoding = None
        if self.clip is not None or text is not None or decoder.reads_text:
            encoding = self._encode_text(captions).repeat(n)
        rows = z_image.to(self.device, torch.float32).repeat_interleave(n, 0)  # (B n, D)

        def make(generators: list[torch.Generator]) -> list[Image.Image]:
            return self._decode(rows, encoding, generators, opts)

        return self._best(make, None if text is None else encoding, len(rows), seed, opts)

    def variations(
        self, image: Image.Image, n: int = 1, seed: int = 0, eta: float = 1.0, **options: Any
    ) -> list[Image.Image]:
        """n pictures with the same CLIP embedding as a given one (Section 3.1)."""
        return self.image_from_embedding(
            self.encode_image(image), n=n, seed=seed, eta=eta, **options
        )

    def upscale(self, image: Image.Image, seed: int = 0, **options: Any) -> Image.Image:
        """Send a picture, padded to a square, through the upsamplers.

        It is first resized to the input of the stage that begins: the one with the largest input
        not above the picture's side.
        """
        opts = Options.of(options)
        if not self.upsamplers:
            raise CheckpointError("this model has no upsampler, which is needed to upscale")
        opts = opts.spread(self.upsamplers)
        opts.check(self.stages)
        image = _square(image)
        side = image.width
        goals = [stage.side for stage in self.upsamplers if stage.side > side]
        goal = opts.size or self.upsamplers[-1].side
        if goal not in goals:
            possible = f"can be upscaled to {goals}" if goals else "is too large to upscale"
            raise ConfigError(f"size {goal}: with this model a picture of {side} pixels {possible}")
        lows = {stage.low for stage in self.upsamplers}
        order = sorted(lows, key=lambda low: (low > side, abs(low - side)))
        low, chosen = next(
            (low, r) for low in order if low < goal and (r := route(self.upsamplers, low, goal))
        )
        x = resize(to_tensor(image)[None].to(self.device), low)  # (1, 3, low, low)
        generators = [torch.Generator().manual_seed(seed)]
        return to_pil(enlarge(chosen, x, generators, self._drawing(opts))[0])

    def _sample_prior(
        self, stage: Stage, text: TextEncoding, generators: list[torch.Generator], opts: Options
    ) -> Tensor:
        count = opts.prior_candidates or self.prior_candidates
        return draw_embeddings(stage, text, generators, count, self._drawing(opts))

    def _decode(
        self,
        z_image: Tensor,
        text: TextEncoding | None,
        generators: list[torch.Generator],
        opts: Options,
    ) -> list[Image.Image]:
        decoder, draw = self._need("decoder", "pictures"), self._drawing(opts)
        x = draw(decoder, Cond(image_embed=z_image, text=text), generators).clamp(-1, 1)
        chosen = route(self.upsamplers, decoder.side, opts.size or self.sizes[-1]) or []
        return [to_pil(row) for row in enlarge(chosen, x, generators, draw)]

    def _drawing(self, opts: Options) -> Draw:
        """How each stage draws under these options, its weights on the device while it does."""

        def draw(stage: Stage, cond: Cond, generators: Sequence[torch.Generator]) -> Tensor:
            null_text = None
            if self.clip is not None and cond.text is not None:
                with self._resident_clip() as clip:
                    null_text = clip.null_text
            with resident([stage.network, stage.last], self.device):
                return stage.draw(
                    cond,
                    stage.shape,
                    opts.sampling(stage),
                    generators,
                    null_text=null_text,
                    dtype=self.dtype,
                    tile=opts.tile,
                    progress=opts.progress,
                )

        return draw

    def _best(
        self,
        make: Callable[[list[torch.Generator]], list[Image.Image]],
        text: TextEncoding | None,
        count: int,
        seed: int,
        opts: Options,
    ) -> list[Image.Image]:
        """Finish `candidates` pictures for each one asked for and keep the best by CLIP score."""
        if opts.candidates > 1 and text is None:
            raise ConfigError("candidates are ranked against a caption, and there is none")
        seeds = range(seed, seed + count)
        rounds = [make([torch.Generator().manual_seed(s) for s in seeds])]
        for j in range(1, opts.candidates):
            rounds.append(make([randomness.generator(s, "candidate", j) for s in seeds]))
        if len(rounds) == 1 or text is None:
            return rounds[0]
        z_text = text.embed.float()
        scores = [cosine_similarity(self.encode_image(r).float(), z_text) for r in rounds]
        best = torch.stack(scores).argmax(0).tolist()  # of (candidates, B)
        return [rounds[j][k] for k, j in enumerate(best)]

    def _check(self, opts: Options, n: int) -> None:
        self._need("decoder", "pictures")
        if n < 1:
            raise ConfigError(f"n = {n}: must be at least 1")
        if opts.size is not None and opts.size not in self.sizes:
            raise ConfigError(f"size {opts.size}: this model makes pictures of {self.sizes} pixels")
        opts.check(self.stages)

    def _encode_text(self, prompts: Sequence[str]) -> TextEncoding:
        with self._resident_clip() as clip:
            return clip.encode_text(prompts)

    def _usual_norm(self) -> float | None:
        """The norm of raw embeddings, as far as the stages or the encoder know it."""
        scales = (getattr(stage.network, "scale", None) for stage in self.stages)
        norm = next((scale.norm for scale in scales if scale is not None and scale.norm), None)
        if norm is not None or self.clip is None:
            return norm
        with self._resident_clip() as clip:
            return clip.norm

    @contextmanager
    def _resident_clip(self) -> Iterator[FrozenCLIP]:
        if self.clip is None:
            raise CheckpointError("this model has no CLIP encoder, which text and pictures need")
        with resident([self.clip], self.device):
            yield self.clip

    def _need(self, name: str, purpose: str) -> Stage:
        stage: Stage | None = getattr(self, name)
        if stage is None:
            raise CheckpointError(f"this model has no {name}, which is needed for {purpose}")
        return stage


def _list(prompts: str | Sequence[str]) -> list[str]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ConfigError("no prompts; for a picture of nothing in particular the prompt is ''")
    return prompts


def _square(image: Image.Image) -> Image.Image:
    """RGB, padded to a square on white."""
    return pad_to_square(to_rgb(image))
