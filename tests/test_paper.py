"""The paper as commands: what the page says is what is run, and lands where the page shows it."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAPER = runpy.run_path(str(ROOT / "benchmarks/paper.py"))
PAGE = (ROOT / "docs/paper.md").read_text(encoding="utf-8")


def test_every_command_of_the_page_has_a_place_of_its_own_there():
    found = PAPER["commands"](PAGE)
    names = [command.name for command in found]
    assert len(found) > 15 and len(set(names)) == len(names)
    for command in found:
        picture = f"(paper/{command.name}.webp)" in PAGE
        assert picture or f"<!-- {command.name} -->" in PAGE
        assert not picture or (ROOT / f"docs/paper/{command.name}.webp").is_file()


def test_what_was_found_takes_the_place_of_what_was_there(tmp_path, monkeypatch):
    command = PAPER["Command"]("figure-7", "unclip experiment pca --out out/paper/figure-7")
    monkeypatch.setitem(PAPER["told"].__globals__, "OUT", tmp_path)
    command.folder.mkdir()
    (command.folder / "pca.md").write_text("### Components\n\n| a |\n", encoding="utf-8")
    page = "before\n<!-- figure-7 -->\nold\n<!-- end -->\n<!-- figure-8 -->\n<!-- end -->\n"
    told = PAPER["told"](command, page)
    assert told == page.replace("old", "**Components**\n\n| a |")
    assert PAPER["told"](command, told) == told
