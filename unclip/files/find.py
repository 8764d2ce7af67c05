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

    A folder in Karlo's layout is one too; `weights/emoji` is the shipped one wherever we are. An id
    is `owner/name`, or `owner/name@revision` for a branch, a tag or a commit. `allow_pickle`
    downloads `.bin` files as well.

    **Raises**: `CheckpointError` if there is none.
    """
    path = located(source)
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(source))
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


def _download(name: str, allow_pickle: bool) -> Path:
    """A snapshot of a model on the Hugging Face hub, from the cache where it is there.

    It is the newest one, or that of the branch, tag or commit behind an @.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    wanted = ["*.json", "*.txt", "*.safetensors", *(["*.bin"] if allow_pickle else [])]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except hub_errors() as error:
        raise CheckpointError(
            f"no model at {name}: there is no such folder, and the hub gave none ({why(error)})"
        ) from None


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises, and whatever client for HTTP is below it (no network)."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)


def why(error: Exception) -> str:
    """Why a hub gave or took nothing, and what to do."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the cache has not all of it"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
        return (
            "there is none of that name that you may use; what is private, and writing, needs "
            "HF_TOKEN or `hf auth login`"
        )
    return str(error).splitlines()[0] if str(error) else type(error).__name__
