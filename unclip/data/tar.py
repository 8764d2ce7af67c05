"""One tar file of samples: where the parts of each lie, found in one reading.

All before the last dot of a member's name is the key of its sample. Names come from the headers
that hold them whole, PAX's and GNU's too.
"""

from __future__ import annotations

import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unclip.data.captions import hash_of, printable
from unclip.data.folders import is_hidden
from unclip.errors import check_open_files
from unclip.images import SUFFIXES

BLOCK = 512  # of a tar file
CHUNK = 2**20
FORMAT = 3
TEXTS = (".txt", ".json")
# Offsets and lengths in bytes, `header` that of the headers before the image; `hash_of` the key;
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
                if tar.offset <= end:  # where the next begins: a sparse one's size is another
                    raise tarfile.ReadError("a member of negative size")
                end = tar.offset
                _enter(samples, member, size, texts)
    # besides TarError, what tarfile raises on headers that are no numbers or names
    except (OSError, tarfile.TarError, ValueError, IndexError, OverflowError) as error:
        if isinstance(error, OSError):
            check_open_files(error)
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
            entry["key"] = hash_of(printable(key))
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


def _checksum(file: Any, offset: int, size: int) -> int:
    file.seek(offset)
    crc = 0
    while size > 0 and (data := file.read(min(size, CHUNK))):
        crc, size = zlib.crc32(data, crc), size - len(data)
    return crc


def name_at(file: Any, entry: np.void) -> str:
    """The key of the sample whose picture lies there, from the headers before it."""
    file.seek(int(entry["image"]) - int(entry["header"]))
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
        member = tar.next()
    if member is None:
        raise tarfile.ReadError("it has changed since it was indexed")
    return printable(member.name.removeprefix("./").rpartition(".")[0])
