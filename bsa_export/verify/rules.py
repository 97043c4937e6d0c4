"""What a conversion changes, judged by plain formulas that share nothing with the code that computed it. numpy
alone."""

from __future__ import annotations

import numpy as np

# Bits of a float dtype as numpy reads them; its values are the upper half of a float32 for BF16.
_BITS = {"F16": "<u2", "BF16": "<u2", "F32": "<u4", "F64": "<u8"}
# Relative distance of neighbouring values, and the smallest distance.
_EPSILON = {"F16": 2.0**-10, "BF16": 2.0**-7, "F32": 2.0**-23, "F64": 2.0**-52}
_TINY = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149, "F64": 0.0}


def values(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values that the bits of a float dtype stand for: float64 of F64, else float32."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    exact = bits.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])
    return exact.astype(np.float32) if dtype == "F16" else exact


def bits_of(data: bytes | memoryview | np.ndarray, dtype: str) -> np.ndarray:
    """Raw bytes as unsigned integers of the dtype's width, flat."""
    return np.frombuffer(data, _BITS[dtype])


def is_rounded(source: np.ndarray, found: np.ndarray, source_dtype: str, dtype: str) -> np.ndarray:
    """Where `found` holds the value of its dtype that is nearest to `source`, the even one of two; both are bits, flat.

    Nearest means: between the midpoints to the two neighbours, one bit up and down, which float64 holds exactly; in
    F64 itself, equal. A NaN stays a NaN, an infinity and a sign what they are.
    """
    exact, mine = (values(bits, kind).astype(np.float64) for bits, kind in ((source, source_dtype), (found, dtype)))
    sign = found.dtype.type(1 << (8 * found.itemsize - 1))
    magnitude = found & ~sign
    up = np.abs(values(magnitude + found.dtype.type(1), dtype).astype(np.float64))
    down = values(np.maximum(magnitude, 1) - found.dtype.type(1), dtype).astype(np.float64)
    with np.errstate(invalid="ignore"):
        size, even = np.abs(exact), (found & found.dtype.type(1)) == 0
        low, high = (down + np.abs(mine)) / 2, (np.abs(mine) + up) / 2
        nearest = ((low < size) | ((low == size) & even) | (magnitude == 0)) & (
            (size < high) | ((size == high) & even) | ~np.isfinite(up)
        )
        nearest &= np.signbit(exact) == np.signbit(mine)
        special = (exact == mine) | (np.isnan(exact) & np.isnan(mine))
        within = np.isfinite(exact) & np.isfinite(mine) & (dtype != "F64")
        return np.where(within, nearest, special)


def is_tiled(
    source: np.ndarray, found: np.ndarray, start: int, reserved: int, source_dtype: str, dtype: str
) -> np.ndarray:
    """Which rows are those of `source`: the reserved ones in front, then position p is p modulo their number.

    Args:
        source: bits of all rows, `[reserved + positions, size]`.
        found: bits of the rows from `start` on, `[rows, size]`; rounded where the dtypes differ.
    """
    rows = start + np.arange(len(found))
    own = len(source) - reserved
    expected = source[np.where(rows < reserved, rows, reserved + (rows - reserved) % own)]
    same = expected == found if source_dtype == dtype else is_rounded(expected, found, source_dtype, dtype)
    return np.asarray(same.all(axis=1))


def is_interpolated(
    source: np.ndarray, found: np.ndarray, start: int, length: int, reserved: int, source_dtype: str, dtype: str
) -> np.ndarray:
    """Which rows are on the line between the two rows of `source` around their place, to rounding in both dtypes.

    Args:
        source: bits of all rows, `[reserved + positions, size]`.
        found: bits of the rows from `start` on, `[rows, size]`, of `reserved + length` in all.
    """
    exact, mine = (values(x, kind).astype(np.float64) for x, kind in ((source, source_dtype), (found, dtype)))
    rows = start + np.arange(len(found))
    own = len(source) - reserved
    places = np.minimum((rows - reserved) * own / length, own - 1)
    places = np.where(rows < reserved, rows, reserved + places)
    low = np.floor(places).astype(int)
    below, above = exact[low], exact[np.minimum(low + 1, len(source) - 1)]
    expected = below + (above - below) * (places - low)[:, None]
    step = max(_EPSILON[dtype], _EPSILON[source_dtype], 4 * _EPSILON["F64" if source_dtype == "F64" else "F32"])
    with np.errstate(invalid="ignore"):
        near = np.abs(mine - expected) <= step * np.maximum(np.abs(below), np.abs(above)) + _TINY[dtype]
    return np.asarray((near | (mine == expected) | (np.isnan(mine) & np.isnan(expected))).all(axis=1))
