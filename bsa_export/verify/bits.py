"""Comparison of stored tensors, byte by byte, in flat memory. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np

from bsa_export.checkpoint.dtypes import pieces, read
from bsa_export.checkpoint.table import ITEM_SIZE, FileRange, Tensor
from bsa_export.verify.rules import bits_of


def first_difference(expected: Tensor, found: Tensor, advance: Callable[[int], None] | None = None) -> int | None:
    """The first byte in which two tensors of one dtype and shape differ, None if there is none.

    Args:
        expected: any row of a table.
        found: a row whose bytes are one range of a file.
        advance: called with the bytes compared since the last call.
    """
    assert isinstance(found.data, FileRange)
    position = 0
    with open(found.data.path, "rb", buffering=0) as file:
        buffer = np.empty(0, np.uint8)
        for data in pieces(expected):
            piece = np.frombuffer(data, np.uint8)
            if len(buffer) < len(piece):
                buffer = np.empty(len(piece), np.uint8)
            count = os.preadv(file.fileno(), [buffer[: len(piece)].data], found.data.offset + position)
            if count != len(piece) or not _equal(piece, buffer[:count]):
                count = min(count, len(piece))
                wrong = np.flatnonzero(piece[:count] != buffer[:count])
                return position + int(wrong[0] if len(wrong) else count)
            position += count
            if advance:
                advance(count)
    return None if position == found.nbytes else position


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    if len(one) % 8 == 0:
        one, other = one.view(np.uint64), other.view(np.uint64)
    return bool((one == other).all())


def rows_of(table: Tensor, start: int, rows: int) -> Tensor:
    """The rows `[start, start + rows)` of a tensor whose bytes are one range of a file."""
    assert isinstance(table.data, FileRange)
    nbytes = table.nbytes // table.shape[0]
    data = FileRange(table.data.path, table.data.offset + start * nbytes, rows * nbytes)
    return Tensor(table.dtype, (rows, *table.shape[1:]), data)


def both(source: Tensor, found: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The bits of two float tensors of one shape, flat, piece by piece."""
    assert isinstance(found.data, FileRange)
    position = 0
    for piece in pieces(source):
        bits = bits_of(piece, source.dtype)
        nbytes = len(bits) * ITEM_SIZE[found.dtype]
        data = FileRange(found.data.path, found.data.offset + position, nbytes)
        yield bits, read(Tensor(found.dtype, (len(bits),), data)).view(f"<u{ITEM_SIZE[found.dtype]}")
        position += nbytes
