"""Write a cache of CLIP image embeddings, from which the prior trains without pictures.

    unclip train embed emoji runs/emoji/cache --clip runs/emoji/clip_text --rounds 4
    unclip train prior emoji/prior data.train=runs/emoji/cache

The same command again goes on; any number of processes share the work.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import Fingerprint, check_same_encoder
from unclip.config import parse_config
from unclip.data.cache import ARRAYS, INDEX, METADATA
from unclip.data.captions import Columns
from unclip.data.metadata import write_metadata
from unclip.data.open import open_dataset
from unclip.data.sample import Batch, Dataset, Sample, fixed
from unclip.errors import ConfigError, DataError, exit_on_error
from unclip.files.disk import check_writable, from_home, read_json, sync, write_json
from unclip.images import Fit
from unclip.precision import allow_tf32, default_dtype
from unclip.progress import progress_bar
from unclip.randomness import generator
from unclip.training.launch import PATIENCE

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
    caption: str | None = None  # its column and that of the pictures, as data.caption, data.image
    image: str | None = None

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
        write_metadata(root / METADATA / f"metadata_{shard:05}.parquet", keys, captions)
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


def _arguments(argv: Sequence[str] | None, called: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=called,
        description="Write the CLIP image embeddings of a dataset, with captions.",
        epilog="Exit codes: 2 configuration, 3 data, 4 checkpoint.",
    )
    parser.add_argument("data", help="what data.train may name, for example emoji or a folder")
    parser.add_argument("out", type=from_home, help="the cache; begun ones are gone on with")
    parser.add_argument("--clip", required=True, help="the frozen encoder")
    parser.add_argument("--resolution", type=int, help="of the pictures; the encoder's by default")
    parser.add_argument(
        "--fit", choices=("pad", "middle"), default="pad", help="padded to squares, or their middle"
    )
    parser.add_argument("--caption", help="the column of captions, as data.caption")
    parser.add_argument("--image", help="the column of pictures, as data.image")
    parser.add_argument("--rounds", type=int, default=1, help="passes, each with other wordings")
    parser.add_argument("--rows", type=int, default=100_000, help="embeddings in a file")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="processes that read, for each")
    parser.add_argument("--seed", type=int, default=0, help="of wordings and augmentation")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, called: str | None = None) -> None:
    """Parse the arguments, embed this process's shards, and finish when all are there.

    `called` is the command in its help.
    """
    given = _arguments(argv, called)
    with exit_on_error():
        for name in ("rounds", "rows", "batch", "resolution"):
            if getattr(given, name) is not None and getattr(given, name) < 1:
                raise ConfigError(f"--{name} = {getattr(given, name)} must be at least 1")
        if given.workers < 0:
            raise ConfigError(f"--workers = {given.workers} must be at least 0")
        check_writable(given.out, "cache")
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
        allow_tf32(state.device)
        clip = FrozenCLIP.load(given.clip, state.device, default_dtype(state.device))
        resolution = given.resolution or clip.preprocess.size
        columns = Columns(given.caption, given.image)
        dataset = open_dataset(given.data, Fit(resolution, given.fit), columns=columns)
        plan = CachePlan(
            given.data,
            resolution,
            given.seed,
            given.rounds,
            given.rows,
            total=len(dataset) * given.rounds,
            fit=given.fit,
            caption=given.caption,
            image=given.image,
        )
        total = plan.total
        with state.main_process_first():
            begin_cache(given.out, clip, plan)
        shown = state.is_main_process
        each = total // state.num_processes
        with progress_bar(what="embed", total=each, shown=shown) as bar:
            rate = write_cache(
                given.out,
                dataset,
                clip,
                plan,
                rank=state.process_index,
                world=state.num_processes,
                batch=given.batch,
                workers=given.workers,
                report=bar.update,
            )
        state.wait_for_everyone()
        if shown:
            finish_cache(given.out)
            print(f"{given.out}: {total} embeddings, {rate:.0f} a second on each process")
        state.destroy_process_group()
