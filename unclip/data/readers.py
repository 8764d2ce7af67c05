"""A person's own captioned pictures: what a path names.

Pictures of any size and mode become pixels by `Fit`. Nothing is unpickled, and names in tables
can't lead out of their folder.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import warnings
from pathlib import Path

from unclip.data.captions import USUAL, Columns
from unclip.data.folders import files_below, fixed_part, with_suffix
from unclip.data.hub import holds_pictures, open_parquet
from unclip.data.pictures import Files, read_folder
from unclip.data.sample import Dataset
from unclip.data.shards import Shards
from unclip.data.tables import FILE_NAME, TABLES, read_table, schema
from unclip.errors import DataError, UnclipWarning
from unclip.images import SUFFIXES, Fit

BUILT_IN = ("emoji", "emoji:val", "emoji-vector", "emoji-vector:val", "shapes", "shapes:val")
METADATA = [f"metadata{suffix}" for suffix in TABLES]


def open_path(spec: str, fit: Fit, columns: Columns = USUAL) -> Dataset:
    """A folder, a table or tar shards as a dataset; see `open_dataset`.

    **Raises**: `DataError` when nothing is there, more than 5 % of the pictures lack captions, or
    of the shards are damaged.
    """
    path = Path(spec)
    if path.is_dir():
        return _open_folder(spec, fit, columns)
    if path.is_file() and path.suffix.lower() in TABLES:
        return _open_table(spec, path, fit, columns)
    literal = path.is_file()  # whatever signs are in its name
    parts = {spec: [spec]} if literal else {part: _matches(part) for part in expand_braces(spec)}
    found = [Path(name) for names in parts.values() for name in names]
    missing = [part for part, names in parts.items() if not names]
    if found and all(shard.suffix.lower() == ".tar" for shard in found):
        root = os.path.dirname(spec if literal else fixed_part(spec)) or "."
        return Shards(spec, found, fit, Path(root), missing, columns)
    if found and all(table.suffix.lower() == ".parquet" for table in found):
        if missing:
            raise DataError(f"data {spec!r}: {missing[0]} is not there")
        return open_parquet(spec, found, fit, columns)
    if found:
        raise DataError(f"data {spec!r}: {found[0]} is no folder, .jsonl, .csv, .parquet or .tar")
    near = difflib.get_close_matches(spec, BUILT_IN, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"the built-in ones are {', '.join(BUILT_IN)}"
    raise DataError(f"data {spec!r}: no such folder, file or dataset ({hint})")


def _open_folder(spec: str, fit: Fit, columns: Columns) -> Dataset:
    """By what lies in it: a table called metadata, tar files, or in the folders below, too, tables,
    pictures, parquet files that hold pictures, tar files."""
    root = Path(spec)
    for table in filter(os.path.isfile, (root / name for name in METADATA)):
        return _open_table(spec, table, fit, columns)
    files = files_below(root)
    pictures, shards = with_suffix(files, *SUFFIXES), with_suffix(files, ".tar")
    here = [shard for shard in shards if shard.parent == root]
    if here and pictures:
        warnings.warn(
            f"data {spec}: of this folder the {len(here)} tar files are read, not the "
            f"{len(pictures)} pictures beside them",
            UnclipWarning,
            stacklevel=4,
        )
    if here:
        return Shards(spec, here, fit, root, columns=columns)
    if tables := [path for path in files if path.name in METADATA[:2]]:
        tables = _for_training(spec, root, tables)
        return Files(spec, [p for t in tables for p in read_table(t, columns, root)], fit)
    if pictures:
        return Files(spec, read_folder(root, files), fit)
    if parquet := with_suffix(files, ".parquet"):
        return open_parquet(spec, _for_training(spec, root, parquet), fit, columns)
    if shards:
        return Shards(spec, shards, fit, root, columns=columns)
    raise DataError(f"no JPEG, PNG or WebP pictures in {root}, nor tar or parquet files with them")


def _open_table(spec: str, table: Path, fit: Fit, columns: Columns) -> Dataset:
    if table.suffix.lower() == ".parquet":
        held = schema(table)
        if holds_pictures(held) or (columns.image or FILE_NAME) not in held.names:
            return open_parquet(spec, [table], fit, columns)
    return Files(spec, read_table(table, columns), fit)


def _for_training(spec: str, root: Path, tables: list[Path]) -> list[Path]:
    """Where some files are called train, as in datasets of the hub, others are held out."""
    train = [
        path
        for path in tables
        if re.search(r"(?<![a-z])train(?![a-z])", str(path.relative_to(root)).lower())
    ]
    if train and len(train) < len(tables):
        warnings.warn(
            f"data {spec}: {len(train)} of {len(tables)} tables are called train, and read",
            UnclipWarning,
            stacklevel=5,
        )
    return train or tables


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
    """Files that match, `**` any folders; one of several that a brace names must exist."""
    if glob.has_magic(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    return [pattern] if os.path.isfile(pattern) else []
