"""Write a table as safetensors: byte ranges go from file to file in one pass, checked and summed up meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple

from bsa_export.checkpoint.checksum import PIECE_BYTES, Checksum
from bsa_export.checkpoint.dtypes import Piece, not_finite, pieces
from bsa_export.checkpoint.safetensors_file import read_safetensors
from bsa_export.checkpoint.table import ITEM_SIZE, Computed, FileRange, Tensor, file_stamp, fill, wrong_crc
from bsa_export.errors import CheckpointError
from bsa_export.files import plain_error

INDEX_NAME = "model.safetensors.index.json"
NO_METADATA: Mapping[str, str] = MappingProxyType({})

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FileRecord:
    """A file that was written.

    Attributes:
        bytes: its size.
        sha256: hex digest of its content, None for weights: at 0.6 s a GB it would take longer than to write them.
        checksum: of weights (`checksum.Checksum`), None for other files.
        not_finite: tensor -> "NaN" or "infinite", for those that hold such a value.
    """

    bytes: int
    sha256: str | None = None
    checksum: str | None = None
    not_finite: dict[str, str] = field(default_factory=dict)


def write_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] = NO_METADATA,
    progress: Progress | None = None,
) -> dict[str, FileRecord]:
    """Write `model.safetensors`, or shards of at most `max_shard_size` bytes and an index, named as the Hub names them.

    A tensor that is larger than `max_shard_size` gets a shard of its own.

    Args:
        folder: where to; it exists.
        tensors: names that share their bytes are written once a name: drop the later ones first (`table.tied`).
        metadata: added to the safetensors `__metadata__`, which always holds `format: pt`: transformers asks for it.
        progress: called with (bytes done, bytes in all).

    Returns:
        file name -> record, the index included.
    """
    shards = split(tensors, max_shard_size)
    total = sum(row.nbytes for row in tensors.values())
    records: dict[str, FileRecord] = {}
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        records[name] = write_safetensors(folder / name, shard, metadata, progress and _part(progress, done, total))
        done += sum(row.nbytes for row in shard.values())
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        data = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        try:
            (folder / INDEX_NAME).write_bytes(data)
        except OSError as error:
            raise plain_error(error, folder / INDEX_NAME) from error
        records[INDEX_NAME] = FileRecord(len(data), sha256=hashlib.sha256(data).hexdigest())
    return records


def _part(progress: Progress, before: int, total: int) -> Progress:
    """The progress of one shard as that of all."""
    return lambda written, _: progress(before + written, total)


def split(tensors: Mapping[str, Tensor], max_shard_size: int | None) -> list[dict[str, Tensor]]:
    """The tensors in order, cut before each one with which a shard would exceed `max_shard_size` bytes."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, row in tensors.items():
        if shards[-1] and max_shard_size is not None and size + row.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = row
        size += row.nbytes
    return shards


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `500MB` (powers of 1000), `2GiB` (of 1024) or `1000`. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise ValueError(f"expected a size such as 5GB or 500MB, found {text!r}")
    power = " KMGT".index((match[2] or " ").upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] = NO_METADATA,
    progress: Progress | None = None,
) -> FileRecord:
    """Write one safetensors file, read its header back and compare it with what was meant.

    The tensors are sorted by the size of their elements, largest first, so that each is aligned; otherwise they stay in
    their order.

    Raises:
        CheckpointError: the disk is full, a source file cannot be read, changed while it was copied or has another
            CRC-32 than it states, or a name cannot be stored.
    """
    header, rows = _header(tensors, metadata)
    total = sum(row.nbytes for row in rows.values())
    sources = {row.data.path for row in rows.values() if not isinstance(row.data, Computed)}
    try:
        stamps = {source: file_stamp(source) for source in sources}
        with _Output(path) as out, _Files() as files:
            out.write(header)
            done = 0
            for name, row in rows.items():
                out.begin(name, row)
                for count in _write_tensor(name, row, files, out):
                    done += count
                    if progress:
                        progress(done, total)
            out.flush()
        changed = [source for source, stamp in stamps.items() if file_stamp(source) != stamp]
    except OSError as error:
        raise plain_error(error, path) from error
    if changed:
        raise CheckpointError(
            "it was changed while it was being copied", where=changed[0], hint="run again when nothing writes to it"
        )
    written, _ = read_safetensors(path)
    if {name: (row.dtype, row.shape) for name, row in written.items()} != {
        name: (row.dtype, row.shape) for name, row in rows.items()
    }:
        raise CheckpointError("the file read back differs from what was written", where=path, hint="please report this")
    seen = out.inspector
    return FileRecord(len(header) + total, checksum=seen.checksum.hexdigest(), not_finite=seen.not_finite)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Tensor]]:
    """The length and JSON header, padded to 8 bytes, and the rows in the order of their bytes."""
    if "__metadata__" in tensors:
        raise CheckpointError("safetensors has no tensor of this name", where="__metadata__", hint="rename it")
    rows = dict(sorted(tensors.items(), key=lambda item: -ITEM_SIZE[item[1].dtype]))
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, row in rows.items():
        entries[name] = {"dtype": row.dtype, "shape": row.shape, "data_offsets": (position, position + row.nbytes)}
        position += row.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, rows


class _Files(AbstractContextManager):
    """Source files, each opened once."""

    def __init__(self) -> None:
        self.files: dict[Path, int] = {}

    def __getitem__(self, path: Path) -> int:
        if path not in self.files:
            self.files[path] = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return self.files[path]

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            os.close(file)


def _write_tensor(name: str, row: Tensor, files: _Files, out: _Output) -> Iterator[int]:
    """Write one tensor to `out` and yield the size of each piece."""
    if not isinstance(row.data, FileRange):
        written = 0
        for piece in pieces(row):
            count = out.write(piece)
            written += count
            yield count
        if written != row.nbytes:
            raise CheckpointError(f"expected {row.nbytes:,} computed bytes", found=f"{written:,}", where=name)
        return
    position, end = row.data.offset, row.data.offset + row.nbytes
    while position < end:
        room = out.room(end - position)
        fill(room, files[row.data.path], position, row.data.path)
        out.advance(len(room))
        position += len(room)
        yield len(room)


class _Span(NamedTuple):
    """The tensor whose bytes a buffer holds from `start` on."""

    name: str
    dtype: str
    start: int
    source: FileRange | None


class _Output(AbstractContextManager):
    """The file that is written, through buffers of one piece, which `_Inspector` looks at meanwhile.

    Plain reads and writes of pieces that stay in the processor's cache are as fast as copying in the kernel (whose
    `copy_file_range` slows down where source and target are not aligned alike), and leave the bytes in memory.
    """

    def __init__(self, path: Path):
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.inspector = _Inspector()
        self.buffer = self.inspector.buffer()
        self.filled = 0
        self.spans = [_Span("", "U8", 0, None)]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inspector.end()
        os.close(self.file)
        if kind is None and self.inspector.error is not None:
            raise self.inspector.error

    def begin(self, name: str, row: Tensor) -> None:
        """Say which tensor the next bytes are of."""
        source = row.data if isinstance(row.data, FileRange) and row.data.crc32 is not None else None
        self.spans.append(_Span(name, row.dtype, self.filled, source))

    def room(self, count: int) -> memoryview:
        """Where the next bytes go, at most `count`; `advance` when they are there."""
        return self.buffer[self.filled : self.filled + count]

    def advance(self, count: int) -> None:
        self.filled += count
        if self.filled == PIECE_BYTES:
            self.flush()

    def write(self, data: Piece) -> int:
        view = memoryview(data).cast("B")
        position = 0
        while position < len(view):
            room = self.room(len(view) - position)
            room[:] = view[position : position + len(room)]
            position += len(room)
            self.advance(len(room))
        return position

    def flush(self) -> None:
        """Write what is in the buffer, and go on in another one."""
        piece = self.buffer[: self.filled]
        self.inspector.pieces.put((piece, self.spans))
        while piece:
            piece = piece[os.write(self.file, piece) :]
        self.buffer = self.inspector.buffer()
        self.filled = 0
        self.spans = [self.spans[-1]._replace(start=0)]


class _Inspector:
    """A thread that sums up the pieces of a file and looks for values that are not finite, while they are written.

    A piece comes with its spans; each begins with a whole element, as tensors are aligned. Bytes whose source states a
    CRC-32 are compared with it.
    """

    BUFFERS = 3

    def __init__(self) -> None:
        self.checksum = Checksum()
        self.crc32: dict[str, tuple[FileRange, int]] = {}
        self.not_finite: dict[str, str] = {}
        self.pieces: queue.SimpleQueue[tuple[memoryview, list[_Span]] | None] = queue.SimpleQueue()
        self.free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        for _ in range(self.BUFFERS):
            self.free.put(memoryview(bytearray(PIECE_BYTES)))
        self.thread = threading.Thread(target=self.run, name="inspector", daemon=True)
        self.thread.start()

    def buffer(self) -> memoryview:
        """A buffer that is not in use. Raises what went wrong in the thread."""
        free = self.free.get()
        if free is None:
            raise self.error or RuntimeError("the inspector ended")
        return free

    def end(self) -> None:
        """Wait until every piece was looked at."""
        self.pieces.put(None)
        self.thread.join()
        for source, found in self.crc32.values():
            if self.error is None and found != source.crc32:
                self.error = wrong_crc(source)

    def run(self) -> None:
        try:
            while (work := self.pieces.get()) is not None:
                piece, spans = work
                self.checksum.update(piece)
                ends = [span.start for span in spans[1:]] + [len(piece)]
                for (name, dtype, start, source), end in zip(spans, ends, strict=True):
                    if source is not None:
                        _, before = self.crc32.get(name, (source, 0))
                        self.crc32[name] = source, zlib.crc32(piece[start:end], before)
                    if self.not_finite.get(name) != "NaN" and (what := not_finite(piece[start:end], dtype)):
                        self.not_finite[name] = what
                self.free.put(memoryview(piece.obj))
        except BaseException as error:
            self.error = error
            self.free.put(None)
