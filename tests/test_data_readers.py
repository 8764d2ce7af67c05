"""Folders and tables of captioned pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unclip.data.open import open_dataset
from unclip.data.readers import expand_braces
from unclip.errors import DataError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def _encode(colour: str, suffix: str = "PNG", size: tuple[int, int] = (12, 12)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(file, suffix)
    return file.getvalue()


def _captions(spec: str | Path) -> dict[str, list[float]]:
    """Caption → colour of the middle pixel."""
    data = open_dataset(str(spec), 8)
    samples = [data.get(i, torch.Generator()) for i in range(len(data))]
    assert all(sample.image.shape == (3, 8, 8) for sample in samples)
    return {sample.caption: sample.image[:, 4, 4].tolist() for sample in samples}


def test_a_folder_with_captions_beside_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, colour in (("a.png", "red"), ("deep/b.PNG", "green")):
        (tmp_path / name).write_bytes(_encode(colour))
        (tmp_path / name).with_suffix(".txt").write_text(f" a {colour}\npicture ")
    assert _captions(tmp_path) == {"a red picture": [1, -1, -1], "a green picture": [-1, 1, -1]}


def test_oblong_pictures_are_padded_on_white(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_encode("red", size=(32, 16)))
    (tmp_path / "a.txt").write_text("a bar")
    image = open_dataset(str(tmp_path), 8).get(0, torch.Generator()).image
    assert image[:, 0, 4].tolist() == [1, 1, 1] and image[:, 4, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize("key", ["text", "caption"])
def test_tables_of_both_kinds(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.png").write_bytes(_encode("red"))
    (tmp_path / "b.jpg").write_bytes(_encode("blue", "JPEG"))
    rows = [{"file_name": "a.png", key: "one, red"}, {"file_name": "b.jpg", key: "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(_captions(tmp_path)) == ["one, red", "two"]
    table = tmp_path / "other.csv"
    table.write_text(f'{key},file_name\n"one, red",a.png\n')
    assert _captions(table) == {"one, red": [1, -1, -1]}
    columns = {"file_name": ["b.jpg", "a.png"], key: ["zwei", "eins"], "else": [1, 2]}
    pq.write_table(pa.table(columns), tmp_path / "other.parquet")
    assert list(_captions(tmp_path / "other.parquet")) == ["zwei", "eins"]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "other.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cut\.parquet is not a whole parquet file"):
        open_dataset(str(tmp_path / "cut.parquet"), 8)


def test_names_in_tables_stay_inside_their_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(_encode("red"))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        row = {"file_name": name, "text": "x"}
        (root / "metadata.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match=r"line 1: file_name .* leads out of"):
            open_dataset(str(root), 8)


def test_missing_captions_are_counted_and_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no JPEG, PNG or WebP"):
        open_dataset(str(tmp_path), 8)
    for k in range(5):
        (tmp_path / f"{k}.png").write_bytes(_encode("red"))
    (tmp_path / "0.txt").write_text("fine")
    (tmp_path / "1.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"4 of 5 pictures .*1\.png, 2\.png, 3\.png …"):
        open_dataset(str(tmp_path), 8)
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text\n0.png,fine\n9.png,gone\n")
    with pytest.raises(DataError, match=r"1 of 2 pictures .*9\.png"):
        open_dataset(str(tmp_path), 8)
    table.write_text("file,text\n0.png,fine\n")
    with pytest.raises(DataError, match="row 2 has no file_name"):
        open_dataset(str(tmp_path), 8)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(_encode("red")[:40])
    (tmp_path / "bad.txt").write_text("broken")
    with pytest.raises(DataError, match=r"bad\.png"):
        open_dataset(str(tmp_path), 8).get(0, torch.Generator())


def test_braces() -> None:
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    assert expand_braces("plain.tar") == ["plain.tar"]
