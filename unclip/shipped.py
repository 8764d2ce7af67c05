"""What comes with the library: configurations, the emoji model, the emoji pictures.

An installed package has them inside, a clone beside it, under the same names.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
FOLDERS = ("configs", "weights", "data")


def shipped(name: str | Path) -> Path:
    """Where something lies that comes with the library: `weights/emoji`, for example."""
    inside = PACKAGE / "share"  # where the wheel has them, see pyproject.toml
    return (inside if inside.is_dir() else PACKAGE.parent) / name


def located(name: str | Path) -> Path:
    """A path as a person gives it: `~` is home, and what isn't there is looked up among what
    comes with the library, so that `weights/emoji` means the same in every folder."""
    path = Path(os.path.expanduser(name))
    ours = path.parts[:1] and path.parts[0] in FOLDERS and not path.exists()
    return shipped(path) if ours and shipped(path).exists() else path


def configuration(name: str | Path) -> Path:
    """The file of a configuration: a path, or the short name of a shipped one."""
    path = located(name)
    return path if path.is_file() else configurations().get(str(name), path)


def configurations() -> dict[str, Path]:
    """The shipped configurations by their short names, such as `shapes/upsampler_128`."""
    folder = shipped("configs")
    files = sorted(folder.glob("*/*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
