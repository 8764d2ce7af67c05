"""Errors and warnings a person can act on, and the exit code that each error means."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from unclip.text import open_console


class UnclipError(ValueError):
    """A mistake in what we were given: what we got, what we expected, how to mend it."""

    exit_code = 2


class ConfigError(UnclipError):
    """Wrong usage or configuration (exit code 2)."""

    exit_code = 2


class DataError(UnclipError):
    """Images, captions or embeddings that can't be used (exit code 3).

    `kind` tells one sort of damage from another.
    """

    exit_code = 3

    def __init__(self, message: str, kind: str = "unusable") -> None:
        super().__init__(message)
        self.kind = kind


class CheckpointError(UnclipError):
    """Weights that are damaged, incomplete, or made for something else (exit code 4)."""

    exit_code = 4


class DivergedError(UnclipError):
    """Training ran into non-finite numbers that skipping steps did not cure (exit code 5)."""

    exit_code = 5


class UnclipWarning(UserWarning):
    """Something that was asked for and is done, but not as one might think."""


def check_open_files(error: Exception) -> None:
    """To be asked before a file is called damaged.

    **Raises**: `ConfigError` if it is descriptors that ran out.
    """
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise ConfigError(
            "too many open files; raise the limit, for example `ulimit -n 4096`"
        ) from None


@contextmanager
def warnings_to(tell: Callable[[str], object]) -> Iterator[None]:
    """Have our own warnings told in one's own way; others go where they always go."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, UnclipWarning):
                tell(str(message))
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn an `UnclipError` into one paragraph on stderr and its exit code, warnings into lines.

    Launchers such as `accelerate launch` turn every failure into exit code 1, so the intended
    code is printed as well.
    """
    open_console()
    with warnings_to(lambda said: print(f"warning: {said}", file=sys.stderr, flush=True)):
        try:
            yield
        except UnclipError as error:
            print(f"error: {error} [exit code {error.exit_code}]", file=sys.stderr, flush=True)
            raise SystemExit(error.exit_code) from None
