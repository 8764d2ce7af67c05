"""Karlo and its kin, read as they are and run by our networks."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unclip.config import Config
from unclip.diffusion.process import GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig
from unclip.errors import CheckpointError
from unclip.files.diffusers import (
    DECODER,
    DECODER_STEPS,
    FIRST,
    IMAGE_ENCODER,
    LAST,
    PRIOR,
    PRIOR_STEPS,
    SCHEDULER,
    TEXT_ENCODER,
    TEXT_PROJ,
    UPSAMPLER_STEPS,
    Folder,
)
from unclip.interop.names import Names, Renamed, prior_names, text_proj_names, unet_names
from unclip.interop.settings import (
    decoder_config,
    diffusion_config,
    prior_config,
    upsampler_config,
)
from unclip.stages.kinds import build, kind_of, stage_name
from unclip.stages.stage import Stage
from unclip.stages.stored import StoredStage

LOW = 64  # what super_res_first enlarges, where there is no decoder to say so
# The parts that hold the weights of each kind of stage, and of the encoder.
PARTS = {"prior": (PRIOR,), "decoder": (DECODER, TEXT_PROJ), "upsampler": (FIRST, LAST)}
ENCODER = (TEXT_ENCODER, IMAGE_ENCODER)
# Karlo's sampling, which its files don't hold: diffusers has it as defaults of its pipeline.
CANDIDATES = 1  # prior samples for each picture
SAMPLING: dict[str, dict[str, Any]] = {
    "prior": {"sampler": "ddpm", "steps": 25, "guidance": 4.0},
    "decoder": {"sampler": "ddpm", "steps": 25, "guidance": 8.0},
    "upsampler": {"sampler": "ddpm", "steps": 7, "guidance": 1.0},
}


def stages(folder: Folder) -> dict[str, StoredStage]:
    """The stages that a folder has, in order, by our names.

    **Raises**: `CheckpointError` naming what is missing, left over or not supported.
    """
    try:
        found = [_prior(folder), _decoder(folder), _upsampler(folder)]
    except (TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"a configuration in {folder.root} is damaged: {error}") from None
    return {stored.stage.name: stored for stored in found if stored is not None}


def _prior(folder: Folder) -> StoredStage | None:
    if not folder.has(PRIOR, PRIOR_STEPS):
        return None
    config = prior_config(*folder.config(PRIOR))
    stage = _stage(folder, config, PRIOR_STEPS)
    return StoredStage(stage, _renamed(folder, PRIOR, prior_names(config), stage), None, stage.name)


def _decoder(folder: Folder) -> StoredStage | None:
    if not folder.has(DECODER, TEXT_PROJ, DECODER_STEPS):
        return None
    (unet, where), (proj, where_proj) = folder.config(DECODER), folder.config(TEXT_PROJ)
    config = decoder_config(unet, proj, where, where_proj)
    stage = _stage(folder, config, DECODER_STEPS)
    if stage.diffusion.config.learned_variance != config.learned_variance:
        raise CheckpointError(f"{where}: out_channels does not fit the scheduler's variance_type")
    # A raw scale has statistics too, which nothing reads and Karlo's files don't hold.
    scale = {"scale.mean": torch.zeros(config.embed), "scale.std": torch.ones(config.embed)}
    tensors: Mapping[str, Tensor] = ChainMap(
        _renamed(folder, DECODER, unet_names(config.unet), stage),  # type: ignore[arg-type]
        _renamed(folder, TEXT_PROJ, text_proj_names(config), stage),  # type: ignore[arg-type]
        scale,
    )
    return StoredStage(stage, tensors, None, stage.name)


def _upsampler(folder: Folder) -> StoredStage | None:
    if not folder.has(FIRST, LAST, UPSAMPLER_STEPS):
        return None
    low = LOW
    if DECODER in folder.parts:
        low = int(folder.config(DECODER)[0].get("sample_size", LOW))
    (first, where), (last, where_last) = folder.config(FIRST), folder.config(LAST)
    config = upsampler_config(first, low, where)
    if config != upsampler_config(last, low, where_last):
        raise CheckpointError(f"{where} and {where_last} describe different networks")
    stage = _stage(folder, config, UPSAMPLER_STEPS)
    names = unet_names(config.unet)
    tensors, other = (_renamed(folder, part, names, stage) for part in (FIRST, LAST))
    return StoredStage(stage, tensors, other, stage.name)


def _stage(folder: Folder, config: Config, steps: str) -> Stage:
    """A stage without weights; its steps and guidance are Karlo's, its bound is the scheduler's."""
    diffusion, bound = diffusion_config(*folder.config(steps, SCHEDULER))
    sampling = SamplingConfig(**SAMPLING[kind_of(config).name], clip=bound)
    return Stage(stage_name(config), build(config), GaussianDiffusion(diffusion), sampling)


def _renamed(folder: Folder, part: str, names: Names, stage: Stage) -> Renamed:
    shapes = {name: x.shape for name, x in stage.network.state_dict().items()}
    return Renamed(names, folder.tensors(part), shapes, str(folder.parts[part]))
