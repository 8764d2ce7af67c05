"""A data set as pictures of named things, perhaps each in a style, and what networks saw in them.

n pictures, R their side, F features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unclip.data.open import open_dataset
from unclip.data.sample import Dataset, Sample, fixed
from unclip.errors import ConfigError, DataError
from unclip.evaluation.features import Remembered
from unclip.images import to_uint8
from unclip.progress import progress_bar
from unclip.randomness import permutation

CHUNK = 64
EMOJI_WORDING = "a {name} emoji in {style}"


class Wording:
    """How a data set's captions say what is shown and in which style: `a {name} in {style}`.

    **Raises**: `ConfigError` for a pattern without one {name}, or with a style before it.
    """

    def __init__(self, pattern: str = "{name}"):
        self.pattern = pattern
        head, name, tail = pattern.partition("{name}")
        if not name or "{" in head or "{" in tail.replace("{style}", "", 1):
            raise ConfigError(
                f"captions {pattern!r}: expected {{name}} once and behind it {{style}} at most "
                f"once, as in {EMOJI_WORDING!r}"
            )
        style = "(?P<style>.+)".join(map(re.escape, tail.split("{style}")))
        self._expression = re.compile(f"{re.escape(head)}(?P<name>.+){style}")

    def read(self, caption: str) -> tuple[str, str | None] | None:
        """Name and style; None where the caption is worded otherwise."""
        found = self._expression.fullmatch(caption)
        return found and (found["name"], found.groupdict().get("style"))

    def plain(self, name: str) -> str:
        """The caption without a style: the pattern up to the name."""
        return self.pattern.partition("{name}")[0] + name


@dataclass(frozen=True)
class Subjects:
    """Pictures of a data set in a fixed shuffled order, so that the first ones are a fair part.

    `seen` holds each network's features of all of them, in the same order. **Shapes**: (n, F).
    """

    dataset: Dataset
    order: Sequence[int]
    captions: list[str]
    names: list[str]
    styles: list[str] | None
    seen: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.captions)

    def pictures(self, rows: range) -> Tensor:
        """**Shapes**: → (n, 3, R, R) in [-1, 1]."""
        return torch.stack([fixed(self.dataset, self.order[k]).image for k in rows])


def caption_of(dataset: Dataset, index: int, sample: Sample) -> str:
    """The canonical caption where a data set words its captions in several ways."""
    canonical = getattr(dataset, "caption", None)
    return sample.caption if canonical is None else canonical(index)


def read_subjects(
    spec: str,
    resolution: int,
    wording: Wording,
    networks: Mapping[str, Remembered],
    count: int,
    least: int,
) -> Subjects:
    """Look at `count` pictures of a data set, or all.

    **Raises**: `DataError` for fewer than `least` pictures, for captions that are worded
    otherwise, or that all name one thing.
    """
    dataset = open_dataset(spec, resolution)
    if len(dataset) < least:
        raise DataError(f"{spec} holds {len(dataset)} pictures; evaluation needs {least} or more")
    order = permutation(0, 0, len(dataset))[:count].tolist()
    captions: list[str] = []
    seen: dict[str, list[Tensor]] = {name: [] for name in networks}
    with progress_bar(what=f"looking at {spec}", total=len(order)) as bar:
        for start in range(0, len(order), CHUNK):
            rows = order[start : start + CHUNK]
            samples = [fixed(dataset, k) for k in rows]
            captions += [caption_of(dataset, k, s) for k, s in zip(rows, samples, strict=True)]
            pictures = to_uint8(torch.stack([s.image for s in samples]))
            for name, network in networks.items():
                seen[name].append(network(pictures))
            bar.update(len(rows))
    names, styles = _read(spec, captions, wording)
    return Subjects(
        dataset, order, captions, names, styles, {k: torch.cat(x) for k, x in seen.items()}
    )


def _read(spec: str, captions: list[str], wording: Wording) -> tuple[list[str], list[str] | None]:
    read = [wording.read(caption) for caption in captions]
    found = [x for x in read if x is not None]
    if len(found) < len(captions):
        other = captions[read.index(None)]
        raise DataError(
            f"{len(captions) - len(found)} of {len(captions)} captions of {spec} do not read "
            f"{wording.pattern!r}, the first is {other!r}; give another pattern with --captions"
        )
    names, styles = [name for name, _ in found], [style for _, style in found if style is not None]
    if len(set(names)) < 2:
        raise DataError(
            f"all pictures of {spec} have one name, {names[0]!r}; evaluation compares things of "
            "different names (--captions says where a caption names them)"
        )
    return names, styles if len(set(styles)) > 1 else None
