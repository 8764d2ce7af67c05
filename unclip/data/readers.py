"""A person's own captioned pictures: folders with captions beside them, tables, and tar shards.

R resolution. Pictures of any size and mode are padded to a square on white and resized with
antialiasing. Nothing is unpickled, and names in tables can't lead out of their folder.
"""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unclip.data.dataset import Dataset, Sample
from unclip.data.images import SUFFIXES, fit_square, load_image, to_tensor
from unclip.errors import DataError

BUILT_IN = ("emoji", "emoji:val", "emoji-vector", "emoji-vector:val", "shapes", "shapes:val")
TABLES = ("metadata.jsonl", "metadata.csv")
CAPTION_KEYS = ("text", "caption")
BLOCK = 512  # of a tar file


def open_path(spec: str, resolution: int) -> Dataset:
    """A folder, a table or tar shards as a dataset; see `open_dataset`.

    **Raises**: `DataError` when nothing is there, pictures lack captions, or a shard is damaged.
    """
    path = Path(spec)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        tables = [path / name for name in TABLES if (path / name).is_file()]
        if tables:
            return Files(spec, _read_table(tables[0]), resolution)
        return Shards(spec, shards, resolution) if shards else _open_folder(path, resolution)
    if path.is_file() and path.suffix in (".jsonl", ".csv"):
        return Files(spec, _read_table(path), resolution)
    found = [Path(name) for part in expand_braces(spec) for name in _matches(part)]
    if found and all(shard.suffix == ".tar" for shard in found):
        return Shards(spec, found, resolution)
    if found:
        raise DataError(f"data {spec!r}: {found[0]} is not a folder, .jsonl, .csv or .tar")
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

    def __init__(self, name: str, pictures: Sequence[Picture], resolution: int) -> None:
        self.name, self.pictures, self.resolution = name, pictures, resolution

    def __len__(self) -> int:
        return len(self.pictures)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Picture `index` with its one caption; the generator is not drawn from."""
        picture = self.pictures[index]
        image = fit_square(load_image(picture.path), self.resolution)
        return Sample(to_tensor(image), picture.caption, picture.key)


def _open_folder(root: Path, resolution: int) -> Files:
    """Pictures in a folder and the folders below it, each with its caption in a .txt beside it."""
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"no JPEG, PNG or WebP pictures in {root}")
    pictures, missing = [], []
    for path in paths:
        key = path.relative_to(root).as_posix()
        sidecar = path.with_suffix(".txt")
        caption = _clean(_decode(sidecar.read_bytes(), sidecar)) if sidecar.is_file() else ""
        if caption:
            pictures.append(Picture(path, caption, key))
        else:
            missing.append(key)
    _complain(
        missing, len(paths), f"in {root} have no caption; write it to a .txt of the same name"
    )
    return Files(str(root), pictures, resolution)


def _read_table(table: Path) -> list[Picture]:
    """`file_name` and `text` (or `caption`) from the lines of a .jsonl or the rows of a .csv."""
    root = table.parent.resolve()
    pictures: list[Picture] = []
    unnamed: list[str] = []
    absent: list[str] = []
    for place, row in _rows(table):
        name, caption = row.get("file_name"), _caption(row)
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
    text = _decode(table.read_bytes(), table)
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


@dataclass
class Entry:
    """Where one sample of a shard lies: for each suffix its offset and length in bytes."""

    shard: Path
    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def picture(self) -> str | None:
        """The suffix of its picture, if it has one."""
        return next((suffix for suffix in SUFFIXES if suffix in self.parts), None)

    @property
    def captioned(self) -> bool:
        """Whether it has a .txt or .json."""
        return ".txt" in self.parts or ".json" in self.parts

    def read(self, suffix: str) -> bytes:
        """One part's bytes; the file is opened anew, so that processes share no position."""
        offset, length = self.parts[suffix]
        with self.shard.open("rb") as file:
            file.seek(offset)
            return file.read(length)


class Shards:
    """Tar files in webdataset's layout: `key.jpg` (or png, webp) with `key.txt` or `key.json`."""

    def __init__(self, name: str, shards: Iterable[Path], resolution: int) -> None:
        self.name, self.resolution = name, resolution
        self.entries = [entry for shard in shards for entry in index_shard(shard)]
        if not self.entries:
            raise DataError(f"no JPEG, PNG or WebP pictures in the tar files of {name}")

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Picture `index` with its one caption; the generator is not drawn from."""
        entry = self.entries[index]
        label = f"{entry.shard}:{entry.key}"
        suffix = entry.picture
        assert suffix is not None, "index_shard keeps only entries with a picture"
        image = load_image(io.BytesIO(entry.read(suffix)), label + suffix)
        return Sample(
            to_tensor(fit_square(image, self.resolution)), _entry_caption(entry, label), label
        )


def index_shard(shard: Path) -> list[Entry]:
    """The samples of a tar file, from its headers alone.

    **Raises**: `DataError` when it is damaged or truncated, or samples lack a part.
    """
    entries: dict[str, Entry] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                end = member.offset_data + (
                    -(-member.size // BLOCK) * BLOCK if member.isreg() else 0
                )
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if member.isreg() and not member.issparse() and stem and dot:
                    key = f"{folder}/{stem}" if folder else stem
                    entry = entries.setdefault(key, Entry(shard, key))
                    entry.parts["." + suffix.lower()] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{shard} is not a whole, uncompressed tar file: {error}") from None
    with shard.open("rb") as file:  # tarfile takes a cut between two members for the end
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise DataError(f"{shard} is truncated: it has no end mark; fetch or write it again")
    samples = [entry for entry in entries.values() if entry.picture or entry.captioned]
    blind = [entry.key for entry in samples if not entry.picture and ".txt" in entry.parts]
    mute = [entry.key for entry in samples if not entry.captioned]
    _complain(blind, len(samples), f"in {shard} have a caption but no JPEG, PNG or WebP")
    _complain(mute, len(samples), f"in {shard} have no caption; add a .txt or .json of that key")
    return [entry for entry in samples if entry.picture]


def _entry_caption(entry: Entry, label: str) -> str:
    if ".txt" in entry.parts:
        caption = _clean(_decode(entry.read(".txt"), label + ".txt"))
    else:
        try:
            row = json.loads(_decode(entry.read(".json"), label + ".json"))
        except json.JSONDecodeError as error:
            raise DataError(f"{label}.json is not JSON: {error}") from None
        caption = _caption(row) if isinstance(row, dict) else ""
    if not caption:
        raise DataError(f"{label} has an empty caption")
    return caption


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


def _caption(row: dict[str, Any]) -> str:
    values = (row.get(key) for key in CAPTION_KEYS)
    return next((_clean(value) for value in values if isinstance(value, str)), "")


def _clean(caption: str) -> str:
    return " ".join(caption.split())


def _decode(data: bytes, name: object) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text: {error}") from None


def _complain(names: Sequence[str], total: int, what: str) -> None:
    if names:
        more = " …" if len(names) > 3 else ""
        raise DataError(f"{len(names)} of {total} pictures {what}: {', '.join(names[:3])}{more}")
