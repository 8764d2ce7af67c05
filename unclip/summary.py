"""What a model is made of, read from its configurations and headers without loading weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel

from unclip.diffusion.sampling import SamplingConfig
from unclip.errors import CheckpointError
from unclip.files.folder import read_stage_config
from unclip.files.tensors import TensorFile
from unclip.sources import Source
from unclip.stages.kinds import kind_of


@dataclass(frozen=True)
class StageSummary:
    """One line of `unclip info`; `size` is in words, `bytes` on disk."""

    name: str
    parameters: int
    size: str
    sampling: str
    bytes: int
    encoder: str


def summarise(source: Source) -> list[StageSummary]:
    """The encoder and every stage, in order; of weights, those files that are read.

    **Raises**: `CheckpointError` if a file is missing or damaged.
    """
    found = []
    for name, files in source.weights.items():
        tensors = [TensorFile(path) for path in files]
        count = sum(math.prod(file.shape(name)) for file in tensors for name in file)
        size, sampling, encoder = _encoder(source) if name == "clip" else _stage(source, name)
        on_disk = sum(path.stat().st_size for path in files)
        found.append(StageSummary(name, count, size, sampling, on_disk, encoder))
    return found


def _stage(source: Source, name: str) -> tuple[str, str, str]:
    stage = source.stage(name).stage
    return (
        kind_of(stage.config).words(stage.config),
        _sampling(stage.sampling),
        stage.encoder.name if stage.encoder else "",
    )


def _sampling(asked: BaseModel) -> str:
    if not isinstance(asked, SamplingConfig):
        return ", ".join(f"{key} {value:g}" for key, value in asked.model_dump().items())
    steps = f"{asked.steps} step{'s' * (asked.steps > 1)}"
    within = "" if asked.interval is None else " in {:g} to {:g}".format(*asked.interval)
    return f"{asked.sampler}, {steps}, guidance {asked.guidance:g}{within}"


def _encoder(source: Source) -> tuple[str, str, str]:
    if source.published is not None:
        return "", "", ""
    config = read_stage_config(source.root, "clip")
    try:
        fingerprint, side = config["fingerprint"], config["preprocess_cfg"]["size"]
        return f"{side} px → {fingerprint['width']} wide", "", str(fingerprint["name"])
    except (KeyError, TypeError) as error:
        where = source.root / "clip"
        raise CheckpointError(f"{where} has a damaged config.json: {error!r}") from None
