"""Files of CLIP image embeddings: N rows, a key for each, and the encoder that made them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unclip.clip.fingerprint import Fingerprint, check_same_encoder
from unclip.config import parse_config
from unclip.errors import ConfigError, DataError, UnclipWarning
from unclip.files.disk import write_new

NAME = "image_embeds"
SUFFIXES = (".safetensors", ".npy")
UNIT = 0.01  # how far from one the norms of unit vectors may be


def write_embeddings(
    path: Path, z_image: Tensor, keys: Sequence[str], encoder: Fingerprint
) -> Path:
    """Write raw embeddings, their keys and their encoder's fingerprint under a free name.

    **Shapes**: z_image (N, D), N keys. **Raises**: `ConfigError` if nothing can be written there.
    """
    metadata = {"keys": json.dumps(list(keys)), "clip": encoder.model_dump_json()}

    def write(beside: Path) -> None:
        beside.touch()
        mode = beside.stat().st_mode
        save_file({NAME: z_image.float().cpu().contiguous()}, beside, metadata=metadata)
        beside.chmod(mode)  # safetensors makes its files 0600

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_new(path, write)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"can't write {path}: {error}") from None


def read_embeddings(path: Path, encoder: Fingerprint | None) -> tuple[Tensor, list[str]]:
    """Read a .safetensors file of ours, or a .npy array, which names no keys and no encoder.

    Rows that are not finite are left out and named.

    **Shapes**: → (N, D) float32 on the CPU, N keys.

    **Raises**: `DataError` if it is missing, damaged or something else; `CheckpointError` if
    another encoder than `encoder` made it.
    """
    if not path.is_file():
        raise DataError(f"no embeddings at {path}")
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".npy":
            z = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                z = file.get_tensor(NAME)
        keys = json.loads(metadata.get("keys", "null"))
    except (SafetensorError, OSError, ValueError, TypeError, EOFError) as error:
        raise DataError(
            f"{path} is damaged or holds no embeddings ({NAME!r}, or a .npy array): {error}"
        ) from None
    if z.ndim != 2 or not len(z) or not z.is_floating_point():
        raise DataError(f"{path} holds {z.dtype} of shape {tuple(z.shape)}; expected floats (N, D)")
    if encoder is not None and "clip" in metadata:
        check_same_encoder(encoder, _fingerprint(metadata["clip"], path), str(path))
    if not isinstance(keys, list) or len(keys) != len(z):
        keys = [f"{path.stem}-{row}" for row in range(len(z))]
    sound = z.isfinite().all(1)
    for key in (key for key, kept in zip(keys, sound.tolist(), strict=True) if not kept):
        warnings.warn(f"left out: {key} in {path} is not finite", UnclipWarning, stacklevel=2)
    if not bool(sound.any()):
        raise DataError(f"{path} holds no embedding of finite numbers")
    keys = [str(key) for key, kept in zip(keys, sound.tolist(), strict=True) if kept]
    return z[sound].float(), keys


def check_raw(z: Tensor, usual: Callable[[], float | None], what: str, mend: str) -> None:
    """Refuse unit vectors, such as LAION's, where embeddings as the encoder gives them are meant.

    `usual` says the norm that those have, if that is known. **Shapes**: z (N, D).

    **Raises**: `DataError` that says what they are and ends with `mend`.
    """
    if bool(((z.float().norm(dim=-1) - 1).abs() < UNIT).all()):
        norm = usual()
        if norm is not None and not 0.5 < norm < 2:
            raise DataError(
                f"{what} have been normalised: their norms are 1, but those that the encoder gives "
                f"are about {norm:.1f}; {mend}"
            )


def _fingerprint(text: str, path: Path) -> Fingerprint:
    try:
        return parse_config(json.loads(text), Fingerprint, str(path))
    except ValueError as error:
        raise DataError(f"{path} has a damaged fingerprint of its encoder: {error}") from None
