"""A person's own captioned pictures: folders with captions beside them, and tables of captions.

Pictures of any size and mode become pixels by `Fit`. Nothing is unpickled, and names in tables
can't lead out of their folder.
"""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unclip.data.captions import KEYS, caption_of, clean, decode
from unclip.data.hub import open_parquet
from unclip.data.sample import Dataset, Sample
from unclip.data.shards import Shards
from unclip.errors import ConfigError, DataError
from unclip.images import SUFFIXES, Fit

BUILT_IN = ("emoji", "emoji:val", "emoji-vector", "emoji-vector:val", "shapes", "shapes:val")
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def open_path(spec: str, fit: Fit) -> Dataset:
    """A folder, a table or tar shards as a dataset; see `open_dataset`.

    **Raises**: `DataError` when nothing is there, pictures lack captions, or a shard is damaged.
    """
    path = Path(spec)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        tables = [path / name for name in TABLES if (path / name).is_file()]
        if tables:
            return Files(spec, _read_table(tables[0]), fit)
        return Shards(spec, shards, fit) if shards else _open_folder(path, fit)
    if path.is_file() and path.suffix in (".jsonl", ".csv", ".parquet"):
        if path.suffix == ".parquet" and "file_name" not in _columns(path):
            return open_parquet(spec, [path], fit)
        return Files(spec, _read_table(path), fit)
    parts = {part: _matches(part) for part in expand_braces(spec)}
    found = [Path(name) for names in parts.values() for name in names]
    missing = [part for part, names in parts.items() if not names]
    if found and all(shard.suffix == ".tar" for shard in found):
        return Shards(spec, found, fit, missing)
    if found and all(table.suffix == ".parquet" for table in found):
        if missing:
            raise DataError(f"data {spec!r}: {missing[0]} is not there")
        return open_parquet(spec, found, fit)
    if found:
        raise DataError(f"data {spec!r}: {found[0]} is no folder, .jsonl, .csv, .parquet or .tar")
    near = difflib.get_close_matches(spec, BUILT_IN, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"the built-in ones are {', '.join(BUILT_IN)}"
    raise DataError(f"data {spec!r}: no such folder, file or dataset ({hint})")


@dataclass(frozen=True)
class Picture:
    """A picture file, its caption, and the name under which it is reported."""

    path: Path
    caption: str
    key: str


class Files:
    """Pictures in separate files."""

    def __init__(self, name: str, pictures: Sequence[Picture], fit: Fit) -> None:
        self.name, self.pictures, self.fit = name, pictures, fit

    def __len__(self) -> int:
        return len(self.pictures)

    def place(self, index: int) -> str:
        """The file of picture `index`."""
        return str(self.pictures[index].path)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Picture `index` with its one caption; the generator is not drawn from."""
        picture = self.pictures[index]
        return Sample(self.fit.read(picture.path), picture.caption, picture.key)


def _open_folder(root: Path, fit: Fit) -> Dataset:
    """Pictures in a folder and the folders below it, each with its caption in a .txt beside it;
    without any, the parquet files of the folder, which should hold them."""
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths and (tables := sorted(root.glob("*.parquet"))):
        return open_parquet(str(root), tables, fit)
    if not paths:
        raise DataError(f"no JPEG, PNG or WebP pictures in {root}")
    pictures, missing = [], []
    for path in paths:
        key = path.relative_to(root).as_posix()
        sidecar = path.with_suffix(".txt")
        caption = clean(decode(sidecar.read_bytes(), sidecar)) if sidecar.is_file() else ""
        if caption:
            pictures.append(Picture(path, caption, key))
        else:
            missing.append(key)
    _complain(
        missing, len(paths), f"in {root} have no caption; write it to a .txt of the same name"
    )
    return Files(str(root), pictures, fit)


def _read_table(table: Path) -> list[Picture]:
    """`file_name` and `text` (or `caption`) from the lines of a .jsonl, the rows of a .csv or
    .parquet."""
    root = table.parent.resolve()
    pictures: list[Picture] = []
    unnamed: list[str] = []
    absent: list[str] = []
    for place, row in _rows(table):
        name, caption = row.get("file_name"), caption_of(row)
        if not isinstance(name, str) or not name:
            raise DataError(f"{place} has no file_name; it has {', '.join(map(str, row))}")
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise DataError(f"{place}: file_name {name!r} leads out of {root}")
        if not caption:
            unnamed.append(name)
        elif not path.is_file():
            absent.append(name)
        else:
            pictures.append(Picture(path, caption, name))
    total = len(pictures) + len(unnamed) + len(absent)
    if not total:
        raise DataError(f"{table} lists no pictures")
    _complain(unnamed, total, f"in {table} have no caption; give it as text or caption")
    _complain(absent, total, f"of {table} are not in {root}")
    return pictures


def _rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its place for error messages."""
    if table.suffix == ".parquet":
        yield from _parquet_rows(table)
        return
    text = decode(table.read_bytes(), table)
    if table.suffix == ".csv":
        for number, cells in enumerate(csv.DictReader(io.StringIO(text, newline="")), 2):
            yield f"{table}, row {number}", cells
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        place = f"{table}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{place} must be a JSON object, not {type(row).__name__}")
        yield place, row


def _parquet_rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    pa, pq = arrow()
    number = 0
    try:
        file = pq.ParquetFile(table)
        wanted = [name for name in ("file_name", *KEYS) if name in file.schema_arrow.names]
        for part in file.iter_batches(columns=wanted):
            for row in part.to_pylist():
                number += 1
                yield f"{table}, row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{table} is not a whole parquet file: {error}") from None


def _columns(table: Path) -> list[str]:
    pa, pq = arrow()
    try:
        return list(pq.read_schema(table).names)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{table} is not a whole parquet file: {error}") from None


def arrow() -> tuple[Any, Any]:
    """pyarrow and its parquet. **Raises**: `ConfigError` if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("parquet files need pyarrow: pip install 'unclip[train]'") from None
    return pyarrow, pyarrow.parquet


def expand_braces(text: str) -> list[str]:
    """`a-{08..10}.tar` → a-08.tar, a-09.tar, a-10.tar; `{a,b}` → a, b."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if found is None:
        return [text]
    first, last, options = found.groups()
    if options is None:
        numbers = range(int(first), int(last) + 1)
        choices = [str(number).zfill(len(first)) for number in numbers]
    else:
        choices = options.split(",")
    head, tail = text[: found.start()], text[found.end() :]
    return [head + choice + rest for choice in choices for rest in expand_braces(tail)]


def _matches(pattern: str) -> list[str]:
    """Files that match; one of several that a brace names must exist."""
    if glob.has_magic(pattern):
        return sorted(glob.glob(pattern))
    return [pattern] if Path(pattern).is_file() else []


def _complain(names: Sequence[str], total: int, what: str) -> None:
    if names:
        more = " …" if len(names) > 3 else ""
        raise DataError(f"{len(names)} of {total} pictures {what}: {', '.join(names[:3])}{more}")
