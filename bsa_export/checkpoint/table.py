"""A checkpoint as a table: name -> dtype, shape and where the bytes lie. Nothing is decoded, torch is not imported."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bsa_export.errors import CheckpointError

# Names of dtypes are those of the safetensors format; the value is the size of one element in bytes.
ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

MAX_DIMS = 32  # numpy before 2.0 has no more


def checked_shape(shape: object) -> tuple[int, ...]:
    """`shape`, from a file, as a tuple of sizes that numpy can hold. Raises ValueError with the reason."""
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int and 0 <= size < 2**62 for size in shape):
        raise ValueError(f"its shape is {str(shape)[:80]}, not a list of sizes")
    if len(shape) > MAX_DIMS:
        raise ValueError(f"it has {len(shape)} dimensions; {MAX_DIMS} are the most")
    return tuple(shape)


@dataclass(frozen=True)
class FileRange:
    """Bytes of one contiguous, row-major tensor: `[offset, offset + nbytes)` of `path`."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class StridedRange:
    """A tensor that is a non-contiguous view of a storage in a file.

    `strides` are in elements, `offset` is that of its first element in bytes.
    """

    path: Path
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Computed:
    """Bytes that are made when they are written: `chunks()` yields bytes-like pieces, row-major, in order."""

    chunks: Callable[[], Iterator[bytes | memoryview]]


@dataclass(frozen=True)
class Tensor:
    """One row of the table. Two names with equal rows share their storage (tied weights)."""

    dtype: str
    shape: tuple[int, ...]
    data: FileRange | StridedRange | Computed

    @property
    def nbytes(self) -> int:
        """Size in bytes when written contiguously."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass
class Checkpoint:
    """What `open_checkpoint` found.

    Attributes:
        tensors: name -> row, in the order of the file(s), wrappers and the prefix `module.` removed.
        folder: the folder that holds the weights, config.json and the tokenizer.
        files: the weight files, in order.
        skipped: what lies beside the tensors and was not built: (name, why).
        metadata: the safetensors `__metadata__`, empty for other formats.
        stamps: what `check_unchanged` compares.
    """

    tensors: dict[str, Tensor]
    folder: Path
    files: list[Path]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    stamps: dict[Path, tuple[int, int, int]] = field(default_factory=dict)

    def check_unchanged(self) -> None:
        """Raise CheckpointError when a weight file is no longer the one that was opened. Call it after copying."""
        for path, stamp in self.stamps.items():
            try:
                now = file_stamp(path)
            except OSError as error:
                raise CheckpointError(
                    f"it was removed while it was being read ({error.strerror})", where=path
                ) from None
            if now != stamp:
                raise CheckpointError(
                    "it was changed while it was being read", where=path, hint="run again when nothing writes to it"
                )


def file_stamp(path: Path) -> tuple[int, int, int]:
    """Inode, size and time of the last change of a file."""
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that share every byte with an earlier name (tied weights): later -> first. Empty tensors are never tied."""
    first: dict[Tensor, str] = {}
    return {name: first[row] for name, row in tensors.items() if row.nbytes and first.setdefault(row, name) != name}
