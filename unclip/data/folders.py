"""What lies in a folder and the folders below it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from unclip.errors import DataError

# What systems keep beside people's files, as they do much that begins with a dot.
NOT_DATA = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


def is_hidden(name: str) -> bool:
    """Whether a part of a relative name says that it is no data."""
    parts = name.split("/")
    return any(part in NOT_DATA or part.strip(".") != part.rstrip(".") for part in parts)


def files_below(root: Path) -> list[Path]:
    """All files but hidden ones, in order. Links are followed, into each folder once.

    **Raises**: `DataError` if a folder can't be read.
    """
    seen: set[tuple[int, int]] = set()
    found: list[Path] = []

    def is_new(folder: str) -> bool:
        stat = os.stat(folder)
        known = (stat.st_dev, stat.st_ino) in seen
        seen.add((stat.st_dev, stat.st_ino))
        return not known

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} can't be read: {error.strerror}")

    is_new(str(root))
    for folder, below, files in os.walk(root, onerror=fail, followlinks=True):
        below[:] = sorted(
            (name for name in below if not is_hidden(name)),
            key=lambda name: (os.path.islink(os.path.join(folder, name)), name),
        )
        below[:] = [name for name in below if is_new(os.path.join(folder, name))]
        found += [Path(folder, name) for name in files if not is_hidden(name)]
    return sorted(found)


def fixed_part(pattern: str) -> str:
    """What stands in a path before its first `*`, `?`, `[` or `{`."""
    return re.split(r"[*?\[{]", pattern)[0]


def with_suffix(paths: Sequence[Path], *suffixes: str) -> list[Path]:
    """Those of a kind, in capitals or not."""
    return [path for path in paths if path.suffix.lower() in suffixes]
