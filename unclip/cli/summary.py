"""What a model folder holds, read from its configurations and headers without loading weights."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclip.errors import CheckpointError
from unclip.files.diffusers import PIPELINE
from unclip.files.folder import WEIGHTS, WEIGHTS_LAST, read_index, read_stage_config, stage_order
from unclip.files.tensors import TensorFile
from unclip.stages.kinds import KINDS


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
    """Every stage of a model folder, or of one in Karlo's layout, in order.

    **Raises**: `CheckpointError` if a file is missing or damaged.
    """
    if (root / PIPELINE).is_file():
        return _published(root)
    return [_stage(root, str(name)) for name in read_index(root)["stages"]]


def model_hash(root: Path) -> str:
    """The first 12 digits of a sha256 over the weights of all stages of a model folder."""
    if (root / PIPELINE).is_file():
        files = sorted(root.glob("*/*.safetensors"))
    else:
        folders = [root / str(name) for name in read_index(root)["stages"]]
        files = [f / name for f in folders for name in (WEIGHTS, WEIGHTS_LAST)]
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()[:12]


def _stage(root: Path, name: str) -> StageSummary:
    stage_order(name)  # a name from an index must not lead out of the folder
    config, weights = read_stage_config(root, name), [root / name / WEIGHTS]
    if (root / name / WEIGHTS_LAST).is_file():
        weights.append(root / name / WEIGHTS_LAST)
    try:
        fingerprint = config.get("fingerprint") or config.get("clip") or {}
        return StageSummary(
            name,
            sum(map(_parameters, weights)),
            _size(config),
            _sampling(config.get("sampling")),
            sum(path.stat().st_size for path in weights),
            str(fingerprint.get("name", "")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{root / name} has a damaged config.json: {error!r}") from None


def _published(root: Path) -> list[StageSummary]:
    from unclip.files.diffusers import Folder
    from unclip.interop.karlo import ENCODER, PARTS, stages

    folder, found = Folder(root), []
    configs = {name: stored.stage.describe() for name, stored in stages(folder).items()}
    for name, config in {"clip": {}, **configs}.items():
        parts = ENCODER if name == "clip" else PARTS[config["kind"]]
        files = [f for part in parts if part in folder.parts for f in folder.weights(part)]
        if files:
            size, sampling = _size(config) if config else "", _sampling(config.get("sampling"))
            count, size_on_disk = sum(map(_parameters, files)), sum(f.stat().st_size for f in files)
            found.append(StageSummary(name, count, size, sampling, size_on_disk, ""))
    return found


def _parameters(weights: Path) -> int:
    file = TensorFile(weights)
    return sum(math.prod(file.shape(name)) for name in file)


def _size(config: dict[str, Any]) -> str:
    if "kind" not in config:
        return f"{config['preprocess_cfg']['size']} px → {config['fingerprint']['width']} wide"
    kind = KINDS[config["kind"]]
    return kind.words(kind.config.model_validate(config["model"]))


def _sampling(sampling: dict[str, Any] | None) -> str:
    if not sampling:
        return ""
    return f"{sampling['sampler']}, {sampling['steps']} steps, guidance {sampling['guidance']:g}"
