"""A stage: a network with the process it was trained on, its sampling defaults and its encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unclip.clip import Fingerprint
from unclip.config import Config, parse_config
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig
from unclip.errors import CheckpointError, ConfigError
from unclip.folder import load_tensors, read_stage_config, read_tensors, write_stage
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig

NETWORKS: dict[str, tuple[type[Config], type[nn.Module]]] = {
    "prior": (PriorConfig, DiffusionPrior),
    "decoder": (DecoderConfig, Decoder),
    "upsampler": (UpsamplerConfig, Upsampler),
}


@dataclass
class Stage:
    """One diffusion stage. `encoder` is the CLIP it was trained with; upsamplers have none."""

    name: str
    network: Any
    diffusion: GaussianDiffusion
    sampling: SamplingConfig
    encoder: Fingerprint | None = None

    @property
    def kind(self) -> str:
        """prior, decoder or upsampler."""
        return self.name.split("_")[0]

    def save(
        self, folder: Path, network: nn.Module | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write `folder/<name>/`; `network` stands in for ours (an EMA copy, say)."""
        config = {
            "kind": self.kind,
            "model": self.network.config.model_dump(mode="json"),
            "diffusion": self.diffusion.config.model_dump(mode="json"),
            "sampling": self.sampling.model_dump(mode="json"),
            "clip": self.encoder.model_dump(mode="json") if self.encoder else None,
        }
        tensors = (network or self.network).state_dict()
        write_stage(folder, self.name, config, tensors, dtype)


def load_stage(
    folder: Path, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Stage:
    """Read `folder/<name>/` for inference.

    **Raises**: `CheckpointError` when files are missing, damaged or do not fit together.
    """
    data = read_stage_config(folder, name)
    where = f"{folder / name / 'config.json'}"
    kind = data.get("kind")
    if kind not in NETWORKS:
        raise CheckpointError(f"{where}: unknown kind {kind!r}; expected one of {list(NETWORKS)}")
    schema, network_class = NETWORKS[kind]
    try:
        config = parse_config(data["model"], schema, where)
        diffusion = parse_config(data["diffusion"], DiffusionConfig, where)
        sampling = parse_config(data["sampling"], SamplingConfig, where)
        clip = data.get("clip")
        encoder = parse_config(clip, Fingerprint, where) if clip else None
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{where} can't be used: {error}") from None
    with torch.device("meta"):
        network = network_class(config)
    network.to_empty(device="cpu")
    weights = folder / name / "model.safetensors"
    load_tensors(network, read_tensors(weights), str(weights))
    network.to(device, dtype).eval().requires_grad_(False)
    if kind != "prior":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Stage(name, network, GaussianDiffusion(diffusion), sampling, encoder)
