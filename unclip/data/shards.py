"""Tar shards in webdataset's layout (img2dataset's too): any sample by its number.

`key.jpg` (or png, webp) with `key.txt` or `key.json`. Each shard is read once, to note where the
pictures and captions lie, their checksums, and a hash of the key: 46 bytes a sample, kept in the
cache folder, joined and mapped from there (`index`). Nothing is unpickled or unpacked.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import warnings
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import torch

from unclip.data.captions import (
    USUAL,
    Columns,
    captions_of,
    check_text,
    decode,
    draw,
    printable,
    read_captions,
)
from unclip.data.damage import named
from unclip.data.index import index_all
from unclip.data.kept import cache_folder
from unclip.data.sample import MAX_BAD, Sample
from unclip.data.tar import ENTRY, FORMAT, TEXTS, ShardIndex, index_shard, name_at
from unclip.errors import DataError, UnclipWarning, check_open_files
from unclip.files.disk import replacing
from unclip.images import SUFFIXES, Fit


class Shards:
    """The samples of many shards, in the order of the shards.

    Shards that are missing, empty or damaged, and samples that lack a picture or a caption, are
    counted and reported; what is whole is used. Samples are called `shard:key`, the shard by its
    place below `root`, so that a set has the same keys from wherever it is named.

    **Raises**: `DataError` when more than 5 % of either are bad, or a shard is named twice.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Path],
        fit: Fit,
        root: Path,
        missing: Sequence[str] = (),
        columns: Columns = USUAL,
    ) -> None:
        self.name, self.fit, self.shards = name, fit, shards
        self.root, self.columns = root, columns
        twice = [str(shard) for shard, times in Counter(shards).items() if times > 1]
        if twice:
            raise DataError(f"data {name} names {twice[0]} twice")
        read = partial(read_index, texts=self._texts)
        index = index_all(shards, read, f"{FORMAT} {self._texts}")
        self._entries, self._ends = index.entries, index.ends
        told = list(zip(map(str, shards), index.about, strict=True))
        problems = dict.fromkeys(missing, "is not there")
        problems |= {shard: about["problem"] for shard, about in told if about["problem"]}
        lacking = {
            f"{shard}:{about['first']}": about["lacking"]
            for shard, about in told
            if about["lacking"]
        }
        self._check(problems, lacking, len(shards) + len(missing))

    @property
    def key_hashes(self) -> np.ndarray:
        """`hash_of` each sample's name in its shard. **Shapes**: → (n,) uint64."""
        return self._entries["key"]

    @property
    def _texts(self) -> Sequence[str]:
        """Where captions are looked for: a column is a key of a .json."""
        return TEXTS if self.columns.caption is None else (".json",)

    def _check(self, bad: dict[str, str], lacking: dict[str, int], shards: int) -> None:
        what = []
        if bad:
            places = [f"{shard} {problem}" for shard, problem in bad.items()]
            what.append(f"{len(bad)} of {shards} shards: {named(places)}")
        if any(lacking.values()):
            most = [(first, n) for first, n in Counter(lacking).most_common() if n]
            places = [first if n == 1 else f"{first} and {n - 1} more there" for first, n in most]
            what.append(
                f"{sum(lacking.values())} samples lack a JPEG, PNG or WebP, or a caption in "
                f"{' or '.join(self._texts)}, or have two: {named(places)}"
            )
        total = len(self) + sum(lacking.values())
        if len(bad) > MAX_BAD * shards or sum(lacking.values()) > MAX_BAD * total:
            raise DataError(f"data {self.name}: {'. '.join(what)}. Fetch or write them again")
        if not len(self):
            raise DataError(f"no JPEG, PNG or WebP pictures in the tar files of {self.name}")
        for line in what:
            warnings.warn(f"data {self.name}, left out: {line}", UnclipWarning, stacklevel=4)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A loader's worker opens the indexes itself, instead of being sent them."""
        return Shards, (self.name, self.shards, self.fit, self.root, (), self.columns)

    def place(self, index: int) -> str:
        """The shard that holds sample `index`."""
        return str(self.shards[bisect_right(self._ends, index)])

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Sample `index`; of several captions the generator draws one.

        **Raises**: `DataError` if its bytes have changed since indexing or can't be used.
        """
        number = bisect_right(self._ends, index)
        shard = self.shards[number]
        entry = self._entries[index]
        try:
            with shard.open("rb") as file:  # anew: processes share no position
                name = name_at(file, entry)
                label = f"{shard}:{name}"
                picture = _read(file, entry, "image", label)
                text = _read(file, entry, "text", label)
        except (OSError, tarfile.TarError) as error:
            if isinstance(error, OSError):
                check_open_files(error)
            raise DataError(f"{shard} can't be read: {error}") from None
        captions = self._captions(text, TEXTS[entry["text_form"]], label)
        pixels = self.fit.read(io.BytesIO(picture), label + SUFFIXES[entry["form"]])
        key = printable(f"{os.path.relpath(shard, self.root)}:{name}")
        return Sample(pixels, draw(captions, generator), key)

    def _captions(self, data: bytes, form: str, label: str) -> list[str]:
        if form == ".txt":
            captions = read_captions(data, label + form)
        else:
            text = check_text(decode(data), label + form)
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # also for numbers of 5,000 digits
                raise DataError(f"{label}.json is not JSON: {error}", "no JSON") from None
            named = isinstance(row, dict)
            captions = captions_of(row, self.columns.caption, label) if named else []
        if not captions:
            raise DataError(f"{label} has an empty caption", "no caption")
        return captions


def read_index(shard: Path, texts: Sequence[str] = TEXTS) -> ShardIndex:
    """A shard's index, from the cache folder if the file has not changed since."""
    try:
        return _read_index(shard, texts)
    except OSError as error:
        check_open_files(error)
        return ShardIndex(np.zeros(0, ENTRY), f"can't be read ({error.strerror or error})", 0, "")


def _read_index(shard: Path, texts: Sequence[str]) -> ShardIndex:
    stat = shard.stat()
    if not S_ISREG(stat.st_mode):
        raise OSError("it is no file")
    identity = f"{FORMAT} {texts} {shard.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    name = hashlib.blake2b(os.fsencode(identity), digest_size=16).hexdigest()
    path = cache_folder("shards") / f"{name}.npy"
    beside = path.with_suffix(".json")
    if path.is_file() and beside.is_file():
        try:
            about = json.loads(beside.read_text())
            entries = np.load(path, mmap_mode="r", allow_pickle=False)
            return ShardIndex(entries, about["problem"], about["lacking"], about["first"])
        except (OSError, ValueError, KeyError) as error:  # damaged: made again
            check_open_files(error)
    index = index_shard(shard, texts)
    try:
        with replacing(path) as own, own.open("wb") as file:
            np.save(file, index.entries, allow_pickle=False)
        with replacing(beside) as own:
            own.write_text(json.dumps({k: v for k, v in vars(index).items() if k != "entries"}))
    except OSError:  # no place to keep it: made again next time
        return index
    return replace(index, entries=np.load(path, mmap_mode="r"))


def _read(file: Any, entry: np.void, what: str, label: str) -> bytes:
    file.seek(int(entry[what]))
    data: bytes = file.read(int(entry[f"{what}_size"]))
    if zlib.crc32(data) != entry[f"{what}_crc"]:
        raise DataError(f"{label}: its {what} has changed since the shard was indexed", "changed")
    return data
