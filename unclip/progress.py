"""Progress bars by one rule: on a terminal, after two seconds, gone when done. Never in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tqdm import tqdm

BAR_AFTER = 2.0  # seconds

# Whether to show bars on a terminal, or what to call after every step with what is at work, the
# steps that are done and those there are.
Progress = bool | Callable[[str, int, int], object]


def progress_bar(
    items: Iterable[Any] | None = None,
    what: str | None = None,
    total: float | None = None,
    *,
    unit: str = "it",
    done: int = 0,
    shown: bool = True,
) -> Any:
    """A tqdm bar, of which `done` of `total` are behind us; one that is not `shown` only counts."""
    return tqdm(
        items,
        what,
        total,
        initial=done,
        unit=unit,
        delay=BAR_AFTER,
        leave=False,
        dynamic_ncols=True,
        disable=None if shown else True,  # None: unless stderr is a terminal
    )


@contextmanager
def steps_of(what: str, total: int, progress: Progress) -> Iterator[Callable[[], None]]:
    """What to call after each of so many steps."""
    done = 0
    with progress_bar(what=what, total=total, shown=progress is True) as bar:

        def step() -> None:
            nonlocal done
            done += 1
            bar.update()
            if callable(progress):
                progress(what, done, total)

        yield step


@contextmanager
def without_bars(logging: ModuleType) -> Iterator[None]:
    """Keep a library from its own bars, by the `utils.logging` that Hugging Face's all have."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
