"""Faults planted into a converted folder, each undone at the end of its `with`: for the tests and for
tests/benchmarks/faults.py."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import Tensor
from bsa_export.converted.folder import ConvertedFolder, open_folder


def _bytes(row: Tensor) -> bytes:
    with open(row.data.path, "rb") as file:
        file.seek(row.data.offset)
        return file.read(row.nbytes)


class _Edits:
    """Changes to files, undone in reverse."""

    def __init__(self):
        self.undo = []

    def write(self, path: Path, offset: int, data: bytes) -> None:
        with open(path, "r+b") as file:
            file.seek(offset)
            before = file.read(len(data))
            file.seek(offset)
            file.write(data)
        self.undo.append((path, offset, before))

    def flip(self, path: Path, offset: int, bit: int) -> None:
        with open(path, "rb") as file:
            file.seek(offset)
            byte = file.read(1)[0]
        self.write(path, offset, bytes([byte ^ 1 << bit]))

    def swap(self, one: Tensor, other: Tensor) -> None:
        first, second = _bytes(one), _bytes(other)
        self.write(one.data.path, one.data.offset, second)
        self.write(other.data.path, other.data.offset, first)

    def replace(self, path: Path, data: bytes) -> None:
        before = path.read_bytes()
        path.write_bytes(data)
        self.undo.append((path, None, before))

    def resize(self, path: Path, size: int, filling: bytes = b"") -> None:
        before = path.stat().st_size
        with open(path, "r+b") as file:
            file.seek(min(size, before))
            tail = file.read()
            file.truncate(size)
            if filling:
                file.seek(before)
                file.write(filling)
        self.undo.append((path, min(size, before), tail))

    def undone(self) -> None:
        for path, offset, before in reversed(self.undo):
            if offset is None:
                path.write_bytes(before)
                continue
            with open(path, "r+b") as file:
                if offset + len(before) > path.stat().st_size or path.stat().st_size > offset + len(before) == offset:
                    file.truncate(offset)
                file.seek(offset)
                file.write(before)


def _weights(opened: ConvertedFolder, rng: random.Random) -> Path:
    return rng.choice(opened.checkpoint.files)


def data_bit(edits: _Edits, opened: ConvertedFolder, rng: random.Random) -> str:
    """One bit anywhere in the data."""
    name, row = rng.choices(list(opened.tensors.items()), [row.nbytes for row in opened.tensors.values()])[0]
    offset, bit = rng.randrange(row.nbytes), rng.randrange(8)
    edits.flip(row.data.path, row.data.offset + offset, bit)
    return f"bit {bit} of byte {offset} of {name}"


def header_bit(edits: _Edits, opened: ConvertedFolder, rng: random.Random) -> str:
    """One bit anywhere in the header."""
    path = _weights(opened, rng)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    offset, bit = rng.randrange(8 + length), rng.randrange(8)
    edits.flip(path, offset, bit)
    return f"bit {bit} of byte {offset} of the header of {path.name}"


def swapped_tensors(edits: _Edits, opened: ConvertedFolder, rng: random.Random) -> str:
    """Two tensors of equal shape and dtype exchanged."""
    names = sorted(opened.tensors)
    while True:
        one = rng.choice(names)
        row = opened.tensors[one]
        alike = [
            n
            for n in names
            if n != one and (opened.tensors[n].dtype, opened.tensors[n].shape) == (row.dtype, row.shape)
        ]
        other = rng.choice(alike) if alike else None
        if other and _bytes(row) != _bytes(opened.tensors[other]):
            edits.swap(row, opened.tensors[other])
            return f"{one} exchanged with {other}"


def swapped_layers(edits: _Edits, opened: ConvertedFolder, rng: random.Random) -> str:
    """All tensors of two layers exchanged."""
    one, other = rng.sample(range(opened.layers), 2)
    start = f"{opened.prefix}encoder.layer.{one}."
    for name in [name for name in opened.tensors if name.startswith(start)]:
        twin = name.replace(start, f"{opened.prefix}encoder.layer.{other}.")
        edits.swap(opened.tensors[name], opened.tensors[twin])
    return f"layer {one} exchanged with layer {other}"


def shifted_positions(edits: _Edits, opened: ConvertedFolder, rng: random.Random) -> str:
    """Position rows from a random one on moved down by one to a few."""
    name = opened.prefix + "embeddings.position_embeddings.weight"
    row = opened.tensors[name]
    data, width = _bytes(row), row.nbytes // row.shape[0]
    first, by = rng.randrange(row.shape[0] - 9), rng.randrange(1, 9)
    moved = data[first * width : -by * width]
    edits.write(row.data.path, row.data.offset + (first + by) * width, moved)
    return f"position rows from {first} on shifted by {by}"


def layout_bit(edits: _Edits, opened: ConvertedFolder, rng: random.Random) -> str:
    """One block of one head's layout kept or dropped."""
    name = opened.layout_name(rng.randrange(opened.layers))
    row = opened.tensors[name]
    offset = rng.randrange(row.nbytes)
    edits.flip(row.data.path, row.data.offset + offset, 0)
    return f"element {offset} of {name}"


def _edit_config(edits: _Edits, opened: ConvertedFolder, **changes) -> None:
    edits.replace(opened.path / "config.json", (json.dumps(opened.config | changes, indent=2) + "\n").encode())


def wrong_block(edits: _Edits, opened: ConvertedFolder, rng: random.Random) -> str:
    """Another block in config.json."""
    block = rng.choice([size for size in (8, 16, 32, 64, 128) if size != opened.block])
    _edit_config(edits, opened, sparse_attention=opened.config["sparse_attention"] | {"block": block})
    return f"block {block} in config.json"


def wrong_heads(edits: _Edits, opened: ConvertedFolder, rng: random.Random) -> str:
    """Another head count in config.json, also where the sparsity config repeats it."""
    hidden = opened.config["hidden_size"]
    heads = rng.choice(
        [count for count in range(1, 2 * opened.heads + 1) if hidden % count == 0 and count != opened.heads]
    )
    both = rng.random() < 0.5
    section = opened.config["sparse_attention"] | ({"num_heads": heads} if both else {})
    _edit_config(edits, opened, num_attention_heads=heads, sparse_attention=section)
    return f"{heads} heads in config.json" + (", twice" if both else "")


def truncated(edits: _Edits, opened: ConvertedFolder, rng: random.Random) -> str:
    """A file of weights cut short."""
    path = _weights(opened, rng)
    size = rng.choice([rng.randrange(path.stat().st_size), path.stat().st_size - rng.randrange(1, 9)])
    edits.resize(path, size)
    return f"{path.name} cut to {size} bytes"


def padded(edits: _Edits, opened: ConvertedFolder, rng: random.Random) -> str:
    """Bytes behind the end of a file of weights."""
    path = _weights(opened, rng)
    filling = rng.randbytes(rng.randrange(1, 4096)) if rng.random() < 0.5 else bytes(rng.randrange(1, 4096))
    edits.resize(path, path.stat().st_size + len(filling), filling)
    return f"{len(filling)} bytes behind the end of {path.name}"


KINDS = {
    "bit in the data": data_bit,
    "bit in the header": header_bit,
    "tensors of equal shape swapped": swapped_tensors,
    "layers swapped": swapped_layers,
    "position rows shifted": shifted_positions,
    "layout bit": layout_bit,
    "wrong block": wrong_block,
    "wrong head count": wrong_heads,
    "file truncated": truncated,
    "file padded": padded,
}


@contextmanager
def planted(kind: str, folder: Path, seed: int) -> Iterator[str]:
    """Plants a seeded fault of one of KINDS into the folder, gives its description, and undoes it at the end."""
    edits = _Edits()
    try:
        yield KINDS[kind](edits, open_folder(folder), random.Random(f"{kind} {seed}"))
    finally:
        edits.undone()


def without_digests(folder: Path) -> None:
    """Takes sizes and sha256 out of the folder's conversion.json, as if it had recorded none."""
    record = json.loads((folder / "conversion.json").read_text())
    record["files"] = {}
    (folder / "conversion.json").write_text(json.dumps(record))


def signature(folder: Path) -> dict[str, bytes]:
    """What a folder holds, to see that every fault was undone."""
    open_checkpoint(folder)
    return {entry.name: entry.read_bytes() for entry in sorted(folder.iterdir()) if not os.path.isdir(entry)}
