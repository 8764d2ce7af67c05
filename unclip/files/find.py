"""From a name to a model folder: a folder, a run's newest sound checkpoint, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from unclip.errors import CheckpointError
from unclip.files.checkpoints import MANIFEST, check_manifest, newest_checkpoint
from unclip.files.diffusers import PIPELINE
from unclip.files.folder import INDEX
from unclip.shipped import located


def resolve_folder(source: str | Path, *, allow_pickle: bool = False) -> Path:
    """The model folder that a name means: itself, a run's newest sound checkpoint, or a hub id's.

    A folder in Karlo's layout is one too; `weights/emoji` is the shipped one wherever we are.
    `allow_pickle` downloads `.bin` files as well.

    **Raises**: `CheckpointError` if there is none.
    """
    path = located(source)
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source))
    if is_id and not path.parent.is_dir():  # below a folder that is there it would be a path
        path = _download(str(source), allow_pickle)
    if (path / INDEX).is_file():
        if (path / MANIFEST).is_file():
            check_manifest(path, training=False)
        return path
    if (path / PIPELINE).is_file():
        return path
    if (path / "checkpoints").is_dir():
        newest = newest_checkpoint(path, training=False)
        if newest is None:
            raise CheckpointError(f"the run in {path} has saved no checkpoint yet")
        return newest
    if not path.exists():
        raise CheckpointError(f"no model at {path}: there is no such folder")
    hint = f"; did you mean {path.parent}?" if (path.parent / INDEX).is_file() else ""
    raise CheckpointError(
        f"no model at {path}: expected a model folder (with {INDEX}, or {PIPELINE} as diffusers "
        f"has it) or a run folder (with checkpoints/){hint}"
    )


def _download(repo: str, allow_pickle: bool) -> Path:
    """The newest snapshot of a model on the Hugging Face hub, from the cache where it is there."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.safetensors", *(["*.bin"] if allow_pickle else [])]
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"no model at {repo}: there is no such folder, and the hub gave none ({reason})"
        ) from None
