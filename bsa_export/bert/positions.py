"""Position embeddings for longer inputs: rows in, rows out, computed when they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bsa_export.checkpoint.dtypes import cast, read
from bsa_export.checkpoint.table import Computed, Tensor
from bsa_export.errors import FamilyError

# Rotary frequencies that stay where max_position_embeddings changes. The others may be computed from it.
_LENGTHS_APART = ("default", "linear", "dynamic", "proportional")
_BY_LENGTH = ("yarn", "longrope", "llama3")

METHODS = ("tile", "interpolate")
ROWS = 4096  # that are interpolated at once


def rotary_scalings(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The kinds of rotary scaling that config.json states, each with its parameters, as transformers reads them.

    They are in `rope_parameters` or, in older files, `rope_scaling`: one for all layers, or one for each kind of layer.

    Raises:
        FamilyError: they are no object, of a kind that transformers does not compute, or for a part of each head.
    """
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        stated = config.get(name) or {}
        if not isinstance(stated, Mapping):
            raise FamilyError(f"{name}: expected an object", found=repr(stated)[:80], where="config.json")
        for one in [value for value in stated.values() if isinstance(value, Mapping)] or [stated]:
            kind = one.get("rope_type") or one.get("type") or "default"
            if kind not in _LENGTHS_APART + _BY_LENGTH:
                kinds = ", ".join(_LENGTHS_APART + _BY_LENGTH)
                raise FamilyError(
                    f"{name}: expected a scaling that transformers computes ({kinds})",
                    found=repr(kind)[:80],
                    where="config.json",
                )
            share = one.get("partial_rotary_factor", config.get("partial_rotary_factor"))
            if kind != "proportional" and share not in (None, 1):
                raise FamilyError(
                    "partial_rotary_factor: expected 1, because the class rotates whole heads",
                    found=repr(share)[:80],
                    where="config.json",
                )
            found.append((kind, one))
    return found


def scaling_that_depends_on_length(config: Mapping[str, Any]) -> str | None:
    """The kind of rotary scaling that is computed from `max_position_embeddings`; None where there is none.

    A kind of `_BY_LENGTH` needs the trained length and a factor; transformers takes what config.json does not state
    from `max_position_embeddings`.
    """
    for kind, one in rotary_scalings(config):
        own = one.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        if kind in _BY_LENGTH and not (own and one.get("factor")):
            return kind
    return None


def extend(name: str, table: Tensor, length: int, reserved: int, method: str = "tile") -> Tensor:
    """Makes the position embeddings of `length` tokens from those of a model that reads fewer (or more).

    `tile` repeats the source's rows, bit for bit: position p is row p modulo their number (as DeepSpeed's
    `extend_position_embedding` means to). `interpolate` puts position p at p * rows / length of the source, linearly
    between neighbours, in float32 (position interpolation, arXiv 2306.15595). Reserved rows stay in front as they are.

    Args:
        name: of the tensor, for messages.
        table: float `[reserved + rows, size]`.
        length: tokens to read, at least 1.
        reserved: rows in front that are not positions.
        method: one of METHODS.

    Returns:
        The row of the table for `[reserved + length, size]` in the same dtype; `table` itself where nothing changes.
    """
    rows = table.shape[0] - reserved
    if rows == length:
        return table
    shape = (reserved + length, *table.shape[1:])
    if method == "interpolate" and length > rows:
        if table.dtype in ("F32", "F64"):
            return Tensor(table.dtype, shape, Computed(lambda: _interpolated(read(table), length, reserved)))
        wide = Tensor("F32", shape, Computed(lambda: _interpolated(read(table, float32=True), length, reserved)))
        return cast(name, wide, table.dtype)
    return Tensor(table.dtype, shape, Computed(lambda: _tiled(read(table), length, reserved)))


def _tiled(table: np.ndarray, length: int, reserved: int) -> Iterator[memoryview]:
    own = table[reserved:]
    yield _bytes(table[:reserved])
    for start in range(0, length, len(own)):
        yield _bytes(own[: length - start])


def _interpolated(table: np.ndarray, length: int, reserved: int) -> Iterator[memoryview]:
    own = table[reserved:]
    yield _bytes(table[:reserved])
    for start in range(0, length, ROWS):
        places = np.arange(start, min(start + ROWS, length)) * (len(own) / length)
        below = np.minimum(places.astype(int), len(own) - 1)
        above = np.minimum(below + 1, len(own) - 1)
        share = (places - below)[:, None].astype(table.dtype)
        mixed = own[below] * (1 - share) + own[above] * share
        yield _bytes(np.where(share == 0, own[below], mixed))  # -0.0 too stays as it is


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
