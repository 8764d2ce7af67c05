"""Nodes for ComfyUI: text to image, variation and upscaling with an unclip model.

Copy or link this folder into ComfyUI's `custom_nodes/` and install `unclip` into its environment.
A picture is ComfyUI's IMAGE: (B, H, W, 3) float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

CATEGORY = "unclip"
SEED = ("INT", {"default": 0, "min": 0, "max": 2**63 - 1})
COUNT = ("INT", {"default": 1, "min": 1, "max": 64})
SIZE = ("INT", {"default": 0, "min": 0, "max": 4096, "tooltip": "Side in pixels; 0: the largest."})


def to_comfy(images: Sequence[Image]) -> Tensor:
    """**Shapes**: B pictures of one size → (B, H, W, 3) in [0, 1]."""
    from unclip.images import to_tensor

    x = torch.stack([to_tensor(image) for image in images])  # (B, 3, H, W) in [-1, 1]
    return ((x + 1) / 2).movedim(1, -1).contiguous()


def from_comfy(images: Tensor) -> list[Image]:
    """**Shapes**: (B, H, W, 3) in [0, 1] → B pictures."""
    from unclip.images import to_pil

    return [to_pil(x) for x in images.movedim(-1, 1) * 2 - 1]


class Load:
    """A model folder, a run or a hub id, ready to draw."""

    CATEGORY: ClassVar[str] = CATEGORY
    FUNCTION: ClassVar[str] = "load"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("UNCLIP",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node asks for."""
        return {
            "required": {
                "model": ("STRING", {"default": "", "tooltip": "Empty: the shipped weights."}),
                "dtype": (["fp32", "fp16", "bf16"],),
            }
        }

    def load(self, model: str, dtype: str) -> tuple[Any]:
        """**Raises**: `CheckpointError` naming what is missing."""
        from unclip import UnCLIP
        from unclip.cli.shell import default_model, to_device, to_dtype

        return (
            UnCLIP.from_pretrained(model or default_model(), to_device("auto"), to_dtype(dtype)),
        )


class TextToImage:
    """Pictures of a prompt."""

    CATEGORY: ClassVar[str] = CATEGORY
    FUNCTION: ClassVar[str] = "draw"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node asks for."""
        prompt = ("STRING", {"multiline": True})
        asked = {"model": ("UNCLIP",), "prompt": prompt, "n": COUNT, "seed": SEED, "size": SIZE}
        return {"required": asked}

    def draw(self, model: Any, prompt: str, n: int, seed: int, size: int) -> tuple[Tensor]:
        """**Shapes**: → (n, size, size, 3)."""
        return (to_comfy(model.text_to_image(prompt, n=n, seed=seed, size=size or None)),)


class Variations:
    """Other pictures with the same CLIP embedding, n of each."""

    CATEGORY: ClassVar[str] = CATEGORY
    FUNCTION: ClassVar[str] = "draw"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node asks for."""
        asked = {"model": ("UNCLIP",), "image": ("IMAGE",), "n": COUNT, "seed": SEED, "size": SIZE}
        return {"required": asked}

    def draw(self, model: Any, image: Tensor, n: int, seed: int, size: int) -> tuple[Tensor]:
        """**Shapes**: (B, H, W, 3) → (B n, size, size, 3)."""
        z_image = model.encode_image(from_comfy(image))
        drawn = model.image_from_embedding(z_image, n=n, seed=seed, size=size or None)
        return (to_comfy(drawn),)


class Upscale:
    """A picture through the upsamplers."""

    CATEGORY: ClassVar[str] = CATEGORY
    FUNCTION: ClassVar[str] = "draw"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node asks for."""
        asked = {"model": ("UNCLIP",), "image": ("IMAGE",), "seed": SEED, "size": SIZE}
        return {"required": asked}

    def draw(self, model: Any, image: Tensor, seed: int, size: int) -> tuple[Tensor]:
        """**Shapes**: (B, H, W, 3) → (B, size, size, 3)."""
        pictures = from_comfy(image)
        larger = [
            model.upscale(x, seed=seed + k, size=size or None) for k, x in enumerate(pictures)
        ]
        return (to_comfy(larger),)


NODE_CLASS_MAPPINGS = {
    "UnclipLoad": Load,
    "UnclipTextToImage": TextToImage,
    "UnclipVariations": Variations,
    "UnclipUpscale": Upscale,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "UnclipLoad": "unCLIP: load a model",
    "UnclipTextToImage": "unCLIP: text to image",
    "UnclipVariations": "unCLIP: variations",
    "UnclipUpscale": "unCLIP: upscale",
}
