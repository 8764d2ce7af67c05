"""The shipped emoji pictures: openly licensed drawings in eight styles, rasterised on demand.

R resolution. Rasters are cached under `$UNCLIP_CACHE` (or `~/.cache/unclip`): up to 256 px one
memory-mapped array for each set and split, above that one file for each picture.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unclip.data.kept import cache_folder
from unclip.data.sample import Sample
from unclip.errors import DataError
from unclip.files.disk import replacing
from unclip.images import fit_square, load_image, to_pixels, to_rgb
from unclip.progress import progress_bar
from unclip.shipped import shipped

RASTER_SET = "fluent-3d"
FLUENT_SETS = ("fluent-emoji", "fluent-emoji-flat", "fluent-3d")  # they share drawings
LARGEST_ARRAY = 256  # a set of 1024 px arrays would take 5 GB


class Emoji:
    """Emoji pictures on white; `split` is `train` or `val`, `vector_only` leaves out `fluent-3d`.

    Training captions vary in wording; validation captions are always the canonical
    `a {name} emoji in {style}`, in the file's order. Nothing is rasterised before it is asked for.

    **Raises**: `DataError` when the data folder is absent or incomplete.
    """

    def __init__(
        self,
        resolution: int,
        split: str = "train",
        *,
        vector_only: bool = False,
        root: Path | None = None,
        cache: Path | None = None,
    ) -> None:
        name = "emoji-vector" if vector_only else "emoji"
        self.name = name if split == "train" else f"{name}:{split}"
        self.resolution = resolution
        self.split = split
        self.root = data_folder() if root is None else root
        self.cache = cache_folder("emoji") if cache is None else cache
        drawn = [r for r in read_records(self.root) if not (vector_only and r["set"] == RASTER_SET)]
        self.records: list[dict[str, Any]] = [r for r in drawn if r["split"] == split]
        self._train_sets: dict[str, set[str]] = {}  # codepoint → Fluent sets in training
        for record in drawn:
            if record["split"] == "train" and record["set"] in FLUENT_SETS:
                self._train_sets.setdefault(record["codepoint"], set()).add(record["set"])
        self._place: list[tuple[str, int]] = []  # (set, row in the set's array)
        self._keys: dict[str, list[str]] = {}
        for record in self.records:
            keys = self._keys.setdefault(record["set"], [])
            self._place.append((record["set"], len(keys)))
            keys.append(record["key"])
        self._arrays: dict[str, np.ndarray] = {}
        self._names: dict[str, str] = {}  # set → name of its cache entry

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}  # a memory map would be pickled as its contents

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Picture `index`; in training the generator picks the caption's wording."""
        record = self.records[index]
        caption = self.caption(index) if self.split == "val" else vary_caption(record, generator)
        return Sample(to_pixels(self.images(index)), caption, record["key"])

    def caption(self, index: int) -> str:
        """The canonical caption, with which validation is done."""
        return canonical_caption(self.records[index])

    def attributes(self, index: int) -> dict[str, str]:
        """What picture `index` is one of."""
        return {name: self.records[index][name] for name in ("style", "group")}

    def has_fluent_sibling(self, index: int) -> bool:
        """Whether a Fluent picture has its concept in *another* Fluent set in training.

        The three Fluent sets share drawings, so such a validation picture is nearly seen. Of the
        155 validation pictures 67 have a sibling and 88 have none (85 of another family and 3
        Fluent ones).
        """
        record = self.records[index]
        others = self._train_sets.get(record["codepoint"], set()) - {record["set"]}
        return record["set"] in FLUENT_SETS and bool(others)

    def images(self, index: int) -> np.ndarray:
        """Picture `index` on white. **Shapes**: (R, R, 3) uint8."""
        set_name, row = self._place[index]
        if self.resolution > LARGEST_ARRAY:
            return self._picture(set_name, self.records[index]["key"])
        if set_name not in self._arrays:
            self._arrays[set_name] = self._array(set_name)
        return self._arrays[set_name][row]

    def prepare(self) -> None:
        """Rasterise whatever is not in the cache yet (up to 256 px; larger ones on first use)."""
        if self.resolution <= LARGEST_ARRAY:
            for set_name in self._keys:
                self._arrays[set_name] = self._array(set_name)

    def _array(self, set_name: str) -> np.ndarray:
        path = self.cache / f"{self._entry(set_name)}.npy"
        if not path.is_file():
            archive = read_archive(self.root, set_name)
            write_array(path, archive, self._keys[set_name], self.resolution)
        return np.load(path, mmap_mode="r")

    def _picture(self, set_name: str, key: str) -> np.ndarray:
        path = self.cache / self._entry(set_name) / f"{key}.webp"
        if not path.is_file():
            pixels = rasterise(read_archive(self.root, set_name)[key], self.resolution)
            with replacing(path) as temporary:
                # lossless; method 0 is the fastest
                Image.fromarray(pixels).save(temporary, "WEBP", lossless=True, method=0)
        return np.asarray(load_image(path))

    def _entry(self, set_name: str) -> str:
        """A cache entry's name changes with the archive and with the list of pictures."""
        if set_name not in self._names:
            digest = hashlib.sha256(archive_path(self.root, set_name).read_bytes())
            digest.update("\n".join(self._keys[set_name]).encode())
            self._names[set_name] = (
                f"{set_name}-{self.split}-{self.resolution}-{digest.hexdigest()[:12]}"
            )
        return self._names[set_name]


def canonical_caption(record: Mapping[str, Any]) -> str:
    """`a {name} emoji in {style}`, always with "a"."""
    return f"a {record['name']} emoji in {record['style']}"


def vary_caption(record: Mapping[str, Any], generator: torch.Generator) -> str:
    """Half the time the canonical caption, otherwise one of several shorter or richer wordings."""
    if torch.rand((), generator=generator) < 0.5:
        return canonical_caption(record)
    name, style, keywords = record["name"], record["style"], record["keywords"]
    choices = [
        f"a {name} in {style}",
        f"a {name}",
        f"a {name} emoji",
        name,
        f"{name} emoji, {style}",
    ]
    if record["aka"]:
        other = record["aka"][_draw(len(record["aka"]), generator)]
        choices.append(f"a {other} emoji in {style}")
    if len(keywords) >= 2:
        first, second = torch.randperm(len(keywords), generator=generator)[:2].tolist()
        choices.append(f"{name}, {keywords[first]}, {keywords[second]}")
        choices.append(f"{name}, {keywords[first]}, {style}")
    return choices[_draw(len(choices), generator)]


def _draw(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(high, (), generator=generator))


def data_folder() -> Path:
    """Where the pictures lie: `$UNCLIP_EMOJI`, or where they come with the library."""
    root = Path(os.environ.get("UNCLIP_EMOJI") or shipped("data/emoji"))
    if not (root / "samples.jsonl.gz").is_file():
        raise DataError(
            f"no emoji data at {root}; it comes with the library, or point UNCLIP_EMOJI at the "
            "folder data/emoji of a clone"
        )
    return root


@lru_cache(maxsize=4)
def read_records(root: Path) -> list[dict[str, Any]]:
    """All records of `samples.jsonl.gz` in file order: key, set, style, name, keywords, split …"""
    path = root / "samples.jsonl.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}") from None


def archive_path(root: Path, set_name: str) -> Path:
    """The file that holds a set's pictures."""
    raster = set_name == RASTER_SET
    path = root / ("fluent-3d-256.zip" if raster else f"svg/{set_name}.tar.xz")
    if not path.is_file():
        raise DataError(
            f"the emoji set {set_name} is missing: no {path}. An installed package leaves out the "
            "one that is no vectors: data.train=emoji-vector has all others, or point UNCLIP_EMOJI "
            "at the folder data/emoji of a clone"
        )
    return path


@lru_cache(maxsize=8)
def read_archive(root: Path, set_name: str) -> dict[str, bytes]:
    """A set's pictures, SVG or WebP, by key; nothing is unpacked to disk."""
    path = archive_path(root, set_name)
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                return {Path(name).stem: archive.read(name) for name in archive.namelist()}
        with tarfile.open(path) as tar:
            files = ((member.name, tar.extractfile(member)) for member in tar)
            return {Path(name).stem: file.read() for name, file in files if file is not None}
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged: {error}") from None


def rasterise(data: bytes, resolution: int) -> np.ndarray:
    """One drawing (SVG) or picture (WebP) on white. **Shapes**: → (R, R, 3) uint8."""
    if data.lstrip()[:1] != b"<":
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
            return np.asarray(fit_square(to_rgb(image), resolution))
    render, usvg = _resvg()
    try:
        tree = usvg.Tree.from_str(data.decode("utf-8"), usvg.Options.default())
    except BaseException as error:  # a panic of resvg is no Exception and would kill a worker
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"a drawing is not valid SVG: {error}") from None
    width, height = tree.int_size()
    scale = resolution / max(width, height)
    left, top = (resolution - scale * width) / 2, (resolution - scale * height) / 2
    transform = (scale, 0.0, left, 0.0, scale, top)  # row-major
    png = render(tree, transform, None, None, (resolution, resolution), (255, 255, 255, 255))
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return np.asarray(to_rgb(image))


def _resvg() -> tuple[Callable[..., bytes], Any]:
    try:
        from resvg import render, usvg
    except ImportError:
        raise DataError("drawing emoji needs resvg: pip install 'unclip[emoji]'") from None
    return render, usvg


def write_array(path: Path, archive: Mapping[str, bytes], keys: list[str], resolution: int) -> None:
    """Rasterise pictures into one array file, atomically: whoever renames last wins.

    **Shapes**: the file holds (number of keys, R, R, 3) uint8.
    """
    missing = [key for key in keys if key not in archive]
    if missing:
        raise DataError(f"{len(missing)} emoji are not in their archive, first {missing[0]}")
    with replacing(path) as temporary:
        shape = (len(keys), resolution, resolution, 3)
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        jobs = ((archive[key], resolution) for key in keys)
        drawn = progress_bar(_map(_job, jobs), f"drawing {path.stem}", len(keys), unit=" pictures")
        for row, pixels in enumerate(drawn):
            array[row] = pixels
        array.flush()


def _job(job: tuple[bytes, int]) -> np.ndarray:
    return rasterise(*job)


def _map(
    function: Callable[[tuple[bytes, int]], np.ndarray], jobs: Iterable[tuple[bytes, int]]
) -> Iterator[np.ndarray]:
    """`map` over a process pool where there are cores and processes can be forked.

    An executor and not a `multiprocessing.Pool`, which waits for ever when a worker dies.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    daemon = multiprocessing.current_process().daemon  # a loader's worker may not have children
    if cores < 2 or daemon or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(cores, 16), mp_context=context) as pool:
        yield from pool.map(function, jobs, chunksize=16)
