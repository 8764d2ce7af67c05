"""The shell: `unclip text "a red apple"`, and the verbs of its other rooms.

A verb is a function in one of the files of this package, and a row in the list below. One that
makes pictures takes `Asked`, which has the options that all of these share, and a `Making`.

What needs torch is imported inside the verbs, so that a mistyped option answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from unclip.cli import data, edits, evaluation, models, pictures, training
from unclip.cli.arguments import expanded
from unclip.errors import exit_on_error

app = typer.Typer(
    name="unclip",
    help="Pictures from text, from pictures and from CLIP embeddings (DALL·E 2, unCLIP).",
    epilog="Exit codes: 2 usage or configuration, 3 data, 4 checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for verb in (
    pictures.text,
    pictures.vary,
    edits.reconstruct,
    edits.interpolate,
    edits.edit,
    edits.mix,
    edits.inpaint,
    edits.redraw,
    data.embed,
    pictures.upscale,
    pictures.app,
    models.info,
    models.assemble,
    models.convert,
    training.plan,
    evaluation.evaluate,
):
    app.command()(expanded(verb))


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb. Errors a person can act on become one paragraph and their exit code."""
    with exit_on_error():
        app(args=None if argv is None else list(argv), prog_name="unclip")
