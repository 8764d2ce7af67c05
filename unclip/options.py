"""What a call to the pipeline may ask for, and what that means for each stage."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from unclip.config import parse_config
from unclip.diffusion.sampling import SamplingConfig
from unclip.diffusion.schedulers import check_sampler
from unclip.errors import ConfigError
from unclip.inputs import as_number
from unclip.progress import Progress
from unclip.stages.stage import Preview, Stage

# One value for the decoder, or a dict by stage name ("prior", "decoder", "upsampler_256" …).
ByStage = Any
BY_STAGE = ("steps", "guidance", "sampler")
DECODERS = ("eta", "interval")
PRIORS = ("prior", "ar_prior")
INTERNAL = ("meant_for", "elsewhere")
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

    What would change nothing is an error, unless stages of a kind in `elsewhere` have a use for it:
    those that other calls with the same options draw from.

    **Raises**: `ConfigError` for what is no number, or out of range.
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
    elsewhere: Collection[str] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for name, least in (("size", None), ("tile", None), ("prior_candidates", 1)):
            if (value := getattr(self, name)) is not None:
                as_number(name, value, least)
        as_number("candidates", self.candidates, 1)
        if self.interval is not None and not _is_interval(self.interval):
            raise ConfigError(
                f"interval = {self.interval}: expected start,end with 0 <= start <= end <= 1"
            )
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
        defaults = {f.name: f.default for f in fields(cls) if f.name not in INTERNAL}
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
        told = ("progress", "preview", *INTERNAL)
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

    def check_used(
        self, at_work: Sequence[Stage], stages: Sequence[Stage], sampling: Mapping[str, Any]
    ) -> None:
        """See that all that was asked for has an effect where, of a model's `stages`, those
        `at_work` are drawn from; `sampling` is what `resolve` gave.

        **Raises**: `ConfigError` saying what has none, and why.
        """
        used = [s for s in stages if s in at_work or s.kind in self.elsewhere]
        kinds, names = {s.kind for s in used}, [s.name for s in used]
        sampled = ", ".join(names) or "none"
        for option in BY_STAGE:
            value = getattr(self, option)
            for name in value if isinstance(value, dict) else ():
                if name not in names:
                    raise ConfigError(
                        f"{option} for {name!r} has no effect; stages that sample here: {sampled}"
                    )
            single = value is not None and not isinstance(value, dict)
            if single and not kinds & {self.meant_for, *self.elsewhere}:
                raise ConfigError(
                    f"{option} = {value}, the {self.meant_for}'s, has no effect; stages that "
                    f"sample here: {sampled}"
                )
        if self.prior_candidates is not None and not kinds & set(PRIORS):
            raise ConfigError(
                f"prior_candidates = {self.prior_candidates} has no effect without a prior that "
                f"samples; stages that sample here: {sampled}"
            )
        if self.tile is not None and "upsampler" not in kinds:
            raise ConfigError(
                f"tile = {self.tile} has no effect without an upsampler; stages that sample here: "
                f"{sampled}"
            )
        guided = [s.kind for s in used if sampling[s.name].guidance != 1]
        if self.interval is not None and "decoder" not in guided:
            raise ConfigError(
                f"interval = {self.interval} has no effect: the decoder's guidance is 1, which is "
                "off; ask for more (--guidance 4), or leave interval out"
            )
        if self.negative_prompt is not None and not {"decoder", *PRIORS} & set(guided):
            raise ConfigError(
                f"negative_prompt = {self.negative_prompt!r} has no effect: guidance is 1, which "
                "is off, in all that could be led away from it; ask for more (--guidance 4), or "
                "leave it out"
            )

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
            for name in DECODERS:
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
        """Of a decoder's options, those that embeddings of text have a use for; single values are
        the decoder's, which is drawn from elsewhere."""
        own: dict[str, Any] = dict.fromkeys((*DECODERS, "size", "tile"))
        for key in BY_STAGE:
            value = getattr(self, key)
            single = value is not None and not isinstance(value, dict)
            own[key] = {"decoder": value} if single else value
        return replace(self, candidates=1, elsewhere=("decoder", "upsampler"), **own)

    def of_pictures(self) -> Options:
        """The others, once priors have made embeddings of all texts."""
        return replace(self, prior=None, prior_candidates=None, elsewhere=PRIORS)

    def fresh(self, eta: float, stage: Stage) -> Options:
        """The same with this eta where none is given and the stage is sampled by DDIM."""
        if self.eta is not None or self.sampling(stage).sampler != "ddim":
            return self
        return replace(self, eta=eta)


def _is_interval(value: Any) -> bool:
    try:
        start, end = value
        return bool(0 <= start <= end <= 1)
    except (TypeError, ValueError):
        return False
