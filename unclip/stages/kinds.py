"""The kinds of stages: one table, a row a kind, of all that differs between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unclip.config import Config
from unclip.models.ar_prior import ArPrior, ArPriorConfig
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig


@dataclass(frozen=True)
class Kind:
    """What stages of a kind are: configuration and network; by configuration, the shape of what
    they draw and, in `says`, the words for that."""

    name: str
    config: type[Config]
    network: type[nn.Module]
    shape: Callable[[Any], tuple[int, ...]]
    says: str

    def words(self, config: Config) -> str:
        """What a stage of this configuration draws."""
        return self.says.format(**dict(config))


def _vector(config: Any) -> tuple[int, ...]:
    return (config.embed,)


def _picture(side: int) -> tuple[int, ...]:
    return 3, side, side


ROWS = (  # in the order of the stack
    Kind("prior", PriorConfig, DiffusionPrior, _vector, "{embed} wide"),
    Kind("ar_prior", ArPriorConfig, ArPrior, _vector, "{embed} wide, in {components} x {buckets}"),
    Kind("decoder", DecoderConfig, Decoder, lambda c: _picture(c.resolution), "{resolution} px"),
    Kind("upsampler", UpsamplerConfig, Upsampler, lambda c: _picture(c.high), "{low} → {high} px"),
)
KINDS = {kind.name: kind for kind in ROWS}


def kind_of(config: Config) -> Kind:
    """The kind of stage that a network's configuration is of."""
    return next(kind for kind in KINDS.values() if isinstance(config, kind.config))


def stage_name(config: Config) -> str:
    """What the stage of a network is called: by its kind, an upsampler by its size as well."""
    name = kind_of(config).name
    return f"{name}_{config.high}" if isinstance(config, UpsamplerConfig) else name


def kind_of_keys(keys: Iterable[str]) -> Kind | None:
    """The kind whose configuration most resembles one with these keys, if any does.

    Every kind demands keys that the others lack; one of them may be missing or misspelt.
    """

    given = set(keys)

    def lacking(kind: Kind) -> int:
        fields = kind.config.model_fields.items()
        return len({name for name, field in fields if field.is_required()} - given)

    best = min(KINDS.values(), key=lacking)
    return best if lacking(best) <= 1 else None


def build(config: Config) -> nn.Module:
    """The network of a configuration, on the meta device: shapes without weights."""
    with torch.device("meta"):
        return kind_of(config).network(config)
