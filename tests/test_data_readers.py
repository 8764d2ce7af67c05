"""Folders and tables of captioned pictures."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unclip.data.captions import Columns, clean
from unclip.data.open import open_dataset
from unclip.data.readers import expand_braces
from unclip.errors import DataError, UnclipWarning

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
        (tmp_path / name).with_suffix(".txt").write_text(f" a {colour}\t\tpicture \n\n")
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


FUZZ = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 pairs; picture k says so in caption and name."""
    root = tmp_path / "folder"
    root.mkdir()
    data = _encode("red", "JPEG")
    for k in range(40):
        (root / f"{k:03}.jpg").write_bytes(data)
        (root / f"{k:03}.txt").write_text(f"number {k}")
    return root


ROWS = [(f"{k:03}.jpg", f"number {k}") for k in range(40)]


def read(spec: Path, **options: Any) -> dict[str, str]:
    """Key → caption."""
    data = open_dataset(str(spec), 8, **options)
    samples = [data.get(k, torch.Generator()) for k in range(len(data))]
    found = {sample.key: sample.caption for sample in samples}
    assert len(found) == len(samples)
    return found


def table(folder: Path, *lines: str, name: str = "t.csv") -> Path:
    (folder / name).write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    return folder / name


def csv_lines(change: dict[int, str], head: str = "file_name,text") -> list[str]:
    return [head, *(change.get(k, f"{name},{text}") for k, (name, text) in enumerate(ROWS))]


def json_lines(change: dict[int, Any]) -> list[str]:
    rows = [change.get(k, {"file_name": a, "text": b}) for k, (a, b) in enumerate(ROWS)]
    return [row if isinstance(row, str) else json.dumps(row) for row in rows]


def test_names_in_tables_stay_inside_their_folder(folder: Path) -> None:
    """Names are judged before links are followed: the hub's cache is made of links, as are folders
    that people put together."""
    secret = folder.parent / "secret.png"
    secret.write_bytes(_encode("red"))
    (folder / "link.png").symlink_to(secret)
    (folder / "below").symlink_to(folder.parent)
    for name in ("../secret.png", str(secret), "below/../../secret.png", "..", "", "."):
        path = table(folder, json.dumps({"file_name": name, "text": "x"}), name="a.jsonl")
        with pytest.raises(DataError, match=r"1 of 1 rows (lead out of .* line 1 names|have no)"):
            open_dataset(str(path), 8)
    for name in ("link.png", "below/secret.png", "./000.jpg", "below/../000.jpg", "x/../000.jpg"):
        for called in (name, f"{folder}/{name}"):
            path = table(folder, json.dumps({"file_name": called, "text": "x"}), name="a.jsonl")
            assert read(path) == {os.path.normpath(name): "x"}


def test_a_snapshot_of_the_hubs_cache_is_read(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    (blobs / "m").write_text("\n".join(json_lines({})))
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/m")
    for name, _ in ROWS:
        (blobs / f"b{name[:3]}").write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/b{name[:3]}")
    assert read(snapshot) == dict(ROWS)


def test_links_are_followed_into_each_folder_once(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    for name, link in (("up", root), ("again", root / "real"), ("deep", folder), ("lost", "none")):
        (root / name).symlink_to(link)
    (root / "real" / "self").symlink_to(root / "real" / "self")
    for end in (".jpg", ".txt"):
        (root / "real" / f"a{end}").write_bytes((folder / f"000{end}").read_bytes())
    (root / "real" / "b.jpg").symlink_to("nowhere.jpg")
    with pytest.warns(UnclipWarning, match=r"1 of 42 pictures have no caption .*real/b\.jpg"):
        found = read(root)
    assert found == {"real/a.jpg": "number 0", **{f"deep/{a}": b for a, b in ROWS}}


def test_hidden_files_are_passed_over(folder: Path) -> None:
    for name in (
        "._000.jpg",
        ".ipynb_checkpoints/000.jpg",
        "__MACOSX/._1.jpg",
        "@eaDir/000.jpg/S.jpg",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
    (folder / "Thumbs.db").write_bytes(b"")
    (folder / "README.txt").write_text("not a caption")
    assert read(folder) == dict(ROWS)


def test_captions_may_be_in_capitals_and_names_have_dots(folder: Path) -> None:
    (folder / "000.jpg").rename(folder / "a.v1.5.JPG")
    (folder / "000.txt").rename(folder / "a.v1.5.TXT")
    assert read(folder) == {"a.v1.5.JPG": "number 0", **dict(ROWS[1:])}


def spoil(folder: Path, what: str) -> str:
    """Make one of forty pairs unusable; what will be said."""
    picture, text = folder / "007.jpg", folder / "007.txt"
    if what == "no caption":
        text.unlink()
    elif what == "empty":
        text.write_text(" \n\n")
    elif what == "latin-1":
        text.write_bytes("café".encode("latin-1"))
    elif what == "utf-16 without a mark":
        text.write_bytes("a cat".encode("utf-16-le"))
    elif what == "a folder":
        text.unlink(), text.mkdir()
    else:
        picture.rename(folder / "007.bmp")
        return r"are not JPEG, PNG or WebP: 007\.bmp"
    kind = "no caption" if what in ("no caption", "empty", "a folder") else "captions that are not"
    return rf"have {kind}.*: 007\.jpg"


SPOILT = ["no caption", "empty", "latin-1", "utf-16 without a mark", "a folder", "bmp"]


@pytest.mark.parametrize("what", SPOILT)
def test_one_bad_pair_of_many_is_named_and_left_out(folder: Path, what: str) -> None:
    said = spoil(folder, what)
    with pytest.warns(UnclipWarning, match=f"1 of 40 pictures {said}$"):
        assert read(folder) == {a: b for a, b in ROWS if a != "007.jpg"}


def test_missing_captions_are_counted_and_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no JPEG, PNG or WebP"):
        open_dataset(str(tmp_path), 8)
    for k in range(5):
        (tmp_path / f"{k}.png").write_bytes(_encode("red"))
    (tmp_path / "0.txt").write_text("fine")
    with pytest.raises(DataError, match=r"4 of 5 pictures .*1\.png; 2\.png; 3\.png …"):
        open_dataset(str(tmp_path), 8)
    table(tmp_path, "file,text", "0.png,fine", name="metadata.csv")
    with pytest.raises(DataError, match=r"1 of 1 rows have no file_name .*: line 2 has file, text"):
        open_dataset(str(tmp_path), 8)


def test_of_several_lines_one_is_drawn(folder: Path) -> None:
    """They were joined to one, longer than an encoder reads."""
    (folder / "000.txt").write_text("one\r\n\n two  words\nthree\n")
    assert drawn_first(folder) == {"one", "two words", "three"}
    data = open_dataset(str(folder), 8)
    untouched = torch.Generator().manual_seed(0)
    data.get(1, untouched)
    assert torch.equal(untouched.get_state(), torch.Generator().manual_seed(0).get_state())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_says_by_a_mark_how_it_is_encoded(folder: Path, encoding: str) -> None:
    (folder / "000.txt").write_bytes("ein Käse 🧀".encode(encoding))
    assert read(folder)["000.jpg"] == "ein Käse 🧀"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('007.jpg,"number 7', r"are not CSV: line 9: .*007\.jpg,\"number 7"),
        ('007.jpg,"a "seventh" one"', "are not CSV: line 9"),
        ("007.jpg,red, on white", "have more cells than the header .*007.jpg,red, on white"),
        ("007.jpg", "have fewer cells than the header .*: line 9: '007.jpg'"),
        ("007.jpg,", r"have no caption in text or caption: line 9, 007\.jpg"),
        (",a caption", "have no file_name"),
        ("nowhere.jpg,a caption", r"name files that are not in .*: line 9 names 'nowhere\.jpg'"),
        ("../007.jpg,a", r"lead out of .*: line 9 names '\.\./007\.jpg'"),
        ("007.jpg,caf\udce9", "are not UTF-8: line 9"),
    ],
)
def test_one_bad_row_of_a_csv_is_named_and_left_out(folder: Path, row: str, said: str) -> None:
    """A quote that is never closed took the rest of the file as its caption; one with commas and
    no quotes was cut at the first."""
    path = table(folder, *csv_lines({7: row}))
    with pytest.warns(UnclipWarning, match=f"1 of 40 rows {said}"):
        assert read(path) == {a: b for a, b in ROWS if a != "007.jpg"}
    path = table(folder, *csv_lines({k: row for k in range(3)}))
    with pytest.raises(DataError, match=r"3 of 40 rows .*line 2.*; line 3.*; line 4"):
        open_dataset(str(path), 8)


def test_quotes_that_swallow_whole_rows_are_seen(folder: Path) -> None:
    """A quote opened in one row and closed in another is well-formed CSV."""
    for last in (8, 11):
        change = {7: '007.jpg,"number 7', last: f'{last:03}.jpg,number {last}"'}
        other = [";".join(line.split(",")[::-1]) for line in csv_lines(change)]  # captions first
        for lines in (csv_lines(change), other):
            with pytest.warns(UnclipWarning, match="1 of 40 rows are not CSV: line 9: a quote is"):
                found = read(table(folder, *lines))
            own = {f"{last:03}.jpg": f'number {last}"'}
            assert found == {a: b for a, b in ROWS if a != "007.jpg"} | own


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@settings(FUZZ, max_examples=8)
@given(
    captions=st.lists(LINE, min_size=3, max_size=3),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    order=st.sampled_from([["text", " file_name "], ["file_name", "text"]]),
)
def test_csv_as_any_program_writes_it(
    folder: Path,
    delimiter: str,
    encoding: str,
    captions: list[str],
    end: str,
    quoting: Any,
    order: list[str],
) -> None:
    between = "\n" if quoting == csv.QUOTE_ALL else " "
    captions = [f"a{between}{caption}" for caption in captions]
    with (folder / "t.csv").open("w", encoding=encoding, newline="") as file:
        rows = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting)
        rows.writerow(order)
        for (name, _), caption in zip(ROWS, captions, strict=False):
            rows.writerow([caption, name] if order[0] == "text" else [name, caption])
    expected = {f"{k:03}.jpg": clean(caption) for k, caption in enumerate(captions)}
    assert read(folder / "t.csv") == expected


@settings(FUZZ, max_examples=40)
@given(places=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 9)), max_size=4))
def test_stray_quotes_never_give_a_picture_the_words_of_another(
    folder: Path, places: list[tuple[int, int]]
) -> None:
    change = {}
    for row, place in places:
        text = f"number {row}"
        change[row] = f'{row:03}.jpg,{text[:place]}"{text[place:]}'
    path = table(folder, *csv_lines(change))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read(path)
        except DataError as error:
            found = {}
            assert len(change) > 2 and "are not CSV" in str(error)
    for name, caption in found.items():
        assert caption.replace('"', "") == dict(ROWS)[name]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("null", "are not JSON objects, one a line: line 8: 'null'"),
        ('{"file_name": "007.jpg", "text"', "are not JSON: line 8"),
        ("[" * 100_000, "are not JSON: line 8"),
        ('{"file_name": "007.jpg", "text": ' + "1" * 5000 + "}", "are not JSON: line 8"),
        ({"file_name": "007.jpg", "text": " "}, r"have no caption .*: line 8, 007\.jpg"),
        ({"file_name": "007.jpg", "text": None}, "have no caption"),
        ({"file_name": "007.jpg", "text": [{"a": 1}, [], None]}, "have no caption"),
        ({"file_name": "007.jpg", "text": True}, "have no caption"),
        ({"file_name": "007.jpg", "text": float("nan")}, "have no caption"),
        ({"file_name": "007.jpg", "text": 10**400}, "have no caption"),
        ('{"file_name": "007.jpg", "text": ' + "[" * 600 + "]" * 600 + "}", "have no caption"),
        ({"file_name": 7, "text": "a"}, "have no file_name .*: line 8 has file_name, text"),
        ({"file_name": "a" * 5000, "text": "a"}, "name files that are not in"),
        ({"file_name": "a\0.jpg", "text": "a"}, "name files that are not in"),
        ({"file_name": "\ud83d.jpg", "text": "a"}, "name files that are not in"),
        ('{"file_name": "007.jpg", "text": "caf\udce9"}', "are not UTF-8: line 8"),
    ],
)
def test_one_bad_line_of_a_jsonl_is_named_and_left_out(folder: Path, row: Any, said: str) -> None:
    path = table(folder, *json_lines({7: row}), name="t.jsonl")
    with pytest.warns(UnclipWarning, match=f"1 of 40 rows {said}"):
        assert read(path) == {a: b for a, b in ROWS if a != "007.jpg"}


@pytest.mark.parametrize(
    ("row", "drawn"),
    [
        ({"text": ["a", " b ", "", None]}, {"a", "b"}),
        ({"text": "", "caption": "a"}, {"a"}),
        ({"text": None, "captions": ["a"]}, {"a"}),
        ({"text": 7}, {"7"}),
        ({"text": 0.5}, {"0.5"}),
        ({"text": "a cat \ud83d"}, {"a cat �"}),
        ({"text": "\ud83d\ude3a \u0000\u001b[0m a\u2028b"}, {"😺 [0m a b"}),
    ],
)
def test_what_a_caption_may_be_in_every_table(
    folder: Path, row: dict[str, Any], drawn: set[str]
) -> None:
    """Lists and numbers were refused; half a surrogate lost whole files of embeddings later."""
    lines, halves = json_lines({}), any("\ud83d" in str(value) for value in row.values())
    for raw in (False,) if halves else (True, False):
        lines[0] = json.dumps({"file_name": "000.jpg", **row}, ensure_ascii=not raw)
        assert drawn_first(table(folder, *lines, name="t.jsonl")) == drawn
    if not halves:
        columns = {key: [value] for key, value in row.items()}
        pq.write_table(pa.table({"file_name": ["000.jpg"], **columns}), folder / "t.parquet")
        assert drawn_first(folder / "t.parquet") == drawn


def drawn_first(spec: Path) -> set[str]:
    """The captions that the first sample may have."""
    data = open_dataset(str(spec), 8)
    return {data.get(0, torch.Generator().manual_seed(k)).caption for k in range(20)}


def test_bad_rows_of_a_parquet_table_are_left_out(folder: Path) -> None:
    names, texts = (list(column) for column in zip(*ROWS, strict=True))
    bad = pa.StringArray.from_buffers(1, *pa.array([b"caf\xe9"]).buffers()[1:])
    text = pa.concat_arrays([pa.array(texts[:-1], pa.string()), bad])
    pq.write_table(pa.table({"file_name": names, "text": text}), folder / "t.parquet")
    with pytest.warns(UnclipWarning, match="1 of 40 rows are not UTF-8: row 40"):
        assert read(folder / "t.parquet") == dict(ROWS[:-1])


def test_columns_of_other_names(folder: Path) -> None:
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        path = folder / name
        rows = [{"path": a, "text": "x", "title": b} for a, b in ROWS]
        if name == "t.csv":
            table(folder, "path,text,title", *(",".join(row.values()) for row in rows))
        elif name == "t.jsonl":
            table(folder, *map(json.dumps, rows), name=name)
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        assert read(path, columns=Columns("title", "path")) == dict(ROWS)
        with pytest.raises(DataError, match=r"data\.caption|no caption in long"):
            open_dataset(str(path), 8, columns=Columns("long", "path"))


def test_tables_may_lie_further_down(folder: Path) -> None:
    for part in ("train", "validation"):
        (folder / part).mkdir()
        (folder / part / "a.jpg").write_bytes((folder / "000.jpg").read_bytes())
        table(folder / part, '{"file_name": "a.jpg", "text": "x"}', name="metadata.jsonl")
    with pytest.warns(UnclipWarning, match="1 of 2 tables are called train"):
        assert read(folder) == {"train/a.jpg": "x"}


def test_tables_that_are_none_are_named(folder: Path) -> None:
    for lines, said in (
        ([], "has no header"),
        (["file_name,text,text"], "two columns called 'text'"),
        (["file_name,text"], "lists no pictures"),
        (["[", *json_lines({}), "]"], "rows have no file_name"),
    ):
        with pytest.raises(DataError, match=said):
            open_dataset(str(table(folder, *lines)), 8)
    with pytest.raises(DataError, match="42 of 42 rows are not JSON"):
        lines = ["[", *(line + "," for line in json_lines({})), "]"]
        open_dataset(str(table(folder, *lines, name="t.jsonl")), 8)


def test_names_that_are_not_utf_8_make_keys_that_are(folder: Path) -> None:
    """A file called café in Latin-1: its key could not be written to a cache of embeddings."""
    for end in (".jpg", ".txt"):
        os.rename(folder / f"000{end}", os.fsencode(folder) + b"/caf\xe9" + end.encode())
    assert read(folder) == {r"caf\udce9.jpg": "number 0", **dict(ROWS[1:])}


def test_tar_files_beside_pictures_are_said_to_be_read_alone(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "old.tar").write_bytes(b"a backup, further down")
    assert read(folder) == dict(ROWS)
    (folder / "old.tar").write_bytes(b"")
    told = pytest.warns(UnclipWarning, match="1 tar files are read, not the 40 pictures")
    with told, pytest.raises(DataError, match=r"old\.tar"):
        open_dataset(str(folder), 8)


def test_data_without_a_name_are_not_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`unclip new mine --data "$UNSET"` wrote configurations for it."""
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match="the name of the data is empty"):
        open_dataset("", 8)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(_encode("red")[:40])
    (tmp_path / "bad.txt").write_text("broken")
    with pytest.raises(DataError, match=r"bad\.png"):
        open_dataset(str(tmp_path), 8).get(0, torch.Generator())


def test_braces() -> None:
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    assert expand_braces("plain.tar") == ["plain.tar"]
