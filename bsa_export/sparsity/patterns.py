"""The parts that the layout of one head is joined from, bool `[n, n]` for n blocks: windows, a sliding window, global
and random blocks."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np


def aligned_windows(sizes: Sequence[int], n: int) -> np.ndarray:
    """Blocks of the same window attend to each other. `sizes` are the windows' lengths in blocks; the last one
    repeats."""
    edges = np.cumsum([*(min(size, n) for size in sizes), *[sizes[-1]] * (n // sizes[-1])])
    window = np.searchsorted(edges, np.arange(n), side="right")
    return window[:, None] == window[None, :]


def sliding_window(width: int, n: int) -> np.ndarray:
    """Blocks attend to `width // 2` blocks on either side, so an even width acts as the next odd one."""
    half = min(width // 2, n)
    return np.tri(n, n, half, bool) & ~np.tri(n, n, -half - 1, bool)


def causal(pattern: np.ndarray, attention: str) -> np.ndarray:
    """Drops blocks ahead of the query when the attention is `unidirectional`."""
    return np.tril(pattern) if attention == "unidirectional" else pattern


def add_global(pattern: np.ndarray, windows: Iterable[tuple[int, int]], attention: str, horizontal: bool) -> None:
    """Keeps the columns `[start, stop)` of each window, and with `horizontal` its rows, in place.

    Unidirectional columns begin at row `start`, as in DeepSpeed: of a window wider than a block, its first rows see its
    last.
    """
    n = len(pattern)
    first_row = np.full(n, n)  # from which on a column is kept
    is_global = np.zeros(n, bool)
    for start, stop in windows:
        columns = slice(*slice(start, stop).indices(n))
        first = 0 if attention == "bidirectional" else slice(start, None).indices(n)[0]
        first_row[columns] = np.minimum(first_row[columns], first)
        is_global[columns] = True
    pattern |= np.greater_equal.outer(np.arange(n), first_row)
    if horizontal:
        pattern[is_global] = True


def add_random(pattern: np.ndarray, count: int, columns: Sequence[range], rng: random.Random) -> None:
    """Keeps `count` blocks of each row, in place, drawn row by row from the row's `columns` with `rng.sample`."""
    if count:
        drawn = [rng.sample(population, count) for population in columns]
        pattern[np.arange(len(pattern))[:, None], drawn] = True
