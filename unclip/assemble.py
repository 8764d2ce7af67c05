"""Collect stages that were trained apart into one model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from unclip.clip.encoder import FrozenCLIP
from unclip.errors import CheckpointError, ConfigError
from unclip.files.disk import check_writable, from_home
from unclip.files.folder import INDEX
from unclip.pipeline import UnCLIP
from unclip.sources import Source
from unclip.stages.lora import Lora, read_loras
from unclip.stages.stage import Stage


def assemble(
    out: str | Path,
    clip: str | Path | None,
    prior: str | Path | None,
    decoder: str | Path | None,
    upsamplers: Sequence[str | Path],
    dtype: torch.dtype = torch.float32,
    ar_prior: str | Path | None = None,
    lora: Sequence[str | Path] = (),
) -> UnCLIP:
    """Take each stage from a run's newest checkpoint or a folder, ours or Karlo's, and write `out`.

    `lora` are low-rank changes, which are merged into the stages that they are of.

    **Raises**: `ConfigError` if there is nothing to do or `out` holds a model already;
    `CheckpointError` if a stage is missing, or trained with another CLIP encoder than the rest.
    """
    out = from_home(out)
    if not any([clip, prior, ar_prior, decoder, upsamplers]):
        raise ConfigError("nothing to assemble: name at least one of clip, prior, decoder, …")
    if (out / INDEX).exists():
        raise ConfigError(f"{out} holds a model already; delete it first or name another folder")
    check_writable(out, "--out")
    encoder = FrozenCLIP.load(str(clip)) if clip is not None else None
    chosen = [stage for source in upsamplers for stage in _upsamplers(source)]
    names = [stage.name for stage in chosen]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name} is in more than one of the folders given")
    changes = {change.stage: change for change in read_loras(lora)}
    named = {"prior": prior, "ar_prior": ar_prior, "decoder": decoder}
    for name in changes:
        if named.get(name) is None:
            raise ConfigError(f"{changes[name].file} changes a {name}, and none is named")
    found = {
        name: None if source is None else _stage(source, name, changes.get(name))
        for name, source in named.items()
    }
    pipe = UnCLIP(encoder, found["prior"], found["decoder"], chosen, ar_prior=found["ar_prior"])
    try:
        pipe.save_pretrained(out, dtype)
    except OSError as error:
        raise ConfigError(f"can't write into {out}: {error.strerror or error}") from None
    return pipe


def _stage(name: str | Path, stage: str, lora: Lora | None) -> Stage:
    changes = [] if lora is None else [lora]
    return Source(name).change(changes).stage(stage).load()


def _upsamplers(name: str | Path) -> list[Stage]:
    source = Source(name)
    found = [stored for stored in source.stages.values() if stored.stage.kind == "upsampler"]
    if not found:
        raise CheckpointError(f"no upsampler in {source.root}")
    return [stored.load() for stored in found]
