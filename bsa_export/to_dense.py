"""The way back: a converted folder becomes the dense checkpoint that it came from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bsa_export import sidecars
from bsa_export.checkpoint.dtypes import read
from bsa_export.checkpoint.folder import CONVERSION_RECORD, AtomicFolder
from bsa_export.checkpoint.source import open_checkpoint
from bsa_export.checkpoint.table import Computed, FileRange, Tensor
from bsa_export.checkpoint.writer import write_weights
from bsa_export.convert import write_json
from bsa_export.errors import CheckpointError, FamilyError
from bsa_export.families import (
    BUFFER,
    FAMILIES,
    POSITIONS,
    Family,
    encoder_prefix,
    find_family,
    read_config,
    reserved_rows,
)
from bsa_export.plan import STORED_LAYOUT, buffer_values
from bsa_export.state_dict import longest_input, model_fields

SPARSE_FIELDS = ("sparse_config_cls", "sparse_attention")


@dataclass(frozen=True)
class Dense:
    """A dense checkpoint to be written.

    Attributes:
        tensors: by the source's names.
        config: content of its config.json.
        max_length: tokens that it reads.
        notes: where it is not the source bit for bit, a sentence each.
    """

    tensors: dict[str, Tensor]
    config: dict
    max_length: int
    notes: list[str]


def plan_dense(
    tensors: Mapping[str, Tensor], config: Mapping, record: Mapping | None, max_length: int | None = None
) -> Dense:
    """Works out the dense checkpoint of a sparse one: layouts go, names and positions become the source's.

    Args:
        tensors: of the sparse checkpoint.
        config: content of its config.json.
        record: content of its conversion.json; None for a checkpoint that was trained sparse.
        max_length: tokens that the dense model is to read; None is the source's length, as recorded, else the
            checkpoint's.

    Raises:
        FamilyError: it is of no BERT family, or cannot read that many tokens.
    """
    written = find_family(config, tensors)
    model_fields(config)
    family = FAMILIES[record["family"]] if record else written
    prefix = encoder_prefix(tensors)
    reserved, longest = reserved_rows(written, config), longest_input(written, config)
    positions = record["positions"] if record else None
    length = max_length or (min(record["source_length"], longest) if record else longest)
    if length > longest:
        raise FamilyError(
            f"expected at most the {longest:,} tokens that it reads", found=f"{length:,}", where="--max-length"
        )

    notes = []
    dense = {name: row for name, row in tensors.items() if not STORED_LAYOUT.fullmatch(name)}
    name = f"{prefix}{POSITIONS}"
    if positions and positions["method"] == "interpolate":
        rows = positions["source_rows"] - positions["reserved"]
        if length not in (rows, longest):
            raise FamilyError(
                f"its positions are interpolated: they give {rows:,} or {longest:,} tokens back",
                found=f"{length:,}",
                where="--max-length",
            )
        if length != longest and longest % rows:
            notes.append(
                f"{name}: interpolated from {rows:,} to {longest:,}, no multiple: "
                "its rows are near the source's, not equal"
            )
        dense[name] = _picked(dense[name], reserved, np.round(np.arange(length) * longest / length).astype(int))
    elif length < longest:
        dense[name] = _cut(dense[name], reserved + length)
    if record:
        dense = _restored(dense, record, reserved + length, notes)
    new_config = {
        key: value
        for key, value in (record["source"]["config"] if record else config).items()
        if key not in SPARSE_FIELDS
    }
    new_config["max_position_embeddings"] = reserved + length
    if record and record["options"]["dtype"] != "keep":
        key = "dtype" if "dtype" in new_config else "torch_dtype"
        new_config[key] = config.get(key)
        notes.append(f"the conversion rounded to {record['options']['dtype']}: values stay rounded")
    _check_family(family, new_config)
    return Dense(dense, new_config, length, notes)


def _check_family(family: Family, config: Mapping) -> None:
    kind = config.get("model_type", family.name)
    if kind != family.name:
        raise FamilyError(f"expected the config of a {family.name} model", found=repr(kind), where=CONVERSION_RECORD)


def _restored(dense: dict[str, Tensor], record: Mapping, rows: int, notes: list[str]) -> dict[str, Tensor]:
    """The tensors under the source's names, with what the conversion left out."""
    source_names = {new: old for old, new in record["renamed"].items()}
    added = set(record["added"])
    tied = {old: dense[holder] for old, holder in record["tied"].items() if holder in dense}
    restored = {source_names.get(name, name): row for name, row in dense.items() if name not in added} | tied
    for name, why in record["dropped"].items():
        if why == BUFFER:
            values = buffer_values(name, rows)
            restored[name] = Tensor("I64", values.shape, Computed(lambda values=values: iter([values.tobytes()])))
        else:
            notes.append(f"{name}: left out by the conversion ({why})")
    return restored


def _cut(table: Tensor, rows: int) -> Tensor:
    """The first rows of a table, still a range of its file."""
    shape = (rows, *table.shape[1:])
    if isinstance(table.data, FileRange):
        nbytes = table.nbytes // table.shape[0] * rows
        return Tensor(table.dtype, shape, replace(table.data, nbytes=nbytes))
    return Tensor(table.dtype, shape, Computed(lambda: iter([read(table)[:rows].tobytes()])))


def _picked(table: Tensor, reserved: int, places: np.ndarray) -> Tensor:
    rows = np.concatenate([np.arange(reserved), reserved + places])
    return Tensor(table.dtype, (len(rows), *table.shape[1:]), Computed(lambda: iter([read(table)[rows].tobytes()])))


def to_dense(
    source: Path,
    target: Path,
    *,
    max_length: int | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Dense, float]:
    """Writes the dense checkpoint of the converted folder `source` into the folder `target`, whole or not at all.

    Names and bits are those of the conversion's source: as safetensors, tied weights under each of their names.

    Returns:
        What was written, and the seconds that it took.

    Raises:
        BsaError: with what was wrong; nothing is left behind then.
    """
    started = time.perf_counter()
    folder = AtomicFolder(target, overwrite=overwrite)
    folder.refuse_target()
    checkpoint = open_checkpoint(source)
    if folder.target in (checkpoint.folder.resolve(), *checkpoint.folder.resolve().parents):
        raise CheckpointError("the target would replace the source", where=target, hint="choose another folder")
    config = read_config(checkpoint.folder / "config.json")
    record = _record(checkpoint.folder / CONVERSION_RECORD)
    if (
        not record
        and not any(STORED_LAYOUT.fullmatch(name) for name in checkpoint.tensors)
        and not config.get("sparse_attention")
    ):
        raise CheckpointError(
            "expected a sparse checkpoint", found="neither stored layouts nor conversion.json", where=source
        )
    dense = plan_dense(checkpoint.tensors, config, record, max_length)
    with folder as staging:
        write_weights(staging, dense.tensors, max_shard_size=max_shard_size, progress=progress)
        checkpoint.check_unchanged()
        write_json(staging / "config.json", dense.config)
        longest = config["max_position_embeddings"] - reserved_rows(find_family(config, checkpoint.tensors), config)
        edited = sidecars.write(checkpoint.folder, staging, longest, dense.max_length)
    dense.notes.extend(f"{name}: {how}" for name, how in edited.items() if how != "copied")
    return dense, time.perf_counter() - started


def _record(path: Path) -> dict | None:
    """The content of conversion.json, None where there is none."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["source"]["config"], record["renamed"], record["tied"], record["options"]["dtype"]  # noqa: B018
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"it cannot be read ({error!r})", where=path, hint="convert again with bsa-convert"
        ) from None
