"""Datasets of the Hugging Face hub by name, and parquet files that hold the pictures themselves.

The `datasets` library finds, fetches and maps them into memory as Arrow, so that any row can be
read by its number; it runs no code of theirs. Pictures are decoded here, as those of any file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from unclip.data.captions import KEYS, clean
from unclip.data.sample import Sample
from unclip.errors import ConfigError, DataError
from unclip.images import fit_square, load_image, to_tensor
from unclip.progress import without_bars

PREFIX = "hf:"
CAPTIONS = (*KEYS, "captions", "TEXT")


class Rows:
    """Pictures and captions in the columns of a table; a list of captions gives one of them.

    **Raises**: `DataError` when it has no column of pictures, or none of captions.
    """

    def __init__(self, name: str, table: Any, resolution: int) -> None:
        self.name, self.resolution = name, resolution
        columns = list(table.features)
        pictures = [column for column in columns if _holds_pictures(table.features[column])]
        captions = [column for column in CAPTIONS if column in columns]
        if not pictures or not captions:
            raise DataError(
                f"data {name} has the columns {', '.join(columns)}; expected one with pictures "
                f"(encoded, not their names) and one of {', '.join(CAPTIONS)}"
            )
        self._picture, self._caption = pictures[0], captions[0]
        self._table = _undecoded(table, self._picture).select_columns(
            [self._picture, self._caption]
        )

    def __len__(self) -> int:
        return len(self._table)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Row `index`; of several captions the generator draws one.

        **Raises**: `DataError` if its picture or its caption can't be used.
        """
        row, label = self._table[index], f"{self.name}, row {index}"
        data = row[self._picture]
        data = data.get("bytes") if isinstance(data, dict) else data
        if not data:
            raise DataError(f"{label} has no picture", "no picture")
        captions = row[self._caption]
        captions = [captions] if isinstance(captions, str) else captions or []
        captions = [clean(text) for text in captions if isinstance(text, str) and text.strip()]
        if not captions:
            raise DataError(f"{label} has an empty caption", "no caption")
        drawn = torch.randint(len(captions), (), generator=generator) if captions[1:] else 0
        image = fit_square(load_image(io.BytesIO(data), label), self.resolution)
        return Sample(to_tensor(image), captions[int(drawn)], label)


def open_hub(spec: str, resolution: int) -> Rows:
    """`hf:owner/name`, `hf:owner/name:split` or `hf:owner/name#config:split`; split train if none.

    **Raises**: `DataError` when there is no such dataset, configuration or split.
    """
    name, _, split = spec.removeprefix(PREFIX).partition(":")
    name, _, config = name.partition("#")
    options = {"name": config or None, "split": split or "train"}
    return Rows(spec, _load(spec, lambda load: load(name, **options)), resolution)


def open_parquet(spec: str, paths: Sequence[Path], resolution: int) -> Rows:
    """Parquet files with the pictures in them, one after the other.

    **Raises**: `DataError` when they aren't whole, or hold no pictures or captions.
    """
    files = [str(path) for path in paths]
    options = {"data_files": files, "split": "train"}
    return Rows(spec, _load(spec, lambda load: load("parquet", **options)), resolution)


def _load(spec: str, call: Callable[[Any], Any]) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"data {spec!r} needs datasets: pip install 'unclip[train]'") from None
    try:
        with without_bars(datasets.utils.logging):
            return call(datasets.load_dataset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise DataError(f"data {spec!r} can't be loaded: {cause}") from None


def _holds_pictures(feature: Any) -> bool:
    """Encoded pictures: an image feature, bytes, or what an image feature is made of."""
    import datasets

    if isinstance(feature, dict):
        feature = feature.get("bytes")
    kind = getattr(feature, "dtype", None)
    return isinstance(feature, datasets.Image) or kind in ("binary", "large_binary")


def _undecoded(table: Any, column: str) -> Any:
    import datasets

    if not isinstance(table.features[column], datasets.Image):
        return table
    return table.cast_column(column, datasets.Image(decode=False))
