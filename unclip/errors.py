"""Errors a person can act on, and the exit code that each one means."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn an `UnclipError` into one paragraph on stderr and its exit code.

    Launchers such as `accelerate launch` turn every failure into exit code 1, so the intended
    code is printed as well.
    """
    try:
        yield
    except UnclipError as error:
        print(f"error: {error} [exit code {error.exit_code}]", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
