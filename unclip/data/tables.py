"""Tables of file names and captions: .jsonl, .csv and .parquet, of which any row may be bad."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unclip.data.captions import KEYS, Columns, captions_of, check_text, decode, printable
from unclip.data.damage import Damage
from unclip.data.pictures import Picture
from unclip.errors import ConfigError, DataError
from unclip.images import SUFFIXES

TABLES = (".jsonl", ".csv", ".parquet")
FILE_NAME = "file_name"
DELIMITERS = ",;\t|"  # between the cells of a .csv: that which gives the header most
SHOWN = 120  # characters of a bad row

Row = tuple[str, Mapping[str, Any] | DataError]  # where it stands, and what it holds or why not


def read_table(table: Path, columns: Columns, below: Path | None = None) -> list[Picture]:
    """The pictures that a table names, below its folder, with their captions; their keys are names
    in that folder, or in one above it (`below`).

    **Raises**: `DataError` when more than 5 % of the rows can't be used, or it is no table.
    """
    root = os.path.abspath(table.parent)
    damage = Damage(str(table), "rows")
    front = "" if below is None else printable(f"{table.parent.relative_to(below).as_posix()}/")
    pictures = []
    for place, row in _rows(table, columns):
        try:
            picture = _picture(root, place, row, columns)
            pictures.append(replace(picture, key=front + picture.key) if front else picture)
        except DataError as error:
            damage.add(error.kind, str(error))
    if not pictures and not damage.kinds:
        raise DataError(f"{table} lists no pictures")
    damage.check(len(pictures))
    return pictures


def _picture(
    root: str, place: str, row: Mapping[str, Any] | DataError, columns: Columns
) -> Picture:
    """**Raises**: `DataError` whose kind says what is wrong, and the message where."""
    if isinstance(row, DataError):
        raise row
    column = columns.image or FILE_NAME
    name = row.get(column)
    if not isinstance(name, str) or not name:
        has = ", ".join(map(str, row))
        raise DataError(
            f"{place} has {has}", f"have no {column} (data.image names its column, if another)"
        )
    path = os.path.normpath(os.path.join(root, name))  # before any link is followed
    inside = root.rstrip("/") + "/"
    if not path.startswith(inside):
        raise DataError(f"{place} names {name!r}", f"lead out of {root}")
    captions = captions_of(row, columns.caption, place)
    if not captions:
        which = columns.caption or "text or caption"
        raise DataError(f"{place}, {name}", f"have no caption in {which}")
    if not os.path.isfile(path):
        raise DataError(f"{place} names {name!r}", f"name files that are not in {root}")
    return Picture(Path(path), captions, printable(path.removeprefix(inside)))


def _rows(table: Path, columns: Columns) -> Iterator[Row]:
    if table.suffix.lower() == ".parquet":
        return _parquet_rows(table, columns)
    try:
        text = decode(table.read_bytes())
    except OSError as error:
        raise DataError(f"{table} can't be read: {error}") from None
    lines = io.StringIO(text, newline="").readlines()
    if table.suffix.lower() == ".csv":
        return _csv_rows(table, lines, columns.image or FILE_NAME)
    return _json_rows(text.split("\n"))


def _json_rows(lines: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"line {number}", _json_row(line, f"line {number}")


def _json_row(line: str, place: str) -> Mapping[str, Any] | DataError:
    try:
        row = json.loads(check_text(line, place))
    except DataError as error:
        return error
    except (ValueError, RecursionError) as error:
        return DataError(f"{place}: {error}: {_shown(line)}", "are not JSON")
    if not isinstance(row, dict):
        return DataError(f"{place}: {_shown(line)}", "are not JSON objects, one a line")
    return row


def _csv_rows(table: Path, lines: Sequence[str], file_name: str) -> Iterator[Row]:
    """Rows by the header, strictly: else a quote that is not closed would take other rows with it,
    and a caption with commas and without quotes would be cut, both without a word."""
    begin = next((k for k, line in enumerate(lines) if line.strip()), len(lines))
    heads = [_cells(lines[begin : begin + 1], delimiter) for delimiter in DELIMITERS]
    header, delimiter = max(zip(heads, DELIMITERS, strict=True), key=lambda head: len(head[0]))
    names = [name.strip() for name in header]
    twice = [name for k, name in enumerate(names) if name and name in names[:k]]
    if not names or twice:
        what = f"two columns called {twice[0]!r}" if twice else "no header"
        raise DataError(f"{table} has {what}: {_shown(''.join(lines[begin : begin + 1]))}")
    name_at = names.index(file_name) if file_name in names else 0
    begin += 1
    while begin < len(lines):  # again after each row that can't be read
        first = begin
        reader = csv.reader(lines[begin:], delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                after = begin + reader.line_num
                parts = (line.replace('"', "").split(delimiter) for line in lines[first:after])
                rows = {part[name_at].strip() for part in parts if len(part) == len(names)}
                if sum(name.lower().endswith(SUFFIXES) for name in rows) > 1:
                    raise csv.Error("a quote is opened and closed only in another row")
                if cells:
                    yield _csv_row(names, cells, f"line {first + 1}", lines[first])
                first = after
            return
        except csv.Error as error:
            place = f"line {first + 1}"
            yield place, DataError(f"{place}: {error}: {_shown(lines[first])}", "are not CSV")
            begin = first + 1


def _csv_row(names: Sequence[str], cells: Sequence[str], place: str, line: str) -> Row:
    if len(cells) != len(names):
        how = "more" if len(cells) > len(names) else "fewer"
        kind = f"have {how} cells than the header (captions with commas need quotes)"
        return place, DataError(f"{place}: {_shown(line)}", kind)
    try:
        check_text("".join(cells), place)
    except DataError as error:
        return place, error
    return place, dict(zip(names, cells, strict=True))


def _cells(lines: Sequence[str], delimiter: str) -> list[str]:
    """One row; none where it is no row."""
    try:
        return next(csv.reader(lines, delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def _parquet_rows(table: Path, columns: Columns) -> Iterator[Row]:
    pa, pq = arrow()
    number = 0
    try:
        file = pq.ParquetFile(table)
        names = (columns.image or FILE_NAME, *((columns.caption,) if columns.caption else KEYS))
        wanted = [name for name in names if name in file.schema_arrow.names]
        for part in file.iter_batches(columns=wanted):
            for row in _parquet_part(part):
                number += 1
                yield f"row {number}", row or DataError(f"row {number}", "are not UTF-8")
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{table} is not a whole parquet file: {error}") from None


def _parquet_part(part: Any) -> Iterator[Mapping[str, Any] | None]:
    """Its rows; none for one that isn't UTF-8, which no row of the part can then be read with."""
    try:
        yield from part.to_pylist()
    except UnicodeDecodeError:
        for k in range(len(part)):
            try:
                yield part.slice(k, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")


def arrow() -> tuple[Any, Any]:
    """pyarrow and its parquet. **Raises**: `ConfigError` if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("parquet files need pyarrow: pip install 'unclip[train]'") from None
    return pyarrow, pyarrow.parquet


def schema(table: Path) -> Any:
    """A parquet file's. **Raises**: `DataError` if it isn't whole."""
    pa, pq = arrow()
    try:
        return pq.read_schema(table)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{table} is not a whole parquet file: {error}") from None
