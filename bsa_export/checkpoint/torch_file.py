"""The files of `torch.save`: zip archives (torch >= 1.6) and the older stream of pickles, read without torch.

The formats are those of torch/serialization.py and torch/_utils.py, torch 0.1.10 to 2.13.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, NoReturn, cast

from bsa_export.checkpoint import restricted_pickle
from bsa_export.checkpoint.restricted_pickle import MAX_PICKLE_BYTES, Global, brief, describe
from bsa_export.checkpoint.table import (
    ITEM_SIZE,
    FileRange,
    StridedRange,
    Tensor,
    checked_shape,
    read_at,
    wrong_crc,
)
from bsa_export.errors import CheckpointError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

STORAGE_DTYPE = {
    "BFloat16": "BF16", "Bool": "BOOL", "Byte": "U8", "Char": "I8", "ComplexFloat": "C64", "Double": "F64",
    "Float": "F32", "Half": "F16", "Int": "I32", "Long": "I64", "Short": "I16", "Untyped": "U8",
}  # fmt: skip
TORCH_DTYPE = {
    "bfloat16": "BF16", "bool": "BOOL", "complex64": "C64", "float16": "F16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int16": "I16", "int32": "I32", "int64": "I64", "int8": "I8",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "uint8": "U8",
}  # fmt: skip
_REBUILD_TENSOR = frozenset(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
# Names that a pickle may refer to, for a better answer than "unsafe" where the tensor itself cannot be copied.
_STORAGES = (*STORAGE_DTYPE, "ComplexDouble", "QInt8", "QInt32", "QUInt2x4", "QUInt4x2", "QUInt8")
_CONSTANTS = (
    *TORCH_DTYPE, "complex128", "complex32", "float4_e2m1fn_x2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    "contiguous_format", "per_channel_affine", "per_tensor_affine", "strided",
)  # fmt: skip
_REFERRED_TO = (
    *(f"{module}.{name}Storage" for module in ("torch", "torch.cuda", "torch.storage") for name in _STORAGES),
    *(f"torch.{name}" for name in _CONSTANTS),
)
_REFUSED = tuple(
    f"torch._utils._rebuild_{name}"
    for name in (
        "device_tensor_from_cpu_tensor", "device_tensor_from_numpy", "meta_tensor_no_storage", "nested_tensor",
        "qtensor", "sparse_csr_tensor", "sparse_tensor", "wrapper_subclass", "xla_tensor",
    )
)  # fmt: skip
# Tensors may share and repeat (stride 0) the elements of a storage: written, all of them are at most 4 times the file
# and this much, or they are made to fill a disk.
MAX_EXPANDED_BYTES = 1 << 20
MAX_ENTRIES = 200_000


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    first: int  # element of the storage at which a legacy view starts
    numel: int  # elements of the view
    total: int  # elements of the storage


def read_torch(path: Path) -> object:
    """Read what `torch.save` wrote: the saved object as `restricted_pickle.load` returns it, every tensor a `Tensor`.

    Raises:
        UnsafePickleError: the pickle names code.
        CheckpointError: the file is damaged, or its tensors cannot be copied as they are stored (quantized, sparse,
            TorchScript, big-endian).
    """
    with open(path, "rb") as file:
        return _read_zip(path, file) if file.read(4) == b"PK\x03\x04" else _read_legacy(path, file)


def _read_zip(path: Path, file: io.BufferedReader) -> object:
    ranges = _zip_ranges(path, file)
    pickles = [name for name in ranges if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            "expected the zip archive of torch.save, with one data.pkl",
            found=f"{len(pickles)} of {len(ranges)} entries",
            where=path,
        )
    prefix = pickles[0].removesuffix("data.pkl")
    byteorder = ranges.get(f"{prefix}byteorder")
    if byteorder and (order := _entry(file, byteorder, 16)) != b"little":
        raise CheckpointError(
            "expected little-endian tensors", found=order, where=path, hint="save it again on a little-endian machine"
        )
    data = ranges[pickles[0]]
    if data.nbytes > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"its pickle has {data.nbytes:,} bytes; at most {MAX_PICKLE_BYTES:,} are allowed", where=path
        )
    stream = io.BytesIO(_entry(file, data, MAX_PICKLE_BYTES))
    tensors = _Tensors(path, lambda key: ranges.get(f"{prefix}data/{key}"))
    return restricted_pickle.load(stream, path, tensors.rebuild, tensors.persistent)


def _zip_ranges(path: Path, file: io.BufferedReader) -> dict[str, FileRange]:
    """Entry -> its bytes. Every entry is stored uncompressed, inside the file, and overlaps no other.

    Its header says what the directory says: the name, that it is not compressed, and the CRC-32 of the bytes. The bytes
    are compared with the CRC-32 where they are read (`dtypes.pieces`, `writer`), if one tensor fills the whole entry.
    Storages that tensors share, that are strided or that are unused are not compared. A CRC-32 of 0 means that torch
    did not write one.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    # What zipfile raises on damaged directories depends on the byte that is wrong.
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        OSError,
        EOFError,
        struct.error,
        OverflowError,
        LookupError,
    ) as error:
        raise CheckpointError(
            f"its zip directory cannot be read ({error})", where=path, hint="is the download complete?"
        ) from None
    if len(entries) > MAX_ENTRIES:
        raise CheckpointError(f"expected at most {MAX_ENTRIES:,} zip entries", found=f"{len(entries):,}", where=path)
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(
            "expected a state dict",
            found="a TorchScript archive",
            where=path,
            hint="save torch.jit.load(file).state_dict() with torch.save",
        )
    ranges: dict[str, FileRange] = {}
    ends = [entry.header_offset for entry in entries[1:]] + [size]
    for entry, end in zip(entries, ends, strict=True):
        header = os.pread(file.fileno(), 30, entry.header_offset) if 0 <= entry.header_offset < size else b""
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise CheckpointError(
                f"its zip entry {entry.filename!r} is not where the directory says",
                where=path,
                hint="is the file complete?",
            )
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        _check_local_header(path, file, entry, header)
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise CheckpointError(
                f"its zip entry {entry.filename!r} is compressed or encrypted",
                where=path,
                hint="torch.save does neither; was the file packed again?",
            )
        if start + entry.file_size > end:
            raise CheckpointError(
                f"its zip entry {entry.filename!r} reaches beyond its place", where=path, hint="is the file complete?"
            )
        if entry.filename in ranges:
            raise CheckpointError(f"its zip entry {entry.filename!r} is there twice", where=path)
        ranges[entry.filename] = FileRange(path, start, entry.file_size, entry.CRC or None)
    return ranges


def _check_local_header(path: Path, file: io.BufferedReader, entry: zipfile.ZipInfo, header: bytes) -> None:
    """Raise CheckpointError where the header before an entry contradicts the directory (APPNOTE.TXT 6.3.10, 4.3.7)."""
    flags, method, _, _, crc, _, size, name_length, extra = struct.unpack("<HHHHIIIHH", header[6:])
    name = os.pread(file.fileno(), name_length, entry.header_offset + 30)
    described = flags & 8 and not crc  # sizes and CRC-32 are stored in a descriptor behind the bytes
    if described:
        behind = os.pread(file.fileno(), 8, entry.header_offset + 30 + name_length + extra + entry.file_size)
        crc = struct.unpack("<I", behind[4:])[0] if behind[:4] == b"PK\x07\x08" and len(behind) == 8 else entry.CRC
    same_size = described or size in (entry.file_size, 0xFFFF_FFFF)
    same_name = name.decode("utf-8" if flags & 0x800 else "cp437", "replace") == entry.orig_filename
    if (flags, method, crc) != (entry.flag_bits, entry.compress_type, entry.CRC) or not (same_size and same_name):
        raise CheckpointError(
            f"its zip entry {entry.filename!r} has a header that contradicts the directory",
            where=path,
            hint="the file is damaged or was changed; download it again",
        )


def _entry(file: io.BufferedReader, entry: FileRange, most: int) -> bytes:
    """The bytes of a small entry, at most `most`, compared with its CRC-32."""
    content = read_at(file.fileno(), min(entry.nbytes, most), entry.offset, entry.path)
    if len(content) == entry.nbytes and entry.crc32 is not None and zlib.crc32(content) != entry.crc32:
        raise wrong_crc(entry)
    return content


def _read_legacy(path: Path, file: io.BufferedReader) -> object:
    size = os.fstat(file.fileno()).st_size
    with mmap.mmap(file.fileno(), min(size, MAX_PICKLE_BYTES), access=mmap.ACCESS_READ) as stream:
        names = _Tensors(path, None)

        def load() -> object:
            return restricted_pickle.load(cast(IO[bytes], stream), path, names.rebuild, names.persistent)

        if load() != LEGACY_MAGIC:
            raise CheckpointError(
                "expected a file of torch.save",
                found="another pickle",
                where=path,
                hint="save the state dict with torch.save",
            )
        if (protocol := load()) != LEGACY_PROTOCOL:
            raise CheckpointError(
                f"expected protocol {LEGACY_PROTOCOL} of torch.save", found=describe(protocol), where=path
            )
        system = load()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise CheckpointError(
                "expected little-endian tensors", where=path, hint="save it again on a little-endian machine"
            )
        start = stream.tell()
        load()  # finds the storages; their places are known only behind it
        keys = load()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
            raise CheckpointError("its list of storages is damaged", where=path, hint="is the file complete?")
        ranges: dict[str, FileRange] = {}
        position = stream.tell()
        for key in keys:
            storage = names.storages.get(key)
            if storage is None:
                raise CheckpointError(
                    f"its storage {key!r} belongs to no tensor", where=path, hint="is the file complete?"
                )
            head = os.pread(file.fileno(), 8, position)
            nbytes = storage.total * ITEM_SIZE[storage.dtype]
            if len(head) != 8 or position + 8 + nbytes > size:
                raise CheckpointError(
                    f"expected storage {key!r} of {nbytes:,} bytes at byte {position:,}",
                    found=f"a file of {size:,}",
                    where=path,
                    hint="it is truncated",
                )
            if (count := struct.unpack("<q", head)[0]) != storage.total:
                raise CheckpointError(
                    f"expected {storage.total:,} elements in storage {key!r}", found=f"{count:,}", where=path
                )
            ranges[key] = FileRange(path, position + 8, nbytes)
            position += 8 + nbytes
        stream.seek(start)
        tensors = _Tensors(path, ranges.get)
        return restricted_pickle.load(cast(IO[bytes], stream), path, tensors.rebuild, tensors.persistent)


class _Tensors:
    """The names that rebuild tensors, and the persistent ids that stand for their storages.

    `find` returns the bytes of a storage by its key. Without it tensors become None; a reading leaves `storages`.
    """

    def __init__(self, path: Path, find: Callable[[str], FileRange | None] | None):
        self.path, self.find = path, find
        self.file_size = os.stat(path).st_size
        self.storages: dict[str, _Storage] = {}
        self.rows: set[Tensor] = set()
        self.written = 0  # bytes of the rows
        self.rebuild: dict[str, Callable[[tuple], object] | None] = dict.fromkeys(_REFERRED_TO)
        self.rebuild |= {name: partial(self.refuse, name) for name in _REFUSED}
        self.rebuild |= {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.tensor_v3,
            "torch._utils._rebuild_parameter": self.parameter,
            "torch._utils._rebuild_parameter_with_state": self.parameter,
            "torch._tensor._rebuild_from_type_v2": self.from_type,
            "torch.Size": lambda args: tuple(args[0]) if args and isinstance(args[0], (list, tuple)) else (),
        }

    def error(self, message: str, hint: str | None = "is the file complete?") -> CheckpointError:
        return CheckpointError(message, where=self.path, hint=hint)

    def refuse(self, name: str, args: tuple) -> NoReturn:
        raise self.refused(name)

    def refused(self, name: str) -> CheckpointError:
        return self.error(
            f"a tensor is stored by {name}, not as plain elements",
            hint="save it dense, on the CPU, in a float or integer dtype",
        )

    def persistent(self, pid: object) -> object:
        """`("storage", class, key, location, elements[, view])`, or `("module", class, file, source)` of a model."""
        match pid:
            case ("module", Global() as cls, *_):
                return cls
            case ("storage", Global(name), str(key), str(), int(total)) if 0 <= total < 2**62:
                view: object = None
            case ("storage", Global(name), str(key), str(), int(total), view) if 0 <= total < 2**62:
                pass
            case _:
                raise self.error(f"a storage is described as {brief(pid)}")
        dtype = STORAGE_DTYPE.get(name.rpartition(".")[2].removesuffix("Storage"))
        if dtype is None:
            raise self.refused(name)
        match view:
            case None:
                storage = _Storage(key, dtype, 0, total, total)
            case (str(), int(first), int(numel)) if 0 <= first <= first + numel <= total:
                storage = _Storage(key, dtype, first, numel, total)
            case _:
                raise self.error(f"storage {key!r} has {total:,} elements and a view {brief(view)}")
        known = self.storages.setdefault(key, storage)
        if (known.dtype, known.total) != (dtype, total):
            raise self.error(
                f"storage {key!r} has {total:,} elements of {dtype} here, {known.total:,} of {known.dtype} elsewhere"
            )
        return storage

    def tensor(self, args: tuple) -> Tensor | None:
        """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])`, or the first four."""
        match args:
            case (_Storage() as storage, offset, shape, strides, *rest) if all(
                isinstance(flag, bool) for flag in rest[:1]
            ):
                return self.resolve(storage, storage.dtype, offset, shape, strides, rest[2] if len(rest) > 2 else None)
        raise self.error("a tensor is described by other arguments than a storage, an offset, a shape and strides")

    def tensor_v3(self, args: tuple) -> Tensor | None:
        """`_rebuild_tensor_v3(storage in bytes, offset, size, stride, requires_grad, hooks, dtype[, metadata])`."""
        match args:
            case (_Storage() as storage, offset, shape, strides, bool(), _, Global(name), *rest):
                dtype = TORCH_DTYPE.get(name.removeprefix("torch."))
                if dtype is None:
                    raise self.refused(name)
                return self.resolve(storage, dtype, offset, shape, strides, rest[0] if rest else None)
        raise self.error(
            "a tensor is described by other arguments than a storage, an offset, a shape, strides and a dtype"
        )

    def parameter(self, args: tuple) -> object:
        """`_rebuild_parameter(data, requires_grad, hooks[, state])` is its data."""
        match args:
            case (Tensor() | restricted_pickle.Unbuilt() | None as data, bool(), *_):
                return data
        raise self.error("a parameter is described by other arguments than its data and whether it is trained")

    def from_type(self, args: tuple) -> object:
        """`_rebuild_from_type_v2(function, type, arguments, state)`: a tensor with Python attributes."""
        match args:
            case (Global(name), _, tuple(inner), *_) if name in _REBUILD_TENSOR:
                return self.tensor_v3(inner) if name.endswith("_v3") else self.tensor(inner)
            case (Global(name), *_):
                raise self.refused(name)
        raise self.error("a tensor is described by other arguments than a function, a type and its arguments")

    def resolve(
        self, storage: _Storage, dtype: str, offset: object, shape: object, strides: object, metadata: object
    ) -> Tensor | None:
        """The row of a view of a storage; offset and strides are in elements of `dtype`."""
        try:
            shape = checked_shape(shape)
            strides = checked_shape(strides)
        except ValueError as error:
            raise self.error(f"a tensor of storage {storage.key!r} is damaged: {error}") from None
        if type(offset) is not int or offset < 0 or len(strides) != len(shape):
            raise self.error(
                f"storage {storage.key!r} has a tensor of offset {brief(offset)}, shape {shape}, strides {strides}"
            )
        if isinstance(metadata, dict) and (metadata.get("conj") or metadata.get("neg")):
            raise self.error(
                "a tensor is stored as a lazy conjugate or negative", hint="save it after .resolve_conj().resolve_neg()"
            )
        if self.find is None:
            return None
        found = self.find(storage.key)
        if found is None:
            raise self.error(f"expected storage {storage.key!r}, which is not in the file")
        if found.nbytes != storage.total * ITEM_SIZE[storage.dtype]:
            raise self.error(
                f"storage {storage.key!r} has {found.nbytes:,} bytes, not {storage.total:,} elements of {storage.dtype}"
            )
        item = ITEM_SIZE[dtype]
        count = math.prod(shape)
        last = (
            offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if count else offset
        )
        available = storage.numel * ITEM_SIZE[storage.dtype] // item
        if last + bool(count) > available:
            raise self.error(
                f"a tensor reaches to element {last:,} of storage {storage.key!r}, which has {available:,}"
            )
        start = found.offset + storage.first * ITEM_SIZE[storage.dtype] + offset * item
        if count == 0 or _is_contiguous(shape, strides):
            whole = (start, count * item) == (found.offset, found.nbytes)
            row = Tensor(dtype, shape, FileRange(self.path, start, count * item, found.crc32 if whole else None))
        else:
            row = Tensor(dtype, shape, StridedRange(self.path, start, strides))
        if row in self.rows:
            return row
        self.rows.add(row)
        self.written += row.nbytes
        if self.written > 4 * self.file_size + MAX_EXPANDED_BYTES:
            raise self.error(
                f"with a tensor of shape {shape}, its tensors repeat the elements of their storages until they are "
                f"{self.written:,} bytes",
                hint="save them contiguous",
            )
        return row


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
