"""One index of many shards: made once on a machine, joined in one file, mapped by all processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from filelock import FileLock

from unclip.data.kept import THREADS, kept_at, made_once
from unclip.errors import check_open_files
from unclip.files.disk import replacing
from unclip.progress import progress_bar

T = TypeVar("T")


class Part(Protocol):
    """What is known of one shard: its entries (n,), and fields that JSON can hold."""

    @property
    def entries(self) -> np.ndarray: ...


Read = Callable[[Path], Part]  # which keeps what it has read for the next time


@dataclass(frozen=True)
class Index:
    """Entries of all shards, one after the other; where each shard ends; its other fields."""

    entries: np.ndarray
    ends: list[int]
    about: list[dict[str, Any]]


def index_all(shards: Sequence[Path], read: Read, form: str) -> Index:
    """The joined index, made if it isn't there or a shard has changed; `form` names its format.

    The processes of a machine read the new shards by turns, each its share, and one joins them.
    Where nothing can be kept, every process has all of it in memory.

    **Raises**: `ConfigError` when the system lets no more files be open.
    """
    path = kept_at("shards", shards, form, ".all.npy")
    try:
        if (found := _open(path)) is not None:
            return found
        _read_shares(path, shards, read)
        return made_once(path, lambda: _open(path), lambda own: _join(own, path, shards, read))
    except OSError as error:
        check_open_files(error)
    parts = _all(shards, lambda shard: _in_memory(read(shard)))
    entries = [own for own, _ in parts]
    ends = list(accumulate(len(own) for own in entries))
    return Index(np.concatenate(entries), ends, [about for _, about in parts])


def _open(path: Path) -> Index | None:
    """The joined index, if it is there and whole."""
    beside = path.with_suffix(".json")
    if not (path.is_file() and beside.is_file()):
        return None
    try:
        told = json.loads(beside.read_text())
        entries = np.load(path, mmap_mode="r", allow_pickle=False)
        return Index(entries, told["ends"], told["about"])
    except (ValueError, KeyError, TypeError):
        return None  # damaged: made again


def _read_shares(path: Path, shards: Sequence[Path], read: Read) -> None:
    """Let every shard's index be kept: this process's share, then what others have not done."""
    rank = int(os.environ.get("LOCAL_RANK", 0))  # as launchers say it
    world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in range(rank, rank + world):
        with FileLock(path.with_suffix(f".{part % world}.lock")):
            _all(shards[part % world :: world], lambda shard: bool(read(shard)))


def _join(own: Path, path: Path, shards: Sequence[Path], read: Read) -> None:
    """Shard by shard: no more than one of them is open or in memory."""
    lengths, about, form = [], [], np.dtype("u1")
    for shard in shards:
        entries, told = _in_memory(read(shard))
        lengths.append(len(entries))
        about.append(told)
        form = entries.dtype
    descr = np.lib.format.dtype_to_descr(form)
    header = {"descr": descr, "fortran_order": False, "shape": (sum(lengths),)}
    with own.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for shard in shards:
            file.write(_in_memory(read(shard))[0].tobytes())
    with replacing(path.with_suffix(".json")) as beside:
        beside.write_text(json.dumps({"ends": list(accumulate(lengths)), "about": about}))


def _all(shards: Sequence[Path], work: Callable[[Path], T]) -> list[T]:
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(work, shards)
        return list(progress_bar(found, "index", len(shards)))


def _in_memory(part: Part) -> tuple[np.ndarray, dict[str, Any]]:
    """A shard's entries, no longer mapped, which takes a descriptor; its other fields."""
    return np.array(part.entries), {k: v for k, v in vars(part).items() if k != "entries"}
