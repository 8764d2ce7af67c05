"""Pictures in and out, and between the units that they have on disk and in networks.

B batch, H height, W width. Inside, an image is float32 BCHW RGB in [-1, 1]; outside, PIL.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unclip.containers import bare
from unclip.errors import DataError, check_open_files

MAX_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_BYTES = 2**30  # of a file: twice what `MAX_PIXELS` take in 16-bit RGBA
UPRIGHT = (  # by EXIF's orientation, from 2 on
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
TOO_SMALL = "too small"  # the kind of error that tells a picture that isn't wanted from a bad one


def load_image(
    source: str | Path | BinaryIO, name: str | None = None, min_side: int = 0
) -> Image.Image:
    """Read a JPEG, PNG or WebP as upright RGB on white; `name` stands for an open file in errors.

    Of a file's metadata only EXIF's orientation is read, and damage in them is no damage.

    **Raises**: `DataError` naming the picture when it is missing, of another format, damaged, or by
    its header, before anything is decoded, larger than `MAX_PIXELS` or narrower than `min_side`.
    """
    label = name or str(source)
    if isinstance(source, str | Path):
        source = os.path.expanduser(source)
    try:
        data, turn = bare(_read(source, label))
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, label, min_side)
            image.load()
            upright = to_rgb(image.transpose(UPRIGHT[turn - 2]) if turn > 1 else image)
    except (DataError, MemoryError):
        raise
    except FileNotFoundError:
        raise DataError(f"no picture at {label}", "missing") from None
    except IsADirectoryError:
        raise DataError(
            f"{label} is a folder, and a picture is expected; name a picture in it", "no picture"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(
            f"{label} claims more pixels than the limit of {MAX_PIXELS:,}; scale it down first",
            "too large",
        ) from None
    except Image.UnidentifiedImageError:
        raise DataError(
            f"{label} is not a JPEG, PNG or WebP picture; convert it first", "no picture"
        ) from None
    except Exception as error:  # decoders raise anything on damaged files
        check_open_files(error)
        raise DataError(f"{label} is damaged and can't be decoded: {error}", "damaged") from None
    return upright


def _read(source: str | Path | BinaryIO, label: str) -> bytes:
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    else:
        data = source.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DataError(f"{label} is larger than {MAX_BYTES:,} bytes", "too large")
    return data


def _check_size(image: Image.Image, label: str, min_side: int) -> None:
    width, height = image.size
    if min(width, height) < min_side:
        raise DataError(
            f"{label} is {width} x {height}, narrower than data.min_side = {min_side}", TOO_SMALL
        )
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{label} is {width} x {height} = {width * height:,} pixels, more than the limit of "
            f"{MAX_PIXELS:,}; scale it down first",
            "too large",
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB; transparent parts become white."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def pad_to_square(image: Image.Image) -> Image.Image:
    """Centre an RGB picture on a white square as large as its longer side.

    **Raises**: `DataError` if that square has more than `MAX_PIXELS`.
    """
    side = max(image.size)
    if side**2 > MAX_PIXELS:
        raise DataError(
            f"a picture of {image.width} x {image.height} padded to a square has more pixels than "
            f"the limit of {MAX_PIXELS:,}; scale it down first",
            "too large",
        )
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Pad to a square on white and resize with antialiasing to `size` pixels."""
    square = pad_to_square(image)
    return square if square.width == size else square.resize((size, size), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Fit:
    """How pictures of all sizes come to have `size` pixels.

    `pad` centres the whole picture on a white square. `crop` gives the shorter side that size and
    leaves the longer one, out of which whoever asks for the picture cuts a square (`crop`);
    `middle` cuts it here. Pictures narrower than `min_side` are refused, not blown up.
    """

    size: int
    how: Literal["pad", "crop", "middle"] = "pad"
    min_side: int = 0

    def read(self, source: str | Path | BinaryIO, name: str | None = None) -> Tensor:
        """A picture's pixels; see `load_image`. **Shapes**: → (3, H, W) uint8."""
        image = load_image(source, name, self.min_side)
        fitted = fit_square if self.how == "pad" else fit_shorter
        pixels = to_pixels(np.asarray(fitted(image, self.size)))
        return crop(pixels, self.size) if self.how == "middle" else pixels


def fit_shorter(image: Image.Image, size: int) -> Image.Image:
    """Resize with antialiasing until the shorter side has `size` pixels.

    **Raises**: `DataError` if the longer one then makes more than `MAX_PIXELS` of it.
    """
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if width * height > MAX_PIXELS:
        raise DataError(
            f"a picture of {image.width} x {image.height} with its shorter side resized to {size} "
            f"has more pixels than the limit of {MAX_PIXELS:,}; cut it",
            "too large",
        )
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


def crop(x: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """A square out of a picture: anywhere, or without a generator its middle.

    **Shapes**: (C, H, W) → (C, size, size), a view.
    """
    spare = [side - size for side in x.shape[-2:]]
    if generator is None:
        top, left = (room // 2 for room in spare)
    else:
        top, left = (int(torch.randint(room + 1, (), generator=generator)) for room in spare)
    return x[..., top : top + size, left : left + size]


def from_uint8(x: Tensor) -> Tensor:
    """**Units**: uint8 [0, 255] → float32 [-1, 1], any shape."""
    return x.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """**Units**: float [-1, 1] → uint8 [0, 255], any shape; values outside are clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_pixels(x: Tensor) -> Tensor:
    """**Units**: what a dataset gives, uint8, or float32 [-1, 1] if computed → float32 [-1, 1]."""
    return from_uint8(x) if x.dtype == torch.uint8 else x


def to_pixels(array: np.ndarray) -> Tensor:
    """**Shapes**: (H, W, 3) uint8 → (3, H, W) uint8."""
    return rearrange(torch.from_numpy(np.array(array)), "h w c -> c h w").contiguous()


def from_array(array: np.ndarray) -> Tensor:
    """**Shapes**: (H, W, 3) uint8 → (3, H, W) float32 in [-1, 1]."""
    return from_uint8(to_pixels(array))


def to_tensor(image: Image.Image) -> Tensor:
    """**Shapes**: PIL, any mode → (3, H, W) float32 in [-1, 1]."""
    return from_array(np.asarray(to_rgb(image)))


def to_pil(x: Tensor) -> Image.Image:
    """**Shapes**: (3, H, W) in [-1, 1] → PIL RGB."""
    return Image.fromarray(rearrange(to_uint8(x.detach().cpu()), "c h w -> h w c").numpy())


def to_html(image: Image.Image, alt: str, kind: Literal["png", "webp"] = "png") -> str:
    """A picture as part of a page: nothing is loaded from elsewhere. `alt` says what it shows."""
    file = io.BytesIO()
    how: dict[str, Any] = {"optimize": True} if kind == "png" else {"quality": 80}
    image.save(file, kind.upper(), **how)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'


def resize(x: Tensor, size: int) -> Tensor:
    """Bicubic with antialiasing. **Shapes**: (B, 3, H, W) → (B, 3, size, size)."""
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB. **Shapes**: two (B, 3, H, W) in [-1, 1] → (B,)."""
    error = (a.float() - b.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)  # the range is 2, its square 4


def gradient_energy(x: Tensor) -> Tensor:
    """Sharpness: mean squared difference of neighbouring pixels. **Shapes**: (B, 3, H, W) → (B,)"""
    x = x.float()
    across = x.diff(dim=-1).square().flatten(1).mean(1)
    down = x.diff(dim=-2).square().flatten(1).mean(1)
    return across + down


def grid(
    images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None
) -> Image.Image:
    """Pictures of one size as a contact sheet, row by row, with captions beneath when given."""
    assert images and columns > 0
    gap, text = 4, 0 if captions is None else 30
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB",
        (columns * (width + gap) + gap, rows * (height + text + gap) + gap),
        (235, 235, 235),
    )
    draw = ImageDraw.Draw(sheet)
    for k, image in enumerate(images):
        x = gap + k % columns * (width + gap)
        y = gap + k // columns * (height + text + gap)
        sheet.paste(image, (x, y))
        if captions is not None:
            _write(draw, captions[k], x, y + height, width)
    return sheet


def _write(draw: ImageDraw.ImageDraw, caption: str, x: int, y: int, width: int) -> None:
    """Three lines of small print, cut to the width of the picture."""
    font = ImageFont.load_default(9)
    words, lines = caption.split(), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    for row, line in enumerate(lines[:3]):
        while line and font.getlength(line) > width:
            line = line[:-1]
        draw.text((x, y + 10 * row), line, fill="black", font=font)
