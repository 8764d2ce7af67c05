"""How `make docs` builds these pages: Markdown by MyST, the API's from docstrings, furo's looks."""

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import messages

import unclip

project = "unclip"
release = version = unclip.__version__
html_title = "unclip"
html_theme = "furo"
html_copy_source = False
exclude_patterns = ["_build"]

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}


class Messages(SphinxDirective):
    """All messages of the library, as they are in its source now."""

    def run(self) -> list[nodes.Node]:
        """Parse the index as if it stood in the page."""
        node = nodes.Element()
        text = StringList(messages.index().splitlines(), "messages.py")
        self.state.nested_parse(text, self.content_offset, node, match_titles=True)
        return node.children


def from_markdown(app: Sphinx, what: str, name: str, obj: object, how: object, lines: list[str]):
    """Docstrings have `code` and **bold** as Markdown has, and stars that are stars; autodoc reads
    reStructuredText."""
    parts = re.split(r"`([^`]+)`", "\n".join(lines))
    for k, part in enumerate(parts):
        code = f"``{part}``\\ " if re.match(r"\w", (parts[k + 1 :] or [""])[0]) else f"``{part}``"
        parts[k] = code if k % 2 else re.sub(r"(?<!\*)\*(?!\*)", r"\\*", part)
    lines[:] = "".join(parts).splitlines()


def setup(app: Sphinx) -> None:
    """What is ours."""
    app.add_directive("messages", Messages)
    app.connect("autodoc-process-docstring", from_markdown)
