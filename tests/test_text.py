"""Text that is no UTF-8, and consoles that can't show what is."""

from __future__ import annotations

import io
import os
import sys

import pytest

from unclip.text import is_whole, meant, open_console, whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", "a cat"),
        ("\ud83d\ude00", "😀"),  # two halves of one character
        ("a \ud83d b", "a \ufffd b"),
        ("caf\udce9", "caf\ufffd"),  # a Latin-1 byte, as Python holds it
    ],
)
def test_halves_of_characters_are_joined_or_replaced(text: str, expected: str) -> None:
    assert whole(text) == expected and is_whole(expected)
    assert is_whole(text) == (text == expected)


def test_an_argument_is_read_as_what_was_typed() -> None:
    for said in ("a cat", "zwei Äpfel", "红色"):
        as_ascii = said.encode().decode("ascii", "surrogateescape")  # with LC_ALL=C
        assert meant(said) == said == meant(as_ascii)
    assert meant(os.fsdecode(b"caf\xe9")) == "café"
    assert is_whole(meant("\ud83d"))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_any_text_is_printed_and_names_of_files_keep_their_bytes(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    bytes_ = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_, encoding=encoding))
    open_console()
    for text in (os.fsdecode(b"caf\xe9.png"), "红.png", "\ud83d", "plain"):
        print(text, flush=True)
    first, second, *rest = bytes_.getvalue().splitlines()
    assert first == b"caf\xe9.png" and second == "红.png".encode()
    assert rest == [rb"\ud83d", b"plain"]
