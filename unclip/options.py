"""What a call to the pipeline may ask for, and what that means for each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from unclip.config import parse_config
from unclip.diffusion.sampling import SamplingConfig
from unclip.diffusion.schedulers import make_scheduler
from unclip.errors import ConfigError
from unclip.stages.stage import Stage

# One value for the decoder, or a dict by stage name ("prior", "decoder", "upsampler_256" …).
ByStage = Any
BY_STAGE = ("steps", "guidance", "sampler")


@dataclass(frozen=True)
class Options:
    """What a call asks for beyond a model's own defaults, the same for every verb.

    `steps`, `guidance` and `sampler` are one value for the decoder (or for what runs where it
    doesn't) or a dict by stage name. `eta` is the decoder's, and DDIM's only. `tile` runs
    upsamplers on tiles of that many pixels. `prior_candidates` embeddings are drawn for each
    picture and the one closest to its text is kept; `candidates` pictures are finished for each
    one returned and the best by CLIP score is kept.

    **Raises**: `ConfigError` for numbers out of range.
    """

    size: int | None = None
    steps: ByStage = None
    guidance: ByStage = None
    sampler: ByStage = None
    eta: float | None = None
    tile: int | None = None
    prior_candidates: int | None = None
    candidates: int = 1
    progress: bool = False

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
    def of(cls, given: dict[str, Any]) -> Options:
        """Options from keywords. **Raises**: `ConfigError` for one that does not exist."""
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise ConfigError(f"unknown option {name!r}; options are {', '.join(names)}")
        return cls(**given)

    def spread(self, stages: Sequence[Stage]) -> Options:
        """The same with single values meant for these stages instead of the decoder."""
        values = {name: getattr(self, name) for name in BY_STAGE}
        spread: dict[str, Any] = {
            name: {stage.name: value for stage in stages}
            for name, value in values.items()
            if value is not None and not isinstance(value, dict)
        }
        return replace(self, **spread)

    def check(self, stages: Sequence[Stage]) -> None:
        """Check everything that is said by stage.

        **Raises**: `ConfigError` naming the stages there are, the samplers, the tile's grain.
        """
        names = [stage.name for stage in stages]
        for option in BY_STAGE:
            value = getattr(self, option)
            for name in value if isinstance(value, dict) else ():
                if name not in names:
                    raise ConfigError(f"{option} for {name!r}: this model has {', '.join(names)}")
        for stage in stages:
            self.sampling(stage)
            if self.tile is not None and stage.kind == "upsampler":
                grain = max(4, stage.config.unet.stride)  # below 4 nothing overlaps
                if self.tile < grain or self.tile % grain:
                    raise ConfigError(
                        f"tile = {self.tile}: must be a multiple of {grain}, the grain of "
                        f"{stage.name}"
                    )

    def sampling(self, stage: Stage) -> SamplingConfig:
        """How to sample one stage: its own defaults with what the caller said.

        **Raises**: `ConfigError` naming the stage, the value and what would be valid.
        """
        asked = {}
        for key in BY_STAGE:
            value = getattr(self, key)
            if isinstance(value, dict):
                value = value.get(stage.name)
            elif stage.kind != "decoder":
                value = None
            if value is not None:
                asked[key] = value
        if self.eta is not None and stage.kind == "decoder":
            asked["eta"] = self.eta
        source = f"sampling of {stage.name}"
        config = parse_config(stage.sampling.model_dump() | asked, SamplingConfig, source)
        try:
            make_scheduler(stage.diffusion, config.sampler, config.steps)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        return config
