"""The one progress bar of all commands: on stderr, for what takes longer than a second, if a person looks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from typing import Any

import click

Update = Callable[[int, int], None]


def is_watched() -> bool:
    """Whether a person looks at stderr."""
    return sys.stderr.isatty()


class Progress:
    """A bar for one thing at a time. Lines that are printed close it first."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, what: str = "", unit: str = "") -> Update | None:
        """Starts a bar. Returns what is called with (done, in all), or None without a terminal.

        Args:
            what: text in front of the bar.
            unit: `B` for bytes, shown with prefixes; empty for a count.
        """
        self.close()
        if not is_watched():
            return None
        from tqdm import tqdm

        columns, rows = shutil.get_terminal_size()  # 80 x 24 where a terminal has no size; tqdm would draw nothing
        bar = self.bar = tqdm(
            desc=what or None, unit=unit, unit_scale=bool(unit), delay=1, leave=False, ncols=columns - 1, nrows=rows
        )

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return update

    def write(self, text: str) -> None:
        """Prints a line on stdout."""
        self.close()
        click.echo(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
