"""Tar shards in webdataset's layout (img2dataset's too): any sample by its number.

`key.jpg` (or png, webp) with `key.txt` or `key.json`. Each shard is read once, to note where the
pictures and captions lie and their checksums: 34 bytes a sample, kept in the cache folder and
mapped from there. Nothing is unpickled or unpacked.
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
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unclip.data.captions import caption_of, clean, decode
from unclip.data.sample import MAX_BAD, Sample, cache_folder
from unclip.errors import DataError
from unclip.files.disk import replacing
from unclip.images import SUFFIXES, fit_square, load_image, to_tensor
from unclip.progress import progress_bar

BLOCK = 512  # of a tar file
CHUNK = 2**20
FORMAT = 1
TEXTS = (".txt", ".json")
# Offsets and lengths in bytes; `form` and `text_form` are places in SUFFIXES and TEXTS.
ENTRY = np.dtype(
    [
        ("image", "<u8"),
        ("text", "<u8"),
        ("image_size", "<u4"),
        ("text_size", "<u4"),
        ("image_crc", "<u4"),
        ("text_crc", "<u4"),
        ("form", "u1"),
        ("text_form", "u1"),
    ]
)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard (n,) of `ENTRY`; what is wrong with it; samples that lack a part."""

    entries: np.ndarray
    problem: str
    lacking: int


class Shards:
    """The samples of many shards, in the order of the shards.

    Shards that are missing, empty or damaged, and samples that lack a picture or a caption, are
    counted and reported; what is whole is used.

    **Raises**: `DataError` when more than 5 % of either are bad.
    """

    def __init__(
        self, name: str, shards: Sequence[Path], resolution: int, missing: Sequence[str] = ()
    ) -> None:
        self.name, self.resolution, self.shards = name, resolution, shards
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(read_index, shards)
            indexes = list(progress_bar(found, "index", len(shards)))
        bad = dict.fromkeys(missing, "is not there")
        bad |= {str(s): i.problem for s, i in zip(shards, indexes, strict=True) if i.problem}
        self._entries = [index.entries for index in indexes]
        self._ends = list(accumulate(len(entries) for entries in self._entries))
        lacking = {str(s): i.lacking for s, i in zip(shards, indexes, strict=True) if i.lacking}
        self._check(bad, lacking, len(shards) + len(missing))

    def _check(self, bad: dict[str, str], lacking: dict[str, int], shards: int) -> None:
        what = []
        if bad:
            named = "; ".join(f"{shard} {problem}" for shard, problem in list(bad.items())[:5])
            what.append(f"{len(bad)} of {shards} shards: {named}{' …' * (len(bad) > 5)}")
        if lacking:
            most = Counter(lacking).most_common(5)
            named = ", ".join(f"{shard} ({count})" for shard, count in most)
            what.append(
                f"{sum(lacking.values())} samples lack a JPEG, PNG or WebP, or a caption in .txt "
                f"or .json: {named}{' …' * (len(lacking) > 5)}"
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
        return Shards, (self.name, self.shards, self.resolution)

    def place(self, index: int) -> str:
        """The shard that holds sample `index`."""
        return str(self.shards[bisect_right(self._ends, index)])

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Sample `index` with its one caption; the generator is not drawn from.

        **Raises**: `DataError` if its bytes have changed since indexing or can't be used.
        """
        number = bisect_right(self._ends, index)
        shard = self.shards[number]
        entry = self._entries[number][index - (self._ends[number - 1] if number else 0)]
        try:
            with shard.open("rb") as file:  # anew: processes share no position
                name = _name(file, int(entry["image"]))
                label = f"{shard}:{name.rpartition('.')[0] or name}"
                picture = _read(file, entry, "image", label)
                text = _read(file, entry, "text", label)
        except OSError as error:
            raise DataError(f"{shard} can't be read: {error}") from None
        caption = _caption(text, TEXTS[entry["text_form"]], label)
        image = load_image(io.BytesIO(picture), label + SUFFIXES[entry["form"]])
        return Sample(to_tensor(fit_square(image, self.resolution)), caption, label)


def read_index(shard: Path) -> ShardIndex:
    """A shard's index, from the cache folder if the file has not changed since."""
    stat = shard.stat()
    identity = f"{FORMAT} {shard.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    name = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    path = cache_folder("shards") / f"{name}.npy"
    beside = path.with_suffix(".json")
    if path.is_file() and beside.is_file():
        try:
            about = json.loads(beside.read_text())
            entries = np.load(path, mmap_mode="r", allow_pickle=False)
            return ShardIndex(entries, about["problem"], about["lacking"])
        except (OSError, ValueError, KeyError):
            pass  # damaged: made again
    index = index_shard(shard)
    try:
        with replacing(path) as own, own.open("wb") as file:
            np.save(file, index.entries, allow_pickle=False)
        with replacing(beside) as own:
            own.write_text(json.dumps({"problem": index.problem, "lacking": index.lacking}))
    except OSError:  # no place to keep it: made again next time
        return index
    return ShardIndex(np.load(path, mmap_mode="r"), index.problem, index.lacking)


def index_shard(shard: Path) -> ShardIndex:
    """Where every whole sample of a tar file lies, and the checksums of its parts."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    size, end, problem = shard.stat().st_size, 0, ""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK * member.isreg()
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not (member.isreg() and not member.issparse() and stem and dot):
                    continue
                if member.offset_data + member.size <= size:
                    parts = samples.setdefault(f"{folder}/{stem}", {})
                    parts["." + suffix.lower()] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        problem = f"is not a whole, uncompressed tar file ({error})"
    with shard.open("rb") as file:  # tarfile takes a damaged header, or a cut, for the end
        file.seek(end)
        if not problem and file.read(BLOCK) != bytes(BLOCK):
            problem = f"is truncated or damaged after {end:,} of {size:,} bytes"
        known = [parts for parts in samples.values() if {*parts} & {*SUFFIXES, *TEXTS}]
        whole = [parts for parts in known if {*parts} & {*SUFFIXES} and {*parts} & {*TEXTS}]
        entries = np.zeros(len(whole), ENTRY)
        for entry, parts in zip(entries, whole, strict=True):
            for what, form, forms in (("image", "form", SUFFIXES), ("text", "text_form", TEXTS)):
                entry[form] = next(k for k, suffix in enumerate(forms) if suffix in parts)
                entry[what], entry[f"{what}_size"] = parts[forms[entry[form]]]
                entry[f"{what}_crc"] = _checksum(file, *parts[forms[entry[form]]])
    if not known and not problem:
        problem = "holds no samples"
    return ShardIndex(entries, problem, 0 if problem else len(known) - len(whole))


def _checksum(file: Any, offset: int, size: int) -> int:
    file.seek(offset)
    crc = 0
    while size > 0 and (data := file.read(min(size, CHUNK))):
        crc, size = zlib.crc32(data, crc), size - len(data)
    return crc


def _name(file: Any, offset: int) -> str:
    """A member's name, from the header before its data."""
    file.seek(offset - BLOCK)
    header = file.read(BLOCK)
    name, prefix = (part.partition(b"\0")[0] for part in (header[:100], header[345:500]))
    whole = prefix + b"/" + name if prefix and header[257:262] == b"ustar" else name
    return whole.decode("utf-8", "replace")


def _read(file: Any, entry: np.void, what: str, label: str) -> bytes:
    file.seek(int(entry[what]))
    data: bytes = file.read(int(entry[f"{what}_size"]))
    if zlib.crc32(data) != entry[f"{what}_crc"]:
        raise DataError(f"{label}: its {what} has changed since the shard was indexed", "changed")
    return data


def _caption(data: bytes, form: str, label: str) -> str:
    text = decode(data, label + form)
    if form == ".txt":
        caption = clean(text)
    else:
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{label}.json is not JSON: {error}", "no JSON") from None
        caption = caption_of(row) if isinstance(row, dict) else ""
    if not caption:
        raise DataError(f"{label} has an empty caption", "no caption")
    return caption
