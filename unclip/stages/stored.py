"""Stages on disk: their files checked, their weights read when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclip.clip.fingerprint import Fingerprint
from unclip.config import parse_config
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig
from unclip.errors import CheckpointError, ConfigError
from unclip.files.folder import (
    CONFIG,
    WEIGHTS,
    WEIGHTS_LAST,
    read_stage_config,
    stage_kind,
)
from unclip.files.tensors import TensorFile, load_tensors
from unclip.models.ar_prior import ArPriorConfig
from unclip.stages.ar_prior import ArSamplingConfig, ArStage
from unclip.stages.kinds import KINDS, Kind, build
from unclip.stages.lora import LORA
from unclip.stages.stage import Stage

GONE = ("text_guidance", "threshold")  # settings that models may name, None in all of them


@dataclass(frozen=True)
class StoredStage:
    """A stage on disk, its files checked.

    `stage` has a network without weights; `tensors`, and `final` for the network of the last step,
    are read when asked for. `where` names them in errors.
    """

    stage: Stage
    tensors: Mapping[str, Tensor]
    final: Mapping[str, Tensor] | None
    where: str

    @property
    def last(self) -> Mapping[str, Tensor] | None:
        """The last step's network; None where it is a copy of the first. Reads to tell."""
        if self.final is None:
            return None
        copied = all(torch.equal(x, self.final[name]) for name, x in self.tensors.items())
        return None if copied else self.final

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Stage:
        """The stage with its weights, for inference.

        **Raises**: `CheckpointError` where they don't fit the network.
        """
        networks = [
            materialise(build(self.stage.config), tensors, self.where, device, dtype)
            for tensors in (self.tensors, self.last)
            if tensors is not None
        ]
        return replace(self.stage, network=networks[0], last=networks[1] if networks[1:] else None)


def read_stage(folder: Path, name: str) -> StoredStage:
    """The stage in `folder/<name>/`.

    **Raises**: `CheckpointError` when files are missing, damaged or do not fit together.
    """
    expected = stage_kind(name)  # a name from an index must not lead out of the folder
    data = read_stage_config(folder, name)
    where = str(folder / name / CONFIG)
    if data.get("kind") == LORA:
        raise CheckpointError(
            f"{where} is a LoRA, which changes a {expected}: name the model that it was made for "
            f"({data.get('base')}), and this as --lora"
        )
    kind = KINDS.get(str(data.get("kind")))
    if kind is None or kind.name != expected:
        raise CheckpointError(
            f"{where}: kind {data.get('kind')!r} in the stage {name!r}; expected one of "
            f"{list(KINDS)}"
        )
    try:
        stage = _describe(kind, data, name, where)
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{where} can't be used: {error}") from None
    weights, last = folder / name / WEIGHTS, folder / name / WEIGHTS_LAST
    return StoredStage(
        stage, TensorFile(weights), TensorFile(last) if last.is_file() else None, str(weights)
    )


def _describe(kind: Kind, data: dict[str, Any], name: str, where: str) -> Stage:
    """The stage without weights."""
    config = parse_config(data["model"], kind.config, where)
    clip = data.get("clip")
    encoder = parse_config(clip, Fingerprint, where) if clip else None
    if isinstance(config, ArPriorConfig):
        drawing = parse_config(data["sampling"], ArSamplingConfig, where)
        return ArStage.of(build(config), drawing, encoder)
    diffusion = parse_config(data["diffusion"], DiffusionConfig, where)
    asked = data["sampling"].items()
    kept = {key: value for key, value in asked if key not in GONE or value is not None}
    sampling = parse_config(kept, SamplingConfig, where)
    if getattr(config, "learned_variance", False) != diffusion.learned_variance:
        raise ConfigError("learned_variance of model and diffusion must agree")
    process = GaussianDiffusion(diffusion, _power(data.get("power", {})))
    return Stage(name, build(config), process, sampling, encoder)


def _power(data: Any) -> dict[int, float]:
    """What was measured for the sampler `analytic`. **Raises**: `ConfigError`."""
    try:
        return {int(t): float(value) for t, value in data.items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(
            "power must be numbers by timestep, as `unclip measure` writes them"
        ) from None


def materialise(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    what: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Give a network from the meta device its weights, for inference.

    Memory is taken once, in `dtype`; tensors are read one by one. `what` names them in errors.
    """
    network.to(dtype).to_empty(device=device)
    load_tensors(network, tensors, what)
    return network.eval().requires_grad_(False)
