"""Starts the commands: `python -m bsa_export convert ...`, and the console scripts of setup.cfg.

Imports everything inside `_start`, so that Ctrl-C ends quietly also while a command is still being imported.
"""

from __future__ import annotations

import sys
from importlib import import_module

INTERRUPTED = 130  # 128 + SIGINT, as in shells


def convert() -> None:
    """Starts bsa-convert."""
    _start("bsa_export.cli.convert")


def verify() -> None:
    """Starts bsa-verify."""
    _start("bsa_export.cli.verify")


def push() -> None:
    """Starts bsa-push."""
    _start("bsa_export.cli.push")


def pull() -> None:
    """Starts bsa-pull."""
    _start("bsa_export.cli.pull")


def _start(module: str) -> None:
    try:
        import_module(module).main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    _start("bsa_export.cli")
