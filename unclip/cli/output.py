"""Pictures onto disk: names that overwrite nothing, and files that say how they were made."""

from __future__ import annotations

import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unclip.errors import ConfigError, DataError
from unclip.files.disk import check_writable, write_new
from unclip.images import grid
from unclip.text import whole

THUMBNAIL = 256  # a contact sheet's pictures are no larger, and 64 where there are many
FORMATS = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}
QUALITY = 95  # of those that lose something
DESCRIPTION = 0x010E  # EXIF's tag
NAME_LENGTH = 40  # letters of a prompt in a file name; four bytes each at worst


def encoded(image: Image.Image, form: str, about: Mapping[str, Any]) -> bytes:
    """A picture as a file of this format that says how it was made: in a PNG's text, or as JSON in
    the image description of a JPEG or WebP."""
    texts = {
        key: whole(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in about.items()
        if value is not None
    }
    file = io.BytesIO()
    if form == "png":
        chunks = PngInfo()
        for key, text in texts.items():
            chunks.add_itxt(key, text)
        image.save(file, "PNG", pnginfo=chunks)
    else:
        exif = Image.Exif()
        exif[DESCRIPTION] = json.dumps(texts)  # in ASCII, which is all it may hold
        image.save(file, FORMATS[form], quality=QUALITY, exif=exif)
    return file.getvalue()


class Writer:
    """Writes a verb's pictures into a folder, or one picture into a file.

    Every path is printed as soon as it is written.

    **Raises**: `ConfigError` where nothing can be written, before any work is done.
    """

    def __init__(self, out: Path, count: int, form: str | None = None):
        self.out = out
        named = out.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
        self.single = named in FORMATS
        self.form = named if self.single else form or "png"
        self.expect(count)
        if form not in (None, self.form):
            raise ConfigError(f"--out {out} is no {form}, which --format asks for")
        if not self.single and named_as_picture(out):
            raise ConfigError(
                f"--out {out}: pictures are written as .png, .webp or .jpg, and {out.suffix} is "
                "none of these; name such a file, or a folder"
            )
        check_writable(out.parent if self.single else out, "--out")
        self.thumbnails: list[Image.Image] = []

    def expect(self, count: int) -> None:
        """Say how many pictures will come. **Raises**: `ConfigError` if one file is too few."""
        if self.single and count > 1:
            raise ConfigError(f"--out {self.out} is one file, but {count} pictures are made")
        self.count = count

    def save(self, image: Image.Image, name: str, about: Mapping[str, Any]) -> Path:
        """Write one picture under a free name made of `name` and the seed in `about`, which goes
        into the file; `read_about` has a PNG's back."""
        if self.count > 1:
            side = THUMBNAIL if self.count <= 256 else 64
            self.thumbnails.append(image if image.width <= side else image.resize((side, side)))
        return self._write(image, f"{slug(name)}-{about['seed']}", about)

    def sheet(self, name: str, columns: int, captions: Sequence[str] | None = None) -> None:
        """Write the contact sheet where several pictures were made."""
        if len(self.thumbnails) > 1:
            self._write(grid(self.thumbnails, columns, captions), f"{slug(name)}-sheet", {})

    def animation(self, images: Sequence[Image.Image], name: str, suffix: str) -> None:
        """Write pictures there and back as a .gif or .webp."""
        frames = [*images, *images[-2:0:-1]]
        how = {"save_all": True, "append_images": frames[1:], "loop": 0, "duration": 100}
        path = self.out / f"{slug(name)}{suffix}"
        self._save(path, lambda to: frames[0].save(to, suffix[1:].upper(), **how))

    def _write(self, image: Image.Image, stem: str, about: Mapping[str, Any]) -> Path:
        path = self.out if self.single else self.out / f"{stem}.{self.form}"
        return self._save(path, lambda to: to.write_bytes(encoded(image, self.form, about)))

    def _save(self, path: Path, write: Callable[[Path], object]) -> Path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path = write_new(path, write)
        except OSError as error:
            raise ConfigError(f"can't write {path}: {error.strerror or error}") from None
        print(path, flush=True)
        return path


def named_as_picture(path: Path) -> bool:
    """Whether a path is named as pictures are, of any format, and is no folder."""
    return path.suffix.lower() in Image.registered_extensions() and not path.is_dir()


def read_about(path: str | Path) -> dict[str, Any]:
    """What a PNG that was made here says of itself: prompt, seed, settings and the model's hash.

    **Raises**: `DataError` for another file, or one that says nothing of the kind.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            said = dict(getattr(image, "text", {}))
        seed, settings = int(said["seed"]), json.loads(said["settings"])
        return {**said, "seed": seed, "settings": dict(settings)}
    except (OSError, SyntaxError, ValueError, TypeError, KeyError):
        raise DataError(
            f"{Path(path).name} says nothing of how it was made: expected a PNG that unclip wrote, "
            "as it was written (other programs leave its text out)"
        ) from None


def slug(text: str) -> str:
    """A file name's worth of a prompt: letters and digits of any script that the file system has,
    joined by hyphens."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # a system whose names are ASCII
        text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    return words[:NAME_LENGTH].rstrip("-") or "untitled"
