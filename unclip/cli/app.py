"""The shell: `unclip text "a red apple"`, and the verbs of its other rooms.

A verb is a function in one of the files of this package, and a row in the list below. One that
makes pictures takes `Asked`, which has the options that all of these share, and a `Making`.

What needs torch is imported inside the verbs, so that a mistyped option answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from unclip import __version__
from unclip.cli import data, edits, evaluation, machine, models, pictures, training
from unclip.cli.arguments import expanded
from unclip.errors import exit_on_error

app = typer.Typer(
    name="unclip",
    epilog="Exit codes: 2 usage or configuration, 3 data, 4 checkpoint, 5 diverged.",
    no_args_is_help=True,
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
    models.push,
    training.train,
    training.watch,
    training.configs,
    training.new,
    models.measure,
    training.validate,
    training.plan,
    evaluation.evaluate,
    evaluation.experiment,
    machine.doctor,
):
    # A stage's own options go to its own parser, --help among them.
    passed_on = {"ignore_unknown_options": True, "help_option_names": []}
    settings = passed_on if verb is training.train else {}
    app.command(context_settings=settings)(expanded(verb))


def _version(asked: bool) -> None:
    if asked:
        print(f"unclip {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Pictures from text, from pictures and from CLIP embeddings (DALL·E 2, unCLIP)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb. Errors a person can act on become one paragraph and their exit code."""
    with exit_on_error():
        app(args=None if argv is None else list(argv), prog_name="unclip")
