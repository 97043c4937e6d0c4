"""Elements of tensors: read, stream, convert between float dtypes, judge whether they are finite. Memory stays flat."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import as_strided

from bsa_export.checkpoint.table import ITEM_SIZE, Computed, FileRange, StridedRange, Tensor, fill, wrong_crc
from bsa_export.errors import CheckpointError

PIECE_BYTES = 4 << 20
Piece = bytes | memoryview

# numpy has no bfloat16 and no float8: their arrays hold the bits.
NUMPY_DTYPE = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
CASTS = ("F32", "F16", "BF16")
# What --dtype calls them, and what torch does.
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Bits of infinity; a larger magnitude is a NaN.
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}

FLOATS = _INFINITY.keys()


def pieces(tensor: Tensor) -> Iterator[Piece]:
    """The bytes of a tensor, row-major, in pieces of at most PIECE_BYTES (those of `Computed` as they come).

    A piece is valid until the next one is asked for.

    Raises:
        CheckpointError: the file is shorter than the table says, cannot be read, or has another CRC-32 than it states.
    """
    match tensor.data:
        case Computed(chunks):
            yield from chunks()
        case FileRange() as place:
            yield from _contiguous_pieces(place)
        case StridedRange() as place:
            yield from _strided_pieces(tensor, place)


def _contiguous_pieces(place: FileRange) -> Iterator[memoryview]:
    with open(place.path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(PIECE_BYTES, place.nbytes)))
        crc = 0
        for start in range(0, place.nbytes, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, place.nbytes - start)]
            fill(piece, file.fileno(), place.offset + start, place.path)
            if place.crc32 is not None:
                crc = zlib.crc32(piece, crc)
            yield piece
    if place.crc32 is not None and crc != place.crc32:
        raise wrong_crc(place)


def _strided_pieces(tensor: Tensor, place: StridedRange) -> Iterator[memoryview]:
    path, offset, item = place.path, place.offset, ITEM_SIZE[tensor.dtype]
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, place.strides, strict=True))
    with open(path, "rb") as file:

        def check_length() -> None:  # a page of a map beyond the end of its file would end the process
            if os.fstat(file.fileno()).st_size < offset + elements * item:
                raise CheckpointError("it became shorter while it was being read", where=path)

        check_length()
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed when the last view of it goes
        flat = np.frombuffer(memory, NUMPY_DTYPE[tensor.dtype], elements, offset)
        strides = [stride * item for stride in place.strides]
        for piece in _blocks(as_strided(flat, tensor.shape, strides, writeable=False)):
            check_length()
            out = np.empty(piece.shape, piece.dtype)
            _gather(out, piece, memory)
            yield out.reshape(-1).view(np.uint8).data


def _blocks(view: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of leading rows that fit into a piece, in order."""
    if view.nbytes <= PIECE_BYTES:
        yield view
    elif (rows := PIECE_BYTES // (view.nbytes // len(view))) >= 1:
        for start in range(0, len(view), rows):
            yield view[start : start + rows]
    else:
        for row in view:
            yield from _blocks(row)


def _gather(out: np.ndarray, view: np.ndarray, memory: mmap.mmap) -> None:
    """Copy `view`, of `memory`, to `out` in tiles, none of which keeps more than a piece of the file in memory."""
    spans = [(size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)]
    if sum(spans) <= PIECE_BYTES:
        out[...] = view
        memory.madvise(mmap.MADV_DONTNEED)
        return
    axis = spans.index(max(spans))
    half = view.shape[axis] // 2
    for part in (slice(None, half), slice(half, None)):
        index = (slice(None),) * axis + (part,)
        _gather(out[index], view[index], memory)


def read(tensor: Tensor, *, float32: bool = False) -> np.ndarray:
    """The elements of a tensor, in memory.

    Args:
        float32: returns F16, BF16, F32 and F64 as float32, instead of BF16 and float8 as bits (uint16, uint8).

    Returns:
        an array `tensor.shape` that owns its memory.
    """
    if float32 and tensor.dtype != "F32":
        parts = [_to_float32(piece, tensor.dtype) for piece in _arrays(tensor)]
        return np.concatenate(parts).reshape(tensor.shape) if parts else np.empty(tensor.shape, np.float32)
    out = np.empty(tensor.shape, NUMPY_DTYPE[tensor.dtype])
    flat, position = out.reshape(-1).view(np.uint8), 0
    for piece in pieces(tensor):
        data = np.frombuffer(piece, np.uint8)
        flat[position : position + data.size] = data
        position += data.size
    return out


def first_values(tensor: Tensor, count: int) -> np.ndarray:
    """At most `count` elements from the start of a float tensor, row-major, as flat float32. Reads no more than needed.

    Args:
        tensor: its dtype is one of `FLOATS`.
        count: of elements.
    """
    found, missing = [np.empty(0, np.float32)], count
    for piece in _arrays(tensor):
        with np.errstate(over="ignore"):  # a large F64 becomes infinite
            found.append(_to_float32(piece[:missing], tensor.dtype))
        missing -= len(found[-1])
        if missing <= 0:
            break
    return np.concatenate(found)


def cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """The row of `tensor` in another float dtype, rounded to nearest, ties to even, when it is written.

    A tensor that is not F64, F32, F16 or BF16, or is of `dtype` already, comes back as it is.

    Raises:
        CheckpointError: when its chunks are made and a finite value overflows `dtype`; names the tensor and the value.
    """
    if dtype not in CASTS:
        raise ValueError(f"expected one of {', '.join(CASTS)}, found {dtype}")
    if tensor.dtype == dtype or tensor.dtype not in _INFINITY:
        return tensor
    return Tensor(dtype, tensor.shape, Computed(lambda: _cast_chunks(name, tensor, dtype)))


def _cast_chunks(name: str, tensor: Tensor, dtype: str) -> Iterator[memoryview]:
    for piece in _arrays(tensor):
        wide = piece if tensor.dtype == "F64" and dtype != "BF16" else _to_float32(piece, tensor.dtype)
        with np.errstate(over="ignore"):
            if dtype == "BF16":
                cast_piece = _float32_to_bf16(wide)
                back = _to_float32(cast_piece, "BF16")
            else:
                cast_piece = back = wide.astype(NUMPY_DTYPE[dtype])
        lost = np.isinf(back) & np.isfinite(piece if tensor.dtype == "F64" else wide)
        if lost.any():
            raise CheckpointError(
                f"{wide[lost][0]:g} is too large for {dtype}",
                where=name,
                hint="choose another --dtype (bf16 has the range of fp32)",
            )
        yield cast_piece.data.cast("B")


def _arrays(tensor: Tensor) -> Iterator[np.ndarray]:
    """`pieces` as flat arrays of the tensor's dtype."""
    for piece in pieces(tensor):
        yield np.frombuffer(piece, NUMPY_DTYPE[tensor.dtype])


def _to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype not in _INFINITY:
        raise ValueError(f"{dtype} does not convert to float32")
    return array.astype(np.float32)


def _float32_to_bf16(array: np.ndarray) -> np.ndarray:
    """The upper half of the bits, rounded to nearest even; a NaN stays a (quiet) NaN."""
    bits = array.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # only a NaN can wrap around
    return np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def not_finite(piece: bytes | memoryview, dtype: str) -> str | None:
    """`"NaN"`, else `"infinite"`, where the little-endian elements in `piece` hold such a value; None otherwise."""
    infinity = _INFINITY.get(dtype)
    if infinity is None or not len(piece):
        return None
    unsigned = np.dtype(f"<u{ITEM_SIZE[dtype]}")
    sign = 1 << (8 * unsigned.itemsize - 1)
    largest = int(np.max(np.frombuffer(piece, unsigned) & unsigned.type(sign - 1)))
    return None if largest < infinity else "infinite" if largest == infinity else "NaN"
