"""CLIP image embeddings of a dataset on disk, with captions: a prior trains from them alone.

FOLDER/img_emb/img_emb_00000.npy          (n, D) float16 raw embeddings
FOLDER/metadata/metadata_00000.parquet    `key` and `caption` of each row (see `metadata`)
FOLDER/embeddings.json                    how many rows of what, and the encoder that made them;
                                          once all shards are there also mean and deviation

The first two are clip-retrieval's layout, LAION's too, which is read without the third.
"""

from __future__ import annotations

import os
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from unclip.clip.fingerprint import Fingerprint, check_same_encoder
from unclip.config import parse_config
from unclip.data.captions import clean, hash_of
from unclip.data.embeddings import check_raw
from unclip.data.folders import fixed_part
from unclip.data.metadata import Metadata
from unclip.data.sample import Dataset, Sample
from unclip.errors import CheckpointError, ConfigError, DataError, UnclipWarning, check_open_files
from unclip.files.disk import read_json

INDEX, ARRAYS, METADATA = "embeddings.json", "img_emb", "metadata"
PROBED = 256  # rows whose norms are looked at
SAME = 0.02  # of its length, by which one picture's embeddings may differ
SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


class Encoder(Protocol):
    """What a cache asks of a CLIP encoder."""

    @property
    def width(self) -> int:
        """Of its embeddings."""
        ...

    @property
    def fingerprint(self) -> Fingerprint:
        """Which encoder it is."""
        ...

    @property
    def norm(self) -> float:
        """The usual length of its image embeddings."""
        ...


class EmbeddingCache:
    """A cache as a dataset: its samples hold z_image (D,) and no picture.

    **Raises**: `DataError` when it is incomplete or its files don't fit together.
    """

    def __init__(self, root: Path) -> None:
        self.name, self.root = str(root), root
        self.index = read_json(root / INDEX) if (root / INDEX).is_file() else {}
        arrays, tables = (
            _numbered(root / folder, suffix)
            for folder, suffix in ((ARRAYS, ".npy"), (METADATA, ".parquet"))
        )
        self._check_shards(sorted(arrays), sorted(tables))
        self._arrays = [_open_array(arrays[number]) for number in sorted(arrays)]
        self._metadata = Metadata([tables[number] for number in sorted(arrays)])
        self._ends = list(accumulate(array.shape[0] for array in self._arrays))
        self.width = self._arrays[0].shape[1]
        for array, count in zip(self._arrays, self._metadata.counts, strict=True):
            if array.shape[1] != self.width:
                raise DataError(
                    f"{array.path} has embeddings of width {array.shape[1]}, others here of "
                    f"{self.width}"
                )
            if array.shape[0] != count:
                raise DataError(
                    f"{array.path} has {array.shape[0]} embeddings but {count} captions"
                )

    def _check_shards(self, arrays: list[int], tables: list[int]) -> None:
        if not arrays:
            raise DataError(f"no embeddings in {self.root / ARRAYS}")
        lacking = sorted(set(arrays) - set(tables))
        if lacking:
            raise DataError(f"{self.root} has no captions for shard {lacking[0]}, in {METADATA}")
        if self.index and "mean" not in self.index:
            raise DataError(
                f"{self.root} is not complete; run `unclip train embed` again to finish it"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        """A loader's worker maps the files itself, instead of being sent them."""
        return EmbeddingCache, (self.root,)

    def place(self, index: int) -> str:
        """The file that holds row `index`."""
        return str(self._arrays[bisect_right(self._ends, index)].path)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Row `index` with its one caption; the generator is not drawn from."""
        z = self.embedding(index)
        if not (caption := clean(self._metadata.caption(index))):
            raise DataError(
                f"{self.place(index)}: row {index} of all has no caption in UTF-8", "no caption"
            )
        return Sample(None, caption, self.key(index), z)

    def embedding(self, index: int) -> Tensor:
        """That of one row. **Shapes**: → (D,). **Raises**: `DataError` if it isn't finite."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        z = self._row(index)
        if not bool(z.isfinite().all()):
            raise DataError(f"{self.place(index)}: row {index} of all is not finite", "not finite")
        return z

    def _row(self, index: int) -> Tensor:
        shard = bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        return torch.from_numpy(self._arrays[shard].row(row).astype(np.float32))  # (D,)

    def key(self, row: int) -> str:
        """The key of one row."""
        return self._metadata.key(row)

    def rows(self, key: str) -> Iterator[int]:
        """The rows with that key, in order."""
        hashes, rows = self._by_key
        first, end = (np.searchsorted(hashes, np.uint64(hash_of(key)), s) for s in SIDES)
        yield from (int(row) for row in rows[first:end] if self.key(row) == key)

    @cached_property
    def _by_key(self) -> np.ndarray:
        return self._metadata.sorted_hashes()

    def check_fit(self, fit: str) -> None:
        """**Raises**: `ConfigError` if the embeddings are of other parts of the pictures."""
        made = self.index.get("fit", "pad") if "data" in self.index else None  # None: not by us
        if fit == "crop" or made not in (None, fit):
            raise ConfigError(
                f"data.fit = {fit}, but {self.root} has each picture's embedding with data.fit = "
                f"{made or 'middle (or pad)'}: set that"
            )

    def check_raw(self, clip: Encoder) -> None:
        """What a scale needs that does not normalise. **Raises**: `DataError` for unit vectors."""
        chosen = range(0, len(self), -(-len(self) // PROBED))
        z = torch.stack([self._row(index) for index in chosen])
        check_raw(
            z[z.isfinite().all(1)],
            lambda: clip.norm,
            f"the embeddings of {self.root}",
            "set model.scale.normalize = true (with kind whiten) or model.scale.kind = unit in "
            "prior and decoder, or write raw ones with `unclip train embed`",
        )

    def check_encoder(self, clip: Encoder, name: str) -> None:
        """**Raises**: `CheckpointError` if another encoder made the embeddings."""
        if "clip" in self.index:
            trained = parse_config(self.index["clip"], Fingerprint, str(self.root / INDEX))
            check_same_encoder(clip.fingerprint, trained, str(self.root))
        if self.width != clip.width:
            raise CheckpointError(
                f"{self.root} has embeddings of width {self.width}, but the CLIP encoder {name} "
                f"makes them of width {clip.width}"
            )


class Joined:
    """Pictures with their embeddings out of a cache, found by key.

    Its keys are those that the dataset gives, as `unclip train embed` writes them; shards of tar
    files may also stand there by any path that leads to them, as earlier versions wrote it, or not
    at all as img2dataset does. Of rows with one key the first counts, if they hold one embedding.
    """

    def __init__(self, dataset: Dataset, cache: EmbeddingCache) -> None:
        self.name, self.dataset, self.cache = dataset.name, dataset, cache
        self._root = Path(getattr(self._inner, "root", ""))
        made = str(cache.index.get("data", self.name))
        ours, theirs = (os.path.realpath(fixed_part(spec)) for spec in (self.name, made))
        if not (ours.startswith(theirs) or theirs.startswith(ours)):
            warnings.warn(
                f"{cache.name} was made of {made}, not of {self.name}: embeddings are taken by the "
                "names of samples, which is right only if the same data lie there",
                UnclipWarning,
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Picture `index` with its embedding.

        **Raises**: `DataError` if the cache has none, or it isn't clear which.
        """
        sample = self.dataset.get(index, generator)
        for key in _spellings(sample.key, self._root):
            if rows := list(self.cache.rows(key)):
                return replace(sample, z_image=self._only(sample, key, rows))
        raise DataError(f"{sample.key} has no embedding in {self.cache.name}", "no embedding")

    def _only(self, sample: Sample, key: str, rows: list[int]) -> Tensor:
        """What all rows of a key hold."""
        found = [self.cache.embedding(row) for row in rows]
        z = found[0]
        one = all((other - z).norm() <= SAME * z.norm() for other in found)
        if not one or (key != sample.key and self._is_shared(key)):
            raise DataError(
                f"{sample.key}: more than one picture is called {key}, and {self.cache.name} does "
                "not say of which its embedding is; write it anew with `unclip train embed`",
                "ambiguous",
            )
        return z

    @property
    def _inner(self) -> Dataset:
        """What a `Tolerant` is around."""
        return getattr(self.dataset, "dataset", self.dataset)

    @cached_property
    def _shared(self) -> np.ndarray:
        """Hashes of names that samples of several shards have: 8 bytes a sample for a moment."""
        hashes = np.array(getattr(self._inner, "key_hashes", []), np.uint64)
        hashes.sort()
        return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])

    def _is_shared(self, key: str) -> bool:
        place = np.searchsorted(self._shared, np.uint64(hash_of(key)))
        return bool(place < len(self._shared) and self._shared[place] == hash_of(key))


def _spellings(key: str, root: Path) -> Iterator[str]:
    """A sample's key as the cache may have it."""
    shard, colon, name = key.rpartition(":")
    yield key
    if colon:
        path = root / shard
        yield from (
            f"{same}:{name}" for same in (path, os.path.abspath(path), os.path.relpath(path))
        )
        yield name


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """Files by the number that ends their name. **Raises**: `DataError` if two have the same."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(f"*{suffix}")):
        if match := re.search(r"(\d+)$", path.stem):
            other = found.setdefault(int(match[1]), path)
            if other != path:
                raise DataError(
                    f"{other} and {path.name} have the same number, by which embeddings find their "
                    "captions; keep the files of one run"
                )
    return found


@dataclass(frozen=True)
class _Array:
    """Where the rows of a .npy file lie. They are read one by one: a mapping takes a descriptor."""

    path: Path
    offset: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    def row(self, number: int) -> np.ndarray:
        """**Shapes**: → (D,)."""
        size = self.shape[1] * self.dtype.itemsize
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset + number * size)
                return np.frombuffer(file.read(size), self.dtype)
        except (OSError, ValueError) as error:
            check_open_files(error)
            raise DataError(f"row {number} of {self.path} can't be read: {error}") from None


def _open_array(path: Path) -> _Array:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        check_open_files(error)
        raise DataError(f"{path} is not a whole .npy file: {error}") from None
    if array.ndim != 2 or array.dtype.kind != "f" or not len(array):
        raise DataError(
            f"{path} holds {array.dtype} of shape {array.shape}; expected floats (n, D)"
        )
    if not array.flags.c_contiguous:
        raise DataError(f"{path} is stored column by column; save np.ascontiguousarray of it")
    return _Array(path, array.offset, array.shape, array.dtype)
