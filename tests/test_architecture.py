"""The house: imports point one way, and docs/architecture.md says what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up; a module may import from its own floor and from those below.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("torchvision_ops", "errors", "text", "shipped", "config"),
    ("randomness", "precision", "progress"),
    ("conditioning", "containers", "images", "files", "inputs"),
    ("models", "diffusion", "clip"),
    ("stages",),
    ("interop", "data"),
    ("sources", "options", "reader", "drawing", "summary", "hub"),
    ("stack",),
    ("edit",),
    ("pipeline", "training"),
    ("assemble", "evaluation", "doctor"),
    ("cli", "app", "train"),
)
# Within a floor, and where a floor would allow it: what must not know of what.
STRANGERS = (
    ("models", ("files", "diffusion", "clip", "data", "training")),
    ("diffusion", ("files", "models", "clip", "data", "training")),
    ("data", ("models", "diffusion", "stages", "clip.encoder", "clip.towers")),
    ("training.fit", ("models", "data", "stages", "pipeline", "sources")),
    ("training.checkpoint", ("models", "data", "stages", "pipeline", "sources")),
    ("clip", ("models", "diffusion")),
)


def modules() -> dict[str, Path]:
    """Every module of the library by its name without `unclip.`; a package by its __init__."""
    found = {}
    for path in sorted((ROOT / "unclip").rglob("*.py")):
        parts = path.relative_to(ROOT / "unclip").with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the library that a file imports anywhere, types' sake included."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [(alias.name.split("."), "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ["unclip", *package[: len(package) - node.level + 1]] if node.level else []
            base = [*start, *(node.module or "").split(".")]
            wanted = [([part for part in base if part], alias.name) for alias in node.names]
        else:
            continue
        for parts, attribute in wanted:
            if parts[0] != "unclip":
                continue
            inside = ".".join(parts[1:])
            below = ".".join([*parts[1:], attribute]) if attribute else inside
            found.add(below if below in known else inside)
    return {target for target in found if target in known} - {name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def floor(name: str) -> int:
    return next(k for k, rooms in enumerate(FLOORS) if name.split(".")[0] in rooms)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def test_no_imports_go_in_a_circle(graph: dict[str, set[str]]) -> None:
    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for target in graph[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        return seen

    assert [name for name in graph if name in reach(name)] == []


def test_imports_point_down(graph: dict[str, set[str]]) -> None:
    up = [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if name and target and floor(target) > floor(name)
    ]
    assert up == []


def test_rooms_know_nothing_of_strangers(graph: dict[str, set[str]]) -> None:
    known = [
        f"{name} -> {target}"
        for room, strangers in STRANGERS
        for name, targets in graph.items()
        if within(name, room)
        for target in targets
        if any(within(target, stranger) for stranger in strangers)
    ]
    assert known == []


def test_a_circle_and_an_arrow_up_would_be_seen(tmp_path: Path) -> None:
    files = {
        "models.a": "def f():\n    from unclip.training import b",
        "training.b": "from ..models.a import f",
        "training": "",
    }
    known = {}
    for name, text in files.items():
        known[name] = tmp_path / f"{name}.py"
        known[name].write_text(text)
    found = {name: imports(name, path, known) for name, path in known.items()}
    assert found == {"models.a": {"training.b"}, "training.b": {"models.a"}, "training": set()}
    assert floor("training.b") > floor("models.a")


def table() -> str:
    """The page's lines: each file, and the first paragraph that it says of itself."""
    lines = []
    for path in modules().values():
        if path.name != "__init__.py":
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            first = " ".join(said.split("\n\n")[0].split())
            lines.append(
                f"| `{path.relative_to(ROOT).as_posix()}` | {first.replace('|', chr(92) + '|')} |"
            )
    return "\n".join(sorted(lines, key=lambda line: (line.count("/"), line)))


def test_the_architecture_page_has_one_line_for_every_file() -> None:
    """`python tests/test_architecture.py` prints them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `unclip/.*$", page, re.MULTILINE)
    assert listed == table().splitlines()


if __name__ == "__main__":
    print(table())
