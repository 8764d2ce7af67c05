"""The kinds of diffusion stages: what configures each, and its network."""

from __future__ import annotations

import torch
from torch import nn

from unclip.config import Config
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig

NETWORKS: dict[str, tuple[type[Config], type[nn.Module]]] = {
    "prior": (PriorConfig, DiffusionPrior),
    "decoder": (DecoderConfig, Decoder),
    "upsampler": (UpsamplerConfig, Upsampler),
}


def build(kind: str, config: Config) -> nn.Module:
    """A network of a kind of stage, on the meta device: shapes without weights."""
    with torch.device("meta"):
        return NETWORKS[kind][1](config)
