"""What a training may start with: an encoder of its model's widths, and weights of its kin."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any, Protocol

import torch.nn.functional as F
from torch import nn

from unclip.clip.fingerprint import check_same_encoder
from unclip.config import flat
from unclip.diffusion.process import GaussianDiffusion
from unclip.diffusion.schedulers import check_sampler
from unclip.errors import CheckpointError, ConfigError
from unclip.files.checkpoints import newest_checkpoint
from unclip.files.find import resolve_folder
from unclip.files.folder import WEIGHTS, read_stage_config
from unclip.files.tensors import TensorFile, load_tensors
from unclip.models.lora import adapt
from unclip.sources import Source
from unclip.stages import lora
from unclip.stages.stage import Stage
from unclip.stages.stored import StoredStage

# What may differ between weights and the run that starts from them.
FREE = {
    "dropout",
    "checkpointing",
    "low",
    "high",
    "resolution",
    "steps",
    "schedule",
    "weight",
    "bias",
    "time_power",
    "inpaint",
}
# What may not where they are changed by low rank: the change is drawn with the base's.
OF_A_BASE = FREE - {"resolution", "steps", "schedule"}
FIRST = "unet.conv_in.weight"


class Widths(Protocol):
    """An encoder's, of its embeddings and of its text states, and how many of these there are."""

    @property
    def width(self) -> int: ...
    @property
    def text_width(self) -> int: ...
    @property
    def context(self) -> int: ...


def check_lora(run: Any) -> None:
    """**Raises**: `ValueError` for low-rank changes of nothing."""
    if run.lora is not None and run.train.init is None:
        raise ValueError("lora needs train.init, the model that it changes")


def check_sampling(run: Any) -> None:
    """**Raises**: `ConfigError` for a process or a sampling with which no preview can be drawn."""
    if run.diffusion.steps < 2:
        raise ConfigError(f"diffusion.steps = {run.diffusion.steps} must be at least 2")
    try:
        check_sampler(GaussianDiffusion(run.diffusion), run.sampling.sampler, run.sampling.steps)
    except ConfigError as error:
        raise ConfigError(f"sampling: {error}") from None


def check_widths(clip: Widths, run: Any) -> None:
    """**Raises**: `ConfigError` for a model whose widths are not its encoder's, or that has too few
    places for its texts."""
    for key, width in (("embed", clip.width), ("text_width", clip.text_width)):
        value = getattr(run.model, key)
        if value is not None and value != width:
            raise ConfigError(
                f"model.{key} = {value}, but the CLIP encoder {run.clip} has {width}: set them "
                "equal"
            )
    places = getattr(run.model, "context", None)
    if places is not None and places < clip.context:
        raise ConfigError(
            f"model.context = {places}, but texts of the CLIP encoder {run.clip} have up to "
            f"{clip.context} tokens: set it to that"
        )


def load_weights(model: nn.Module, name: str, path: str | Path) -> None:
    """The weights of the stage `name` in a folder, a run or a hub id.

    **Raises**: `CheckpointError` if there is no such stage, or its shapes differ.
    """
    folder = resolve_folder(path)
    read_stage_config(folder, name)
    weights = folder / name / WEIGHTS
    load_tensors(model, TensorFile(weights), str(weights))


def start_from(stage: Stage, path: str | Path, free: Set[str] = FREE) -> None:
    """Take over the weights of the same stage in a folder, a run or a hub id, or of its only kin.

    Kin are stages of one kind: an upsampler may start from the only upsampler there is. Folders in
    Karlo's layout are read as they are. Channels that an inpainting decoder sees and the other
    doesn't begin at zero, as no change (GLIDE); `detail`, where the other has none, begins anew.

    **Raises**: `CheckpointError` if there is no such stage, its shapes or settings differ, or it
    was trained with another encoder.
    """
    stored = kin_of(stage, path, free)
    tensors = stored.tensors
    if getattr(stage.config, "detail", None) is not None and stored.stage.config.detail is None:
        own = stage.network.state_dict().items()
        tensors = {**tensors, **{key: x for key, x in own if key.startswith("detail.")}}
    if getattr(stage.config, "inpaint", False) and not stored.stage.config.inpaint:
        narrow = tensors[FIRST]
        lacking = stage.network.state_dict()[FIRST].shape[1] - narrow.shape[1]
        tensors = {**tensors, FIRST: F.pad(narrow, (0, 0, 0, 0, 0, lacking))}
    load_tensors(stage.network, tensors, stored.where)


def adapted(stage: Stage, rank: int, train: Any) -> nn.Module:
    """The low-rank changes of a network, with its base's weights. They alone are trained and saved,
    so that a run which goes on reads its base again.

    **Raises**: as `start_from`, and `CheckpointError` if the run began with another base.
    """
    start_from(stage, train.init, OF_A_BASE)
    begun = newest_checkpoint(Path(train.out), training=True)
    for change in lora.read_loras([begun] if begun else []):
        for layer in change.layers:
            change.check(layer, stage.network.get_parameter(f"{layer}.weight"))
    return adapt(stage.network, rank)


def kin_of(stage: Stage, path: str | Path, free: Set[str] = FREE) -> StoredStage:
    """What `start_from` reads; settings that are `free` may differ. **Raises**: as that does, but
    for shapes."""
    source = Source(path)
    kin = [stored for stored in source.stages.values() if stored.stage.kind == stage.kind]
    stored = kin[0] if len(kin) == 1 else source.stage(stage.name)
    _check_settings(stage.describe(), stored.stage.describe(), stored.where, free)
    trained = stored.stage.encoder
    if source.published is not None and stage.encoder is not None:
        # Published weights don't say; the parts beside them do.
        clip = source.clip()
        trained = None if clip is None else clip.fingerprint
    if stage.encoder is not None and trained is not None:
        check_same_encoder(stage.encoder, trained, stored.where)
    return stored


def _check_settings(
    ours: dict[str, Any], theirs: dict[str, Any], where: str, free: Set[str]
) -> None:
    """Check what shapes don't show: heads, groups, scales, what is predicted."""
    pairs = [(flat(ours[part]), flat(theirs[part])) for part in ("model", "diffusion")]
    differ = [
        f"{key} = {value}, here {a.get(key)}"
        for a, b in pairs
        for key, value in b.items()
        if a.get(key) != value and key.split(".")[-1] not in free
    ]
    if differ:
        raise CheckpointError(f"train.init: {where} has {'; '.join(differ)}; set them equal")
