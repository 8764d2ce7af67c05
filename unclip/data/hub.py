"""Datasets of the Hugging Face hub by name, and parquet files that hold the pictures themselves.

The `datasets` library finds, fetches and maps them into memory as Arrow, so that any row can be
read by its number; it runs no code of theirs. Pictures are decoded here, as those of any file.
"""

from __future__ import annotations

import glob
import io
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from unclip.data.captions import KEYS, USUAL, Columns, captions_of, draw
from unclip.data.sample import Sample
from unclip.errors import ConfigError, DataError, check_open_files
from unclip.images import Fit
from unclip.progress import without_bars

PREFIX = "hf:"
PICTURES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture")  # where several hold them


class Rows:
    """Pictures and captions in the columns of a table; a list of captions gives one of them.

    **Raises**: `DataError` when it has no column of pictures, several, or none of captions.
    """

    def __init__(self, name: str, table: Any, fit: Fit, columns: Columns) -> None:
        self.name, self.fit, self.columns = name, fit, columns
        names = list(table.features)
        captions = [c for c in ((columns.caption,) if columns.caption else KEYS) if c in names]
        if not captions:
            raise DataError(
                f"data {name} has the columns {', '.join(names)}; expected captions in one of "
                f"{columns.caption or ', '.join(KEYS)}: name their column as data.caption"
            )
        kinds = {c: _one_of(table.features[c]) for c in captions}
        self._classes = {c: kind.names for c, kind in kinds.items() if hasattr(kind, "names")}
        self._picture = _picture_column(name, table.features.arrow_schema, columns.image)
        self._of_files = _of_files(table, self._picture)
        wanted = list(dict.fromkeys([self._picture, *captions]))
        self._table = _undecoded(table, self._picture).select_columns(wanted)

    def __len__(self) -> int:
        return len(self._table)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Row `index`; of several captions the generator draws one.

        **Raises**: `DataError` if its picture or its caption can't be used.
        """
        key = f"row {index}"
        label = f"{self.name}, {key}"
        try:
            row = self._table[index]
        except UnicodeDecodeError:
            raise DataError(f"{label} is not UTF-8 text", "are not UTF-8") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{label} can't be read: {error}", "unreadable") from None
        for column, names in self._classes.items():  # numbers that stand for words
            row[column] = _words(row[column], names)
        data = row[self._picture]
        if isinstance(data, dict):
            path, data = data.get("path"), data.get("bytes")
            if data is None and path and self._of_files:
                data = _read(path, label)
        if not data:
            raise DataError(f"{label} has no picture", "no picture")
        captions = captions_of(row, self.columns.caption, label)
        if not captions:
            raise DataError(f"{label} has an empty caption", "no caption")
        caption = draw(captions, generator)
        return Sample(self.fit.read(io.BytesIO(data), label), caption, key)


def open_hub(spec: str, fit: Fit, columns: Columns = USUAL) -> Rows:
    """`hf:owner/name`, `hf:owner/name:split` or `hf:owner/name#config:split`; split train if none.

    **Raises**: `DataError` when there is no such dataset, configuration or split.
    """
    name, _, split = spec.removeprefix(PREFIX).partition(":")
    name, _, config = name.partition("#")
    options = {"name": config or None, "split": split or "train"}
    return Rows(spec, _load(spec, lambda load: load(name, **options)), fit, columns)


def open_parquet(spec: str, paths: Sequence[Path], fit: Fit, columns: Columns = USUAL) -> Rows:
    """Parquet files with the pictures in them, one after the other.

    **Raises**: `DataError` when they aren't whole, or hold no pictures or captions.
    """
    files = [glob.escape(str(path)) for path in paths]  # datasets takes names for patterns
    options = {"data_files": files, "split": "train"}
    table = _load(spec, lambda load: load("parquet", **options))
    return Rows(spec, table, fit, columns)


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


def holds_pictures(schema: Any) -> bool:
    """Whether a column of a parquet file holds encoded pictures."""
    return any(map(_is_picture, schema))


def _picture_column(name: str, schema: Any, wanted: str | None) -> str:
    """**Raises**: `DataError` when it is not clear which."""
    found = [field.name for field in schema if _is_picture(field)]
    usual = [column for column in PICTURES if column in found]
    if wanted is not None:
        found = [column for column in found if column == wanted]
    elif usual:
        found = usual[:1]
    if len(found) == 1:
        return str(found[0])
    raise DataError(
        f"data {name} has the columns {', '.join(schema.names)}; expected one with pictures "
        f"(encoded, not their names){f' called {wanted}' if wanted else ''}"
        f"{', not ' + ' and '.join(found) + ': name it as data.image' if found else ''}"
    )


def _is_picture(field: Any) -> bool:
    """Bytes, or what an image feature is made of."""
    kind = field.type
    if hasattr(kind, "get_field_index") and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return str(kind) in ("binary", "large_binary")


def _of_files(table: Any, column: str) -> bool:
    """Whether paths in the column are those of files that datasets itself has found: any other
    table may name any file."""
    import datasets

    found = table.info.builder_name == "imagefolder"
    return found and isinstance(table.features[column], datasets.Image)


def _read(path: str, label: str) -> bytes:
    """A picture's file, or one in an archive (`zip://a.png::/b.zip`)."""
    import fsspec  # comes with datasets

    try:
        with fsspec.open(path, "rb") as file:
            data: bytes = file.read()
    except (OSError, ValueError, BadZipFile, zlib.error) as error:
        check_open_files(error)
        raise DataError(f"{label}, {path}, can't be read: {error}", "unreadable") from None
    return data


def _one_of(kind: Any) -> Any:
    """What a list is of, however deep; anything else as it is."""
    while hasattr(kind, "feature"):
        kind = kind.feature
    return kind


def _words(value: Any, names: Sequence[str]) -> Any:
    """The names of classes for their numbers; -1 says that there is none."""
    if isinstance(value, list):
        return [_words(one, names) for one in value]
    return names[value] if value is not None and 0 <= value < len(names) else None


def _undecoded(table: Any, column: str) -> Any:
    import datasets

    if not isinstance(table.features[column], datasets.Image):
        return table
    return table.cast_column(column, datasets.Image(decode=False))
