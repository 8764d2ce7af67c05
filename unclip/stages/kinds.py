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
    they draw and the words that say so."""

    name: str
    config: type[Config]
    network: type[nn.Module]
    shape: Callable[[Any], tuple[int, ...]]
    words: Callable[[Any], str]


def _picture(side: int) -> tuple[int, ...]:
    return 3, side, side


# In the order of the stack.
KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "prior",
            PriorConfig,
            DiffusionPrior,
            lambda config: (config.embed,),
            lambda config: f"{config.embed} wide",
        ),
        Kind(
            "ar_prior",
            ArPriorConfig,
            ArPrior,
            lambda config: (config.embed,),
            lambda config: f"{config.embed} wide, in {config.components} x {config.buckets}",
        ),
        Kind(
            "decoder",
            DecoderConfig,
            Decoder,
            lambda config: _picture(config.resolution),
            lambda config: f"{config.resolution} px",
        ),
        Kind(
            "upsampler",
            UpsamplerConfig,
            Upsampler,
            lambda config: _picture(config.high),
            lambda config: f"{config.low} → {config.high} px",
        ),
    )
}


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
