"""Many prompts from a file, their pictures into a folder or a tar: stopped, it goes on.

Either is a data set itself: `data.train` may name it. What is there already is not drawn again.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from pydantic import Field

from unclip.cli.arguments import SEEDS
from unclip.cli.output import encoded, named_as_picture, slug
from unclip.config import Config, parse_config
from unclip.errors import ConfigError, DataError, UnclipError
from unclip.files.disk import check_writable, replacing
from unclip.options import Options
from unclip.pipeline import UnCLIP

KINDS = (".txt", ".csv", ".jsonl")
METADATA = "metadata.jsonl"
Record = dict[str, Any]


class Line(Config):
    """What a line of the file may say; what it doesn't is as the command line has it."""

    prompt: str
    seed: int | None = Field(default=None, ge=0, le=SEEDS)
    n: int | None = Field(default=None, ge=1)
    negative: str | None = None


@dataclass(frozen=True)
class Wanted:
    """One picture; `key` is its name, without a suffix."""

    key: str
    prompt: str
    seed: int
    negative: str | None


def read_lines(path: Path) -> list[Line]:
    """The lines of a .txt of prompts, or of a .csv or .jsonl with `prompt` and perhaps `seed`, `n`
    and `negative`.

    **Raises**: `DataError` if it can't be read, `ConfigError` naming the line that is wrong.
    """
    if path.suffix.lower() not in KINDS:
        raise ConfigError(f"--prompts {path}: expected a name that ends in {', '.join(KINDS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path} can't be read: {error}") from None
    rows = {".txt": _plain, ".csv": _cells, ".jsonl": _objects}[path.suffix.lower()]
    lines = [
        parse_config(row, Line, f"{path}, line {number}") for number, row in rows(text, str(path))
    ]
    if not lines:
        raise DataError(f"--prompts {path} has no prompts")
    return lines


def _plain(text: str, path: str) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _cells(text: str, path: str) -> Iterator[tuple[int, Record]]:
    table = csv.DictReader(io.StringIO(text, newline=""))
    for row in table:
        said = {key: value for key, value in row.items() if value}
        for key in ("seed", "n"):
            if key in said and said[key].isdecimal():
                said[key] = int(said[key])
        yield table.line_num, {str(key): value for key, value in said.items()}


def _objects(text: str, path: str) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise DataError(f"{path}, line {number} is no JSON: {error}") from None
        if row is not None and not isinstance(row, dict):
            raise DataError(f"{path}, line {number} must be an object: {{'prompt': …}}")
        if row is not None:
            yield number, row


def pictures_of(lines: Sequence[Line], n: int, seed: int, negative: str | None) -> list[Wanted]:
    """Every picture; the k-th of all uses `seed + k` where its line says no seed."""
    wanted: list[Wanted] = []
    for number, line in enumerate(lines):
        first = seed + len(wanted) if line.seed is None else line.seed
        for own in range(first, first + (line.n or n)):
            key = f"{number:05}-{slug(line.prompt)}-{own}"
            wanted.append(Wanted(key, line.prompt, own, line.negative or negative))
    return wanted


class Place(Protocol):
    """Where pictures go, and what is said of those that are there."""

    there: dict[str, Record]

    def add(self, key: str, picture: bytes, record: Record) -> Path:
        """Put a picture there; where it is then."""


class Folder:
    """Pictures in a folder, with `metadata.jsonl`."""

    def __init__(self, out: Path, suffix: str):
        check_writable(out, "--out")
        self.out, self.suffix, self.path = out, suffix, out / METADATA
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        self.there: dict[str, Record] = {}
        lines, kept = text.removesuffix("\n").split("\n"), []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError:
                if number < len(lines):
                    raise
                break  # the last, cut off
            there = (out / record["file_name"]).is_file()
            if there:
                self.there[Path(record["file_name"]).stem] = record
            if there or "settings" not in record:  # what is ours and gone will be drawn again
                kept.append(line)
        with replacing(self.path) as beside:
            beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def add(self, key: str, picture: bytes, record: Record) -> Path:
        """The picture first, so that what is listed is there."""
        path = self.out / f"{key}{self.suffix}"
        with replacing(path) as beside:
            beside.write_bytes(picture)
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps({"file_name": path.name, **record}, ensure_ascii=False), file=file)
        return path


class Tar:
    """Pictures in a tar file, each with a .json behind it, as webdataset has them."""

    def __init__(self, out: Path, suffix: str):
        check_writable(out.parent, "--out")
        self.out, self.suffix = out, suffix
        self.there: dict[str, Record] = {}
        self.end = end = self._read() if out.exists() else 0
        with out.open("r+b" if end else "wb") as file:  # without what was cut off, if anything was
            file.truncate(end)
            file.seek(end)
            file.write(bytes(2 * tarfile.BLOCKSIZE))

    def _read(self) -> int:
        """Enter what is there, and say where the last whole sample ends."""
        end, size, since = 0, self.out.stat().st_size, []
        with tarfile.open(self.out, "r:") as tar:
            try:
                for member in tar:
                    after = (
                        member.offset_data
                        + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    )
                    since.append(member.name)
                    if member.name.endswith(".json") and after <= size:
                        file = tar.extractfile(member)
                        assert file is not None
                        self.there[member.name.removesuffix(".json")] = json.load(file)
                        end, since = after, []
            except tarfile.ReadError:
                pass  # cut off
        if not all(re.fullmatch(r"\d{5}-.*-\d+\.\w+", name) for name in since):
            raise ValueError(f"it has {since[0]}")
        return end

    def add(self, key: str, picture: bytes, record: Record) -> Path:
        """The picture first, so that a sample with its .json is whole; behind the last one, which
        mode "a" would look for through all of them."""
        said = json.dumps(record, ensure_ascii=False).encode()
        with self.out.open("r+b") as file:
            file.seek(self.end)
            with tarfile.open(fileobj=file, mode="w:") as tar:
                for name, data in ((f"{key}{self.suffix}", picture), (f"{key}.json", said)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                self.end = file.tell()
        return self.out / f"{key}{self.suffix}"


def open_place(out: Path, form: str) -> Place:
    """A .tar file, or else a folder. **Raises**: `ConfigError` if nothing can be written there."""
    if named_as_picture(out):
        raise ConfigError(
            f"--out {out} is one picture's name, but a file of prompts makes several; name a "
            "folder or a .tar, and png, webp or jpg by --format"
        )
    try:
        return (Tar if out.suffix.lower() == ".tar" else Folder)(out, f".{form}")
    except UnclipError:
        raise
    except (ValueError, KeyError, TypeError, tarfile.TarError) as error:
        raise ConfigError(f"--out {out} holds pictures of something else: {error}") from None


def draw(
    pipe: UnCLIP,
    options: Options,
    wanted: Sequence[Wanted],
    place: Place,
    form: str,
    same: Mapping[str, Any],
) -> Iterator[Path]:
    """Draw what is not there yet; each one's path as it is written. `same` is said of all.

    **Raises**: `ConfigError` where something is there that was drawn in another way.
    """
    for key, record in place.there.items():
        if {name: record.get(name) for name in same} != json.loads(json.dumps(same)):
            raise ConfigError(
                f"{key} is there, drawn by another model or with other options; choose another "
                "--out"
            )
    for picture in wanted:
        was = place.there.get(picture.key, {"text": picture.prompt, "negative": picture.negative})
        if (was.get("text"), was.get("negative")) != (picture.prompt, picture.negative):
            raise ConfigError(f"{picture.key} is there, of another prompt; choose another --out")
    todo = [picture for picture in wanted if picture.key not in place.there]
    for negative, picture in {picture.negative: picture for picture in todo}.items():
        try:  # all that is wrong is said before the first is drawn
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they come when it is drawn
                pipe.iterate(picture.prompt, options=replace(options, negative_prompt=negative))
        except ConfigError as error:
            raise ConfigError(f"{picture.key} can't be drawn: {error}") from None
    for negative, group in groupby(todo, lambda picture: picture.negative):
        some = list(group)
        images: Iterator[Image.Image] = pipe.iterate(
            [picture.prompt for picture in some],
            seed=[picture.seed for picture in some],
            options=replace(options, negative_prompt=negative),
        )
        for picture, image in zip(some, images, strict=True):
            record = {"text": picture.prompt, "seed": picture.seed, "negative": negative, **same}
            about = {"prompt": picture.prompt, **{k: v for k, v in record.items() if k != "text"}}
            yield place.add(picture.key, encoded(image, form, about), record)
