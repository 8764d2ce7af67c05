"""Configurations of a whole stack for somebody's own pictures, made from the shipped ones."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Literal, NamedTuple

from unclip.config import read_yaml
from unclip.data.open import open_dataset
from unclip.errors import CheckpointError, ConfigError, UnclipWarning
from unclip.files.disk import check_writable
from unclip.shipped import configurations
from unclip.sources import Source
from unclip.stages.kinds import KINDS
from unclip.training.plan import GB, plan
from unclip.training.trainers import TRAINERS, trained_by

Machine = Literal["cpu", "gpu24", "gpus8"]
STACK = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")
# How a trained stage goes on with few pictures: short, and seen soon.
FURTHER = {"warmup": 50, "ema": 0.99, "save_every": 100, "sample_every": 50}
FURTHER_STEPS = {"prior": 300, "decoder": 1000}
FEW = 2_000  # pictures, with which a stack of its own comes to little
SLOWER = 0.25  # than the learning rate of a training from nothing
COMMENTS = {
    "name": "What error messages call this encoder.",
    "clip": "The frozen encoder, the same for prior and decoder: a run, a folder, or NAME/TAG of "
    "open_clip.",
    "data": "Pictures with captions. fit: pad puts whole drawings on white, crop cuts squares out "
    "of photographs.",
    "model": "The network.",
    "vocabulary": "Words: those of the captions (data), or all that CLIP knows (full).",
    "restore": "A head that draws small pictures from embeddings: what it needs, a decoder needs.",
    "augment": "How pictures are moved at random, so that few go further.",
    "diffusion": "How noise is added, and what the network predicts of it.",
    "sampling": "How pictures are drawn, in samples/ and later, where nobody says otherwise.",
    "draws": "Noise and timesteps for each pair at every step: the caption is read once for all.",
    "jitter": "How far embeddings are moved off the data at most, as a prior's are.",
    "prior": "A trained prior: the decoder learns what the embeddings mean that it draws.",
    "perceptual": "What the encoder sees of a guess counts beside its pixels.",
    "adversary": "A critic that what the decoder draws by itself has to pass.",
    "drop": "Shares of the samples that train without a condition: guidance needs them.",
    "degradation": "What is done to small pictures, so that flawed ones can be enlarged too.",
    "train": "steps x batch pictures are seen; stopped at any step, the same command goes on.",
}


@dataclass(frozen=True)
class _Target:
    """A machine: the shipped configurations to begin with, how many GPUs it has, how fast each is
    (in TFLOP/s that are reached), and how training is started there."""

    configs: str
    gpus: int
    speed: float
    words: str
    command: str


TARGETS: dict[Machine, _Target] = {
    "cpu": _Target("emoji", 1, 0.1, "on two CPU cores", "unclip train"),
    "gpu24": _Target("gpu24", 1, 60.0, "on a GPU of 24 GB", "unclip train"),
    "gpus8": _Target(
        "gpu24", 8, 120.0, "on eight GPUs", "accelerate launch --multi_gpu -m unclip.train"
    ),
}


class Written(NamedTuple):
    """A configuration, the command that trains it, and how long that takes, where it is known."""

    file: Path
    command: str
    time: str


def new(folder: Path, data: str, machine: Machine, start: str | None = None) -> Iterator[Written]:
    """Write a configuration for each stage into `folder`, where their runs will lie too, in order;
    with `start` one for each that can go on from that model's.

    **Raises**: `DataError` if the pictures can't be used, `ConfigError` if something is there,
    `CheckpointError` if there is nothing to start from.
    """
    check_writable(folder, "folder")
    pictures = len(open_dataset(data, 64))
    if start is None and pictures < FEW:
        warnings.warn(
            f"{pictures} pictures are few to learn drawing from: --from weights/emoji, or another "
            "model, goes on from one that can",
            UnclipWarning,
            stacklevel=2,
        )
    target, shipped = TARGETS[machine], configurations()
    stages = STACK if start is None else _further(start)
    sources = {folder / f"{name}.yaml": shipped.get(f"{target.configs}/{name}") for name in stages}
    for file in sources:
        if file.exists():
            raise ConfigError(f"{file} is there already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    encoder = read_yaml(source) if (source := sources.get(folder / "clip.yaml")) else None
    for file, source in sources.items():
        if source is not None:  # a GPU's stack has a public CLIP
            text = _body(source.read_text(encoding="utf-8"))
            if start is not None:
                text = _going_on(read_yaml(source), start, file.stem)
            changes: dict[str, Any] = {"data.train": data, "data.val": None}
            changes["train.out"] = str(file.with_suffix(""))
            changes |= {"train.accumulate": 1} if target.gpus > 1 else {}
            changes |= _of_own_encoder(file, encoder, pictures) if encoder else {}
            for key, value in changes.items():
                text = changed(text, key, value)
            text = _commented(text)
            file.write_text(text, encoding="utf-8")
            name = trained_by(file)
            command = f"{target.command} {name.replace('_', '-')} {quote(str(file))}"
            begun = "" if start is None else f" and {start}"
            head, time = _head(file, name, command, target, f"{pictures:,} pictures{begun}")
            file.write_text(f"{head}\n{text}", encoding="utf-8")
            yield Written(file, command, time)


def assembling(folder: Path, written: list[Written], start: str | None = None) -> str:
    """The command that puts the runs, and what `start` has besides, into one model."""
    parts = [(one.file.stem.partition("_")[0], str(one.file.with_suffix(""))) for one in written]
    if start is not None:
        there = [stage.stage.kind for stage in Source(start).stages.values()]
        have = {part for part, _ in parts}
        parts.insert(0, ("clip", start))
        parts += [(kind, start) for kind in dict.fromkeys(there) if kind not in have]
    options = " ".join(f"--{part.replace('_', '-')} {quote(place)}" for part, place in parts)
    return f"unclip assemble {options} --out {quote(str(folder / 'model'))}"


def _further(start: str) -> tuple[str, ...]:
    """The stages of a model that learn something of a few pictures; its upsamplers enlarge any."""
    source = Source(start)
    if source.published is not None:
        raise ConfigError(f"{start} is not a folder of ours: take configs/karlo, or convert it")
    found = tuple(name for name in FURTHER_STEPS if name in source.stages)
    if not found or not source.has_clip:
        raise CheckpointError(f"{start} has no encoder with a prior or a decoder to go on from")
    return found


def _going_on(shipped: dict[str, Any], start: str, name: str) -> str:
    """A configuration as a trained stage's own: its network, its process, its sampling."""
    stage = Source(start).stages[name].stage
    own = {"model": stage.config, "diffusion": stage.diffusion.config, "sampling": stage.sampling}
    changes: dict[str, Any] = {
        key: json.loads(one.model_dump_json(exclude_defaults=True)) for key, one in own.items()
    }
    train = shipped["train"] | FURTHER | {"init": start, "steps": FURTHER_STEPS[name]}
    train["lr"] = SLOWER * train["lr"]
    return "".join(_written(shipped | changes | {"clip": start, "train": train}))


def _written(data: dict[str, Any], indent: str = "") -> Iterator[str]:
    """A configuration's lines: a section under its name, all else as JSON, which YAML contains."""
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:\n"
            yield from _written(value, indent + "  ")
        else:
            yield f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}\n"


def _of_own_encoder(file: Path, encoder: dict[str, Any], pictures: int) -> dict[str, Any]:
    """What differs in a stack whose CLIP is trained first: its widths, and where runs begin."""
    folder, clip, words = file.parent, encoder["model"], encoder["model"]["text_cfg"]
    told: dict[str, Any] = {"clip": str(folder / "clip"), "model.embed": clip["embed_dim"]}
    told["model.text_width"] = words["width"]
    return {
        "clip": {
            "name": folder.name,
            "teacher": None,  # knows what emoji mean, and is a package of its own
            "train.batch": min(encoder["train"]["batch"], pictures),
        },
        "prior": {**told, "model.context": words["context_length"]},
        "decoder": told,
        "upsampler_1024": {"train.init": str(folder / "upsampler_256")},  # the same network
    }.get(file.stem, {})


def changed(text: str, key: str, value: object) -> str:
    """A YAML text with one key set, or without it (None); everything else stays as it is written.

    `key` is a key of the top, or one of a section's.
    """
    section, _, name = key.rpartition(".")
    start = re.search(rf"^{section}:\n", text, re.MULTILINE) if section else None
    if section and start is None:
        return text
    begin = start.end() if start else 0
    inner = re.match(r"(?: .*\n)*", text[begin:]) if start else None
    end = begin + inner.end() if inner else len(text)
    indent = "  " if section else ""
    line = "" if value is None else f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}\n"
    body, found = re.subn(
        rf"^{indent}{name}:.*\n(?:{indent} .*\n)*", lambda _: line, text[begin:end], flags=re.M
    )
    return text[:begin] + (body if found or not line else body + line) + text[end:]


def _body(text: str) -> str:
    """What follows the comments at the head."""
    return re.sub(r"\A(#.*\n)*", "", text)


def _commented(text: str) -> str:
    """Each section behind a comment that says what it is for."""
    return re.sub(
        r"^(\w+):",
        lambda key: f"# {COMMENTS[key[1]]}\n{key[0]}" if key[1] in COMMENTS else key[0],
        text,
        flags=re.MULTILINE,
    )


def _head(file: Path, name: str, command: str, target: _Target, source: str) -> tuple[str, str]:
    """What a configuration says of itself: what it trains, how, and what that takes; the time."""
    lines = [f"{TRAINERS[name].says[:-1]}, {target.words}, from {source}."]
    lines.append(f"Command:  {command}")
    took = ""
    if name in KINDS:
        needs = plan(file, [], target.gpus)
        hours = 24 * needs.days(target.gpus, target.speed * 1e12, 1.0)
        took = f"about {_span(hours)}"
        lines += [
            f"Memory:   {needs.total / GB:,.1f} GB: {needs.parameters / 1e6:,.1f} M parameters, "
            f"gradients, moments and averages {needs.fixed / GB:,.1f},",
            f"          a micro-batch of {needs.micro_batch} {needs.step / GB:,.1f}"
            + "; the frozen CLIP comes on top" * (name != "upsampler"),
            f"Time:     {needs.pictures:,} pictures of {needs.flops / 1e9:,.1f} GFLOP: "
            f"{took} at {target.speed:g} TFLOP/s",
        ]
    lines.append(f"Result:   samples/ in {file.with_suffix('')} shows how far it is")
    return "".join(f"# {line}\n" for line in lines), took


def _span(hours: float) -> str:
    """In the unit that says it best."""
    if hours > 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:,.1f} hours" if hours > 1 else f"{max(1, round(60 * hours))} minutes"
