"""Files made from data and kept for the next time, under the identity of what they are made of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from unclip.files.disk import replacing

THREADS = min(8, os.cpu_count() or 1)

T = TypeVar("T")


def cache_folder(what: str) -> Path:
    """Where things made from data are kept: `$UNCLIP_CACHE`, or `~/.cache/unclip`."""
    chosen = os.environ.get("UNCLIP_CACHE")
    kept = Path(os.path.expanduser(chosen)) if chosen else Path.home() / ".cache" / "unclip"
    return kept / what


def kept_at(folder: str, files: Sequence[Path], form: str, suffix: str) -> Path:
    """Where that is kept which is made of `files` as they are now; `form` names its format."""
    with ThreadPoolExecutor(THREADS) as pool:
        identities = "\n".join([form, *pool.map(_identity, files)])
    name = hashlib.blake2b(os.fsencode(identities), digest_size=16).hexdigest()
    return cache_folder(folder) / f"{name}{suffix}"


def made_once(path: Path, opened: Callable[[], T | None], make: Callable[[Path], None]) -> T:
    """What is kept at `path`, by one process while the others wait, if `opened` has nothing yet.

    **Raises**: `OSError` if it can't be kept.
    """
    found = opened()
    if found is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            found = opened()
            if found is None:
                with replacing(path) as own:
                    make(own)
                found = opened()
    assert found is not None
    return found


def _identity(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return f"{path} is not there"
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
