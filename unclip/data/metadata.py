"""Keys and captions of a cache's rows: its parquet tables as one Arrow file, mapped into memory.

Parquet has to be decoded, and stood in the memory of every process: 80 to 100 bytes a row. Arrow is
read where it lies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unclip.data.captions import hash_of, printable
from unclip.data.kept import kept_at, made_once
from unclip.data.tables import arrow
from unclip.errors import DataError, check_open_files
from unclip.files.disk import sync

KEY_COLUMNS, CAPTION_COLUMNS = ("key", "image_path", "url"), ("caption", "text", "TEXT")
FORMAT, ROWS = "2", 2**16  # rows at a time


class Metadata:
    """Keys and captions by row, over all tables; `counts` says how many rows each table has.

    **Raises**: `DataError` naming the table that is damaged, lacks a column or has no text in it.
    """

    def __init__(self, tables: Sequence[Path]) -> None:
        self.counts = [_rows_of(table) for table in tables]
        self._path = kept_at("metadata", tables, FORMAT, ".arrow")
        pa, _ = arrow()

        def opened() -> Any:
            try:
                return pa.ipc.open_file(pa.memory_map(str(self._path))).read_all()
            except (OSError, pa.ArrowException):
                return None  # not there, or damaged

        try:
            table = made_once(self._path, opened, lambda own: _write(own, tables))
        except OSError as error:  # no place to keep it
            check_open_files(error)
            sink = pa.BufferOutputStream()
            _convert(tables, sink)
            table = pa.ipc.open_file(sink.getvalue()).read_all()
        self._keys, self._captions = table["key"], table["caption"]

    def key(self, row: int) -> str:
        """The key of one row."""
        return str(self._keys[int(row)].as_py())

    def caption(self, row: int) -> str:
        """The caption of one row; empty where there is none."""
        return self._captions[int(row)].as_py() or ""

    def keys(self) -> Iterator[str]:
        """The keys of all rows, in order."""
        for chunk in self._keys.chunks:
            yield from map(str, chunk.to_pylist())

    def sorted_hashes(self) -> np.ndarray:
        """Hashes of all keys in order, and the row of each: mapped. **Shapes**: → (2, n) uint64."""
        path = self._path.with_suffix(".keys.npy")

        def opened() -> np.ndarray | None:
            try:
                return np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError):
                return None

        def make(own: Path) -> None:
            with own.open("wb") as file:
                np.save(file, self._sort())

        try:
            return made_once(path, opened, make)
        except OSError as error:
            check_open_files(error)
            return self._sort()

    def _sort(self) -> np.ndarray:
        hashes = np.fromiter(map(hash_of, self.keys()), np.uint64, len(self._keys))
        rows = np.argsort(hashes, kind="stable")
        return np.stack([hashes[rows], rows.astype(np.uint64)])


def write_metadata(path: Path, keys: Sequence[str], captions: Sequence[str]) -> None:
    """One table of a cache, on disk when this returns."""
    pa, pq = arrow()
    beside = path.with_suffix(".tmp")
    pq.write_table(pa.table({"key": keys, "caption": captions}), beside)
    sync(beside)
    os.replace(beside, path)


def _write(path: Path, tables: Sequence[Path]) -> None:
    pa, _ = arrow()
    with pa.OSFile(str(path), "wb") as sink:
        _convert(tables, sink)


def _convert(tables: Sequence[Path], sink: Any) -> None:
    """All tables into one Arrow file."""
    pa, _ = arrow()
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    with pa.ipc.new_file(sink, schema) as writer:
        for table in tables:
            for keys, captions in _parts(table):
                columns = [_strings(table, "keys", keys), _strings(table, "captions", captions)]
                writer.write_batch(pa.record_batch(columns, schema=schema))


def _strings(path: Path, what: str, values: Any) -> Any:
    """As text: a caption that isn't UTF-8 is none, a key has such bytes written out.

    **Raises**: `DataError` when they are of a type that has no text.
    """
    pa, _ = arrow()
    try:
        text = values.cast(pa.string())
        text.validate(full=True)
    except pa.ArrowNotImplementedError:
        raise DataError(
            f"{path} has {what} of type {values.type}; expected one text each"
        ) from None
    except pa.ArrowInvalid:
        form = _key if what == "keys" else _caption
        rows = values.cast(pa.binary()).to_pylist()
        return pa.array([None if row is None else form(row) for row in rows], pa.string())
    return text


def _key(data: bytes) -> str:
    return printable(data.decode("utf-8", "surrogateescape"))


def _caption(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _parts(path: Path) -> Iterator[tuple[Any, Any]]:
    """Keys and captions of one table, a few rows at a time."""
    pa, pq = arrow()
    try:
        file = pq.ParquetFile(path)
        chosen = _columns(path, file.schema_arrow.names)
        for part in file.iter_batches(ROWS, columns=chosen):
            yield part[chosen[0]], part[chosen[1]]
    except (OSError, pa.ArrowException) as error:
        check_open_files(error)
        raise DataError(f"{path} is not a whole parquet file: {error}") from None


def _columns(path: Path, names: Sequence[str]) -> list[str]:
    key = next((name for name in KEY_COLUMNS if name in names), None)
    caption = next((name for name in CAPTION_COLUMNS if name in names), None)
    if key is None or caption is None:
        raise DataError(
            f"{path} has the columns {', '.join(names)}; expected one of "
            f"{', '.join(KEY_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}"
        )
    return [key, caption]


def _rows_of(path: Path) -> int:
    pa, pq = arrow()
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        check_open_files(error)
        raise DataError(f"{path} is not a whole parquet file: {error}") from None
