"""How fast one core feeds a training: pictures decoded and degraded, rows of a cache, embeddings.

See benchmarks/README.md. All is made anew in a temporary folder, then read as a run reads it.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from machine import MB, memory, reset_peak

from unclip.clip.encoder import FrozenCLIP
from unclip.data.cache import EmbeddingCache
from unclip.data.degradations import bsr
from unclip.data.metadata import write_metadata
from unclip.data.open import open_dataset
from unclip.data.order import batches
from unclip.data.sample import Dataset
from unclip.data.shards import index_shard
from unclip.errors import exit_on_error
from unclip.files.disk import write_json
from unclip.images import to_pil
from unclip.randomness import generator
from unclip.text import markdown_table
from unclip.training.embed import CachePlan, begin_cache, finish_cache, write_cache

SECONDS = 3.0  # for each measurement


def rate(work: Callable[[int], int], seconds: float = SECONDS) -> float:
    """Items a second of `work(k)`, which says how many it did; the first call warms up."""
    work(0)
    done, k, began = 0, 1, time.perf_counter()
    while time.perf_counter() - began < seconds:
        done, k = done + work(k), k + 1
    return done / (time.perf_counter() - began)


def write_tar(path: Path, dataset: Dataset, count: int, form: str, bad: bool = False) -> None:
    """A webdataset shard of the first pictures; if `bad`, the first is cut in half."""
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            sample = dataset.get(index, generator(0, "benchmark", index))
            file = io.BytesIO()
            to_pil(sample.image).save(file, form, quality=90)
            data = file.getvalue()[: file.tell() // 2 if bad and index == 0 else None]
            parts = {form.lower(): data, "txt": sample.caption.encode()}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{index:06}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def measure_pictures(root: Path, side: int, form: str) -> dict[str, float]:
    """Pictures a second from a tar shard, in training order; at 1024 also degraded."""
    shard = root / f"{form}-{side}.tar"
    write_tar(shard, open_dataset("emoji-vector:val", side), min(100, 2**20 // side), form)
    stream = batches(open_dataset(str(shard), side), batch=8, seed=0)

    def read(k: int) -> int:
        return len(next(stream))

    def degrade(k: int) -> int:
        batch = next(stream)
        for image, g in zip(batch.images, batch.ids.tolist(), strict=True):
            bsr(image, side // 4, generator(0, "bsr", g))
        return len(batch)

    return {"read": rate(read)} | ({"read and BSR": rate(degrade)} if side == 1024 else {})


def measure_dirt(root: Path) -> dict[str, float]:
    """Pictures a second of 64 px from shards of which one in a hundred can't be decoded."""
    dataset = open_dataset("emoji", 64)
    rates: dict[str, list[float]] = {"clean": [], "1 % bad": []}
    for name in rates:
        for shard in range(10):
            write_tar(root / f"{name}-{shard}.tar", dataset, 100, "PNG", bad=name != "clean")
    streams = {n: batches(open_dataset(f"{root}/{n}-*.tar", 64), batch=50, seed=0) for n in rates}
    for _ in range(5):  # by turns: the machine is noisy
        for name, stream in streams.items():
            rates[name].append(rate(lambda k, stream=stream: len(next(stream)), SECONDS / 2))
    return {name: statistics.median(several) for name, several in rates.items()}


def measure_index(root: Path) -> dict[str, float]:
    """Samples indexed a second, checksums of their pictures included."""
    shards = sorted(root.glob("clean-*.tar"))
    return {"indexed": rate(lambda k: len(index_shard(shards[k % len(shards)]).entries))}


def measure_many(root: Path, rows: int) -> dict[str, float]:
    """What two processes need to open a thousand shards, together of so many samples.

    One shard under a thousand names, its index taken each time and not read again.
    """
    shard = root / "many.tar"
    dataset = open_dataset("shapes", 8)
    write_tar(shard, dataset, 100, "PNG")
    index = index_shard(shard)
    index = replace(index, entries=np.tile(index.entries, rows // 100_000))
    (root / "many").mkdir()
    for number in range(1000):
        os.link(shard, root / "many" / f"{number:04}.tar")
    with patch("unclip.data.shards.index_shard", lambda path, *texts: index):
        return measure_opening(root, lambda: open_dataset(str(root / "many"), 8))


def measure_rows(root: Path, rows: int) -> dict[str, float]:
    """What two processes need to open a cache of so many embeddings, in ten files."""
    each, captions = rows // 10, [f"a caption of the usual length, number {k}" for k in range(1000)]
    for name in ("img_emb", "metadata"):
        (root / "rows" / name).mkdir(parents=True)
    for number in range(10):
        array = root / "rows" / "img_emb" / f"img_emb_{number}.npy"
        np.save(array, np.full((each, 8), number, np.float16))
        keys = [f"{number:05}{k:09}" for k in range(each)]
        table = root / "rows" / "metadata" / f"metadata_{number}.parquet"
        write_metadata(table, keys, [captions[k % 1000] for k in range(each)])
    return measure_opening(root, lambda: EmbeddingCache(root / "rows"))


def measure_opening(root: Path, opened: Callable[[], Dataset]) -> dict[str, float]:
    """Memory of its own, descriptors and seconds, for each of two processes, to open data and draw
    two batches; first with nothing kept, then again."""
    context, result = multiprocessing.get_context("fork"), {}
    with patch.dict(os.environ, UNCLIP_CACHE=str(root / "kept"), LOCAL_WORLD_SIZE="2"):
        for when in ("first", "again"):
            told = context.Queue()
            both = [context.Process(target=_open, args=(opened, k, told)) for k in (0, 1)]
            for process in both:
                process.start()
            found = [told.get() for _ in both]
            for process in both:
                process.join()
            result |= {f"{when}: {key}": max(one[key] for one in found) for key in found[0]}
    return result


def _open(opened: Callable[[], Dataset], rank: int, told: Any) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    before, held, began = memory("RssAnon"), len(os.listdir("/proc/self/fd")), time.perf_counter()
    reset_peak()
    peak = memory("VmHWM")
    dataset = opened()
    stream = batches(dataset, batch=256, seed=0, rank=rank, world=2)
    next(stream), next(stream)
    told.put(
        {
            "samples": len(dataset),
            "seconds": time.perf_counter() - began,
            "MB of its own": (memory("RssAnon") - before) / MB,
            "MB at most, with what is mapped": (memory("VmHWM") - peak) / MB,
            "descriptors": len(os.listdir("/proc/self/fd")) - held,
        }
    )


def measure_cache(root: Path, clip: FrozenCLIP, rows: int) -> dict[str, float]:
    """Embeddings written a second from pictures in memory; rows read a second, in random order."""
    plan = CachePlan("shapes", clip.image_size, 0, 1, rows, rows)
    begin_cache(root / "cache", clip, plan)
    dataset = open_dataset("shapes", clip.image_size)
    written = write_cache(root / "cache", dataset, clip, plan)
    finish_cache(root / "cache")
    stream = batches(EmbeddingCache(root / "cache"), batch=256, seed=0)
    return {"written": written, "read": rate(lambda k: len(next(stream)))}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and keep the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clip", default="weights/emoji", help="the encoder of the cache")
    parser.add_argument("--rows", type=int, default=4000, help="of the cache")
    parser.add_argument("--many", type=int, default=10_000_000, help="samples to be opened at once")
    parser.add_argument("--only-many", action="store_true", help="measure nothing but that")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data.json"))
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what is bad is bad on purpose
    with exit_on_error(), tempfile.TemporaryDirectory() as folder:
        root, result = Path(folder), {}
        if not given.only_many:
            result = measure_rates(root, FrozenCLIP.load(given.clip), given.rows)
            rates = [[*what, f"{value:,.0f}"] for what, value in _flat(result)]
            print(markdown_table(["what", "how", "a second, one core"], rates))
        shards, cache = measure_many(root, given.many), measure_rows(root, given.many)
        many = {"a thousand shards": shards, "a cache": cache}
        sizes = [[*what, f"{value:,.1f}"] for what, value in _flat(many)]
        print(markdown_table(["opened by two processes", "", "each"], sizes))
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.out, {**result, "many": many})


def measure_rates(root: Path, clip: FrozenCLIP, rows: int) -> dict[str, dict[str, float]]:
    """Pictures, samples and embeddings a second."""
    result = {
        f"{form}, {side} px": measure_pictures(root, side, form)
        for side, form in ((64, "PNG"), (256, "JPEG"), (1024, "JPEG"))
    }
    result["PNG, 64 px, in ten shards"] = measure_dirt(root) | measure_index(root)
    result[f"embeddings, {clip.image_size} px"] = measure_cache(root, clip, rows)
    return result


def _flat(result: dict[str, dict[str, float]]) -> list[tuple[tuple[str, str], float]]:
    return [((what, how), x) for what, found in result.items() for how, x in found.items()]


if __name__ == "__main__":
    main()
