"""What a model of emoji draws, looked at: five sheets, the first seeds, nothing selected.

    python benchmarks/grids.py weights/emoji --out docs/emoji

Captions are the first of the fixed shuffled order in which `unclip evaluate` takes pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from unclip.data.emoji import Emoji
from unclip.errors import exit_on_error
from unclip.images import grid
from unclip.pipeline import UnCLIP
from unclip.randomness import permutation

WORDS = Path(__file__).parent / "unseen_words.json"
SIDE, SHOWN = 256, 112  # what is drawn, and what a sheet has room for
COMPOSITIONS = [
    "a crying pizza",
    "a red cat with sunglasses",
    "a blue apple",
    "a green heart",
    "a house on a boat",
    "a dog with a hat",
    "a smiling moon",
    "a purple tree",
    "a robot and a heart",
    "a fish with legs",
    "a clock with a face",
    "a pink car",
    "an angry banana",
    "a cat driving a car",
    "a yellow guitar",
    "a snowman in the rain",
]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw all sheets, over those that are there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the sheets")
    given = parser.parse_args(argv)
    with exit_on_error():
        pipe = UnCLIP.from_pretrained(given.model)
        given.out.mkdir(parents=True, exist_ok=True)
        for name, (captions, seeds, columns) in sheets().items():
            file = given.out / f"{name}.webp"
            sheet(pipe, captions, seeds, columns).save(file, quality=85)
            print(file)


def sheets() -> dict[str, tuple[list[str], int, int]]:
    """Captions of each sheet, pictures of each caption, and columns."""
    trained, held_out = Emoji(64, "train"), Emoji(64, "val")
    rows = permutation(0, 0, len(trained)).tolist()
    words = json.loads(WORDS.read_text(encoding="utf-8"))
    names = dict.fromkeys(trained.records[k]["name"] for k in rows)
    return {
        "trained": ([trained.caption(k) for k in rows[:24]], 1, 8),
        "held_out": (
            [held_out.caption(k) for k in permutation(0, 0, len(held_out)).tolist()[:24]],
            1,
            8,
        ),
        "without_style": ([f"a {name}" for name in [*names][:16]], 4, 8),
        "compositions": (COMPOSITIONS, 1, 8),
        "words": ([f"a {word}" for word in [*words][:24]], 1, 8),
    }


def sheet(pipe: UnCLIP, captions: list[str], seeds: int, columns: int) -> Image.Image:
    """Pictures of each caption side by side, what was asked for beneath."""
    drawn = [x for k in captions for x in pipe.text_to_image(k, n=seeds, seed=0, size=SIDE)]
    small = [x.resize((SHOWN, SHOWN), Image.Resampling.LANCZOS) for x in drawn]
    beneath = [caption.replace(" emoji in ", ", ") for caption in captions for _ in range(seeds)]
    return grid(small, columns, beneath)


if __name__ == "__main__":
    main()
