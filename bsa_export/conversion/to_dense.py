"""The way back: a converted folder becomes the dense checkpoint that it came from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bsa_export.bert.config_file import find_config, read_config
from bsa_export.bert.encoder import Encoder
from bsa_export.bert.families import FAMILIES, Family
from bsa_export.bert.structure import POSITIONS, STORED_LAYOUT
from bsa_export.checkpoint.atomic_folder import AtomicFolder
from bsa_export.checkpoint.dtypes import cast, read
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import Computed, FileRange, Tensor
from bsa_export.checkpoint.writer import write_weights
from bsa_export.conversion import carried_files
from bsa_export.conversion.config_fields import ATTENTION, BLOCK_SPARSE, from_a_conversion
from bsa_export.conversion.lengths import LENGTH_KEYS, change_words
from bsa_export.conversion.options import parse_length
from bsa_export.conversion.plan import buffer_values, refuse_scaling_by_length
from bsa_export.conversion.resources import refuse_full_disk
from bsa_export.conversion.summary import DROP_WORDS
from bsa_export.converted.names import CONFIG, CONVERSION_RECORD
from bsa_export.converted.records import ConversionRecord, DropReason, LengthChange, read_conversion
from bsa_export.errors import CheckpointError, FamilyError, SparsityError
from bsa_export.files import write_json
from bsa_export.hub.source import find_source
from bsa_export.text import some

SPARSE_FIELDS = ("sparse_config_cls", "sparse_attention")


@dataclass(frozen=True)
class Dense:
    """A dense checkpoint to be written.

    Attributes:
        tensors: by the source's names.
        config: content of its config.json.
        max_length: tokens that it reads.
        notes: how it differs from the source, a sentence each.
    """

    tensors: dict[str, Tensor]
    config: dict
    max_length: int
    notes: list[str]


def plan_dense(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    record: ConversionRecord | None,
    max_length: int | None = None,
) -> Dense:
    """Plans the dense checkpoint of a sparse one: layouts are removed, names and positions become the source's.

    Args:
        tensors: of the sparse checkpoint.
        config: content of its config.json.
        record: content of its conversion.json; None for a checkpoint that was trained sparse.
        max_length: tokens that the dense model is to read; None is the source's length, as recorded, else the
            checkpoint's.

    Raises:
        FamilyError: it is of no BERT family, or cannot read that many tokens.
    """
    encoder = Encoder.find(tensors, config)
    family = FAMILIES[record.family] if record else encoder.family
    reserved, longest = encoder.reserved, encoder.longest
    if record and encoder.position_name is None:  # nothing was cut off with a shorter length
        longest = max(longest, record.origin.source_length)
    positions = record.origin.positions if record else None
    length = max_length or (min(record.origin.source_length, longest) if record else longest)
    if length > longest:
        raise FamilyError(
            f"expected at most the {longest:,} tokens that it reads", found=f"{length:,}", where="--max-length"
        )

    notes = []
    dense = {name: row for name, row in tensors.items() if not STORED_LAYOUT.fullmatch(name)}
    name = f"{encoder.prefix}{POSITIONS}"
    if positions and positions.interpolated:
        rows = positions.source_rows - positions.reserved
        if length not in (rows, longest):
            raise FamilyError(
                f"its positions are interpolated: only {rows:,} or {longest:,} tokens are possible",
                found=f"{length:,}",
                where="--max-length",
            )
        if length != longest and longest % rows:
            notes.append(
                f"{name}: interpolated from {rows:,} to {longest:,}, no multiple: "
                "its rows are near the source's, not equal"
            )
        dense[name] = _picked(dense[name], reserved, np.round(np.arange(length) * longest / length).astype(int))
    elif length < longest and encoder.position_name is not None:
        dense[name] = _cut(dense[name], reserved + length)
    if record is None and from_a_conversion(config):
        notes.append(
            f"there is no {CONVERSION_RECORD}, so the names and the length of the dense source are not known; "
            "bsa-convert SOURCE OUT --trained-from CONVERSION makes a folder that has one"
        )
    if record:
        dense = _restored(dense, record, reserved + length, notes)
    new_config = {
        key: value
        for key, value in (record.source.config if record else config).items()
        if key not in SPARSE_FIELDS and (key, value) != (ATTENTION, BLOCK_SPARSE)
    }
    new_config["max_position_embeddings"] = reserved + length
    if record and record.options.dtype != "keep":
        key = "dtype" if "dtype" in new_config else "torch_dtype"
        new_config[key] = config.get(key)
        notes.append(f"the conversion rounded to {record.options.dtype}: values stay rounded")
    if length != (record.origin.source_length if record else encoder.longest):
        refuse_scaling_by_length(encoder)
    _check_family(family, new_config)
    return Dense(dense, new_config, length, notes)


def _check_family(family: Family, config: Mapping) -> None:
    kind = config.get("model_type", family.name)
    if kind not in (family.name, *family.stated_as):
        raise FamilyError(f"expected the config of a {family.name} model", found=repr(kind), where=CONVERSION_RECORD)


def _restored(dense: dict[str, Tensor], record: ConversionRecord, rows: int, notes: list[str]) -> dict[str, Tensor]:
    """The tensors under the source's names, with what the conversion left out."""
    source_names = {new: old for old, new in record.renamed.items()}
    added = set(record.added)
    tied = {old: dense[holder] for old, holder in record.tied.items() if holder in dense}
    restored = {source_names.get(name, name): row for name, row in dense.items() if name not in added} | tied
    for reason in DropReason:
        names = [name for name, why in record.dropped.items() if why is reason]
        if reason is DropReason.BUFFER:
            for name in names:
                restored[name] = _buffer(name, rows, record)
        elif names:
            notes.append(f"left out by the conversion ({DROP_WORDS[reason]}): {some(names)}")
    return restored


def _buffer(name: str, rows: int, record: ConversionRecord) -> Tensor:
    """A buffer that the source had and the converted model does not store."""
    if name not in record.buffers:
        return Tensor("I64", (1, rows), Computed(partial(iter, [buffer_values(name, rows).tobytes()])))
    stored = record.buffers[name]
    wide = np.array(stored.values, "<f8" if stored.dtype == "F64" else "<f4")
    row = Tensor("F64" if stored.dtype == "F64" else "F32", wide.shape, Computed(partial(iter, [wide.tobytes()])))
    return cast(name, row, stored.dtype)


def former_lengths(record: ConversionRecord) -> list[LengthChange] | None:
    """The lengths that the way back restores. None where the record is from before they were recorded.

    A tokenizer that was saved after training states the new length under more names than the source did.
    """
    origin = record.origin
    if origin.lengths is None or record.trained_from is None:
        return origin.lengths
    own, file = {(change.file, change.key) for change in origin.lengths}, "tokenizer_config.json"
    before, after = str(origin.source_length), str(record.max_length)
    saved = [LengthChange(file, (key,), before, after) for key in sorted(LENGTH_KEYS) if (file, (key,)) not in own]
    return [*origin.lengths, *saved]


def _cut(table: Tensor, rows: int) -> Tensor:
    """The first rows of a table, still a range of its file."""
    shape = (rows, *table.shape[1:])
    if isinstance(table.data, FileRange):
        nbytes = table.nbytes // table.shape[0] * rows
        return Tensor(table.dtype, shape, replace(table.data, nbytes=nbytes, crc32=None))
    return Tensor(table.dtype, shape, Computed(lambda: iter([read(table)[:rows].tobytes()])))


def _picked(table: Tensor, reserved: int, places: np.ndarray) -> Tensor:
    rows = np.concatenate([np.arange(reserved), reserved + places])
    return Tensor(table.dtype, (len(rows), *table.shape[1:]), Computed(lambda: iter([read(table)[rows].tobytes()])))


@dataclass(frozen=True)
class WrittenDense:
    """A dense checkpoint that was written: the folder, what is in it, and how many seconds it took."""

    folder: Path
    plan: Dense
    seconds: float


def to_dense(
    source: str | Path,
    target: str | Path,
    *,
    max_length: int | str | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> WrittenDense:
    """Converts a converted folder back to the dense checkpoint that it came from: `bsa-convert --to-dense`.

    Names and bits are those of the conversion's source: as safetensors, tied weights under each of their names. The
    folder `target` appears whole or not at all.

    Args:
        source: the converted folder, or its repository on the Hub (`org/name[@revision]`).
        target: the folder to make.
        max_length: tokens that the dense model is to read; the source's length, as recorded, unless given.
        max_shard_size: bytes of a file of weights; one file unless given.
        overwrite: whether an earlier conversion may be replaced.
        progress: called with (bytes written, bytes in all).

    Returns:
        What was written.

    Raises:
        BsaError: with what is wrong; nothing is left behind then.
    """
    started = time.perf_counter()
    try:
        length = None if max_length is None else parse_length(max_length)
    except ValueError as error:
        raise SparsityError(str(error)) from None
    folder = AtomicFolder(target, overwrite=overwrite)
    folder.refuse_target()
    path = source if isinstance(source, Path) else find_source(source, progress=progress is not None).path
    checkpoint = open_checkpoint(path)
    if folder.target in (checkpoint.folder.resolve(), *checkpoint.folder.resolve().parents):
        raise CheckpointError("the target would replace the source", where=target, hint="choose another folder")
    config = read_config(find_config(checkpoint.folder))
    record = read_conversion(checkpoint.folder)
    stored = any(STORED_LAYOUT.fullmatch(name) for name in checkpoint.tensors)
    if record is None and not stored and not config.get("sparse_attention"):
        raise CheckpointError(
            "expected a sparse checkpoint", found="neither stored layouts nor conversion.json", where=source
        )
    dense = plan_dense(checkpoint.tensors, config, record, length)
    refuse_full_disk(folder.target, sum(row.nbytes for row in dense.tensors.values()))
    with folder as staging:
        write_weights(staging, dense.tensors, max_shard_size=max_shard_size, progress=progress)
        checkpoint.check_unchanged()
        write_json(staging / CONFIG, dense.config)
        longest = Encoder.find(checkpoint.tensors, config).longest
        restore = former_lengths(record) if record and dense.max_length == record.origin.source_length else None
        carried = carried_files.plan(path, checkpoint, longest, dense.max_length, restore=restore)
        carried_files.write(carried, staging)
    dense.notes.extend(f"{change.file}: {change_words(change)}" for change in carried.changes)
    dense.notes.extend(note.text for note in carried.notes())
    return WrittenDense(Path(target), dense, time.perf_counter() - started)
