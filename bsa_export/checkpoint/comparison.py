"""Comparison of two tensors of tables, byte by byte, in flat memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from bsa_export.checkpoint.dtypes import pieces
from bsa_export.checkpoint.table import Tensor


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and first_difference(one, other) is None


def first_difference(one: Tensor, other: Tensor) -> int | None:
    """The first byte in which two tensors of one dtype and shape differ, None if there is none."""
    start = 0
    for left, right in zip(_regular(pieces(one)), _regular(pieces(other)), strict=True):
        if left != right:
            wrong = np.frombuffer(left, np.uint8) != np.frombuffer(right, np.uint8)
            return start + int(np.argmax(wrong))
        start += len(left)
    return None


def _regular(parts: Iterable[bytes | memoryview], size: int = 1 << 16) -> Iterator[bytes]:
    """The same bytes in pieces of one size; the last one may be shorter."""
    left = b""
    for part in parts:
        left += bytes(part)
        whole = len(left) - len(left) % size
        yield from (left[start : start + size] for start in range(0, whole, size))
        left = left[whole:]
    if left:
        yield left
