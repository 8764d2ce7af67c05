"""Data with a few bad samples: counted, named once a kind, replaced, and above 5 % the end."""

from __future__ import annotations

import warnings
from collections import Counter

import torch

from unclip.data.sample import MAX_BAD, Dataset, Sample
from unclip.errors import DataError, UnclipWarning
from unclip.images import TOO_SMALL

MAX_NARROW = 1000  # pictures in a row that `data.min_side` leaves out


class Tolerant:
    """A dataset in which another sample, always the same, stands for one that can't be used.

    Each kind of damage is reported once. More than 5 % of the samples seen end it; of fewer than
    200 seen the share is not known well, so that it is taken of 200, or of all there are. Pictures
    narrower than `data.min_side` are replaced alike, but aren't damage: any share may be.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.name = dataset, dataset.name
        self.seen, self.bad, self.narrow = 0, 0, 0
        self.bad_places: Counter[str] = Counter()
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Sample `index`, or the first whole one of those that stand for it.

        **Raises**: `DataError` naming the worst files when too many are bad.
        """
        self.seen += 1
        narrow = self.narrow
        while True:
            try:
                return self.dataset.get(index, generator)
            except DataError as error:
                if error.kind != TOO_SMALL:
                    self._count_bad(index, error)
                elif self.narrow - narrow >= min(MAX_NARROW, len(self)):
                    raise DataError(f"{error}, and so are all others tried: lower it") from None
                self._report(error)
            index = (index + len(self) // 3 + 1) % len(self)  # far from it, not the damage beside

    def _count_bad(self, index: int, error: DataError) -> None:
        place = getattr(self.dataset, "place", None)
        self.bad += 1
        self.bad_places[place(index) if place is not None else self.name] += 1
        if self.bad > MAX_BAD * max(self.seen, min(len(self), 200)):
            worst = ", ".join(f"{name} ({n})" for name, n in self.bad_places.most_common(5))
            seen = max(self.seen, self.bad)
            raise DataError(
                f"{error}. {self.bad} of {seen} samples of {self.name} can't be used, most of them "
                f"in {worst}"
            ) from None

    def _report(self, error: DataError) -> None:
        self.narrow += error.kind == TOO_SMALL
        if error.kind not in self._reported:
            self._reported.add(error.kind)
            warnings.warn(
                f"data {self.name}: {error}. Another sample stands for it; further ones like this "
                "are counted and not reported",
                UnclipWarning,
                stacklevel=2,
            )
