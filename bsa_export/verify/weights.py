"""The weights check: every tensor of the source is in the folder, bit for bit, or is what a rule makes of it. No torch.

The rules are those of `rules`, `names` and `carried`, which share nothing with the conversion. Interpolated rows,
whose last bits depend on the order of operations, are then also compared with `bert.positions.extend`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from bsa_export.bert.config_file import find_config, read_config
from bsa_export.bert.families import BUFFERS, FAMILIES, reserved_rows
from bsa_export.bert.positions import extend
from bsa_export.bert.recognition import encoder_prefix, encoder_prefixes
from bsa_export.bert.structure import POSITIONS, STORED_LAYOUT, TOKEN_TYPES
from bsa_export.checkpoint.dtypes import DTYPES, cast, pieces, read
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import ITEM_SIZE, Checkpoint, Tensor
from bsa_export.conversion.source_folder import encoder_folder
from bsa_export.converted.checks import Check, Kind, result
from bsa_export.converted.folder import ConvertedFolder
from bsa_export.converted.records import ConversionRecord
from bsa_export.errors import BsaError
from bsa_export.verify.bits import both, first_difference, rows_of
from bsa_export.verify.carried import carried_faults
from bsa_export.verify.lineage import check_lineage, is_ancestor
from bsa_export.verify.names import ATTRIBUTES, expected_name
from bsa_export.verify.rules import bits_of, is_interpolated, is_rounded, is_tiled
from bsa_export.verify.stated import stated_faults

FLOATS = ("F64", "F32", "F16", "BF16")
ROWS = 1024  # position rows judged at once
# What of a config.json makes another model, by the names of BERT and DistilBERT.
SIZES = (
    "model_type", "hidden_size", "dim", "num_hidden_layers", "n_layers", "num_attention_heads", "n_heads",
    "intermediate_size", "hidden_dim", "vocab_size",
)  # fmt: skip

Progress = Callable[[int, int], None]


def check_weights(
    folder: ConvertedFolder,
    source: Path,
    config_path: Path | None = None,
    progress: Progress | None = None,
    source_name: str | None = None,
) -> Check:
    """Compares every tensor of the folder with the source of the conversion, and the files next to the weights.

    Reads both once, in pieces; memory does not grow with the model.

    Args:
        folder: what was converted.
        source: the weight file, index or folder that it was converted from.
        config_path: the source's config.json, if it is not stored next to the weights.
        progress: called with (bytes compared, bytes in all).
        source_name: what a person calls the source.
    """
    if folder.record is None:
        missing = (
            "there is no conversion.json, which says what was done to the source's tensors: "
            "for a trained model, bsa-convert FOLDER OUT --trained-from CONVERSION writes one"
        )
        return result(Kind.WEIGHTS, [missing])
    try:
        if is_ancestor(folder, source):
            return check_lineage(folder, source, progress)
        checkpoint = open_checkpoint(encoder_folder(source))
        training = folder.record.trained_from
        if training is not None and _is_dense(checkpoint, config_path):
            return result(
                Kind.WEIGHTS,
                [
                    "the model was trained after its conversion: expected --source to name that conversion "
                    f"({training.path}) or the folder that training wrote, found a dense model"
                ],
            )
        if other := _other_model(folder, checkpoint, config_path):
            return result(Kind.WEIGHTS, [f"this is not the source: {other}{_revision_hint(folder, source_name)}"])
        comparison = _Comparison(folder, checkpoint, progress)
        found = list(comparison.faults())
        if found and (hint := _revision_hint(folder, source_name)):
            found[0] += hint
        faults = [
            *_source_faults(folder, checkpoint, config_path),
            *found,
            *stated_faults(folder, folder.record, checkpoint, comparison.prefix),
            *carried_faults(folder, source, checkpoint),
        ]
        checkpoint.check_unchanged()
    except BsaError as error:
        return result(Kind.WEIGHTS, [str(error)])
    figures: dict[str, object] = {**comparison.counts, "bytes": comparison.done}
    if not (config_path or find_config(checkpoint.folder)).is_file():
        figures["not compared"] = "config.json, which is not stored next to the source's weights: name it with --config"
    return result(Kind.WEIGHTS, faults, figures)


def _is_dense(checkpoint: Checkpoint, config_path: Path | None) -> bool:
    """Whether neither tensors nor config.json of a source know of sparse attention."""
    path = config_path or find_config(checkpoint.folder)
    stored = any(map(STORED_LAYOUT.fullmatch, checkpoint.tensors))
    return not stored and path.is_file() and "sparse_attention" not in read_config(path)


def _source_faults(folder: ConvertedFolder, checkpoint: Checkpoint, config_path: Path | None) -> Iterator[str]:
    """Whether the source's config.json is the one that was converted."""
    path = config_path or find_config(checkpoint.folder)
    if not path.is_file():
        return
    config, recorded = read_config(path), _record(folder).source.config
    for name in [*recorded, *(name for name in config if name not in recorded)]:
        if recorded.get(name) != config.get(name):
            yield (
                f"{path}: {name} is {config.get(name)!r}, and in conversion.json {recorded.get(name)!r}:"
                " is it the source that was converted?"
            )


def _other_model(folder: ConvertedFolder, checkpoint: Checkpoint, config_path: Path | None) -> str | None:
    """Why the source is another model than the one that was converted, so that comparing tensors is of no use; None if
    it is not."""
    path, recorded = config_path or find_config(checkpoint.folder), _record(folder).source.config
    config = read_config(path) if path.is_file() else recorded
    for name in SIZES:
        if recorded.get(name) != config.get(name):
            return f"{name} is {config.get(name)!r} in {path}, and {recorded.get(name)!r} in conversion.json"
    comparison = _Comparison(folder, checkpoint)
    known = sum(comparison.is_known(name, row) for name, row in checkpoint.tensors.items())
    if 2 * known < len(checkpoint.tensors):
        return f"{known} of its {len(checkpoint.tensors)} tensors have the names and shapes of the folder's"
    return None


def _revision_hint(folder: ConvertedFolder, source_name: str | None) -> str:
    """A hint with the recorded revision, for users who name a repository without one."""
    origin = _record(folder).source
    if source_name is None or source_name != origin.repo or not origin.revision:
        return ""
    return f"; the conversion was made of --source {source_name}@{origin.revision}"


@dataclass
class _Comparison:
    """A folder's tensors against those of its source, by the rules that its conversion.json states."""

    folder: ConvertedFolder
    checkpoint: Checkpoint
    progress: Progress | None = None
    done: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.record = record = _record(self.folder)
        self.family = FAMILIES[record.family]
        self.prefix = encoder_prefix(self.checkpoint.tensors, record.options.prefix)
        self.reserved = reserved_rows(self.family, record.source.config)
        self.positions = (f"{ATTRIBUTES[record.family][1]}." if self.prefix else "") + POSITIONS
        self.dtype = DTYPES.get(record.options.dtype)
        self.total = sum(row.nbytes for row in self.folder.tensors.values())

    def faults(self) -> Iterator[str]:
        """What is wrong, a sentence each."""
        record, written = self.record, self.folder.tensors
        accounted = set()
        for old, row in self.checkpoint.tensors.items():
            if old in record.dropped:
                self.count("dropped")
                if not self.may_be_dropped(old):
                    yield f"{old}: lost: conversion.json drops it, and no model makes it itself"
                continue
            new, kind = self.destination(old)
            stated = record.tied.get(old) or record.renamed.get(old, old)
            if stated != new:
                yield f"{old}: expected it as {new}, and conversion.json has it as {stated}"
            if new not in written:
                yield f"{old}: lost: there is no {new}"
                continue
            accounted.add(new)
            if kind == "tied":
                self.count("tied")
            fault = self.compare(old, row, new, kind)
            if fault:
                yield fault
        for name, row in written.items():
            if name not in accounted:
                fault = self.added(name, row)
                self.count("added")
                if fault:
                    yield fault

    def may_be_dropped(self, old: str) -> bool:
        """Whether a source's tensor may be absent: a buffer, one that the user ignores, or one of another encoder."""
        options = self.record.options
        others = (prefix for prefix in encoder_prefixes(self.checkpoint.tensors) if prefix != self.prefix)
        return (
            old.removeprefix(self.prefix) in BUFFERS
            or self.are_frequencies(old)
            or any(fnmatchcase(old, pattern) for pattern in options.ignore_tensors)
            or (options.prefix is not None and any(old.startswith(prefix) for prefix in others))
        )

    def are_frequencies(self, old: str) -> bool:
        """Whether a source's tensor holds the rotary frequencies that config.json implies, and conversion.json has
        their values."""
        config = self.folder.encoder.config
        match = re.fullmatch(
            r"encoder\.layer\.\d+\.attention\.self\.rotary_emb\.inv_freq", old.removeprefix(self.prefix)
        )
        row, recorded = self.checkpoint.tensors[old], self.record.buffers.get(old)
        if match is None or recorded is None or config.get("position_embedding_type") != "rotary":
            return False
        stored = read(row, float32=row.dtype != "F64").astype(float)
        if (row.dtype, stored.tolist()) != (recorded.dtype, recorded.values):
            return False
        dim, base = config["rotary_dim"], config["rotary_base"]
        exact = np.array([base ** (-2 * pair / dim) for pair in range(dim // 2)])
        bits = {"F64": 40, "F32": 17, "F16": 10, "BF16": 7}[row.dtype]  # of precision that the stored ones have
        return stored.shape == exact.shape and bool((abs(stored - exact) <= exact * 2.0**-bits + 2.0**-25).all())

    def is_known(self, old: str, row: Tensor) -> bool:
        """Whether the folder has a place for a source's tensor: its name, and its shape except for the length."""
        new, kind = self.destination(old)
        found = self.folder.tensors.get(new)
        if old in self.record.dropped or kind == "layout":
            return True
        return found is not None and found.shape[new == self.positions :] == row.shape[new == self.positions :]

    def destination(self, old: str) -> tuple[str, str]:
        """The name that a source's tensor should have in the folder, and how it is there: `own`, `tied` to another
        tensor, or as a stored `layout`."""
        if match := STORED_LAYOUT.fullmatch(old):
            return self.folder.layout_name(int(match[2])), "layout"
        if holder := self.record.tied.get(old):
            return holder, "tied"
        return expected_name(self.family.name, self.prefix, old), "own"

    def compare(self, old: str, row: Tensor, new: str, kind: str) -> str | None:
        found, record = self.folder.tensors[new], self.record
        positions = new == self.positions and record.positions is not None
        casts = kind != "layout" and self.dtype is not None and row.dtype in FLOATS and row.dtype != self.dtype
        changed = positions or casts or kind == "layout"
        if kind != "tied":
            self.count("changed" if changed else "copied")
        if changed != (new in record.changed):
            return f"{new}: it {'is' if changed else 'is not'} to be changed, and conversion.json says otherwise"
        if kind == "layout":
            return self.stored_layout(old, row, new, found)
        if positions:
            return self.extended(row, new, found)
        if not casts:
            return self.differs(new, row, found, again=kind == "tied")
        if fault := _misshapen(new, (self.dtype or row.dtype, row.shape), found):
            return fault
        for mine, other in both(row, found):
            self.advance(other.nbytes)
            if not is_rounded(mine, other, row.dtype, found.dtype).all():
                return f"{new}: its values are not those of the source rounded to {found.dtype}"
        return None

    def differs(self, name: str, expected: Tensor, found: Tensor, again: bool = False) -> str | None:
        """How a tensor is not what is expected, bit for bit. One that is compared `again`, with another that it holds,
        is counted once."""
        if fault := _misshapen(name, (expected.dtype, expected.shape), found):
            return fault
        at = first_difference(expected, found, None if again else self.advance)
        if at is None:
            return None
        index = np.unravel_index(at // ITEM_SIZE[found.dtype], found.shape)
        where = [int(i) for i in index]
        return f"{name}: it differs from the source's, from element {where} on"

    def extended(self, row: Tensor, name: str, found: Tensor) -> str | None:
        stated = self.record.positions
        assert stated is not None
        length = self.folder.longest
        expected = {"reserved": self.reserved, "source_rows": row.shape[0], "rows": self.reserved + length}
        for key, value in expected.items():
            if getattr(stated, key) != value:
                return f"{name}: expected {key} {value}, and conversion.json says {getattr(stated, key)}"
        method = self.record.options.positions
        shrinks = length < row.shape[0] - self.reserved
        if stated.method != ("tile" if shrinks else method):
            return f"{name}: conversion.json states two ways to extend it, {method} and {stated.method}"
        if fault := _misshapen(name, (self.dtype or row.dtype, (self.reserved + length, *row.shape[1:])), found):
            return fault
        source_bits = bits_of(read(row), row.dtype).reshape(row.shape)
        for start in range(0, found.shape[0], ROWS):
            rows = min(ROWS, found.shape[0] - start)
            bits = bits_of(read(rows_of(found, start, rows)), found.dtype).reshape(rows, -1)
            self.advance(bits.nbytes)
            if stated.interpolated:
                right = is_interpolated(source_bits, bits, start, length, self.reserved, row.dtype, found.dtype)
            else:
                right = is_tiled(source_bits, bits, start, self.reserved, row.dtype, found.dtype)
            if not right.all():
                return f"{name}: row {start + int(np.argmin(right))} is not what {stated.method} makes of the source"
        if not stated.interpolated:
            return None
        wide = extend(name, row, length, self.reserved, method)
        return self.differs(name, wide if self.dtype is None else cast(name, wide, self.dtype), found, again=True)

    def stored_layout(self, old: str, row: Tensor, name: str, found: Tensor) -> str | None:
        if row.dtype in FLOATS:
            return f"{old}: expected a layout of integers, found {row.dtype}"
        layout, mine = read(row), read(found)
        n = mine.shape[-1]
        self.advance(found.nbytes)
        if layout.ndim != 3 or min(layout.shape[1:]) < n or len(layout) != len(mine):
            return f"{name}: expected a slice of the source's {list(layout.shape)}, found {list(mine.shape)}"
        wrong = np.argwhere((layout[:, :n, :n] != 0) != mine)
        if len(wrong):
            head, block_row, column = wrong[0]
            return f"{name}: head {head}, row {block_row}, column {column} is not the source's"
        return None

    def added(self, name: str, row: Tensor) -> str | None:
        """What is wrong with a tensor that comes from no tensor of the source. A layout, which the layout check judges,
        and token types of zeros are right. A training framework may leave out all layouts: then they are those of the
        conversion."""
        self.advance(row.nbytes)
        if STORED_LAYOUT.fullmatch(name):
            left_out = not any(map(STORED_LAYOUT.fullmatch, self.checkpoint.tensors))
            if name in self.record.added or (left_out and self.record.trained_from and name in self.record.changed):
                return None
        if name in self.record.added and self.family.lacks_token_types and name.endswith(TOKEN_TYPES):
            return (
                f"{name}: expected zeros"
                if any(np.any(np.frombuffer(piece, np.uint8)) for piece in pieces(row))
                else None
            )
        return f"{name}: nothing in the source implies this tensor"

    def count(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def advance(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(min(self.done, self.total), self.total)


def _misshapen(name: str, expected: tuple[str, tuple[int, ...]], found: Tensor) -> str | None:
    dtype, shape = expected
    if (found.dtype, found.shape) == (dtype, shape):
        return None
    return f"{name}: expected {dtype} {list(shape)} from the source, found {found.dtype} {list(found.shape)}"


def tiled_rows_fault(folder: ConvertedFolder) -> str | None:
    """Without the source: the first position row that differs from the row one period before it.

    None if all rows repeat, or if the conversion did not tile them.
    """
    positions = folder.record.positions if folder.record else None
    name = folder.prefix + POSITIONS
    row = folder.tensors.get(name)
    if positions is None or positions.method != "tile" or row is None or row.shape[0] != positions.rows:
        return None
    period = positions.source_rows - positions.reserved
    first = positions.reserved
    while (start := first + period) < positions.rows:
        rows = min(period, positions.rows - start)
        if first_difference(rows_of(row, first, rows), rows_of(row, start, rows)) is not None:
            one, other = (read(rows_of(row, at, rows)).reshape(rows, -1) for at in (first, start))
            wrong = int(np.argmax((one != other).any(axis=1)))
            return f"{name}: row {start + wrong} is not a repetition of row {first + wrong}"
        first = start
    return None


def _record(folder: ConvertedFolder) -> ConversionRecord:
    """The conversion.json of a folder that has one."""
    assert folder.record is not None
    return folder.record
