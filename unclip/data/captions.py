"""Captions as they come in files: bytes, and rows of tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip.errors import DataError

KEYS = ("text", "caption")


def decode(data: bytes, name: object) -> str:
    """UTF-8, with or without a mark. **Raises**: `DataError` naming the file."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text: {error}", "not UTF-8") from None


def clean(caption: str) -> str:
    """One line, with single spaces."""
    return " ".join(caption.split())


def caption_of(row: Mapping[str, Any]) -> str:
    """The caption in a row or JSON object; empty where there is none."""
    values = (row.get(key) for key in KEYS)
    return next((clean(value) for value in values if isinstance(value, str)), "")
