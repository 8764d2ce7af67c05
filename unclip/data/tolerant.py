"""Data with a few bad samples: counted, named once a kind, replaced, and above 5 % the end."""

from __future__ import annotations

import warnings
from collections import Counter

import torch

from unclip.data.sample import MAX_BAD, Dataset, Sample
from unclip.errors import DataError


class Tolerant:
    """A dataset in which another sample, always the same, stands for one that can't be used.

    Each kind of damage is reported once. More than 5 % of the samples seen end it; of fewer than
    200 seen the share is not known well, so that it is taken of 200, or of all there are.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.name = dataset, dataset.name
        self.seen, self.bad = 0, 0
        self.bad_places: Counter[str] = Counter()
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Sample `index`, or the first whole one of those that stand for it.

        **Raises**: `DataError` naming the worst files when too many are bad.
        """
        self.seen += 1
        while True:
            try:
                return self.dataset.get(index, generator)
            except DataError as error:
                self._count(index, error)
            index = (index + len(self) // 3 + 1) % len(self)  # far from it, not the damage beside

    def _count(self, index: int, error: DataError) -> None:
        place = getattr(self.dataset, "place", None)
        self.bad += 1
        self.bad_places[place(index) if place is not None else self.name] += 1
        if self.bad > MAX_BAD * max(self.seen, min(len(self), 200)):
            worst = ", ".join(f"{name} ({n})" for name, n in self.bad_places.most_common(5))
            raise DataError(
                f"{error}. {self.bad} of {self.seen} samples of {self.name} can't be used, most of "
                f"them in {worst}"
            ) from None
        if error.kind not in self._reported:
            self._reported.add(error.kind)
            warnings.warn(
                f"data {self.name}: {error}. Another sample stands for it; further ones like this "
                "are counted and not reported",
                stacklevel=2,
            )
