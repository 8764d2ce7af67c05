"""Run the commands of docs/paper.md, and put what they gave beside them.

    make paper      or      python benchmarks/paper.py [NAME …]

A command is a line of a `shell` block that begins with `unclip` and ends with `--out
out/paper/NAME`, or with `> out/paper/NAME` where what it prints counts. Its picture becomes
docs/paper/NAME.webp, its tables stand between <!-- NAME --> and <!-- end -->. What was run with
the same command, weights and sampling is not run again, so that an interrupted run goes on.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unclip.cli import main
from unclip.errors import CheckpointError, ConfigError, exit_on_error
from unclip.files.disk import replacing
from unclip.sources import Source

ROOT = Path(__file__).parents[1]
PAGE, PICTURES, OUT = ROOT / "docs/paper.md", ROOT / "docs/paper", ROOT / "out/paper"
SHIPPED = "weights/emoji"
WIDTH, QUALITY = 900, 75  # of the pictures beside the page


@dataclass(frozen=True)
class Command:
    """One command of the page; `name` is that of its folder and of what comes of it."""

    name: str
    line: str

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return OUT / self.name

    @property
    def words(self) -> list[str]:
        """What `unclip` is told."""
        return shlex.split(self.line.partition(" > ")[0])[1:]

    def stamp(self) -> str:
        """What makes its results what they are. **Raises**: `CheckpointError` without a model."""
        models = [SHIPPED, *(word for word in self.words if word.startswith("runs/"))]
        return "\n".join([self.line, *map(_made_by, models)])


def _made_by(name: str) -> str:
    """A model by its weights and by how its stages draw unless told otherwise."""
    source = Source(ROOT / name)
    drawn = {key: stored.stage.sampling.model_dump() for key, stored in source.stages.items()}
    return f"{name} {source.hash} {drawn}"


def commands(page: str) -> list[Command]:
    """Those of a page, in order."""
    found = []
    for block in re.findall(r"^```shell\n(.*?)^```", page, re.M | re.S):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            place = re.search(r"^unclip .*(?:--out|>) out/paper/([\w-]+)$", line)
            if place is not None:
                found.append(Command(place[1], line))
    return found


def run(command: Command) -> bool:
    """Run it unless that was done before; whether its results are there.

    What needs a model that was not trained here is left as the page has it.
    """
    folder, done = command.folder, command.folder / "done"
    try:
        stamp = command.stamp()
    except CheckpointError as error:
        print(f"{command.name}: left as it is: {error}")
        return False
    if done.is_file() and done.read_text(encoding="utf-8") == stamp:
        return True
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.is_file():  # not the pictures that an experiment keeps
            old.unlink()
    since = time.perf_counter()
    with (folder / "printed.txt").open("w", encoding="utf-8") as printed:
        try:
            with redirect_stdout(printed):
                main(command.words)
        except SystemExit as ended:
            if ended.code:
                print(f"{command.name}: exit code {ended.code}; the same command tries again")
                raise
    print(f"{command.name}: {time.perf_counter() - since:.0f} s", flush=True)
    done.write_text(stamp, encoding="utf-8")
    return True


def show(command: Command) -> None:
    """What it drew beside the page, small: its sheet, or else its only picture."""
    drawn = sorted(command.folder.glob("*.png"))
    sheets = [path for path in drawn if path.stem.endswith("-sheet")] or drawn
    if sheets:
        with Image.open(sheets[0]) as image:
            small = image.convert("RGB")
        small.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
        small.save(PICTURES / f"{command.name}.webp", "WEBP", quality=QUALITY, method=6)


def told(command: Command, page: str) -> str:
    """The page with what it found: an experiment's tables, or what it printed."""
    written = sorted(command.folder.glob("*.md"))
    text = (written or [command.folder / "printed.txt"])[0].read_text(encoding="utf-8").strip()
    text = text.replace(f"{ROOT}/", "")
    bold = re.sub(r"^### (.*)$", r"**\1**", text, flags=re.M)
    text = bold if written else f"```text\n{text}\n```"
    place = rf"(<!-- {re.escape(command.name)} -->\n).*?(<!-- end -->)"
    return re.sub(place, lambda m: f"{m[1]}{text}\n{m[2]}", page, flags=re.S)


def paper(names: Sequence[str]) -> None:
    """All of the page, or what is named. **Raises**: `ConfigError` for a name it hasn't."""
    os.chdir(ROOT)  # commands name files from there
    page = PAGE.read_text(encoding="utf-8")
    known = {command.name: command for command in commands(page)}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"docs/paper.md has no {unknown[0]}; it has {', '.join(known)}")
    for name in names or known:
        if run(known[name]):
            show(known[name])
            page = told(known[name], PAGE.read_text(encoding="utf-8"))
            with replacing(PAGE) as beside:
                beside.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    with exit_on_error():
        paper(sys.argv[1:])
