"""A stage: a network with the process it was trained on, its sampling defaults and its encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from unclip.clip import Fingerprint
from unclip.conditioning import Cond, TextEncoding
from unclip.config import Config, parse_config
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig, sample
from unclip.diffusion.tiling import Tiled
from unclip.errors import CheckpointError, ConfigError
from unclip.folder import (
    CONFIG,
    WEIGHTS,
    load_tensors,
    read_stage_config,
    read_tensors,
    stage_order,
    write_stage,
)
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig

NETWORKS: dict[str, tuple[type[Config], type[nn.Module]]] = {
    "prior": (PriorConfig, DiffusionPrior),
    "decoder": (DecoderConfig, Decoder),
    "upsampler": (UpsamplerConfig, Upsampler),
}

CHUNK_PIXELS = 2**18  # pictures that go through a network together: 64 at 64 px, one at 1024
CHUNK_EMBEDDINGS = 64
BAR_AFTER = 2.0  # seconds before a progress bar appears


def chunk_size(side: int) -> int:
    """How many pictures of this side go through a network together."""
    return max(1, CHUNK_PIXELS // side**2)


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

    def draw(
        self,
        cond: Cond,
        shape: tuple[int, ...],
        config: SamplingConfig,
        generators: Sequence[torch.Generator],
        *,
        null_text: TextEncoding | None = None,
        dtype: torch.dtype = torch.float32,
        tile: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """One sample for each generator, in chunks; a sample's chunk-mates don't change it.

        `tile` runs an upsampler on tiles of that many pixels where the picture is larger.

        **Shapes**: cond has B rows, shape is that of one sample; generators B → (B, *shape).
        """
        network = self.network
        if tile is not None and self.kind == "upsampler" and tile < shape[-1]:
            network = Tiled(network, tile)
        chunk = CHUNK_EMBEDDINGS if len(shape) == 1 else chunk_size(shape[-1])
        starts = range(0, len(generators), chunk)
        total, hide = config.steps * len(starts), not progress
        parts = []
        with tqdm(total=total, desc=self.name, disable=hide, delay=BAR_AFTER, leave=False) as bar:
            for start in starts:
                rows = slice(start, start + chunk)
                part = sample(
                    self.diffusion,
                    network,
                    cond.rows(rows),
                    shape,
                    config,
                    generators[rows],
                    null_text=null_text,
                    dtype=dtype,
                    on_step=bar.update,
                )
                parts.append(part)
        return torch.cat(parts)

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
        if dtype is not None:  # all but the statistics of embeddings, which stay float32
            tensors = {n: x if n.startswith("scale.") else x.to(dtype) for n, x in tensors.items()}
        write_stage(folder, self.name, config, tensors)


def load_stage(
    folder: Path, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Stage:
    """Read `folder/<name>/` for inference.

    **Raises**: `CheckpointError` when files are missing, damaged or do not fit together.
    """
    stage_order(name)  # a name from an index must not lead out of the folder
    data = read_stage_config(folder, name)
    where = str(folder / name / CONFIG)
    kind = data.get("kind")
    if kind not in NETWORKS or kind != name.split("_")[0]:
        raise CheckpointError(
            f"{where}: kind {kind!r} in the stage {name!r}; expected one of {list(NETWORKS)}"
        )
    schema, network_class = NETWORKS[kind]
    try:
        config = parse_config(data["model"], schema, where)
        diffusion = parse_config(data["diffusion"], DiffusionConfig, where)
        sampling = parse_config(data["sampling"], SamplingConfig, where)
        clip = data.get("clip")
        encoder = parse_config(clip, Fingerprint, where) if clip else None
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{where} can't be used: {error}") from None
    if getattr(config, "learned_variance", False) != diffusion.learned_variance:
        raise CheckpointError(f"{where}: learned_variance of model and diffusion must agree")
    with torch.device("meta"):
        network = network_class(config)
    network.to_empty(device="cpu")
    weights = folder / name / WEIGHTS
    load_tensors(network, read_tensors(weights), str(weights))
    network.to(device, dtype).eval().requires_grad_(False)
    if kind != "prior":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Stage(name, network, GaussianDiffusion(diffusion), sampling, encoder)
