"""Carry a model from Karlo's layout to ours and back: the same weights, byte by byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.open import from_folder
from unclip.diffusion.sampling import SamplingConfig
from unclip.errors import ConfigError
from unclip.files import diffusers as layout
from unclip.files.diffusers import PIPELINE
from unclip.files.disk import check_writable, write_json
from unclip.files.folder import CONFIG, INDEX, WEIGHTS_LAST, read_index, update_index, write_stage
from unclip.files.tensors import TensorFile, write_tensors
from unclip.interop.encoder import to_transformers, write_processor, write_tokenizer
from unclip.interop.karlo import CANDIDATES, SAMPLING, stages
from unclip.interop.names import prior_names, text_proj_names, to_diffusers, unet_names
from unclip.interop.settings import (
    to_decoder,
    to_prior,
    to_scheduler,
    to_upsampler,
)
from unclip.models.layers import statistics
from unclip.stages.stage import Stage
from unclip.stages.stored import StoredStage, read_stage

# A part's configuration, and what reads its weights if it has any.
Part = tuple[dict[str, Any], Callable[[], Mapping[str, Tensor]] | None]


def convert(
    source: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> list[str]:
    """Write a folder in Karlo's layout as a model folder, or a model folder in Karlo's layout.

    Weights keep their precision unless `dtype` says otherwise. What the other side has no place
    for is returned, a sentence each.

    **Raises**: `ConfigError` for what Karlo's networks can't express, or an `out` that holds a
    model already; `CheckpointError` for a source that can't be read. Nothing is written by then.
    """
    check_writable(out, "folder")
    for index in (INDEX, PIPELINE):
        if (out / index).exists():
            raise ConfigError(
                f"{out} holds a model already; delete it first or name another folder"
            )
    try:
        if (source / PIPELINE).is_file():
            folder = layout.Folder(source, variant=variant, allow_pickle=allow_pickle)
            return _from_karlo(folder, out, dtype)
        if variant is not None:
            raise ConfigError(layout.NO_VARIANTS.format(source))
        return _to_karlo(source, out, dtype)
    except OSError as error:
        raise ConfigError(f"can't write into {out}: {error.strerror or error}") from None


def _from_karlo(folder: layout.Folder, out: Path, dtype: torch.dtype | None) -> list[str]:
    found = stages(folder)
    parts = from_folder(folder, torch.float32)
    clip = None if parts is None else FrozenCLIP(*parts)
    encoder = None
    if clip is not None:
        encoder = clip.fingerprint
        tower = folder.tensors(layout.TEXT_ENCODER)
        clip.save(out, dtype or _precision(tower))
    for name, stored in found.items():
        needs = None if stored.stage.kind == "upsampler" else encoder
        described = replace(stored.stage, encoder=needs).describe()
        exact = statistics(stored.stage.network)
        write_stage(out, name, described, stored.tensors, dtype, exact)
        if (last := stored.last) is not None:
            write_tensors(out / name / WEIGHTS_LAST, last, dtype, exact)
    update_index(out, prior_candidates=CANDIDATES)
    return []


def _to_karlo(root: Path, out: Path, dtype: torch.dtype | None) -> list[str]:
    names = [str(name) for name in read_index(root)["stages"]]
    found = {name: read_stage(root, name) for name in names if name != "clip"}
    ups = [name for name in found if found[name].stage.kind == "upsampler"]
    if "decoder" in found:
        own = found["decoder"].stage.side
        ups = [name for name in ups if found[name].stage.low == own]
    chosen = [name for name in ("prior", "decoder", *ups[:1]) if name in found]
    parts: dict[str, Part] = {}
    notes: list[str] = []
    problems: list[str] = []
    for name in chosen:
        stage = found[name].stage
        try:
            parts |= _PARTS[stage.kind](found[name])
        except ConfigError as error:
            problems.append(str(error))
        notes += _forgotten(stage)
    clip = FrozenCLIP.load(str(root / "clip")) if "clip" in names else None
    text, vision = None, None
    try:
        if clip is not None:
            text, vision = to_transformers(clip)
    except ConfigError as error:
        problems.append(str(error))
    if not chosen and clip is None:
        problems.append(f"it has no place for {', '.join(found) or 'an empty folder'}")
    if problems:
        raise ConfigError(f"{root} can't be written in Karlo's layout: {'; '.join(problems)}")
    left_out = [name for name in found if name not in chosen]
    notes += [f"{name} is left out: Karlo's layout has no place for it" for name in left_out]

    out.mkdir(parents=True, exist_ok=True)
    for part, (config, read) in parts.items():
        _write_part(out / part, layout.CLASSES[part][1], config, read and read(), dtype)
    written = list(parts)
    if clip is not None and text is not None:
        tower = TensorFile(root / "clip" / layout.TOWER_WEIGHTS)
        written += _write_encoder(out, clip, text, vision, dtype or _precision(tower))
    _write_index(out, written, notes)
    return notes


def _prior(stored: StoredStage) -> dict[str, Part]:
    config = stored.stage.config
    read = partial(to_diffusers, prior_names(config), stored.tensors)
    return {
        layout.PRIOR: (to_prior(config), read),
        layout.PRIOR_STEPS: (_steps(stored.stage), None),
    }


def _decoder(stored: StoredStage) -> dict[str, Part]:
    config = stored.stage.config
    unet, text_proj = to_decoder(config)
    tensors = stored.tensors
    return {
        layout.DECODER: (unet, partial(to_diffusers, unet_names(config.unet), tensors)),
        layout.TEXT_PROJ: (text_proj, partial(to_diffusers, text_proj_names(config), tensors)),
        layout.DECODER_STEPS: (_steps(stored.stage), None),
    }


def _upsampler(stored: StoredStage) -> dict[str, Part]:
    config = stored.stage.config
    theirs, names = to_upsampler(config), unet_names(config.unet)
    return {
        layout.FIRST: (theirs, partial(to_diffusers, names, stored.tensors)),
        layout.LAST: (theirs, partial(to_diffusers, names, stored.final or stored.tensors)),
        layout.UPSAMPLER_STEPS: (_steps(stored.stage), None),
    }


_PARTS = {"prior": _prior, "decoder": _decoder, "upsampler": _upsampler}


def _steps(stage: Stage) -> dict[str, Any]:
    return to_scheduler(stage.name, stage.diffusion.config, stage.sampling.clip)


def _forgotten(stage: Stage) -> Iterator[str]:
    """What a stage's sampling says that Karlo's layout has no file for."""
    ours, karlo = stage.sampling.model_dump(), SamplingConfig(**SAMPLING[stage.kind]).model_dump()
    lost = [key for key in ours if key != "clip" and ours[key] != karlo[key]]
    said = ", ".join(f"{key} {ours[key]}" for key in lost)
    if said:
        yield f"{stage.name} is to be sampled with {said}: Karlo's layout does not hold that"
    if stage.diffusion.power:
        yield f"{stage.name} has statistics for the sampler 'analytic': Karlo's layout has not"


def _write_part(
    folder: Path,
    kind: str,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor] | None,
    dtype: torch.dtype | None,
) -> None:
    folder.mkdir(exist_ok=True)
    head = {"_class_name": kind, "_diffusers_version": diffusers.__version__}
    name = layout.SCHEDULER if tensors is None else CONFIG
    write_json(folder / name, head | config)
    if tensors is not None:
        write_tensors(folder / layout.WEIGHTS, tensors, dtype)


def _write_encoder(
    out: Path, clip: FrozenCLIP, text: Any, vision: Any, dtype: torch.dtype
) -> list[str]:
    text.to(dtype).save_pretrained(out / layout.TEXT_ENCODER)
    write_tokenizer(out / layout.TOKENIZER, clip.context)
    if vision is None:
        return [layout.TEXT_ENCODER, layout.TOKENIZER]
    vision.to(dtype).save_pretrained(out / layout.IMAGE_ENCODER)
    write_processor(out / layout.PROCESSING, clip.preprocess)
    return [layout.TEXT_ENCODER, layout.TOKENIZER, layout.IMAGE_ENCODER, layout.PROCESSING]


def _write_index(out: Path, parts: list[str], notes: list[str]) -> None:
    variations = layout.PRIOR not in parts and layout.IMAGE_ENCODER in parts
    pipeline = "UnCLIPImageVariationPipeline" if variations else "UnCLIPPipeline"
    beside = {layout.IMAGE_ENCODER, layout.PROCESSING}
    if not variations and beside <= set(parts):
        notes.append(f"{pipeline} has no image tower: {' and '.join(sorted(beside))} lie beside it")
        parts = [part for part in parts if part not in beside]
    entries = {part: list(layout.CLASSES[part]) for part in sorted(parts)}
    head = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    write_json(out / PIPELINE, head | entries)


def _precision(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Of stored weights, all of one kind."""
    return next(x.dtype for x in tensors.values() if x.is_floating_point())
