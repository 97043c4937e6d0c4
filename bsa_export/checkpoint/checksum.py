"""A checksum of weights at the speed of memory. It finds damage; against forgers there is sha256, ten times slower."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np

from bsa_export.errors import CheckpointError
from bsa_export.files import open_file

SIDE = 256
PIECE_BYTES = SIDE * SIDE * 8


class Checksum:
    """Sums up a stream of bytes that comes in pieces.

    A piece is a square of little-endian 64-bit words, SIDE by SIDE, padded with zeros; the sums of its rows and those
    of its columns, modulo 2**64, go into a sha256, and at the end the number of bytes. One damaged word changes a row
    and a column, words that change places change two of one kind or other, and pieces are in order.
    """

    def __init__(self) -> None:
        self.digest = sha256()
        self.bytes = 0

    def update(self, piece: bytes | memoryview) -> None:
        """Adds a piece of PIECE_BYTES; the last one may be shorter."""
        if self.bytes % PIECE_BYTES:
            raise ValueError("only the last piece may be short")
        self.bytes += len(piece)
        if len(piece) < PIECE_BYTES:
            piece = bytes(piece).ljust(PIECE_BYTES, b"\0")
        words = np.frombuffer(piece, "<u8").reshape(SIDE, SIDE)
        self.digest.update(words.sum(axis=1))
        self.digest.update(words.sum(axis=0))

    def hexdigest(self) -> str:
        """The checksum of what was added, 64 hex digits."""
        whole = self.digest.copy()
        whole.update(self.bytes.to_bytes(8, "little"))
        return whole.hexdigest()


def file_checksum(path: Path) -> str:
    """The checksum of a file, read once, at the speed of the disk. Raises CheckpointError when it cannot be read."""
    checksum = Checksum()
    buffer = memoryview(bytearray(PIECE_BYTES))
    try:
        with open_file(path) as file:
            while count := file.readinto(buffer):
                checksum.update(buffer[:count])
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error.strerror})", where=path) from None
    return checksum.hexdigest()
