"""The command line. `unclip.cli:main` is its entry point."""

from unclip.cli.app import main

__all__ = ["main"]
