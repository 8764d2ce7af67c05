"""Every message that a person may see: read from the source's own lines, not written by hand.

A message is its template: what is filled in when it happens is `…`. `python docs/messages.py`
prints them all.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CODES = {"ConfigError": 2, "DataError": 3, "CheckpointError": 4, "DivergedError": 5}
TITLES = {
    2: "Usage and configuration (exit code 2)",
    3: "Data (exit code 3)",
    4: "Weights and checkpoints (exit code 4)",
    5: "Diverged (exit code 5)",
    0: "Warnings",
}
VALIDATORS = ("model_validator", "field_validator")  # what these raise becomes a ConfigError
EXPLAINS = {"_explain": 2, "unread": 0}  # what these return or yield does, too
# Functions that say what another message says, with no words of their own but where it was.
PASSED_ON = ("parse_config", "build", "sampling", "prompts")
PASSED_ON += ("read_table", "_picture", "_json_row", "_csv_rows", "_csv_row")
HOLE = "…"


class Message(NamedTuple):
    """A template, the exit code that it ends with (0: it is a warning), and its line."""

    text: str
    code: int
    where: str


def messages(root: Path = ROOT / "unclip") -> list[Message]:
    """All of them, by exit code and text.

    **Raises**: `ValueError` for a message that can't be read from the source: say it where it is
    raised, or name a function that passes one on in `PASSED_ON`.
    """
    found: dict[tuple[str, int], Message] = {}
    trees = {p: ast.parse(p.read_text(encoding="utf-8")) for p in sorted(root.rglob("*.py"))}
    constants = {name: value for tree in trees.values() for name, value in _assigned(tree)}
    for path, tree in trees.items():
        for scope in ast.walk(tree):
            if not isinstance(scope, ast.FunctionDef):
                continue
            for said, code, pattern in _said(scope):
                where = f"{path.relative_to(root.parent).as_posix()}:{said.lineno}"
                for text in _texts(said, scope, constants):
                    if re.search(r"\w{2}", text):
                        whole = pattern.format(text)
                        found.setdefault((whole, code), Message(whole, code, where))
                    elif scope.name not in (*PASSED_ON, *EXPLAINS):
                        raise ValueError(f"{where}: the message can't be read from the source")
    order = list(TITLES)
    return sorted(found.values(), key=lambda m: (order.index(m.code), _key(m.text)))


def index() -> str:
    """All messages in Markdown, under the heading of their kind."""
    parts = []
    known = messages()
    for code, title in TITLES.items():
        lines = [f"- `{m.text.replace('`', chr(39))}`" for m in known if m.code == code]
        parts += [f"### {title}", "\n".join(lines)]
    return "\n\n".join(parts)


def _key(text: str) -> str:
    return re.sub(r"^[^\w]+", "", text).lower()


def _said(scope: ast.FunctionDef) -> Iterator[tuple[ast.expr, int, str]]:
    """What a function raises, warns of, or counts as damage: an expression, its exit code, and the
    words around it."""
    checks = any(name in ast.unparse(d) for d in scope.decorator_list for name in VALIDATORS)
    for node in _own(scope):
        if scope.name in EXPLAINS and isinstance(node, ast.Return | ast.Yield) and node.value:
            yield node.value, EXPLAINS[scope.name], "{}"
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called = ast.unparse(node.func)
        if called in CODES:
            yield node.args[0], CODES[called], "{}"
            if called == "DataError" and len(node.args) > 1:
                yield node.args[1], CODES[called], "… of … {}: …"
        elif called == "damage.add":
            yield node.args[0], CODES["DataError"], "… of … {}: …"
        elif called == "warnings.warn":
            yield node.args[0], 0, "{}"
        elif called == "ValueError" and checks:
            yield node.args[0], CODES["ConfigError"], "{}"


def _own(scope: ast.FunctionDef) -> Iterator[ast.AST]:
    """What is in a function, without the functions in it."""
    todo: list[ast.AST] = list(scope.body)
    while todo:
        node = todo.pop()
        yield node
        todo += [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.FunctionDef)]


def _assigned(scope: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _texts(node: ast.expr, scope: ast.AST, constants: dict[str, ast.expr]) -> list[str]:
    """What an expression may say, with holes where only running it would tell."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = [str(p.value) if isinstance(p, ast.Constant) else HOLE for p in node.values]
        return ["".join(parts)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = (_texts(side, scope, constants) for side in (node.left, node.right))
        return [a + b for a in left for b in right]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, scope, constants) + _texts(node.orelse, scope, constants)
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".format"):
        texts = _texts(node.func.value, scope, constants)  # type: ignore[attr-defined]
        return [re.sub(r"\{[^}]*\}", HOLE, text) for text in texts]
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
    values = [value for known, value in _assigned(scope) if known == name]
    values = values or [constants[known] for known in [name] if known in constants]
    return [text for value in values for text in _texts(value, scope, {})] or [HOLE]


if __name__ == "__main__":
    for message in messages():
        print(message.code, message.text, f"  ({message.where})")
