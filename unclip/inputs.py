"""What callers may hand in, and what it means: prompts, seeds, pictures, embeddings.

B pictures, D CLIP embedding, H and W a picture's sides.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.errors import ConfigError, DataError
from unclip.images import load_image, to_rgb
from unclip.text import whole

# A picture: Pillow's, the path of one, or its pixels (H, W), (H, W, 3) or (H, W, 4) in uint8.
Picture = Image.Image | str | Path | np.ndarray

SEEDS = 2**48  # what a seed is drawn from where none is given


def as_prompts(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several, with halves of characters replaced.

    **Raises**: `ConfigError` if there is none, or something is no text.
    """
    several = [prompts] if isinstance(prompts, str) else _list(prompts, "prompts")
    if not several:
        raise ConfigError("no prompts; for a picture of nothing in particular the prompt is ''")
    for prompt in several:
        if not isinstance(prompt, str):
            raise ConfigError(f"a prompt must be text, not {type(prompt).__name__}")
    return [whole(prompt) for prompt in several]


def as_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """`seed`, `seed + 1`, …, one for each picture; None draws the first. Or each picture's own.

    **Raises**: `ConfigError` for what is no whole number, or too large a one.
    """
    if seed is None:
        return as_seeds(secrets.randbelow(SEEDS), count)
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != count:
            raise ConfigError(f"{len(seed)} seeds for {count} pictures")
        return [as_seeds(one, 1)[0] for one in seed]
    first = as_number("seed", seed)
    if not -(2**63) <= first <= 2**63 - count:
        raise ConfigError(
            f"seed = {first}: seeds go to 2^63 - 1, and {count} pictures need one each"
        )
    return list(range(first, first + count))


def as_number(name: str, value: Any, least: int | None = None) -> int:
    """A whole number, numpy's too. **Raises**: `ConfigError` if it is something else, or less."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} = {value!r}: must be a whole number") from None
    if least is not None and number < least:
        raise ConfigError(f"{name} = {number}: must be at least {least}")
    return number


def as_device(device: torch.device | str) -> torch.device:
    """A device that holds numbers. **Raises**: `ConfigError` if it can't be used here."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # `meta` holds none
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device = {str(device)!r} can't be used here: {reason}") from None
    return found


def as_pictures(pictures: Picture | Sequence[Picture]) -> list[Image.Image]:
    """One picture or several, in RGB.

    **Shapes**: an array (B, H, W, 3) is B pictures. **Raises**: `ConfigError` for something else,
    `DataError` for a file that can't be read.
    """
    single = isinstance(pictures, Image.Image | str | Path)
    single |= isinstance(pictures, np.ndarray) and pictures.ndim < 4
    several = [pictures] if single else _list(pictures, "pictures")
    if not several:
        raise ConfigError("no pictures")
    return [_picture(picture) for picture in several]


def as_picture(picture: Picture | Sequence[Picture]) -> Image.Image:
    """One picture, in RGB. **Raises**: as `as_pictures`, and `ConfigError` for several."""
    pictures = as_pictures(picture)
    if len(pictures) != 1:
        raise ConfigError(f"{len(pictures)} pictures where one is expected")
    return pictures[0]


def _picture(picture: Any) -> Image.Image:
    if isinstance(picture, str | Path):
        return load_image(picture)
    if isinstance(picture, np.ndarray):
        colours = picture.shape[2] if picture.ndim == 3 else picture.ndim - 1
        if picture.dtype != np.uint8 or colours not in (1, 3, 4) or not picture.size:
            raise ConfigError(
                f"a picture as an array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4), "
                f"not {picture.dtype} {picture.shape}"
            )
        picture = Image.fromarray(picture.squeeze(2) if picture.shape[2:] == (1,) else picture)
    if not isinstance(picture, Image.Image):
        raise ConfigError(
            f"a picture must be one of Pillow's, a path or an array, not {type(picture).__name__}"
        )
    return to_rgb(picture)


def as_embeddings(z_image: Any, width: int) -> Tensor:
    """Raw CLIP image embeddings, in torch, numpy or lists, as float32.

    **Shapes**: (B, D) → same. **Raises**: `ConfigError` for another width than D, `DataError` for
    numbers that are not finite.
    """
    try:
        z = z_image if isinstance(z_image, Tensor) else torch.from_numpy(np.array(z_image))
    except (TypeError, ValueError):
        raise ConfigError(f"embeddings must be numbers, not {type(z_image).__name__}") from None
    if z.ndim != 2 or z.shape[1] != width or not len(z) or not z.is_floating_point():
        raise ConfigError(
            f"embeddings of {z.dtype} and shape {tuple(z.shape)}; this decoder takes floats (N, "
            f"{width})"
        )
    if not bool(z.isfinite().all()):
        raise DataError("embeddings must be finite, and some numbers are not")
    return z.float()


def _list(several: Any, what: str) -> list[Any]:
    try:
        return list(several)
    except TypeError:
        raise ConfigError(f"{what} can't be a {type(several).__name__}") from None
