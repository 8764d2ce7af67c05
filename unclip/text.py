"""Text on its way in and out: arguments and names that are no UTF-8, consoles, tables, pages.

Python holds a byte that it can't decode as half a character (a lone surrogate, PEP 383), which no
encoder takes.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable, Sequence
from html import escape

PLAIN = "unclip.plain"  # how consoles treat what they can't show


def whole(text: str) -> str:
    """The same with halves of characters joined, or replaced where the other half is missing."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_whole(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    return whole(text) == text


def meant(argument: str) -> str:
    """What a command-line argument says, in whatever encoding the console has: UTF-8 or Latin-1."""
    if is_whole(argument):
        return argument
    try:
        data = os.fsencode(argument)
    except UnicodeEncodeError:
        return whole(argument)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def open_console() -> None:
    """Let any text be printed: what the console can't show goes out as the bytes of a file's name
    where there are such, so that a printed path names its file, and else as an escape."""
    codecs.register_error(PLAIN, _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=PLAIN)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    try:
        return os.fsencode(text), error.end
    except UnicodeEncodeError:
        return text.encode("ascii", "backslashreplace"), error.end


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well in a terminal and in a README."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }}
table {{ border-collapse: collapse; margin: .6em 0 1.6em }}
th, td {{ padding: .15em .7em; text-align: right; border-bottom: 1px solid #8886 }}
th:first-child, td:first-child {{ text-align: left }}
.grid td, .grid th {{ text-align: center; font-size: 12px; padding: 3px }}
.grid img {{ min-width: 96px; image-rendering: pixelated; display: block; margin: auto }}
.wide {{ overflow-x: auto }}
</style>
{head}
<h1>{title}</h1>
{body}
</html>
"""


def html_page(title: str, body: str, head: str = "") -> str:
    """A page that loads nothing from elsewhere and opens from disk, on light and on dark ground."""
    return PAGE.format(title=escape(title), body=body, head=head)


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table whose cells are HTML already; one that is too wide is scrolled by itself."""
    lines = ["".join(f"<th>{x}</th>" for x in head)]
    lines += ["".join(f"<td>{x}</td>" for x in row) for row in rows]
    inside = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="wide"><table class="{kind}">\n{inside}</table></div>'
