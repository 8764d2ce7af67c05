"""The folders in which diffusers keeps an unCLIP pipeline: Karlo's, and Kandinsky's priors.

    model_index.json                        which parts there are
    text_encoder/ tokenizer/                CLIP's text tower
    image_encoder/ feature_extractor/       its image tower, where present
    prior/ prior_scheduler/
    decoder/ text_proj/ decoder_scheduler/
    super_res_first/ super_res_last/ super_res_scheduler/

Kandinsky's priors call two of them `scheduler` and `image_processor`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.errors import CheckpointError
from unclip.files.disk import read_json
from unclip.files.folder import CONFIG
from unclip.files.tensors import Shards, TensorFile

PIPELINE = "model_index.json"  # of diffusers' folders, Karlo's among them

WEIGHTS = "diffusion_pytorch_model.safetensors"
TOWER_WEIGHTS = "model.safetensors"  # of the parts that are transformers' own
SCHEDULER = "scheduler_config.json"
PROCESSOR = "preprocessor_config.json"
PICKLES = {WEIGHTS: "diffusion_pytorch_model.bin", TOWER_WEIGHTS: "pytorch_model.bin"}

PRIOR, DECODER, TEXT_PROJ = "prior", "decoder", "text_proj"
FIRST, LAST = "super_res_first", "super_res_last"
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
IMAGE_ENCODER, PROCESSING = "image_encoder", "feature_extractor"
PRIOR_STEPS, DECODER_STEPS = "prior_scheduler", "decoder_scheduler"
UPSAMPLER_STEPS = "super_res_scheduler"

# What each part is; the first is the library's name as the published index has it.
CLASSES = {
    TEXT_ENCODER: ("transformers", "CLIPTextModelWithProjection"),
    TOKENIZER: ("transformers", "CLIPTokenizer"),
    IMAGE_ENCODER: ("transformers", "CLIPVisionModelWithProjection"),
    PROCESSING: ("transformers", "CLIPImageProcessor"),
    PRIOR: ("diffusers", "PriorTransformer"),
    PRIOR_STEPS: ("diffusers", "UnCLIPScheduler"),
    DECODER: ("diffusers", "UNet2DConditionModel"),
    TEXT_PROJ: ("unclip", "UnCLIPTextProjModel"),
    DECODER_STEPS: ("diffusers", "UnCLIPScheduler"),
    FIRST: ("diffusers", "UNet2DModel"),
    LAST: ("diffusers", "UNet2DModel"),
    UPSAMPLER_STEPS: ("diffusers", "UnCLIPScheduler"),
}
NO_VARIANTS = "{} has no variants: only folders in diffusers' layout have"
ALIASES = {"scheduler": PRIOR_STEPS, "image_processor": PROCESSING}
PIPELINES = (
    "UnCLIPPipeline, UnCLIPImageVariationPipeline (Karlo), KandinskyPriorPipeline, "
    "KandinskyV22PriorPipeline"
)


class Folder:
    """A folder in this layout; opening it reads the index and nothing else.

    `variant` names the copy of the weights that is read, such as fp16, where there are several.

    An image tower may lie beside the parts that the index names: text-to-image pipelines have no
    place for one.

    **Raises**: `CheckpointError` if a part that the index names is missing, or not ours to read.
    """

    def __init__(self, root: Path, *, variant: str | None = None, allow_pickle: bool = False):
        self.root, self.variant, self.allow_pickle = root, variant, allow_pickle
        index = read_json(root / PIPELINE)
        named = {
            name: entry[1]
            for name, entry in index.items()
            if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
        }
        unknown = [name for name in named if ALIASES.get(name, name) not in CLASSES]
        if unknown or not named:
            what = f"its part {unknown[0]!r} is a {named[unknown[0]]}" if unknown else "no parts"
            raise CheckpointError(
                f"{root / PIPELINE} describes a {index.get('_class_name')}, which is not "
                f"supported ({what}); supported: {PIPELINES}"
            )
        for name in named:
            if not (root / name).is_dir():
                raise CheckpointError(
                    f"{root / PIPELINE} names {name!r}, but there is no such folder"
                )
        beside = [name for name in (IMAGE_ENCODER, PROCESSING) if (root / name).is_dir()]
        self.parts = {ALIASES.get(name, name): root / name for name in [*named, *beside]}

    def has(self, *names: str) -> bool:
        """Whether all these parts are there. **Raises**: `CheckpointError` if only some are."""
        found = [name for name in names if name in self.parts]
        if found and len(found) < len(names):
            lacking = ", ".join(name for name in names if name not in found)
            raise CheckpointError(f"{self.root} has {', '.join(found)} but lacks {lacking}")
        return bool(found)

    def config(self, part: str, name: str = CONFIG) -> tuple[dict[str, Any], str]:
        """A part's configuration and what to call it in errors."""
        path = self.parts[part] / name
        return read_json(path), str(path)

    def weights(self, part: str) -> list[Path]:
        """The safetensors files that `tensors` reads: one, or its shards; none where it has none.

        **Raises**: `CheckpointError` if the index of the shards is damaged.
        """
        folder, name = self.parts[part], _weights_name(part)
        if (whole := folder / self._varied(name)).is_file():
            return [whole]
        index = folder / self._varied(f"{name}.index.json")
        if not index.is_file():
            return []
        named = read_json(index).get("weight_map")
        shards = set(named.values()) if isinstance(named, dict) else set()
        if not shards or any(Path(str(shard)).name != shard for shard in shards):
            raise CheckpointError(f"{index} does not say which files beside it hold the weights")
        return [folder / shard for shard in sorted(shards)]

    def tensors(self, part: str) -> Mapping[str, Tensor]:
        """A part's weights, not read yet but for the header.

        **Raises**: `CheckpointError` if they are missing, damaged, or a pickle; it says what lies
        there instead.
        """
        folder, name = self.parts[part], _weights_name(part)
        if files := self.weights(part):
            return TensorFile(files[0]) if len(files) == 1 else Shards(files)
        pickled = folder / self._varied(PICKLES[name])
        if not pickled.is_file():
            said = _instead(folder, name)
            if not said and not self.allow_pickle:
                said = (
                    f"; from the hub, {pickled.name}, a pickle, is not downloaded: if you trust "
                    "it, convert it once: python sample.py convert OWNER/NAME OUT --allow-pickle"
                )
            raise CheckpointError(f"no weights at {folder / self._varied(name)}{said}")
        if not self.allow_pickle:
            raise CheckpointError(
                f"{folder} has only {pickled.name}, a pickle, which could run any code when "
                "it is loaded; if you trust it, convert it once: "
                "python sample.py convert FOLDER OUT --allow-pickle"
            )
        try:
            # Only tensors are unpickled; anything else is refused.
            return dict(torch.load(pickled, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:  # whatever a damaged pickle provokes
            raise CheckpointError(f"{pickled} can't be used: {error}") from None

    def _varied(self, name: str) -> str:
        """A file's name in the variant that is read: `model.fp16.safetensors`."""
        if self.variant is None:
            return name
        stem, suffix = name.rsplit(".", 1)
        return f"{stem}.{self.variant}.{suffix}"


def _instead(folder: Path, name: str) -> str:
    """What weights there are in place of a file of this name, and how to ask for them."""
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    match = [re.match(rf"{name.split('.')[0]}\.(\w+)[.-]", file) for file in there]
    variants = sorted({found[1] for found in match if found})
    ask = f"; --variant {' or '.join(variants)} reads those" if variants else ""
    return f", but {', '.join(there)}{ask}" if there else ""


def _weights_name(part: str) -> str:
    return TOWER_WEIGHTS if CLASSES[part][0] == "transformers" else WEIGHTS
