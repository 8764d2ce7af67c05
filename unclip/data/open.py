"""What `data.train` may name, and the dataset that it means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from unclip.config import Config, Place
from unclip.data.captions import USUAL, Columns
from unclip.data.sample import Dataset
from unclip.data.tolerant import Tolerant
from unclip.errors import DataError
from unclip.images import Fit

# One folder is one folder, with a slash behind it or without.
Spec = Annotated[Place, AfterValidator(lambda spec: spec.rstrip("/") or spec)]


class DataConfig(Config):
    """What to train on: `emoji`, `shapes`, a folder, a table of captions or tar shards.

    `fit` is how pictures of all shapes become squares of `resolution` pixels: on white (`pad`), or
    for photographs cut out, at a random place (`crop`; previews in the middle) or always in the
    `middle`. Those narrower than `min_side` are left out. `crop` then cuts all of them once more,
    to so many pixels.

    `caption` and `image` name the columns of a table that hold captions and pictures (or their
    file names), where these aren't called as usual; of tar files, `caption` is a key in the .json.
    """

    train: Spec
    val: Spec | None = None
    resolution: int = Field(gt=0)
    fit: Literal["pad", "crop", "middle"] = "pad"
    min_side: int = Field(default=0, ge=0)
    crop: int | None = Field(default=None, gt=0)
    workers: int = Field(default=0, ge=0)
    caption: str | None = Field(default=None, min_length=1)
    image: str | None = Field(default=None, min_length=1)

    embeddings: ClassVar = False  # whether a cache of them will do

    def open(self, spec: str) -> Dataset:
        """The dataset that `train` or `val` names."""
        fit = Fit(self.resolution, self.fit, self.min_side)
        columns = Columns(self.caption, self.image)
        return open_dataset(spec, fit, embeddings=self.embeddings, columns=columns)


class PairsConfig(DataConfig):
    """What a prior trains on: any of these, or a cache of embeddings (`unclip train embed`)."""

    embeddings: ClassVar = True


def open_dataset(
    spec: str, fit: Fit | int, *, embeddings: bool = False, columns: Columns = USUAL
) -> Dataset:
    """The dataset that `data.train` names; a number for `fit` stands for padded squares of that.

    - `emoji`, `emoji-vector` (without the one raster set), `shapes`, each also with `:val`;
    - a folder of pictures; a `.jsonl`, `.csv` or `.parquet` of file names and captions;
    - a tar file, a folder of them, or a pattern such as `shards-{000..009}.tar` or `shards/*.tar`;
      likewise parquet files that hold the pictures;
    - `hf:owner/name`, `hf:owner/name#config:split`: a dataset of the Hugging Face hub;
    - with `embeddings` also a cache (`unclip train embed`, clip-retrieval), whose samples hold
      those instead of pictures.

    Of files that people bring, single samples may be bad: see `Tolerant`.

    **Raises**: `DataError` when nothing of that name exists or it can't be used.
    """
    spec = os.path.expanduser(spec)
    fit = Fit(fit) if isinstance(fit, int) else fit
    if not spec:  # an unset variable, which would be the current folder
        raise DataError("the name of the data is empty; give a folder, a table or a dataset")
    name, _, split = spec.partition(":")
    if name in ("emoji", "emoji-vector", "shapes") and split not in ("", "train", "val"):
        raise DataError(f"{spec!r}: the parts of {name} are train and val, not {split!r}")
    if name in ("emoji", "emoji-vector"):
        from unclip.data.emoji import Emoji

        return Emoji(fit.size, split or "train", vector_only=name == "emoji-vector")
    if name == "shapes":
        from unclip.data.shapes import Shapes

        return Shapes(fit.size, split or "train")
    if is_cache(spec):
        if not embeddings:
            raise DataError(f"{spec} holds embeddings, not pictures: only a prior learns from them")
        from unclip.data.cache import EmbeddingCache

        return Tolerant(EmbeddingCache(Path(spec)))
    if name == "hf":
        from unclip.data.hub import open_hub

        return Tolerant(open_hub(spec, fit, columns))
    from unclip.data.readers import open_path

    return Tolerant(open_path(spec, fit, columns))


def is_cache(spec: str) -> bool:
    """Whether `data.train` names a cache of embeddings."""
    return (Path(spec) / "img_emb").is_dir()
