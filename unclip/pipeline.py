"""UnCLIP: CLIP text → prior → CLIP image embedding → decoder → upsamplers (Section 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from unclip import randomness
from unclip.clip import FrozenCLIP, check_same_encoder
from unclip.conditioning import Cond, TextEncoding
from unclip.config import parse_config
from unclip.data.images import pad_to_square, resize, to_pil, to_rgb, to_tensor
from unclip.diffusion.sampling import SamplingConfig, make_scheduler, sample
from unclip.diffusion.tiling import Tiled
from unclip.errors import CheckpointError, ConfigError
from unclip.folder import read_index, resolve_folder
from unclip.stages import Stage, load_stage

# One value for the decoder, or a dict by stage name ("prior", "decoder", "upsampler_256" …).
ByStage = Any
CHUNK_PIXELS = 2**18  # pictures that go through a network together: 64 at 64 px, one at 1024


@dataclass(frozen=True)
class Options:
    """What a call asks for beyond a model's own defaults, the same for every verb.

    `steps`, `guidance` and `sampler` are one value for the decoder or a dict by stage name.
    `tile` runs upsamplers on tiles of that many pixels. `prior_candidates` embeddings are drawn
    for each picture and the one closest to its text is kept; `candidates` pictures are finished
    for each one returned and the best by CLIP score is kept.
    """

    size: int | None = None
    steps: ByStage = None
    guidance: ByStage = None
    sampler: ByStage = None
    eta: float | None = None
    tile: int | None = None
    prior_candidates: int = 2
    candidates: int = 1
    progress: bool = False

    def sampling(self, stage: Stage) -> SamplingConfig:
        """How to sample one stage: its own defaults with what the caller said."""
        asked = {}
        for key in ("steps", "guidance", "sampler"):
            value = getattr(self, key)
            if isinstance(value, dict):
                value = value.get(stage.name)
            elif stage.kind != "decoder":
                value = None
            if value is not None:
                asked[key] = value
        if self.eta is not None and stage.kind == "decoder":
            asked["eta"] = self.eta
        merged = stage.sampling.model_dump() | asked
        config = parse_config(merged, SamplingConfig, f"sampling of {stage.name}")
        make_scheduler(stage.diffusion, config.sampler, config.steps)
        return config


class UnCLIP:
    """The stack. Stages may be missing: then what needs them says so.

    Image k of a call uses one float32 CPU generator seeded `seed + k` through all stages.
    """

    def __init__(
        self,
        clip: FrozenCLIP | None = None,
        prior: Stage | None = None,
        decoder: Stage | None = None,
        upsamplers: Sequence[Stage] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.clip, self.prior, self.decoder = clip, prior, decoder
        self.upsamplers = sorted(upsamplers, key=lambda stage: stage.network.config.high)
        self.device, self.dtype = torch.device(device), dtype
        if clip is not None:
            for stage in (prior, decoder):
                if stage is not None and stage.encoder is not None:
                    check_same_encoder(clip.fingerprint, stage.encoder, stage.name)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> UnCLIP:
        """Load a model folder or a run folder (its newest checkpoint).

        **Raises**: `CheckpointError` naming the file that is missing, damaged or from elsewhere.
        """
        root = resolve_folder(folder)
        names = read_index(root)["stages"]
        stages = {n: load_stage(root, n, device, dtype) for n in names if n != "clip"}
        return cls(
            FrozenCLIP.load(str(root / "clip"), device, dtype) if "clip" in names else None,
            stages.get("prior"),
            stages.get("decoder"),
            [stage for stage in stages.values() if stage.kind == "upsampler"],
            device,
            dtype,
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write every stage as a model folder, in `dtype` or as they are."""
        folder = Path(folder)
        if self.clip is not None:
            self.clip.save(folder, dtype)
        for stage in self.stages:
            stage.save(folder, dtype=dtype)

    @property
    def stages(self) -> list[Stage]:
        """The diffusion stages that are there, in order."""
        return [s for s in (self.prior, self.decoder, *self.upsamplers) if s is not None]

    @property
    def sizes(self) -> list[int]:
        """The sides of the pictures that this model can make, in pixels."""
        own = [] if self.decoder is None else [self.decoder.network.config.resolution]
        return own + [stage.network.config.high for stage in self.upsamplers]

    def encode_text(self, prompts: str | Sequence[str]) -> Tensor:
        """Raw CLIP text embeddings. **Shapes**: B prompts → (B, D)."""
        return self._clip().encode_text(_list(prompts)).embed

    def encode_image(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Raw CLIP image embeddings of pictures, padded to squares. **Shapes**: → (B, D)."""
        images = [images] if isinstance(images, Image.Image) else list(images)
        return self._clip().encode_pil([pad_to_square(to_rgb(image)) for image in images])

    def text_to_image(
        self, prompt: str | Sequence[str], n: int = 1, seed: int = 0, **options: Any
    ) -> list[Image.Image]:
        """n pictures for each prompt, prompt-major; see `Options` for the rest."""
        opts = _options(options)
        prompts = _list(prompt)
        stage = self._need("prior", "text to image; without one, make variations of a picture")
        self._check(opts)
        text = self._clip().encode_text(prompts).repeat(n)

        def make(generators: list[torch.Generator]) -> list[Image.Image]:
            z_image = self._sample_prior(stage, text, generators, opts)
            return self._decode(z_image, text, generators, opts)

        return self._best(make, text, n * len(prompts), seed, opts)

    def image_from_embedding(
        self,
        z_image: Tensor,
        text: str | Sequence[str] | None = None,
        n: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> list[Image.Image]:
        """n pictures for each raw CLIP image embedding, with an optional caption for each.

        **Shapes**: z_image (B, D). **Raises**: `ConfigError` for another width.
        """
        opts = _options(options)
        self._check(opts)
        width = self._need("decoder", "pictures").network.config.embed
        if z_image.ndim != 2 or z_image.shape[1] != width:
            raise ConfigError(
                f"embeddings of shape {tuple(z_image.shape)}; this decoder takes (N, {width})"
            )
        captions = [""] * len(z_image) if text is None else _list(text)
        if len(captions) not in (1, len(z_image)):
            raise ConfigError(f"{len(captions)} captions for {len(z_image)} embeddings")
        if len(captions) == 1:
            captions = captions * len(z_image)
        encoding = None
        if self.clip is not None:
            encoding = self.clip.encode_text(captions).repeat(n)
        rows = z_image.to(self.device, self.dtype).repeat_interleave(n, 0)

        def make(generators: list[torch.Generator]) -> list[Image.Image]:
            return self._decode(rows, encoding, generators, opts)

        return self._best(make, encoding if text else None, len(rows), seed, opts)

    def variations(
        self, image: Image.Image, n: int = 1, seed: int = 0, eta: float = 1.0, **options: Any
    ) -> list[Image.Image]:
        """n pictures with the same CLIP embedding as a given one (Section 3.1)."""
        return self.image_from_embedding(
            self.encode_image(image), n=n, seed=seed, eta=eta, **options
        )

    def upscale(self, image: Image.Image, seed: int = 0, **options: Any) -> Image.Image:
        """Send a picture through the upsamplers; it is first resized to the nearest one's input.

        The stage with the largest input not above the picture's side begins.
        """
        opts = _options(options)
        if not self.upsamplers:
            raise ConfigError("this model has no upsampler")
        image = pad_to_square(to_rgb(image))
        lows = [stage.network.config.low for stage in self.upsamplers]
        first = max((i for i, low in enumerate(lows) if low <= image.width), default=0)
        highs = [stage.network.config.high for stage in self.upsamplers[first:]]
        goal = opts.size or highs[-1]
        if goal not in highs:
            raise ConfigError(
                f"size {goal}: a picture of {image.width} pixels can be upscaled to {highs}"
            )
        chosen = self.upsamplers[first : first + highs.index(goal) + 1]
        x = resize(to_tensor(image)[None].to(self.device), lows[first])
        generators = [torch.Generator().manual_seed(seed)]
        return to_pil(self._upsample(x, chosen, generators, opts)[0])

    # The stages, each on all pictures of a call.

    def _sample_prior(
        self, stage: Stage, text: TextEncoding, own: list[torch.Generator], opts: Options
    ) -> Tensor:
        """Sample z_image, `prior_candidates` for each text, and keep those closest to z_text."""
        m = opts.prior_candidates
        generators = [g for k in own for g in _candidates(k, m)]
        z = self._run(
            stage, Cond(text=text.repeat(m)), (stage.network.config.embed,), generators, opts
        )
        z = stage.network.scale.inverse(z.to(self.dtype))
        if m == 1:
            return z
        score = cosine_similarity(z.float(), text.repeat(m).embed.float()).view(-1, m)
        return z.view(-1, m, z.shape[1])[torch.arange(len(score)), score.argmax(1)]

    def _decode(
        self,
        z_image: Tensor,
        text: TextEncoding | None,
        generators: list[torch.Generator],
        opts: Options,
    ) -> list[Image.Image]:
        stage = self._need("decoder", "pictures")
        side = stage.network.config.resolution
        x = self._run(
            stage, Cond(image_embed=z_image, text=text), (3, side, side), generators, opts
        )
        goal = opts.size or self.sizes[-1]
        chosen = [s for s in self.upsamplers if s.network.config.high <= goal]
        return [to_pil(row) for row in self._upsample(x.clamp(-1, 1), chosen, generators, opts)]

    def _upsample(
        self, x: Tensor, chosen: list[Stage], generators: list[torch.Generator], opts: Options
    ) -> Tensor:
        for stage in chosen:
            side = stage.network.config.high
            low = resize(x, side).to(self.dtype)
            x = self._run(stage, Cond(low_res=low), (3, side, side), generators, opts).clamp(-1, 1)
        return x

    def _run(
        self,
        stage: Stage,
        cond: Cond,
        shape: tuple[int, ...],
        generators: list[torch.Generator],
        opts: Options,
    ) -> Tensor:
        """Sample one stage in chunks; a picture's chunk-mates don't change it."""
        config = opts.sampling(stage)
        network = stage.network
        if opts.tile is not None and stage.kind == "upsampler" and opts.tile < shape[-1]:
            network = Tiled(network, opts.tile)
        chunk = max(1, CHUNK_PIXELS // (shape[-1] ** 2 if len(shape) == 3 else 4096))
        starts = range(0, len(generators), chunk)
        null = self.clip.null_text if self.clip is not None and cond.text is not None else None
        parts = []
        with tqdm(
            total=config.steps * len(starts),
            desc=stage.name,
            disable=not opts.progress,
            leave=False,
        ) as bar:
            for start in starts:
                rows = slice(start, start + chunk)
                parts.append(
                    sample(
                        stage.diffusion,
                        network,
                        cond.rows(rows),
                        shape,
                        config,
                        generators[rows],
                        null_text=null,
                        dtype=self.dtype,
                        on_step=bar.update,
                    )
                )
        return torch.cat(parts)

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
        own = [torch.Generator().manual_seed(s) for s in seeds]
        rounds = [make(own)]
        for j in range(1, opts.candidates):
            rounds.append(make([randomness.generator(s, "candidate", j) for s in seeds]))
        if len(rounds) == 1 or text is None:
            return rounds[0]
        scores = torch.stack(
            [cosine_similarity(self.encode_image(r).float(), text.embed.float()) for r in rounds]
        )
        return [rounds[int(j)][k] for k, j in enumerate(scores.argmax(0))]

    def _check(self, opts: Options) -> None:
        if opts.size is not None and opts.size not in self.sizes:
            raise ConfigError(f"size {opts.size}: this model makes pictures of {self.sizes} pixels")
        names = [stage.name for stage in self.stages]
        for value in (opts.steps, opts.guidance, opts.sampler):
            for name in value if isinstance(value, dict) else ():
                if name not in names:
                    raise ConfigError(f"no stage {name!r} in this model; it has {names}")
        for stage in self.stages:
            opts.sampling(stage)

    def _clip(self) -> FrozenCLIP:
        if self.clip is None:
            raise CheckpointError("this model has no CLIP encoder, which text and pictures need")
        return self.clip

    def _need(self, name: str, purpose: str) -> Stage:
        stage: Stage | None = getattr(self, name)
        if stage is None:
            raise CheckpointError(f"this model has no {name}, which is needed for {purpose}")
        return stage


def _options(given: dict[str, Any]) -> Options:
    names = [field.name for field in fields(Options)]
    for name in given:
        if name not in names:
            raise ConfigError(f"unknown option {name!r}; options are {', '.join(names)}")
    opts = Options(**given)
    for name in ("prior_candidates", "candidates"):
        if getattr(opts, name) < 1:
            raise ConfigError(f"{name} = {getattr(opts, name)}: must be at least 1")
    return opts


def _list(prompts: str | Sequence[str]) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts)


def _candidates(own: torch.Generator, count: int) -> list[torch.Generator]:
    """The image's own generator first, then others derived from its seed."""
    seed = own.initial_seed()
    return [own, *(randomness.generator(seed, "prior candidate", j) for j in range(1, count))]
