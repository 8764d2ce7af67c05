"""Pictures onto disk: names that overwrite nothing, and PNGs that say how they were made."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unclip.errors import ConfigError
from unclip.images import grid

THUMBNAIL = 256  # a contact sheet's pictures are no larger, and 64 where there are many
NAME_LENGTH = 40  # letters of a prompt in a file name; four bytes each at worst


class Writer:
    """Writes a verb's pictures into a folder, or one picture into a .png file.

    `settings` is what reproduces the pictures, `model` the weights' hash; both go into each PNG
    beside its prompt and seed. Every path is printed as soon as it is written.

    **Raises**: `ConfigError` where nothing can be written, before any work is done.
    """

    def __init__(self, out: str | Path, count: int):
        self.out = Path(out)
        self.settings: dict[str, Any] = {}
        self.model = ""
        self.single = self.out.suffix.lower() == ".png"
        self.expect(count)
        if self.out.suffix.lower() in (".jpg", ".jpeg", ".webp"):
            raise ConfigError(f"--out {out}: pictures are written as .png, or into a folder")
        make_folder(self.out.parent if self.single else self.out)
        self.thumbnails: list[Image.Image] = []

    def expect(self, count: int) -> None:
        """Say how many pictures will come. **Raises**: `ConfigError` if one file is too few."""
        if self.single and count > 1:
            raise ConfigError(f"--out {self.out} is one file, but {count} pictures are made")
        self.count = count

    def save(self, image: Image.Image, name: str, seed: int, prompt: str = "") -> Path:
        """Write one picture under a free name made of `name` and the seed."""
        about = PngInfo()
        about.add_itxt("prompt", prompt)
        about.add_text("seed", str(seed))
        about.add_itxt("settings", json.dumps(self.settings, ensure_ascii=False))
        about.add_text("model", self.model)
        if self.count > 1:
            side = THUMBNAIL if self.count <= 256 else 64
            self.thumbnails.append(image if image.width <= side else image.resize((side, side)))
        return self._write(image, f"{slug(name)}-{seed}", about)

    def sheet(self, name: str, columns: int, captions: Sequence[str] | None = None) -> None:
        """Write the contact sheet where several pictures were made."""
        if len(self.thumbnails) > 1:
            self._write(grid(self.thumbnails, columns, captions), f"{slug(name)}-sheet", PngInfo())

    def _write(self, image: Image.Image, stem: str, about: PngInfo) -> Path:
        path = self.out if self.single else self.out / f"{stem}.png"
        path = free_path(path)
        try:
            with path.open("xb") as file:
                image.save(file, "PNG", pnginfo=about)
        except OSError as error:
            raise ConfigError(f"can't write {path}: {error.strerror or error}") from None
        print(path, flush=True)
        return path


def make_folder(folder: Path) -> None:
    """Make a folder where there is none. **Raises**: `ConfigError` if that can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"can't write into {folder}: {error.strerror or error}") from None


def free_path(path: Path) -> Path:
    """The path itself, or with -1, -2, … appended to its stem the first that does not exist."""
    free, number = path, 0
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def slug(text: str) -> str:
    """A file name's worth of a prompt: letters and digits of any script, joined by hyphens."""
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    return words[:NAME_LENGTH].rstrip("-") or "untitled"
