"""The header of a safetensors file, judged strictly (format: safetensors 0.8.0, README and `tensor.rs`)."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

from bsa_export.checkpoint.table import ITEM_SIZE, FileRange, Tensor, checked_shape
from bsa_export.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the table and the `__metadata__` of a safetensors file. The tensors are in the order of their bytes.

    Raises:
        CheckpointError: the header is damaged, or the ranges in it are not exactly the bytes behind it.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"expected a safetensors header of at most {max(0, min(size - 8, MAX_HEADER_BYTES)):,} bytes",
                found=f"a length of {length:,}",
                where=path,
                hint="is the download complete?",
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
        metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("it is not an object of tensors with a __metadata__ of strings")
        rows = {name: _row(name, entry, path, 8 + length) for name, entry in header.items()}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"its safetensors header is damaged: {str(error)[:300]}", where=path, hint="is the download complete?"
        ) from None
    rows = dict(sorted(rows.items(), key=lambda item: (item[1].data.offset, item[1].nbytes)))
    position = 8 + length
    for name, row in rows.items():
        if row.data.offset != position:
            what = "overlaps the tensor before it" if row.data.offset < position else "leaves a hole before it"
            raise CheckpointError(
                f"{name} starts at byte {row.data.offset:,} and {what}, which ends at {position:,}", where=path
            )
        position += row.nbytes
    if position != size:
        raise CheckpointError(
            f"expected {position:,} bytes", found=f"{size:,}", where=path, hint="is the download complete?"
        )
    return rows, metadata


def _row(name: str, entry: object, path: Path, start: int) -> Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": shape, "data_offsets": [int(begin), int(end)]} if len(entry) == 3:
            pass
        case _:
            raise ValueError(f"{name} is no dtype, shape and data_offsets")
    if dtype not in ITEM_SIZE:
        raise ValueError(f"{name} has the dtype {dtype}; known are {', '.join(ITEM_SIZE)}")
    try:
        shape = checked_shape(shape)
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}") from None
    nbytes = math.prod(shape) * ITEM_SIZE[dtype]
    if begin < 0 or end - begin != nbytes:
        raise ValueError(f"{name} is {dtype} {list(shape)}, {nbytes:,} bytes, but its range is {begin:,} to {end:,}")
    return Tensor(dtype, shape, FileRange(path, start + begin, nbytes))


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict, for `json.loads`. Raises ValueError on a repeated key, whose later value would win."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return result
