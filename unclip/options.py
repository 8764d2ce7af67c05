"""What a call to the pipeline may ask for, and what that means for each stage."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from unclip.config import parse_config
from unclip.diffusion.sampling import SamplingConfig
from unclip.diffusion.schedulers import check_sampler
from unclip.errors import ConfigError
from unclip.progress import Progress
from unclip.stages.stage import Preview, Stage

# One value for the decoder, or a dict by stage name ("prior", "decoder", "upsampler_256" …).
ByStage = Any
BY_STAGE = ("steps", "guidance", "sampler")
DECODERS = ("interval",)
PICTURES_ONLY = ("size", "tile", "candidates", *DECODERS)  # embeddings have no use for these,
OF_TEXT = ("candidates", "prior", "negative_prompt", *DECODERS)  # and upsamplers none for these


@dataclass(frozen=True)
class Options:
    """What a call asks for beyond a model's own defaults, the same for every verb.

    `steps`, `guidance` and `sampler` are one value for the decoder (or for what runs where it
    doesn't) or a dict by stage name. `eta` is the decoder's, and DDIM's only; `interval`
    is the decoder's (see `SamplingConfig`). `tile` runs upsamplers on tiles of that many pixels.
    `prior_candidates` embeddings are drawn for each picture and the one closest to its text is
    kept; `candidates` pictures are finished for each one returned and the best by CLIP score is
    kept. `progress` shows bars on a terminal, or is called after every step with the stage's name,
    the steps done and those to do. `preview` is called then with the stage's name, which of its
    samples were at work, and what they would be by now: x_0 as the stage draws it, of pictures
    (B, 3, R, R).

    `prior` says how text becomes an embedding (see `PriorName`) where a model can do it in several
    ways. Guidance leads away from `negative_prompt`: the prior's from that text, the decoder's from
    what the prior makes of it and from it as a caption; for the prompt itself it is guidance 1.

    **Raises**: `ConfigError` for numbers out of range.
    """

    size: int | None = None
    steps: ByStage = None
    guidance: ByStage = None
    sampler: ByStage = None
    eta: float | None = None
    interval: tuple[float, float] | None = None
    tile: int | None = None
    prior_candidates: int | None = None
    candidates: int = 1
    prior: str | None = None
    negative_prompt: str | None = None
    progress: Progress = False
    preview: Preview | None = None
    meant_for: str = field(default="decoder", kw_only=True)  # the kind that single values are for

    def __post_init__(self) -> None:
        for name in ("prior_candidates", "candidates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: must be at least 1")
        scales = self.guidance.values() if isinstance(self.guidance, dict) else [self.guidance]
        for scale in scales:
            if isinstance(scale, float) and not math.isfinite(scale):
                raise ConfigError(f"guidance = {scale}: must be a finite number")

    @classmethod
    def of(
        cls, given: dict[str, Any], without: Collection[str] = (), meant_for: str = "decoder"
    ) -> Options:
        """Options from keywords, `options` among them for ready ones, for a call that has no use
        for those named in `without`.

        **Raises**: `ConfigError` for one that does not exist, or would have no effect.
        """
        ready = given.get("options", cls())
        more = {name: value for name, value in given.items() if name != "options"}
        defaults = {f.name: f.default for f in fields(cls) if f.name != "meant_for"}
        useful = ", ".join(name for name in defaults if name not in without)
        for name in more:
            if name not in defaults:
                raise ConfigError(f"unknown option {name!r}; options are {useful}")
        options = replace(ready, **more, meant_for=meant_for)
        for name in without:
            if (value := getattr(options, name)) != defaults[name]:
                raise ConfigError(f"{name} = {value} has no effect here; options are {useful}")
        return options

    def described(self) -> dict[str, Any]:
        """What was asked for, as a PNG tells it."""
        told = ("progress", "preview", "meant_for")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in told}

    def resolve(self, stages: Sequence[Stage]) -> dict[str, SamplingConfig]:
        """How each stage is sampled: its own defaults with what the caller said.

        **Raises**: `ConfigError` naming the stages there are, the samplers, the tile's grain.
        """
        names = [stage.name for stage in stages]
        for option in BY_STAGE:
            value = getattr(self, option)
            for name in value if isinstance(value, dict) else ():
                if name not in names:
                    raise ConfigError(f"{option} for {name!r}: this model has {', '.join(names)}")
        for stage in stages:
            if self.tile is not None and stage.kind == "upsampler":
                grain = max(4, stage.config.unet.stride)  # below 4 nothing overlaps
                if self.tile < grain or self.tile % grain:
                    raise ConfigError(
                        f"tile = {self.tile}: must be a multiple of {grain}, the grain of "
                        f"{stage.name}"
                    )
        return {stage.name: self.sampling(stage) for stage in stages}

    def sampling(self, stage: Stage) -> SamplingConfig:
        """How one stage is sampled.

        **Raises**: `ConfigError` naming the stage, the value and what would be valid.
        """
        asked = {}
        for key in BY_STAGE:
            value = getattr(self, key)
            if isinstance(value, dict):
                value = value.get(stage.name)
            elif stage.kind != self.meant_for:
                value = None
            if value is not None:
                asked[key] = value
        source, eta = f"sampling of {stage.name}", None
        if stage.kind == "decoder":
            eta = self.eta
            for name in ("eta", *DECODERS):
                if (value := getattr(self, name)) is not None:
                    asked[name] = value
        own = stage.sampling
        config = parse_config(own.model_dump() | asked, type(own), source)
        if not isinstance(config, SamplingConfig):  # a prior that samples in another way
            return config
        try:
            check_sampler(stage.diffusion, config.sampler, config.steps)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        if config.sampler == "ddim":
            return config
        if eta is not None:
            raise ConfigError(
                f"eta = {eta} is DDIM's share of fresh noise, but the {stage.name} is sampled by "
                f"{config.sampler}, which has none: set sampler = ddim as well (--sampler ddim), "
                "or leave eta out"
            )
        return config.model_copy(update={"eta": 0.0})  # a stage's own is for its own sampler

    def of_priors(self) -> Options:
        """Of a decoder's options, those that embeddings of text have a use for."""
        named = {key: value for key in BY_STAGE if isinstance(value := getattr(self, key), dict)}
        gone = dict.fromkeys((*BY_STAGE, *DECODERS, "size", "tile", "eta"))
        mine: dict[str, Any] = gone | named
        return replace(self, candidates=1, **mine)

    def fresh(self, eta: float, stage: Stage) -> Options:
        """The same with this eta where none is given and the stage is sampled by DDIM."""
        if self.eta is not None or self.sampling(stage).sampler != "ddim":
            return self
        return replace(self, eta=eta)
