"""What conversion.json states about the source's tensors, against the source. No torch.

The names of tensors in it must be names of the source, what it lists as added must not be, and a tensor may stand for
another one only where transformers ties the two.
"""

from __future__ import annotations

from collections.abc import Iterator

from bsa_export.bert.structure import STORED_LAYOUT
from bsa_export.checkpoint.table import Checkpoint
from bsa_export.converted.folder import ConvertedFolder
from bsa_export.converted.records import ConversionRecord
from bsa_export.verify.names import UNTIED_BY_DEFAULT, expected_name, tied_to

SPARSE = ("sparse_attention", "sparse_config_cls")  # fields of a config.json of a sparse model


def stated_faults(
    folder: ConvertedFolder, record: ConversionRecord, checkpoint: Checkpoint, prefix: str
) -> Iterator[str]:
    """What conversion.json states and the source contradicts, a sentence each.

    Args:
        folder: the converted folder.
        record: its conversion.json, whose copy of the source's config.json was compared with it.
        checkpoint: the source's weights.
        prefix: what stands before the names of the source's encoder, with its dot.
    """
    tensors = checkpoint.tensors
    lists = {"renamed": set(record.renamed), "dropped": set(record.dropped), "tied": set(record.tied)}
    for kind, names in lists.items():
        for name in sorted(names - tensors.keys()):
            yield f"{name}: conversion.json has it as {kind}, and the source has no such tensor"
    by_written = {expected_name(record.family, prefix, name): row for name, row in tensors.items()}
    for name in sorted(set(record.added) & by_written.keys()):
        yield f"{name}: conversion.json has it as added, and it is a tensor of the source"
    for name, change in record.changed.items():
        row = by_written.get(name)
        if row is not None and change.dtype is not None and change.dtype[0] != row.dtype:
            yield f"{name}: conversion.json says that it was {change.dtype[0]}, and in the source it is {row.dtype}"
    for old, holder in record.tied.items():
        if old in tensors and not _may_be_tied(folder, record, expected_name(record.family, prefix, old), holder):
            yield f"{old}: lost: conversion.json has {holder} in its place, and transformers does not tie the two"
    is_sparse = any(map(STORED_LAYOUT.fullmatch, tensors)) or any(map(record.source.config.get, SPARSE))
    if record.sparse_source != is_sparse:
        yield f"conversion.json: sparse_source: expected {is_sparse} from the source, found {record.sparse_source}"


def _may_be_tied(folder: ConvertedFolder, record: ConversionRecord, name: str, holder: str) -> bool:
    """Whether transformers' class of the folder reads `holder` as `name`."""
    by_default = record.family not in UNTIED_BY_DEFAULT
    return folder.config.get("tie_word_embeddings", by_default) is True and tied_to(name, folder.prefix) == holder
