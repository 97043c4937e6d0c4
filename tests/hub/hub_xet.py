"""What Xet stores: xorbs as they came, and which of their chunks make up which file."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Term:
    """A run of chunks of a xorb that makes up `size` bytes of a file."""

    xorb: str
    size: int
    first: int
    end: int


class XetStore:
    """Xorbs as they came, and from the shards which of their chunks make up which file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, list[Term]] = {}
        self.by_sha256: dict[str, str] = {}

    def size(self, name: str) -> int:
        return sum(term.size for term in self.files[name])

    def add_shard(self, shard: bytes) -> None:
        """Reads the file section of a shard: behind a header of 48 bytes, records of 48 bytes."""
        records = (shard[start : start + 48] for start in range(48, len(shard), 48))
        for header in records:
            if header[:32] == b"\xff" * 32:
                return
            flags, count = struct.unpack_from("<II", header, 32)
            terms = []
            for record in (next(records) for _ in range(count)):
                size, first, end = struct.unpack_from("<III", record, 36)
                terms.append(Term(_hash(record), size, first, end))
            if flags & 1 << 31:
                for _ in range(count):
                    next(records)
            name = _hash(header)
            self.files[name] = terms
            if flags & 1 << 30:
                self.by_sha256[_hash(next(records))] = name

    def reconstruction(self, name: str, first: int, last: int, url: str) -> dict:
        """The runs of chunks that hold these bytes of a file, and where to get them."""
        terms, places, position, skipped = [], {}, 0, None
        for term in self.files[name]:
            if position + term.size > first and position <= last:
                skipped = first - position if skipped is None else skipped
                terms.append(term)
                ends = self._chunk_ends(term.xorb)
                begin = ends[term.first - 1] if term.first else 0
                place = {"range": {"start": term.first, "end": term.end}, "url": f"{url}/xorbs/{term.xorb}"}
                place["url_range"] = {"start": begin, "end": ends[term.end - 1] - 1}
                if place not in places.setdefault(term.xorb, []):
                    places[term.xorb].append(place)
            position += term.size
        listed = [
            {"hash": term.xorb, "unpacked_length": term.size, "range": {"start": term.first, "end": term.end}}
            for term in terms
        ]
        return {"offset_into_first_range": skipped or 0, "terms": listed, "fetch_info": places}

    def _chunk_ends(self, xorb: str) -> list[int]:
        """Where the chunks of a xorb end: each has a header of 8 bytes, with its packed size in bytes 2 to 4."""
        ends, position = [], 0
        data = (self.folder / xorb).read_bytes()
        while position + 8 <= len(data) and data[position] == 0:
            position += 8 + int.from_bytes(data[position + 1 : position + 4], "little")
            ends.append(position)
        return ends


def _hash(record: bytes) -> str:
    """The 32 bytes at the start of a record as Xet writes them: four little-endian numbers in hex."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", record))
