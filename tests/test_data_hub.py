"""Datasets by name (local folders stand for the hub's) and pictures inside parquet files."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unclip.data.captions import Columns
from unclip.data.open import open_dataset
from unclip.data.sample import fixed
from unclip.errors import DataError, UnclipWarning

LEVELS = [0, 60, 120, 180, 240]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def hub_style(folder: Path, **columns: Any) -> Path:
    """Parquet as `push_to_hub` writes it, with the features in its metadata."""
    columns = {
        "image": [{"bytes": png(level), "path": None} for level in LEVELS],
        "text": [f"level  {level}" for level in LEVELS],
    } | columns
    table = datasets.Dataset.from_dict(columns)
    table = table.cast_column("image", datasets.Image(decode=False))
    (folder / "data").mkdir(parents=True)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    table.select([1]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def level_of(image: torch.Tensor) -> int:
    return round((float(image[0, 4, 4]) + 1) * 127.5)


def test_a_dataset_by_name_gives_every_row_of_its_split(tmp_path: Path) -> None:
    dataset = open_dataset(f"hf:{hub_style(tmp_path / 'd')}", 8)
    samples = [fixed(dataset, i) for i in range(len(dataset))]
    assert [level_of(sample.image) for sample in samples] == LEVELS
    assert [sample.caption for sample in samples] == [f"level {level}" for level in LEVELS]
    assert samples[0].image.shape == (3, 8, 8)
    held_out = open_dataset(f"hf:{tmp_path / 'd'}:test", 8)
    assert [fixed(held_out, i).caption for i in range(len(held_out))] == ["level 60"]


def test_of_several_captions_one_is_drawn(tmp_path: Path) -> None:
    captions = [[f"{level} a", f"{level} b", ""] for level in LEVELS]
    dataset = open_dataset(f"hf:{hub_style(tmp_path / 'd', text=captions)}", 8)
    drawn = {dataset.get(1, torch.Generator().manual_seed(k)).caption for k in range(20)}
    assert drawn == {"60 a", "60 b"}


@pytest.mark.parametrize("packed", [False, True])
def test_a_dataset_of_picture_files_is_read(tmp_path: Path, packed: bool) -> None:
    """datasets keeps only the paths of such pictures, and each row had no picture."""
    (tmp_path / "d").mkdir()
    lines = [json.dumps({"file_name": f"{x}.png", "text": f"level {x}"}) for x in LEVELS]
    (tmp_path / "d" / "metadata.jsonl").write_text("\n".join(lines))
    for level in LEVELS:
        (tmp_path / "d" / f"{level}.png").write_bytes(png(level))
    if packed:
        shutil.make_archive(str(tmp_path / "z" / "train"), "zip", tmp_path / "d")
    dataset = open_dataset(f"hf:{tmp_path / ('z' if packed else 'd')}", 8)
    samples = [fixed(dataset, i) for i in range(len(dataset))]
    assert [(level_of(s.image), s.caption) for s in samples] == [(x, f"level {x}") for x in LEVELS]
    shutil.rmtree(tmp_path / ("z" if packed else "d"))
    with pytest.raises(DataError, match=r"row 0, \S*0\.png\S*, can't be read"):
        fixed(dataset, 0)


@pytest.mark.parametrize("hub", [False, True])
def test_paths_in_parquet_files_are_not_followed(tmp_path: Path, hub: bool) -> None:
    (tmp_path / "secret.png").write_bytes(png(9))
    named = [{"bytes": None, "path": str(tmp_path / "secret.png")}] * len(LEVELS)
    folder = hub_style(tmp_path / "d", image=named)
    file = folder / "data" / "test-00000-of-00001.parquet"
    dataset = open_dataset(f"hf:{folder}" if hub else str(file), 8)
    with pytest.raises(DataError, match="row 0 has no picture"):
        fixed(dataset, 0)


@pytest.mark.parametrize("name", ["set[1]", "a{b}", "what?", "st*r"])
def test_signs_of_patterns_may_be_in_a_folders_name(tmp_path: Path, name: str) -> None:
    """datasets took the names of files for patterns, which matched nothing."""
    (tmp_path / name).mkdir()
    table = pa.table({"image": [png(level) for level in LEVELS], "text": ["x"] * len(LEVELS)})
    pq.write_table(table, tmp_path / name / "a.parquet")
    for spec in (tmp_path / name, tmp_path / name / "a.parquet"):
        assert level_of(fixed(open_dataset(str(spec), 8), 2).image) == LEVELS[2]


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_parquet_files_may_hold_the_pictures(tmp_path: Path, form: str) -> None:
    """img2dataset's columns, and an image feature without its metadata."""
    for number, part in enumerate((LEVELS[:3], LEVELS[3:])):
        pictures = [png(level) for level in part]
        column = pictures if form == "bytes" else [{"bytes": p, "path": "x"} for p in pictures]
        table = pa.table({"caption": [str(level) for level in part], "jpg": column})
        pq.write_table(table, tmp_path / f"0000{number}.parquet")
    for spec in (
        str(tmp_path),
        str(tmp_path / "*.parquet"),
        str(tmp_path / "{00000,00001}.parquet"),
    ):
        dataset = open_dataset(spec, 8)
        samples = [fixed(dataset, i) for i in range(len(dataset))]
        assert [(level_of(s.image), s.caption) for s in samples] == [(x, str(x)) for x in LEVELS]
    assert len(open_dataset(str(tmp_path / "00001.parquet"), 8)) == 2


def test_a_bad_row_has_another_stand_for_it(tmp_path: Path) -> None:
    images = [{"bytes": png(level), "path": None} for level in [*LEVELS] * 60]
    images[7] = {"bytes": b"no picture", "path": None}
    columns = {"image": images, "text": ["x"] * 300}
    dataset = open_dataset(f"hf:{hub_style(tmp_path / 'd', **columns)}", 8)
    with pytest.warns(UnclipWarning, match="row 7 is not a JPEG, PNG or WebP picture"):
        assert fixed(dataset, 7).caption == "x"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("FOLDER/two.parquet", "expected one with pictures (encoded, not their names), not a and"),
        ("hf:absent/name", "data 'hf:absent/name' can't be loaded: "),
        ("hf:FOLDER:val", 'can\'t be loaded: Unknown split "val"'),
        ("FOLDER/names.parquet", "has the columns picture, text; expected one with pictures"),
        ("FOLDER/{names,more}.parquet", "more.parquet is not there"),
        ("FOLDER/torn.parquet", "torn.parquet is not a whole parquet file"),
    ],
)
def test_what_can_not_be_used_is_an_error(tmp_path: Path, spec: str, message: str) -> None:
    folder = hub_style(tmp_path / "d")
    pq.write_table(pa.table({"picture": ["a.png"], "text": ["x"]}), folder / "names.parquet")
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"], "text": ["z"]}), folder / "two.parquet")
    (folder / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError) as raised:
        open_dataset(spec.replace("FOLDER", str(folder)), 8)
    assert message in str(raised.value)


def test_columns_of_other_names_and_files_further_down(tmp_path: Path) -> None:
    """Of a dataset of the hub that was fetched file by file; what is held out is not trained on."""
    folder = tmp_path / "d" / "en" / "data"
    folder.mkdir(parents=True)
    columns = {
        "mask": [png(0)] * 3,
        "image": [png(level) for level in LEVELS[:3]],
        "prompt": ["a"] * 3,
        "file_name": ["x.png"] * 3,
    }
    pq.write_table(pa.table(columns), folder / "train-00000.parquet")
    pq.write_table(pa.table(columns), folder / "test-00000.parquet")
    with pytest.raises(DataError, match="name their column as"), pytest.warns():
        open_dataset(str(tmp_path / "d"), 8)
    with pytest.warns(UnclipWarning, match="1 of 2 tables are called train"):
        dataset = open_dataset(str(tmp_path / "d"), 8, columns=Columns("prompt"))
    samples = [fixed(dataset, i) for i in range(len(dataset))]
    assert [(level_of(s.image), s.caption) for s in samples] == [(x, "a") for x in LEVELS[:3]]
    assert samples[0].key == "row 0"
    file = str(folder / "test-00000.parquet")
    assert level_of(fixed(open_dataset(file, 8, columns=Columns("prompt", "mask")), 1).image) == 0


@pytest.mark.parametrize(
    ("column", "drawn"),
    [
        (pa.array(["a  b", None, ""]), "a b"),
        (pa.array([7, None, 0]), "7"),
        (pa.array([0.5, float("nan"), None]), "0.5"),
        (pa.array([["", "x"], [], [None]]), "x"),
        (pa.array([b"bytes", b"caf\xe9", b""]), "bytes"),
        (pa.StringArray.from_buffers(2, *pa.array([b"fine", b"caf\xe9"]).buffers()[1:]), "fine"),
    ],
)
def test_what_a_caption_may_be(tmp_path: Path, column: pa.Array, drawn: str) -> None:
    """A number was a traceback, and so were bytes that aren't UTF-8."""
    text = pa.concat_arrays([column.slice(0, 1)] * 60 + [column.slice(1, 1)])
    pq.write_table(pa.table({"image": [png(9)] * 61, "text": text}), tmp_path / "a.parquet")
    dataset = open_dataset(str(tmp_path / "a.parquet"), 8)
    assert fixed(dataset, 0).caption == drawn
    with pytest.warns(UnclipWarning, match="row 60 (has an empty caption|is not UTF-8)"):
        assert fixed(dataset, 60).caption == drawn


@pytest.mark.parametrize("several", [False, True])
def test_classes_are_called_by_their_names(tmp_path: Path, several: bool) -> None:
    """-1, which says that there is none, was the last class; of a list the numbers were drawn."""
    kind, labels = datasets.ClassLabel(names=["cat", "dog"]), [1, 0] * 30 + [-1]
    columns = {
        "image": [png(1)] * 61,
        "label": [[k, -1] for k in labels] if several else labels,
    }
    features = {"image": datasets.Value("binary"), "label": [kind] if several else kind}
    table = datasets.Dataset.from_dict(columns, datasets.Features(features))
    table.to_parquet(tmp_path / "a.parquet")
    dataset = open_dataset(str(tmp_path / "a.parquet"), 8, columns=Columns("label"))
    assert [fixed(dataset, i).caption for i in range(4)] == ["dog", "cat"] * 2
    with pytest.warns(UserWarning, match="row 60 has an empty caption"):
        assert fixed(dataset, 60).caption in ("cat", "dog")
