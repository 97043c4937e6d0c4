"""The header of a safetensors file, judged strictly, and by the safetensors library itself.

The format is that of safetensors 0.8.0, README and `tensor.rs`.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open

from bsa_export.checkpoint.table import ITEM_SIZE, MAX_TENSORS, FileRange, Tensor, checked_shape
from bsa_export.errors import CheckpointError
from bsa_export.files import open_file, parse_json

MAX_HEADER_BYTES = 100_000_000


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the table and the `__metadata__` of a safetensors file. The tensors are in the order of their bytes.

    Raises:
        CheckpointError: the header is damaged, the ranges in it are not exactly the bytes behind it, or the safetensors
            library refuses it for another reason.
    """
    with open_file(path) as file:
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
        header = parse_json(text)
        metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
        if not isinstance(header, dict) or not isinstance(metadata, dict) or not _are_strings(metadata):
            raise ValueError("it is not an object of tensors with a __metadata__ of strings")
        if len(header) > MAX_TENSORS:
            raise ValueError(f"it has {len(header):,} tensors; at most {MAX_TENSORS:,} are allowed")
        found = [(name, *_row(name, entry, path, 8 + length)) for name, entry in header.items()]
    except ValueError as error:
        raise CheckpointError(
            f"its safetensors header is damaged: {str(error)[:300]}", where=path, hint="is the download complete?"
        ) from None
    found.sort(key=lambda entry: (entry[2].offset, entry[2].nbytes))
    position = 8 + length
    for name, _, place in found:
        if place.offset != position:
            what = "overlaps the tensor before it" if place.offset < position else "leaves a hole before it"
            raise CheckpointError(
                f"{name} starts at byte {place.offset:,} and {what}, which ends at {position:,}", where=path
            )
        position += place.nbytes
    if position != size:
        raise CheckpointError(
            f"expected {position:,} bytes", found=f"{size:,}", where=path, hint="is the download complete?"
        )
    try:
        with safe_open(path, "np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"the safetensors library refuses it: {str(error)[:300]}", where=path) from None
    return {name: row for name, row, _ in found}, metadata


def _are_strings(metadata: dict) -> bool:
    return all(isinstance(value, str) for value in metadata.values())


def _row(name: str, entry: object, path: Path, start: int) -> tuple[Tensor, FileRange]:
    match entry:
        case {"dtype": str(dtype), "shape": shape, "data_offsets": [int(begin), int(end)], **rest} if not rest:
            pass
        case _:
            raise ValueError(f"{name}: expected dtype, shape and data_offsets only")
    if dtype not in ITEM_SIZE:
        raise ValueError(f"{name} has the dtype {dtype}; known are {', '.join(ITEM_SIZE)}")
    try:
        shape = checked_shape(shape)
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}") from None
    nbytes = math.prod(shape) * ITEM_SIZE[dtype]
    if begin < 0 or end - begin != nbytes:
        raise ValueError(f"{name} is {dtype} {list(shape)}, {nbytes:,} bytes, but its range is {begin:,} to {end:,}")
    place = FileRange(path, start + begin, nbytes)
    return Tensor(dtype, shape, place), place
