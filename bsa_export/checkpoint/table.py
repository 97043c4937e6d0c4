"""A checkpoint as a table: name -> dtype, shape and place of the bytes. Nothing is decoded, torch is not imported."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from bsa_export.errors import CheckpointError

# Names of dtypes are those of the safetensors format; the value is the size of one element in bytes.
ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

MAX_TENSORS = 100_000  # of a checkpoint; a BERT has hundreds
MAX_DIMS = 32  # numpy before 2.0 has no more


def checked_shape(shape: object) -> tuple[int, ...]:
    """`shape`, from a file, as a tuple of sizes that numpy can hold. Raises ValueError with the reason."""
    if not isinstance(shape, (list, tuple)):
        raise ValueError(f"its shape is a {type(shape).__name__}, not a list of sizes")
    if len(shape) > MAX_DIMS:
        raise ValueError(f"it has {len(shape)} dimensions; at most {MAX_DIMS} are allowed")
    if not all(type(size) is int and 0 <= size < 2**62 for size in shape):
        raise ValueError("its shape has entries that are not sizes")
    if math.prod(size for size in shape if size) >= 2**62:
        raise ValueError("its shape has too many elements")
    return tuple(shape)


@dataclass(frozen=True)
class FileRange:
    """Bytes of one contiguous, row-major tensor: `[offset, offset + nbytes)` of `path`.

    `crc32` is the CRC-32 of these bytes where the file states it: a zip archive does, for an entry as a whole.
    """

    path: Path
    offset: int
    nbytes: int
    crc32: int | None = None


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


class SkipReason(Enum):
    """Why something next to the tensors is not read."""

    SAME_WEIGHTS = "same weights"  # a file with the tensors of the one that is read, or with a name for such a file
    OTHER_WEIGHTS = "other weights"  # a file with tensors of other names, such as a head
    UNREADABLE = "unreadable"  # a file with the ending of weights that cannot be opened
    IN_THE_FILE = "in the file"  # an entry next to the state dict
    NOT_INDEXED = "not indexed"  # a tensor that the index does not name in its shard


@dataclass(frozen=True)
class Skipped:
    """Something that is stored next to the tensors and is not read.

    Attributes:
        name: of the file, entry or tensor.
        reason: what it is.
        why: the reason in words, for people.
    """

    name: str
    reason: SkipReason
    why: str


Stamp = tuple[int, int, int, int]


@dataclass
class Checkpoint:
    """What `open_checkpoint` found.

    Attributes:
        tensors: name -> row, in the order of the file(s), wrappers and the prefix `module.` removed.
        folder: the folder that holds the weights, config.json and the tokenizer.
        files: the weight files, in order.
        skipped: what is stored next to the tensors and is not read.
        metadata: the safetensors `__metadata__`, empty for other formats.
        stamps: what `check_unchanged` compares.
    """

    tensors: dict[str, Tensor]
    folder: Path
    files: list[Path]
    skipped: list[Skipped] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    stamps: dict[Path, Stamp] = field(default_factory=dict)

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


def file_stamp(path: Path) -> Stamp:
    """Inode, size and the times of the last change of a file. A program can set back the one (mtime), not the other."""
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def read_at(file: int, count: int, offset: int, path: Path) -> bytes:
    """`count` bytes at `offset` of an open file. Raises CheckpointError where the file ends before."""
    content = bytearray(count)
    fill(memoryview(content), file, offset, path)
    return bytes(content)


def fill(buffer: memoryview, file: int, offset: int, path: Path) -> None:
    """Read into `buffer` what is stored at `offset` of an open file, in as many reads as the system takes.

    Raises:
        CheckpointError: the file ends before, or cannot be read; it names `path`.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(file, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"it cannot be read ({error.strerror})", where=path) from None
        if not count:
            raise CheckpointError("it became shorter while it was being read", where=path)
        done += count


def wrong_crc(found: FileRange) -> CheckpointError:
    """The error for bytes that are not those that were saved."""
    return CheckpointError(
        f"its bytes {found.offset:,} to {found.offset + found.nbytes:,} do not have the CRC-32 that the file states",
        where=found.path,
        hint="the file is damaged; download or copy it again",
    )


def tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that share every byte with an earlier name (tied weights): later -> first. Empty tensors are never tied."""
    first: dict[Tensor, str] = {}
    return {name: first[row] for name, row in tensors.items() if row.nbytes and first.setdefault(row, name) != name}
