"""Bytes onto disk in one piece: a file is whole under its name, or it is not there."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unclip.errors import CheckpointError, ConfigError


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON in one piece, on disk when this returns."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    sync(beside)
    os.replace(beside, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. **Raises**: `CheckpointError` if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"no {path.name} in {path.parent}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return data


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tally(wrong: Mapping[str, list[str]]) -> str:
    """How many names are wrong in which way, and the first few; empty where none are."""
    few = {how: ", ".join(names[:4]) + ", …" * (len(names) > 4) for how, names in wrong.items()}
    return "; ".join(f"{len(names)} {how} ({few[how]})" for how, names in wrong.items() if names)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # machines may share it
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def from_home(path: str | Path) -> Path:
    """The path, where `~` at its beginning is the home folder."""
    return Path(os.path.expanduser(path))


def check_writable(path: Path, name: str) -> None:
    """See that a file or a folder can be made at `path`, and leave nothing behind.

    **Raises**: `ConfigError` that calls the place by `name`, an option or a key.
    """
    try:
        there = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
        if not there.is_dir():
            raise NotADirectoryError(None, f"{there} is no folder")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"can't write into {path}: {error.strerror or error}; choose another {name}"
        ) from None


def write_new(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file under a name that no other has: `path`, or with -1, -2, … after its stem.

    The name is taken first, so that two processes never get the same one; `write` is given a path
    beside it. Where it fails, the name is given back.
    """
    free, number = path, 0
    while True:
        try:
            free.open("xb").close()
            break
        except FileExistsError:
            number += 1
            free = path.with_stem(f"{path.stem}-{number}")
    try:
        with replacing(free) as beside:
            write(beside)
    except BaseException:
        free.unlink(missing_ok=True)
        raise
    return free
