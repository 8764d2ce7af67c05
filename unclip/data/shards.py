"""Tar shards in webdataset's layout (img2dataset's too): any sample by its number.

`key.jpg` (or png, webp) with `key.txt` or `key.json`. Each shard is read once, to note where the
pictures and captions lie, their checksums, and a hash of the key: 46 bytes a sample, kept in the
cache folder and mapped from there. Nothing is unpickled or unpacked.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
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
from unclip.data.folders import is_hidden
from unclip.data.sample import MAX_BAD, Sample, cache_folder
from unclip.errors import DataError
from unclip.files.disk import replacing
from unclip.images import SUFFIXES, fit_square, load_image, to_tensor
from unclip.progress import progress_bar

BLOCK = 512  # of a tar file
CHUNK = 2**20
FORMAT = 2
TEXTS = (".txt", ".json")
# Offsets and lengths in bytes, `header` that of the headers before the image; `key` is `hash_key`;
# `form` and `text_form` are places in SUFFIXES and TEXTS.
ENTRY = np.dtype(
    [
        ("key", "<u8"),
        ("image", "<u8"),
        ("text", "<u8"),
        ("image_size", "<u4"),
        ("text_size", "<u4"),
        ("image_crc", "<u4"),
        ("text_crc", "<u4"),
        ("header", "<u4"),
        ("form", "u1"),
        ("text_form", "u1"),
    ]
)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard (n,) of `ENTRY`; what is wrong with it; how many samples lack a part
    or have one twice, and the first of them."""

    entries: np.ndarray
    problem: str
    lacking: int
    first: str


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
        resolution: int,
        root: Path,
        missing: Sequence[str] = (),
        columns: Columns = USUAL,
    ) -> None:
        self.name, self.resolution, self.shards = name, resolution, shards
        self.root, self.columns = root, columns
        twice = [str(shard) for shard, times in Counter(shards).items() if times > 1]
        if twice:
            raise DataError(f"data {name} names {twice[0]} twice")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(partial(read_index, texts=self._texts), shards)
            indexes = list(progress_bar(found, "index", len(shards)))
        self._entries = [index.entries for index in indexes]
        self._ends = list(accumulate(len(entries) for entries in self._entries))
        problems = dict.fromkeys(missing, "is not there")
        problems |= {str(s): i.problem for s, i in zip(shards, indexes, strict=True) if i.problem}
        lacking = {
            f"{shard}:{index.first}": index.lacking
            for shard, index in zip(shards, indexes, strict=True)
            if index.lacking
        }
        self._check(problems, lacking, len(shards) + len(missing))

    @property
    def _texts(self) -> Sequence[str]:
        """Where captions are looked for: a column is a key of a .json."""
        return TEXTS if self.columns.caption is None else (".json",)

    def _check(self, bad: dict[str, str], lacking: dict[str, int], shards: int) -> None:
        what = []
        if bad:
            places = [f"{shard} {problem}" for shard, problem in bad.items()]
            what.append(f"{len(bad)} of {shards} shards: {named(places)}")
        if lacking:
            most = Counter(lacking).most_common()
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
            warnings.warn(f"data {self.name}, left out: {line}", stacklevel=4)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A loader's worker opens the indexes itself, instead of being sent them."""
        return Shards, (self.name, self.shards, self.resolution, self.root, (), self.columns)

    def place(self, index: int) -> str:
        """The shard that holds sample `index`."""
        return str(self.shards[bisect_right(self._ends, index)])

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Sample `index`; of several captions the generator draws one.

        **Raises**: `DataError` if its bytes have changed since indexing or can't be used.
        """
        number = bisect_right(self._ends, index)
        shard = self.shards[number]
        entry = self._entries[number][index - (self._ends[number - 1] if number else 0)]
        try:
            with shard.open("rb") as file:  # anew: processes share no position
                name = _name(file, entry)
                label = f"{shard}:{name}"
                picture = _read(file, entry, "image", label)
                text = _read(file, entry, "text", label)
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{shard} can't be read: {error}") from None
        captions = self._captions(text, TEXTS[entry["text_form"]], label)
        image = load_image(io.BytesIO(picture), label + SUFFIXES[entry["form"]])
        key = f"{os.path.relpath(shard, self.root)}:{name}"
        image = fit_square(image, self.resolution)
        return Sample(to_tensor(image), draw(captions, generator), printable(key))

    def _captions(self, data: bytes, form: str, label: str) -> list[str]:
        if form == ".txt":
            captions = read_captions(data, label + form)
        else:
            try:
                row = json.loads(check_text(decode(data), label + form))
            except (json.JSONDecodeError, RecursionError) as error:
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
        except (OSError, ValueError, KeyError):
            pass  # damaged: made again
    index = index_shard(shard, texts)
    try:
        with replacing(path) as own, own.open("wb") as file:
            np.save(file, index.entries, allow_pickle=False)
        with replacing(beside) as own:
            own.write_text(json.dumps({k: v for k, v in vars(index).items() if k != "entries"}))
    except OSError:  # no place to keep it: made again next time
        return index
    return replace(index, entries=np.load(path, mmap_mode="r"))


@dataclass
class _Parts:
    """Where the parts of a sample lie in a shard, by suffix: header, data, size; how often."""

    found: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    times: Counter[str] = field(default_factory=Counter)

    def first(self, forms: Sequence[str]) -> str | None:
        return next((form for form in forms if form in self.found), None)


def index_shard(shard: Path, texts: Sequence[str] = TEXTS) -> ShardIndex:
    """Where every whole sample of a tar file lies, and the checksums of its parts."""
    size, problem = shard.stat().st_size, ""
    samples: dict[str, _Parts] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:", encoding="utf-8") as tar:
            for member in tar:
                after = member.offset_data + -(-member.size // BLOCK) * BLOCK * member.isreg()
                if after <= end:
                    raise tarfile.ReadError("a member of negative size")
                end = after
                _enter(samples, member, size, texts)
    # besides TarError, what tarfile raises on headers that are no numbers or names
    except (OSError, tarfile.TarError, ValueError, IndexError, OverflowError) as error:
        problem = f"is not a whole, uncompressed tar file ({error})"
    whole = {
        key: parts
        for key, parts in samples.items()
        if parts.first(SUFFIXES) and parts.first(texts) and max(parts.times.values()) == 1
    }
    lacking = [key for key in samples if key not in whole and _sample_of(key) not in whole]
    with shard.open("rb") as file:  # tarfile takes a damaged header, or a cut, for the end
        file.seek(end)
        if not problem and file.read(BLOCK) != bytes(BLOCK):
            problem = f"is truncated or damaged after {end:,} of {size:,} bytes"
        entries = np.zeros(len(whole), ENTRY)
        for entry, (key, parts) in zip(entries, whole.items(), strict=True):
            entry["key"] = hash_key(key)
            for what, form, forms in (("image", "form", SUFFIXES), ("text", "text_form", texts)):
                suffix = parts.first(forms)
                assert suffix is not None
                header, data, length = parts.found[suffix]
                entry[form] = (SUFFIXES if what == "image" else TEXTS).index(suffix)
                entry[what], entry[f"{what}_size"] = data, length
                entry[f"{what}_crc"] = _checksum(file, data, length)
                if what == "image":
                    entry["header"] = data - header
    if not samples and not problem:
        problem = "holds no samples"
    if problem or not lacking:
        return ShardIndex(entries, problem, 0, "")
    count = sum(max(samples[key].times.values()) for key in lacking)
    return ShardIndex(entries, problem, count, printable(lacking[0]))


def _enter(
    samples: dict[str, _Parts], member: tarfile.TarInfo, size: int, texts: Sequence[str]
) -> None:
    """Add a member to the sample that its name says: all before the last dot is the key."""
    name = member.name.removeprefix("./")
    key, dot, suffix = name.rpartition(".")
    form = dot + suffix.lower()
    if member.isdir() or is_hidden(name) or form not in (*SUFFIXES, *texts):
        return
    parts = samples.setdefault(key, _Parts())
    parts.times[form] += 1
    end = member.offset_data + member.size
    if member.isreg() and not member.issparse() and member.size < 2**32 and end <= size:
        parts.found[form] = (member.offset, member.offset_data, member.size)


def _sample_of(key: str) -> str:
    """The sample that `key` adds a part to, such as `000.mask` to `000`."""
    folder, slash, base = key.rpartition("/")
    return folder + slash + base.partition(".")[0]


def hash_key(key: str) -> int:
    """64 bits of a sample's key, as the index holds them."""
    data = printable(key).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _checksum(file: Any, offset: int, size: int) -> int:
    file.seek(offset)
    crc = 0
    while size > 0 and (data := file.read(min(size, CHUNK))):
        crc, size = zlib.crc32(data, crc), size - len(data)
    return crc


def _name(file: Any, entry: np.void) -> str:
    """The key of the sample whose picture lies there, from the headers before it."""
    file.seek(int(entry["image"]) - int(entry["header"]))
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
        member = tar.next()
    if member is None:
        raise tarfile.ReadError("it has changed since it was indexed")
    return printable(member.name.removeprefix("./").rpartition(".")[0])


def _read(file: Any, entry: np.void, what: str, label: str) -> bytes:
    file.seek(int(entry[what]))
    data: bytes = file.read(int(entry[f"{what}_size"]))
    if zlib.crc32(data) != entry[f"{what}_crc"]:
        raise DataError(f"{label}: its {what} has changed since the shard was indexed", "changed")
    return data
