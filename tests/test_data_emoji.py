"""The shipped emoji: counts, captions, the split, and rasters drawn into a cache."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.data import emoji
from unclip.data.open import open_dataset
from unclip.errors import DataError
from unclip.images import from_array, psnr, resize

ROOT = Path(__file__).parents[1] / "data" / "emoji"
SMALL = "streamline-emojis"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNCLIP_EMOJI", raising=False)


def _only(split: str, resolution: int, keep: int) -> emoji.Emoji:
    """The first pictures of the smallest set, so that a test draws a handful."""
    data = emoji.Emoji(resolution, split)
    chosen = [i for i, record in enumerate(data.records) if record["set"] == SMALL][:keep]
    data.records = [data.records[i] for i in chosen]
    data._place = [(SMALL, row) for row in range(keep)]
    data._keys = {SMALL: [record["key"] for record in data.records]}
    return data


def test_the_counts_are_those_of_the_readme() -> None:
    sizes = {
        spec: len(open_dataset(spec, 64))
        for spec in ("emoji", "emoji:val", "emoji-vector", "emoji-vector:val")
    }
    assert list(sizes.values()) == [10_730, 155, 8_970, 127]
    val = emoji.Emoji(64, "val")
    assert sum(val.has_fluent_sibling(i) for i in range(len(val))) == 67
    assert open_dataset("emoji:val", 64).name == "emoji:val"


def test_validation_concepts_are_in_training_only_in_other_styles() -> None:
    train, val = emoji.Emoji(64), emoji.Emoji(64, "val")
    seen = {(record["name"], record["style"]) for record in train.records}
    names = {record["name"] for record in train.records}
    again = [r["key"] for r in val.records if (r["name"], r["style"]) in seen]
    # both exceptions are listed in the data's README: concepts that training lacks altogether …
    assert sum(record["name"] not in names for record in val.records) == 3
    # … and a second drawing of the same concept
    assert again == [key for key in again if key.startswith(SMALL)] and len(again) == 3
    assert not {r["key"] for r in train.records} & {r["key"] for r in val.records}


def test_captions_follow_the_templates_and_half_are_canonical() -> None:
    data = emoji.Emoji(64)
    g = torch.Generator().manual_seed(0)
    canonical, forms = 0, Counter[str]()
    for index in range(0, 10_000, 5):
        record = data.records[index]
        caption = emoji.vary_caption(record, g)
        canonical += caption == data.caption(index)
        names = [record["name"], *record["aka"]]
        assert any(name in caption for name in names), (caption, record)
        form = caption.replace(record["style"], "{style}").replace(record["name"], "{name}")
        forms[re.sub(r"(?<=\{name\}, )[^{}]+", "…", form)] += 1
    assert 0.46 < canonical / 2000 < 0.54
    assert {"a {name}", "{name}", "a {name} in {style}", "{name} emoji, {style}"} <= set(forms)
    assert data.caption(1) == "a whale emoji in glossy 3d style"


def test_validation_captions_are_canonical_and_training_ones_a_function_of_the_generator() -> None:
    val, train = _only("val", 16, 2), _only("train", 16, 2)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        assert val.get(0, g).caption == val.caption(0)
        again = [train.get(1, torch.Generator().manual_seed(seed)).caption for _ in range(2)]
        assert again[0] == again[1]


def test_arrays_are_drawn_once_and_survive_pickling(tmp_path: Path) -> None:
    data = _only("train", 32, 4)
    data.prepare()
    (path,) = (tmp_path / "cache" / "emoji").iterdir()
    changed = path.stat().st_mtime_ns
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 20_000_000 and copy._arrays == {}
    sample = copy.get(2, torch.Generator().manual_seed(0))
    assert path.stat().st_mtime_ns == changed
    assert sample.image.shape == (3, 32, 32) and sample.image.dtype == torch.float32
    assert sample.key == data.records[2]["key"]
    drawn = emoji.rasterise(emoji.read_archive(ROOT, SMALL)[sample.key], 32)
    assert np.array_equal(drawn, data.images(2))
    torch.testing.assert_close(sample.image, from_array(drawn))
    corners = drawn[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all() and drawn.std() > 20  # white ground, something on it


def test_a_changed_archive_is_drawn_again(tmp_path: Path) -> None:
    """A cache keyed by names alone would keep serving the old pictures."""
    root = tmp_path / "emoji"
    (root / "svg").mkdir(parents=True)
    (root / "samples.jsonl.gz").symlink_to(ROOT / "samples.jsonl.gz")
    archive = (ROOT / "svg" / f"{SMALL}.tar.xz").read_bytes()
    entries = []
    for data in (archive, archive + bytes(4)):
        (root / "svg" / f"{SMALL}.tar.xz").write_bytes(data)
        picture = _only("train", 32, 2)
        picture.root = root
        entries.append(picture._entry(SMALL))
    assert entries[0] != entries[1]


def test_large_pictures_are_drawn_one_by_one_and_agree_with_small_ones(tmp_path: Path) -> None:
    large, small = _only("train", 512, 3), _only("train", 64, 3)
    pictures = [torch.stack([from_array(d.images(i)) for i in range(3)]) for d in (large, small)]
    assert (psnr(resize(pictures[0], 64), pictures[1]) > 22).all()
    files = list((tmp_path / "cache" / "emoji").glob("*-512-*/*.webp"))
    assert len(files) == 3
    again = _only("train", 512, 3).images(1)
    assert np.array_equal(
        again, emoji.rasterise(emoji.read_archive(ROOT, SMALL)[large.records[1]["key"]], 512)
    )


def test_a_raster_picture_is_composited_on_white_without_a_dark_rim() -> None:
    import io

    picture = Image.new("RGBA", (256, 256))  # black where transparent
    picture.paste((255, 0, 0, 255), (64, 64, 192, 192))
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=True)
    drawn = emoji.rasterise(file.getvalue(), 64)
    assert (drawn[0, 0] == 255).all() and tuple(drawn[32, 32]) == (255, 0, 0)
    assert drawn[..., 0].min() == 255  # between red and white the red channel never drops


def test_absent_data_and_absent_pictures_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="1 emoji are not in their archive, first nope"):
        emoji.write_array(tmp_path / "a.npy", {}, ["nope"], 8)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("UNCLIP_EMOJI", str(tmp_path))
    with pytest.raises(DataError, match="UNCLIP_EMOJI"):
        open_dataset("emoji", 64)


def test_a_failed_drawing_is_an_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """resvg panics, which killed the worker, and the pool waited for it for ever."""
    with pytest.raises(DataError, match="not valid SVG"):
        emoji.write_array(tmp_path / "a.npy", {"x": b"<nothing"}, ["x"], 8)
    assert list(tmp_path.iterdir()) == []
