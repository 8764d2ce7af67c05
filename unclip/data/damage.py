"""What a set of data can't use, found when it is opened: counted, named, and above 5 % the end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from unclip.data.sample import MAX_BAD
from unclip.errors import DataError, UnclipWarning

NAMED = 3  # of each kind


class Damage:
    """Samples that are left out, by kind; `what` names them all, as in "3 of 90 pictures …"."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what
        self.kinds: dict[str, list[str]] = {}

    def add(self, kind: str, place: str) -> None:
        """One more that `kind`, such as "have no caption"."""
        self.kinds.setdefault(kind, []).append(place)

    def check(self, whole: int) -> None:
        """Warn once a kind, when `whole` samples are left. **Raises**: `DataError` above 5 %."""
        bad = sum(map(len, self.kinds.values()))
        lines = [
            f"{len(places)} of {whole + bad} {self.what} {kind}: {named(places)}"
            for kind, places in self.kinds.items()
        ]
        if bad > MAX_BAD * (whole + bad):
            raise DataError(f"data {self.name}: {'. '.join(lines)}")
        for line in lines:
            warnings.warn(f"data {self.name}, left out: {line}", UnclipWarning, stacklevel=4)


def named(places: Sequence[str]) -> str:
    """The first few."""
    return "; ".join(places[:NAMED]) + " …" * (len(places) > NAMED)
