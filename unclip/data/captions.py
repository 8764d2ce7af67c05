"""Captions as they come in files, one rule for every reader: what counts as one, which is drawn."""

from __future__ import annotations

import codecs
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unclip.errors import DataError

KEYS = ("text", "caption", "captions", "TEXT")
MARKS = {  # the longer ones first: UTF-16's begins UTF-32's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
HALF = re.compile(r"[\ud800-\udfff]")
ESCAPED = re.compile(r"[\udc80-\udcff]")
LARGEST = sys.float_info.max  # of numbers that are captions


@dataclass(frozen=True)
class Columns:
    """The columns of captions and of pictures, or their file names, where they have other names."""

    caption: str | None = None
    image: str | None = None


USUAL = Columns()


def decode(data: bytes) -> str:
    """UTF-8, or what a mark at the beginning says; any other byte becomes a half surrogate."""
    marked = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8-sig")
    try:
        return data.decode(marked)
    except UnicodeDecodeError:
        return data.decode("utf-8-sig", "surrogateescape")


def check_text(text: str, name: object) -> str:
    """What `decode` gave, if it is text. **Raises**: `DataError` naming where it stands."""
    if ESCAPED.search(text) or "\0" in text:
        raise DataError(f"{name} is not UTF-8 text, nor UTF-16 with a mark", "are not UTF-8")
    return text


def clean(caption: str) -> str:
    """One line with single spaces; control characters are spaces, half surrogates become `�`."""
    if HALF.search(caption):
        caption = caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(CONTROL.sub(" ", caption).split())


def printable(name: str) -> str:
    """A file's name as a key: what is not UTF-8 in it, written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def hash_of(key: str) -> int:
    """64 bits that are the same in every process."""
    data = key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def read_captions(data: bytes, name: object) -> list[str]:
    """Those of a text file, one a line. **Raises**: `DataError` if it isn't text."""
    return _all(re.split(r"[\r\n]+", check_text(decode(data), name)), name)


def captions_of(row: Mapping[str, Any], column: str | None, name: object) -> list[str]:
    """Those in a row of a table or in a JSON object; none where there is no text.

    From the first of `KEYS` that has any, or from `column` alone: a text, a number, or a list.

    **Raises**: `DataError` if it has bytes that aren't text.
    """
    keys = KEYS if column is None else (column,)
    return next((found for key in keys if (found := _all(row.get(key), name))), [])


def _all(value: Any, name: object) -> list[str]:
    found, left = [], [value]
    while left:  # lists in lists may be deeper than calls
        one = left.pop()
        if isinstance(one, list | tuple):
            left += reversed(one)
            continue
        if isinstance(one, bytes):
            one = check_text(decode(one), name)
        if isinstance(one, int | float) and not isinstance(one, bool) and abs(one) <= LARGEST:
            one = str(one)
        if isinstance(one, str) and (caption := clean(one)):
            found.append(caption)
    return found


def draw(captions: Sequence[str], generator: torch.Generator) -> str:
    """One of several; of one alone the generator draws nothing."""
    several = len(captions) > 1
    return captions[int(torch.randint(len(captions), (), generator=generator)) if several else 0]
