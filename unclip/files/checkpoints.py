"""A run's checkpoints: model folders named by step, each with a manifest of sizes and hashes.

run/checkpoints/step-N/manifest.json    size and sha256 of every file, written last
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from unclip.errors import CheckpointError, UnclipWarning
from unclip.files.disk import read_json, sha256, sync, write_json
from unclip.files.folder import FORMAT

MANIFEST = "manifest.json"


def checkpoint_step(folder: Path) -> int | None:
    """The N of a folder named step-N, else None."""
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match[1]) if match else None


def list_checkpoints(run: str | Path) -> list[Path]:
    """The run's folders checkpoints/step-N, newest first, sound or not."""
    found = [
        (step, folder)
        for folder in Path(run).glob("checkpoints/step-*")
        if (step := checkpoint_step(folder)) is not None
    ]
    return [folder for _, folder in sorted(found, reverse=True)]


def newest_checkpoint(run: str | Path, training: bool) -> Path | None:
    """The newest checkpoint whose manifest holds; None if the run has no checkpoint at all.

    A damaged one is passed over with a warning. `training` checks the trainer's files as well.

    **Raises**: `CheckpointError` if there are checkpoints and all of them are damaged.
    """
    damaged: list[CheckpointError] = []
    for folder in list_checkpoints(run):
        try:
            check_manifest(folder, training)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for reason in damaged:
            warnings.warn(f"passing over a damaged checkpoint: {reason}", UnclipWarning, 2)
        return folder
    if damaged:
        raise CheckpointError(f"every checkpoint of {run} is damaged; the newest: {damaged[0]}")
    return None


def write_manifest(folder: Path) -> None:
    """Record size and sha256 of every file under `folder`; written last, it means complete."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in files
    }
    write_json(folder / MANIFEST, {"format": FORMAT, "files": entries})
    for inside in {path.parent for path in files}:
        sync(inside)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 by file, relative to the folder. **Raises**: `CheckpointError`."""
    entries = read_json(folder / MANIFEST).get("files")
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise CheckpointError(f"{folder / MANIFEST} is not a list of files")
    return entries


def check_manifest(folder: Path, training: bool) -> None:
    """Compare every file with the manifest; `training` includes those that only resuming needs.

    **Raises**: `CheckpointError` naming the first file that differs.
    """
    for name, entry in read_manifest(folder).items():
        path = folder / name
        if name.startswith("training/") and not training:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != entry.get("size"):
            raise CheckpointError(f"{path} has {size} bytes, expected {entry.get('size')}")
        if sha256(path) != entry.get("sha256"):
            raise CheckpointError(f"{path} has changed since it was written (sha256 differs)")
