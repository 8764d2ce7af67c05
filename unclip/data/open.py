"""What `data.train` may name, and the dataset that it means."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from unclip.config import Config, Place
from unclip.data.captions import USUAL, Columns
from unclip.data.sample import Dataset
from unclip.data.tolerant import Tolerant
from unclip.errors import DataError


class DataConfig(Config):
    """What to train on: `emoji`, `shapes`, a folder, a table of captions, tar shards, or for a
    prior a cache of embeddings.

    `caption` and `image` name the columns of a table that hold captions and pictures (or their
    file names), where these aren't called as usual; of tar files, `caption` is a key in the .json.
    """

    train: Place
    val: Place | None = None
    resolution: int = Field(gt=0)
    crop: int | None = Field(default=None, gt=0)
    workers: int = Field(default=0, ge=0)
    caption: str | None = None
    image: str | None = None

    @property
    def columns(self) -> Columns:
        """What tables call captions and pictures."""
        return Columns(self.caption, self.image)


def open_dataset(
    spec: str, resolution: int, *, embeddings: bool = False, columns: Columns = USUAL
) -> Dataset:
    """The dataset that `data.train` names, with pictures of `resolution` pixels.

    - `emoji`, `emoji-vector` (without the one raster set), `shapes`, each also with `:val`;
    - a folder of pictures; a `.jsonl`, `.csv` or `.parquet` of file names and captions;
    - a tar file, a folder of them, or a pattern such as `shards-{000..009}.tar` or `shards/*.tar`;
      likewise parquet files that hold the pictures;
    - `hf:owner/name`, `hf:owner/name#config:split`: a dataset of the Hugging Face hub;
    - with `embeddings` also a cache (`train/embed.py`, clip-retrieval), whose samples hold those
      instead of pictures.

    Of files that people bring, single samples may be bad: see `Tolerant`.

    **Raises**: `DataError` when nothing of that name exists or it can't be used.
    """
    spec = os.path.expanduser(spec)
    name, _, split = spec.partition(":")
    if name in ("emoji", "emoji-vector", "shapes") and split not in ("", "train", "val"):
        raise DataError(f"{spec!r}: the parts of {name} are train and val, not {split!r}")
    if name in ("emoji", "emoji-vector"):
        from unclip.data.emoji import Emoji

        return Emoji(resolution, split or "train", vector_only=name == "emoji-vector")
    if name == "shapes":
        from unclip.data.shapes import Shapes

        return Shapes(resolution, split or "train")
    if is_cache(spec):
        if not embeddings:
            raise DataError(f"{spec} holds embeddings, not pictures: only a prior learns from them")
        from unclip.data.cache import EmbeddingCache

        return EmbeddingCache(Path(spec))
    if name == "hf":
        from unclip.data.hub import open_hub

        return Tolerant(open_hub(spec, resolution, columns))
    from unclip.data.readers import open_path

    return Tolerant(open_path(spec, resolution, columns))


def is_cache(spec: str) -> bool:
    """Whether `data.train` names a cache of embeddings."""
    return (Path(spec) / "img_emb").is_dir()
