"""How each CLIP encoder wants its pictures: size, crop, resampling, mean and deviation.

B batch, H and W of the picture, R the tower's picture side.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.config import Config
from unclip.errors import CheckpointError, ConfigError


class PreprocessConfig(Config):
    """How a picture is brought to the tower's size and range, in open_clip's words.

    `resampler`: who shrinks 8-bit pictures; the two differ by a rounding, so it tells no encoder
    from another.
    """

    size: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    resampler: Literal["pillow", "torchvision"] = "pillow"

    def describe(self) -> str:
        """One line for fingerprints; equal lines mean equal preprocessing."""
        numbers = " ".join(f"{value:.4f}" for value in [*self.mean, *self.std])
        return f"{self.resize_mode} {self.size} {self.interpolation} {numbers}"


def transformers_preprocess(data: dict[str, Any], image_size: int) -> PreprocessConfig:
    """A `preprocessor_config.json` in our words; what it leaves out is CLIP's own."""
    size = data.get("size", image_size)
    squash = isinstance(size, dict) and "height" in size
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    if size != image_size:
        raise CheckpointError(
            f"the preprocessing makes pictures of {size} px, the tower reads {image_size} px"
        )
    names = {"mean": "image_mean", "std": "image_std"}
    kept = {ours: data[theirs] for ours, theirs in names.items() if theirs in data}
    return PreprocessConfig(
        size=size,
        interpolation="bilinear" if data.get("resample", 3) == 2 else "bicubic",
        resize_mode="squash" if squash else "shortest",
        resampler="torchvision",  # as transformers itself does since version 5
        **kept,
    )


def _target(height: int, width: int, config: PreprocessConfig) -> tuple[int, int]:
    if config.resize_mode == "squash":
        return config.size, config.size
    if config.resize_mode != "shortest":
        raise ConfigError(f"resize_mode = {config.resize_mode!r}: expected shortest or squash")
    short = min(height, width)
    return int(config.size * height / short), int(config.size * width / short)


def resize_and_crop(x: Tensor, config: PreprocessConfig) -> Tensor:
    """Resize and crop the centre. **Shapes**: (B, 3, H, W) → (B, 3, R, R)."""
    height, width = _target(x.shape[-2], x.shape[-1], config)
    if x.shape[-2:] != (height, width):
        mode = config.interpolation
        x = F.interpolate(x, (height, width), mode=mode, antialias=True, align_corners=False)
    top, left = round((height - config.size) / 2), round((width - config.size) / 2)
    return x[..., top : top + config.size, left : left + config.size]


def resize_pil(image: Image.Image, config: PreprocessConfig) -> Image.Image:
    """Resize an RGB picture as the encoder's own preprocessing does; the crop comes later."""
    height, width = _target(image.height, image.width, config)
    if config.resampler == "torchvision":
        from torchvision.transforms.v2 import InterpolationMode, functional

        pixels = functional.pil_to_tensor(image)  # (3, H, W) uint8
        mode = InterpolationMode(config.interpolation)
        return functional.to_pil_image(functional.resize(pixels, [height, width], mode))
    return image.resize((width, height), Image.Resampling[config.interpolation.upper()])
