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

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.errors import CheckpointError
from unclip.files.disk import read_json
from unclip.files.folder import CONFIG
from unclip.files.tensors import TensorFile

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
ALIASES = {"scheduler": PRIOR_STEPS, "image_processor": PROCESSING}
PIPELINES = (
    "UnCLIPPipeline, UnCLIPImageVariationPipeline (Karlo), KandinskyPriorPipeline, "
    "KandinskyV22PriorPipeline"
)


class Folder:
    """A folder in this layout; opening it reads the index and nothing else.

    An image tower may lie beside the parts that the index names: text-to-image pipelines have no
    place for one.

    **Raises**: `CheckpointError` if a part that the index names is missing, or not ours to read.
    """

    def __init__(self, root: Path, *, allow_pickle: bool = False):
        self.root, self.allow_pickle = root, allow_pickle
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
        """The safetensors files of a part."""
        return sorted(self.parts[part].glob("*.safetensors"))

    def tensors(self, part: str, name: str = WEIGHTS) -> Mapping[str, Tensor]:
        """A part's weights, not read yet but for the header.

        **Raises**: `CheckpointError` if they are missing, damaged, or a pickle.
        """
        path = self.parts[part] / name
        pickled = path.with_name(PICKLES[name])
        if path.is_file() or not pickled.is_file():
            return TensorFile(path)
        if not self.allow_pickle:
            raise CheckpointError(
                f"{path.parent} has only {pickled.name}, a pickle, which could run any code when "
                "it is loaded; if you trust it, convert it once: "
                "python sample.py convert FOLDER OUT --allow-pickle"
            )
        try:
            # Only tensors are unpickled; anything else is refused.
            return dict(torch.load(pickled, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:  # whatever a damaged pickle provokes
            raise CheckpointError(f"{pickled} can't be used: {error}") from None
