"""CLIP image embeddings of a dataset on disk, with captions: a prior trains from them alone.

FOLDER/img_emb/img_emb_00000.npy          (n, D) float16 raw embeddings, mapped when read
FOLDER/metadata/metadata_00000.parquet    `key` and `caption` of each row
FOLDER/embeddings.json                    how many rows of what, and the encoder that made them;
                                          once all shards are there also mean and deviation

The first two are clip-retrieval's layout, LAION's too, which is read without the third.
"""

from __future__ import annotations

import os
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import Fingerprint, check_same_encoder
from unclip.config import parse_config
from unclip.data.sample import Batch, Dataset, Sample, fixed
from unclip.data.tables import arrow
from unclip.errors import CheckpointError, ConfigError, DataError
from unclip.files.disk import read_json, sync, write_json
from unclip.randomness import generator

INDEX, ARRAYS, METADATA = "embeddings.json", "img_emb", "metadata"
KEY_COLUMNS, CAPTION_COLUMNS = ("key", "image_path", "url"), ("caption", "text", "TEXT")
FORMAT = 1


@dataclass(frozen=True)
class CachePlan:
    """What a cache is of: `rounds` passes over the dataset `data`, each with other wordings."""

    data: str
    resolution: int
    seed: int
    rounds: int
    rows: int  # of a shard
    total: int
    fit: str = "pad"  # of the pictures, as data.fit

    @property
    def shards(self) -> int:
        """How many files the rows fill."""
        return -(-self.total // self.rows)


def write_cache(
    root: Path,
    dataset: Dataset,
    clip: FrozenCLIP,
    plan: CachePlan,
    *,
    rank: int = 0,
    world: int = 1,
    batch: int = 256,
    workers: int = 0,
    report: Callable[[int], Any] = lambda rows: None,
) -> float:
    """Write this process's share of the shards, except those that are there; embeddings a second.

    A shard's array gets its name last, so that a killed run leaves no half of one.
    """
    (root / ARRAYS).mkdir(parents=True, exist_ok=True)
    (root / METADATA).mkdir(exist_ok=True)
    rows, began = 0, time.perf_counter()
    for shard in range(rank, plan.shards, world):
        array = root / ARRAYS / f"img_emb_{shard:05}.npy"
        numbers = range(shard * plan.rows, min((shard + 1) * plan.rows, plan.total))
        if array.is_file():
            report(len(numbers))
            continue
        parts: list[np.ndarray] = []
        keys: list[str] = []
        captions: list[str] = []
        loader = DataLoader(
            _Numbered(dataset, plan.seed, numbers), batch, num_workers=workers, collate_fn=list
        )
        for samples in loader:
            images = Batch.of(samples).to(clip.device).images
            z = clip.encode_image(images).float().cpu().half()  # (B, D)
            if not bool(z.isfinite().all()):
                raise DataError(f"{root}: the encoder gives embeddings beyond float16")
            parts.append(z.numpy())
            keys += [sample.key for sample in samples]
            captions += [sample.caption for sample in samples]
            rows += len(samples)
            report(len(samples))
        _write_metadata(root / METADATA / f"metadata_{shard:05}.parquet", keys, captions)
        beside = array.with_suffix(".tmp")
        with beside.open("wb") as file:
            np.save(file, np.concatenate(parts), allow_pickle=False)
        sync(beside)
        os.replace(beside, array)
    return rows / max(time.perf_counter() - began, 1e-9)


def begin_cache(root: Path, clip: FrozenCLIP, plan: CachePlan) -> None:
    """Say what the cache will be of. **Raises**: `ConfigError` if the folder holds another."""
    ours = {"format": FORMAT, **vars(plan), "clip": clip.fingerprint.model_dump(mode="json")}
    path = root / INDEX
    if path.is_file():
        there = {"fit": "pad", **read_json(path)}
        if "clip" in there:
            encoder = parse_config(there["clip"], Fingerprint, str(path))
            check_same_encoder(encoder, clip.fingerprint, str(root))
        if os.path.abspath(str(there.get("data"))) == os.path.abspath(plan.data):
            there["data"] = plan.data  # one folder is one folder
        differ = [
            f"{key} = {there.get(key)!r}, not {value!r}"
            for key, value in ours.items()
            if key != "clip" and there.get(key) != value
        ]
        if differ:
            raise ConfigError(f"{root} holds embeddings with {'; '.join(differ)}: choose another")
        return
    if root.exists() and any(root.iterdir()):
        raise ConfigError(f"{root} is not empty and has no {INDEX}; choose another folder")
    root.mkdir(parents=True, exist_ok=True)
    write_json(path, ours)


def finish_cache(root: Path) -> None:
    """Enter mean and standard deviation of the raw embeddings, in one pass over the arrays."""
    n, mean, squares = 0, np.float64(0), np.float64(0)  # Chan's update, shard by shard
    for path in sorted((root / ARRAYS).glob("img_emb_*.npy")):
        z = np.load(path, mmap_mode="r").astype(np.float64)
        own = z.mean(0)
        delta, total = own - mean, n + len(z)
        squares = squares + ((z - own) ** 2).sum(0) + delta**2 * (n * len(z) / total)
        mean, n = mean + delta * (len(z) / total), total
    std = np.sqrt(squares / n)
    index = read_json(root / INDEX)
    write_json(root / INDEX, {**index, "mean": mean.tolist(), "std": std.tolist()})


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
        self._paths = [arrays[number] for number in sorted(arrays)]
        self._arrays = [_open_array(path) for path in self._paths]
        self._keys, self._captions = _read_metadata([tables[number] for number in sorted(arrays)])
        self._ends = list(accumulate(len(array) for array in self._arrays))
        self.width = self._arrays[0].shape[1]
        for number, array in zip(sorted(arrays), self._arrays, strict=True):
            if array.shape[1] != self.width:
                raise DataError(
                    f"{arrays[number]} has embeddings of width {array.shape[1]}, others here of "
                    f"{self.width}"
                )
        ends = list(accumulate(len(chunk) for chunk in self._captions.chunks))
        if ends != self._ends:
            shard = next(i for i, (a, b) in enumerate(zip(ends, self._ends, strict=True)) if a != b)
            raise DataError(
                f"{root}: shard {sorted(arrays)[shard]} has {len(self._arrays[shard])} embeddings "
                f"but {len(self._captions.chunks[shard])} captions"
            )

    def _check_shards(self, arrays: list[int], tables: list[int]) -> None:
        if not arrays:
            raise DataError(f"no embeddings in {self.root / ARRAYS}")
        lacking = sorted(set(arrays) - set(tables))
        if lacking:
            raise DataError(f"{self.root} has no captions for shard {lacking[0]}, in {METADATA}")
        if self.index and "mean" not in self.index:
            raise DataError(f"{self.root} is not complete; run train/embed.py again to finish it")

    def __len__(self) -> int:
        return self._ends[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        """A loader's worker maps the files itself, instead of being sent them."""
        return EmbeddingCache, (self.root,)

    def place(self, index: int) -> str:
        """The file that holds row `index`."""
        return str(self._paths[bisect_right(self._ends, index)])

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Row `index` with its one caption; the generator is not drawn from."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        z = torch.from_numpy(self._arrays[shard][row].astype(np.float32))  # (D,)
        if not bool(z.isfinite().all()):
            raise DataError(f"{self.root}: row {row} of shard {shard} is not finite")
        return Sample(None, self._captions[index].as_py() or "", self.key(index), z)

    def key(self, row: int) -> str:
        """The key of one row."""
        return str(self._keys[int(row)].as_py())

    def all_keys(self) -> Iterator[str]:
        """The keys of all rows, in order."""
        for chunk in self._keys.chunks:
            yield from map(str, chunk.to_pylist())

    def check_fit(self, fit: str) -> None:
        """**Raises**: `ConfigError` if the embeddings are of other parts of the pictures."""
        made = self.index.get("fit", "pad") if "data" in self.index else None  # None: not by us
        if fit == "crop" or made not in (None, fit):
            raise ConfigError(
                f"data.fit = {fit}, but {self.root} has each picture's embedding with data.fit = "
                f"{made or 'middle (or pad)'}: set that"
            )

    def check_encoder(self, clip: FrozenCLIP, name: str) -> None:
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

    Its keys are those that the dataset gives, as `train/embed.py` writes them, whether it was named
    by a relative path or an absolute one; or img2dataset's: the name of a sample without its shard.
    Of rows with one key, the first counts.
    """

    def __init__(self, dataset: Dataset, cache: EmbeddingCache) -> None:
        self.name, self.dataset, self.cache = dataset.name, dataset, cache
        hashes = np.fromiter((hash(key) for key in cache.all_keys()), np.int64, len(cache))
        self._rows = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._rows]  # 16 bytes a row with the line before

    def __len__(self) -> int:
        return len(self.dataset)

    def __reduce__(self) -> tuple[Any, ...]:
        return Joined, (self.dataset, self.cache)  # strings hash differently in a new process

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Picture `index` with its embedding. **Raises**: `DataError` if the cache has none."""
        sample = self.dataset.get(index, generator)
        for key in _spellings(sample.key):
            row = self._row(key)
            if row is not None:
                return replace(sample, z_image=self.cache.get(row, generator).z_image)
        raise DataError(f"{sample.key} has no embedding in {self.cache.name}", "no embedding")

    def _row(self, key: str) -> int | None:
        first, end = (np.searchsorted(self._hashes, hash(key), side) for side in ("left", "right"))
        return next((int(row) for row in self._rows[first:end] if self.cache.key(row) == key), None)


def _spellings(key: str) -> Iterator[str]:
    """A sample's key as the cache may have it."""
    shard, colon, name = key.rpartition(":")
    yield key
    if colon:
        yield from (f"{same(shard)}:{name}" for same in (os.path.abspath, os.path.relpath))
        yield f"{os.path.realpath(shard)}:{name}"
        yield name


class _Numbered(TorchDataset[Sample]):
    """Samples by their number in the cache, in this process or in a loader's worker."""

    def __init__(self, dataset: Dataset, seed: int, numbers: range) -> None:
        self.dataset, self.seed, self.numbers = dataset, seed, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Sample:
        number = self.numbers[place]
        own = generator(self.seed, "embedding", number)
        return fixed(self.dataset, number % len(self.dataset), own)


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """Files by the number that ends their name."""
    found = {path: re.search(r"(\d+)$", path.stem) for path in folder.glob(f"*{suffix}")}
    return {int(match[1]): path for path, match in found.items() if match}


def _open_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a whole .npy file: {error}") from None
    if array.ndim != 2 or array.dtype.kind != "f" or not len(array):
        raise DataError(
            f"{path} holds {array.dtype} of shape {array.shape}; expected floats (n, D)"
        )
    return array


def _write_metadata(path: Path, keys: list[str], captions: list[str]) -> None:
    pa, pq = arrow()
    beside = path.with_suffix(".tmp")
    pq.write_table(pa.table({"key": keys, "caption": captions}), beside)
    sync(beside)
    os.replace(beside, path)


def _read_metadata(tables: list[Path]) -> tuple[Any, Any]:
    """Keys and captions, each an array in one chunk a table: compact, and read in place."""
    pa, pq = arrow()
    keys, captions = [], []
    for path in tables:
        try:
            names = pq.read_schema(path).names
            key = next((name for name in KEY_COLUMNS if name in names), None)
            caption = next((name for name in CAPTION_COLUMNS if name in names), None)
            if key is None or caption is None:
                raise DataError(
                    f"{path} has the columns {', '.join(names)}; expected one of "
                    f"{', '.join(KEY_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}"
                )
            table = pq.read_table(path, columns=[key, caption]).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} is not a whole parquet file: {error}") from None
        keys.append(_only_chunk(pa, table[key]))
        captions.append(_only_chunk(pa, table[caption]))
    return pa.chunked_array(keys), pa.chunked_array(captions)


def _only_chunk(pa: Any, column: Any) -> Any:
    column = column.cast(pa.string())
    return column.chunk(0) if column.num_chunks else pa.array([], pa.string())


def embeddings_of(clip: FrozenCLIP, batch: Batch) -> Tensor:
    """Raw image embeddings of a batch, made of its pictures if it brings none.

    **Shapes**: → (B, D) float32.
    """
    return clip.encode_image(batch.images).float() if batch.z_image is None else batch.z_image
