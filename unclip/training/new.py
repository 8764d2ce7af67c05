"""Configurations of a whole stack for somebody's own pictures, made from the shipped ones."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unclip.config import read_yaml
from unclip.data.open import open_dataset
from unclip.errors import ConfigError
from unclip.files.disk import check_writable
from unclip.shipped import configurations
from unclip.stages.kinds import KINDS
from unclip.training.plan import GB, plan
from unclip.training.trainers import TRAINERS, trained_by

Machine = Literal["cpu", "gpu24", "gpus8"]
STACK = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")
COMMENTS = {
    "name": "What error messages call this encoder.",
    "clip": "The frozen encoder, the same for prior and decoder: a run, a folder, or NAME/TAG of "
    "open_clip.",
    "data": "Pictures with captions. fit: pad puts whole drawings on white, crop cuts squares out "
    "of photographs.",
    "model": "The network.",
    "vocabulary": "Words: those of the captions (data), or all that CLIP knows (full).",
    "augment": "How pictures are moved at random, so that few go further.",
    "diffusion": "How noise is added, and what the network predicts of it.",
    "sampling": "How pictures are drawn, in samples/ and later, where nobody says otherwise.",
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


def new(folder: Path, data: str, machine: Machine) -> dict[Path, str]:
    """Write a configuration for each stage into `folder`, where their runs will lie too; each with
    the command that trains it, in order.

    **Raises**: `DataError` if the pictures can't be used, `ConfigError` if something is there.
    """
    check_writable(folder, "folder")
    pictures = len(open_dataset(data, 64))
    target, shipped = TARGETS[machine], configurations()
    sources = {folder / f"{name}.yaml": shipped.get(f"{target.configs}/{name}") for name in STACK}
    commands = {}
    for file in sources:
        if file.exists():
            raise ConfigError(f"{file} is there already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    encoder = read_yaml(source) if (source := sources[folder / "clip.yaml"]) else None
    for file, source in sources.items():
        if source is not None:  # a GPU's stack has a public CLIP
            text = _body(source.read_text(encoding="utf-8"))
            changes: dict[str, Any] = {"data.train": data, "data.val": None}
            changes["train.out"] = str(file.with_suffix(""))
            changes |= {"train.accumulate": 1} if target.gpus > 1 else {}
            changes |= _of_own_encoder(file, encoder, pictures) if encoder else {}
            for key, value in changes.items():
                text = changed(text, key, value)
            text = _commented(text)
            file.write_text(text, encoding="utf-8")
            name = trained_by(file)
            commands[file] = f"{target.command} {name.replace('_', '-')} {file}"
            head = _head(file, name, commands[file], target, pictures)
            file.write_text(f"{head}\n{text}", encoding="utf-8")
    return commands


def _of_own_encoder(file: Path, encoder: dict[str, Any], pictures: int) -> dict[str, Any]:
    """What differs in a stack whose CLIP is trained first: its widths, and where runs begin."""
    folder, clip, words = file.parent, encoder["model"], encoder["model"]["text_cfg"]
    told: dict[str, Any] = {"clip": str(folder / "clip"), "model.embed": clip["embed_dim"]}
    told["model.text_width"] = words["width"]
    return {
        "clip": {"name": folder.name, "train.batch": min(encoder["train"]["batch"], pictures)},
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
        rf"^{indent}{name}:.*\n", lambda _: line, text[begin:end], flags=re.MULTILINE
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


def _head(file: Path, name: str, command: str, target: _Target, pictures: int) -> str:
    """What a configuration says of itself: what it trains, how, and what that takes."""
    lines = [f"{TRAINERS[name].says[:-1]}, {target.words}, from {pictures:,} pictures."]
    lines.append(f"Command:  {command}")
    if name in KINDS:
        needs = plan(file, [], target.gpus)
        hours = 24 * needs.days(target.gpus, target.speed * 1e12, 1.0)
        took = f"{hours / 24:,.1f} days" if hours > 48 else f"{hours:,.1f} hours"
        lines += [
            f"Memory:   {needs.total / GB:,.1f} GB: {needs.parameters / 1e6:,.1f} M parameters, "
            f"gradients, moments and averages {needs.fixed / GB:,.1f},",
            f"          a micro-batch of {needs.micro_batch} {needs.step / GB:,.1f}"
            + "; the frozen CLIP comes on top" * (name != "upsampler"),
            f"Time:     {needs.pictures:,} pictures of {needs.flops / 1e9:,.1f} GFLOP: about "
            f"{took} at {target.speed:g} TFLOP/s",
        ]
    lines.append(f"Result:   samples/ in {file.with_suffix('')} shows how far it is")
    return "".join(f"# {line}\n" for line in lines)
