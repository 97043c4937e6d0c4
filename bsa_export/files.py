"""Small files and the disk: bounded reads of regular files, strict JSON, writes that replace, digests, plain errors."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, NoReturn

from bsa_export.errors import BsaError, CheckpointError

PIECE_BYTES = 4 << 20
MAX_CONFIG_BYTES = 4 << 20  # config.json and options: the largest known config.json has 300 kB
MAX_JSON_BYTES = 100_000_000  # an index, a record or a tokenizer.json: the format's own limit for a safetensors header
# The Hub stores larger files by sha256 only. git's own hash of them is never asked for.
LARGEST_BLOB = 10 << 20
MAX_DIGITS = 300  # of an integer in JSON: more do not convert to a float
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Hashes(NamedTuple):
    """A file's sha256, and git's hash of it as a blob; None for one that is too large for a git blob on the Hub."""

    sha256: str
    blob: str | None


def open_file(path: Path, error: type[BsaError] = CheckpointError) -> BufferedReader:
    """Opens a regular file to read its bytes. Never waits for a pipe, never opens a device.

    Raises:
        error: it is not such a file, or cannot be opened.
        FileNotFoundError: there is no such file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        raise error(f"cannot be read ({getattr(problem, 'strerror', None) or problem})", where=path) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise error("expected a file", found="a folder" if stat.S_ISDIR(mode) else "a device or a pipe", where=path)
    return open(descriptor, "rb")


def read_bytes(path: Path, most: int, error: type[BsaError] = CheckpointError) -> bytes:
    """The content of a regular file of at most `most` bytes. Never waits for a pipe, never reads a device.

    Raises:
        error: it is not such a file, or cannot be read.
        FileNotFoundError: there is no such file.
    """
    with open_file(path, error) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise error(f"expected at most {most:,} bytes", found=f"{size:,}", where=path)
        try:
            content = file.read(most + 1)
        except OSError as problem:
            raise error(f"cannot be read ({problem.strerror})", where=path) from None
    if len(content) > most:
        raise error(f"expected at most {most:,} bytes", found="a file that grows", where=path)
    return content


def read_text(path: Path, most: int = MAX_JSON_BYTES, error: type[BsaError] = CheckpointError) -> str:
    """The content of a regular UTF-8 file of at most `most` bytes. Raises as `read_bytes`."""
    try:
        return read_bytes(path, most, error).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"expected text in UTF-8 ({problem.reason} at byte {problem.start})", where=path) from None


def parse_json(text: str | bytes) -> object:
    """JSON as the standard has it: UTF-8, no NaN or infinity, no name twice in an object, no half of a surrogate pair.

    Raises:
        ValueError: with the reason.
    """
    if isinstance(text, bytes):
        text = text.decode()
    try:
        value = json.loads(
            text, object_pairs_hook=_unique_names, parse_constant=_not_json, parse_float=_finite, parse_int=_integer
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string has half of a surrogate pair") from None
    return value


def read_json(path: Path, most: int = MAX_CONFIG_BYTES, error: type[BsaError] = CheckpointError) -> object:
    """The content of a JSON file of at most `most` bytes.

    Raises:
        error: it is not a regular file of that size, or not JSON.
        FileNotFoundError: there is no such file.
    """
    text = read_text(path, most, error)
    try:
        return parse_json(text)
    except ValueError as problem:
        raise error(f"expected JSON ({str(problem)[:200]})", where=path) from None


def _unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name[:100]!r} is there twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text):,} digits")
    return int(text)


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def json_text(content: Mapping) -> str:
    """An object as transformers writes its configs: two spaces, a line break at the end. Raises ValueError for NaN."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, content: Mapping) -> None:
    """Writes an object into a new file. Raises OSError."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(json_text(content))


def replace_file(path: Path, content: bytes) -> None:
    """Writes a temporary file next to `path` and renames it. Raises OSError; the old file is still there then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """The hex digest of a file. Raises CheckpointError if it cannot be read."""
    return hashes_of(path, blob=False).sha256


def hashes_of(path: Path, blob: bool = True) -> Hashes:
    """The hashes of a file, read once. Raises CheckpointError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            git = hashlib.sha1(b"blob %d\0" % size) if blob and size <= LARGEST_BLOB else None
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                if git:
                    git.update(piece)
    except OSError as error:
        raise plain_error(error, path) from None
    return Hashes(digest.hexdigest(), git.hexdigest() if git else None)


def plain_error(error: OSError, where: Path, what: str | None = None) -> CheckpointError:
    """A failed read or write in one sentence: `what` failed with `where`, or with the file that the error names."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            "the disk is full", where=where, hint="nothing was left there; free some space or choose another place"
        )
    if error.errno == errno.EFBIG:
        return CheckpointError(
            "the file is larger than this system allows", where=where, hint="choose a smaller --max-shard-size"
        )
    if what is not None:
        return CheckpointError(f"{what} ({error.strerror or error})", where=where)
    return CheckpointError(f"it cannot be read or written ({error.strerror or error})", where=error.filename or where)
