"""What a model folder holds, read from its configurations and headers without loading weights."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from unclip.errors import CheckpointError
from unclip.folder import WEIGHTS, read_index, read_stage_config, stage_order


@dataclass(frozen=True)
class StageSummary:
    """One line of `unclip info`; `size` is in words, `bytes` on disk."""

    name: str
    parameters: int
    size: str
    sampling: str
    bytes: int
    encoder: str


def summarise(root: Path) -> list[StageSummary]:
    """Every stage of a model folder, in order.

    **Raises**: `CheckpointError` if a file is missing or damaged.
    """
    return [_stage(root, str(name)) for name in read_index(root)["stages"]]


def model_hash(root: Path) -> str:
    """The first 12 digits of a sha256 over the weights of all stages of a model folder."""
    digest = hashlib.sha256()
    for name in read_index(root)["stages"]:
        with (root / str(name) / WEIGHTS).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:12]


def _stage(root: Path, name: str) -> StageSummary:
    stage_order(name)  # a name from an index must not lead out of the folder
    config, weights = read_stage_config(root, name), root / name / WEIGHTS
    try:
        with safe_open(weights, framework="pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
        fingerprint = config.get("fingerprint") or config.get("clip") or {}
        return StageSummary(
            name,
            sum(math.prod(shape) for shape in shapes),
            _size(config),
            _sampling(config.get("sampling")),
            weights.stat().st_size,
            str(fingerprint.get("name", "")),
        )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights} is missing or damaged: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{root / name} has a damaged config.json: {error!r}") from None


def _size(config: dict[str, Any]) -> str:
    model = config.get("model", {})
    if "low" in model:
        return f"{model['low']} → {model['high']} px"
    if "resolution" in model:
        return f"{model['resolution']} px"
    if "embed" in model:
        return f"{model['embed']} wide"
    return f"{config['preprocess_cfg']['size']} px → {config['fingerprint']['width']} wide"


def _sampling(sampling: dict[str, Any] | None) -> str:
    if not sampling:
        return ""
    return f"{sampling['sampler']}, {sampling['steps']} steps, guidance {sampling['guidance']:g}"
