"""Train a stage: `unclip train STAGE …`, or accelerate launch -m unclip.train STAGE CONFIG …

What needs torch is imported when the stage is known, so that a mistyped one answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

STAGES = ("clip", "clip-text", "prior", "ar-prior", "decoder", "upsampler", "embed")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse `STAGE` and hand the rest to that stage's own command.

    **Raises**: `SystemExit` with the exit code of a mistake.
    """
    parser = argparse.ArgumentParser(
        prog="unclip train",
        description="Train a stage of the stack, or write a cache of embeddings (embed).",
        epilog="`unclip train STAGE --help` says what a stage takes. Several processes: "
        "accelerate launch -m unclip.train STAGE CONFIG.",
    )
    parser.add_argument("stage", metavar="STAGE", choices=STAGES, help=", ".join(STAGES))
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="CONFIG [section.key=value …]",
        help="a YAML file, or the name of a shipped one (`unclip configs`), and what differs",
    )
    given = parser.parse_args(argv)
    called = f"unclip train {given.stage}"
    if given.stage == "embed":
        from unclip.training import embed

        return embed.main(given.arguments, called)
    from unclip.training import launch
    from unclip.training.trainers import TRAINERS

    one = TRAINERS[given.stage.replace("-", "_")]
    launch.main(one.schema, one.train, one.says, given.arguments, called)


if __name__ == "__main__":
    main()
