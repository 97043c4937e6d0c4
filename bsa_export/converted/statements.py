"""What conversion.json states, against itself and the folder: the file check of statements that other checks rely on.

A record that states an impossible change could excuse a wrong config.json or a wrong layout. No source is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from bsa_export.bert.expected_tensors import Sizes
from bsa_export.bert.families import FAMILIES, Family, reserved_rows
from bsa_export.bert.structure import STORED_LAYOUT
from bsa_export.converted.folder import ConvertedFolder, recorded_sparsity
from bsa_export.converted.records import ConversionRecord
from bsa_export.errors import BsaError
from bsa_export.sparsity.configs import MODES, SparsityConfig

BLOCK_SPARSE = "block_sparse"
# Fields without a part in the outputs, which block-sparse attention does not allow, and how attention was chosen.
MAY_BE_REMOVED = {
    "output_attentions", "_output_attentions", "chunk_size_feed_forward", "torchscript", "auto_map",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
}  # fmt: skip
# Fields that tensors decide where config.json has none, in a family that chooses its norms and positions.
CHOSEN = {
    "architectures", "num_labels", "pre_layer_norm", "last_layer_norm", "position_embedding_type", "rotary_dim",
    "rotary_base",
}  # fmt: skip
WORDS = "vocab_size"  # which may be the padded number of rows


def statement_faults(opened: ConvertedFolder, record: ConversionRecord) -> Iterator[str]:
    """Statements of conversion.json that cannot be, a sentence each. Those about earlier conversions count too."""
    yield from _statements_about_tensors(opened, record)
    earlier: ConversionRecord | None = record
    while earlier is not None:
        yield from _statements_of(earlier, opened)
        earlier = earlier.trained_from.record if earlier.trained_from else None


def _statements_of(record: ConversionRecord, opened: ConvertedFolder) -> Iterator[str]:
    """What a record, or that of an earlier conversion in it, states against itself."""
    family = FAMILIES[record.family]
    source = family.config(record.source.config)
    yield from _config_statements(opened, record, family, source)
    for name in sorted(set(record.added) & record.changed.keys()):
        yield f"{name}: conversion.json lists it both as added and as changed"
    for name in sorted(record.buffers.keys() - record.dropped.keys()):
        yield f"{name}: conversion.json has its values as those of a buffer, and does not list it as dropped"
    for name, change in record.changed.items():
        if change.layout != (STORED_LAYOUT.fullmatch(name) is not None):
            yield f"{name}: conversion.json says that it is {'' if change.layout else 'not '}a layout of the source"
    try:
        yield from _length_statements(record, family, source | record.implied_config)
        stated, expected = recorded_sparsity(record, opened.heads), _chosen_sparsity(record, opened.heads)
    except (BsaError, ValueError, TypeError) as error:
        yield f"conversion.json: {error}"
        return
    if expected is not None and expected != stated:
        yield (
            f"conversion.json: sparsity: expected {expected.to_parameters()} from its options,"
            f" found {stated.to_parameters()}"
        )


def _config_statements(
    opened: ConvertedFolder, record: ConversionRecord, family: Family, source: dict[str, Any]
) -> Iterator[str]:
    """Fields that config.json may have got, lost or kept."""
    model_type = family.written_as or family.name
    if opened.config.get("model_type") != model_type:
        yield (
            f"conversion.json: family: the model_type of {family.name} is {model_type}, and config.json has"
            f" {opened.config.get('model_type')!r}"
        )
    # Records from before 0.2 have neither this field nor lengths.
    if record.attn_implementation != BLOCK_SPARSE and not (record.attn_implementation is record.lengths is None):
        yield f"conversion.json: attn_implementation: expected {BLOCK_SPARSE}, found {record.attn_implementation!r}"
    for name in sorted(set(record.removed_fields) - MAY_BE_REMOVED):
        yield f"conversion.json: removed_fields: {name}: no conversion takes this field out of config.json"
    sizes = {field.name for field in fields(Sizes)} & family.defaults.keys()
    known = {WORDS, *sizes, *(CHOSEN if family.chooses_norms else ())}
    for name in record.implied_config:
        if name not in known or (name != WORDS and source.get(name) not in (None, [])):
            yield f"conversion.json: implied_config: {name}: the source's config.json decides it, and no tensor"


def _statements_about_tensors(opened: ConvertedFolder, record: ConversionRecord) -> Iterator[str]:
    """How the folder's tensors changed, by their dtypes and rows."""
    for name, change in record.changed.items():
        row = opened.tensors.get(name)
        if change.dtype is not None and row is not None and change.dtype[1] != row.dtype:
            yield f"{name}: conversion.json says that it became {change.dtype[1]}, and it is {row.dtype}"
        if change.rows is None and change.method is None:
            continue
        positions = record.positions
        stated = None if positions is None else ((positions.source_rows, positions.rows), positions.method)
        if name != opened.encoder.position_name or (change.rows, change.method) != stated:
            yield f"{name}: conversion.json says in two ways how its rows changed"


def _length_statements(record: ConversionRecord, family: Family, config: dict[str, Any]) -> Iterator[str]:
    """The source's length, which its config.json and its position rows decide."""
    rows = config.get("max_position_embeddings")
    if rows is None:
        rows = family.defaults.get("max_position_embeddings")
    reserved = reserved_rows(family, config)
    if not isinstance(rows, int) or record.source_length != rows - reserved:
        found = f"found {record.source_length}"
        yield f"conversion.json: source_length: expected {rows} rows less {reserved} from the source's config, {found}"
    wanted = record.options.max_length
    if wanted is not None and wanted != record.max_length and not record.sparse_source:
        yield f"conversion.json: max_length: expected {wanted} from its options, found {record.max_length}"


def _chosen_sparsity(record: ConversionRecord, heads: int) -> SparsityConfig | None:
    """The sparsity config that the options describe; None where a source's or a section's is kept.

    Without a mode it is `windowed`: aligned windows of `window` tokens, by default the source's length, in whole blocks
    rounded up, and a sliding window of one block more, or of one block where a window is one block.
    """
    options = record.options
    if record.sparse_source or options.section is not None:
        return None
    mode = options.mode or ("custom" if options.layout is not None else "windowed")
    block = options.block or recorded_sparsity(record, heads).block
    blocks = -(-(options.window or record.source_length) // block)
    windows = {"num_sliding_window_blocks": blocks + 1 if blocks > 1 else 1}
    if mode not in MODES:
        raise ValueError(f"options: mode: expected one of {', '.join(MODES)}, found {mode!r}")
    config = MODES[mode](num_heads=heads, block=block)
    if mode == "windowed":
        windows["num_local_blocks"] = blocks
    elif options.window is None:
        windows = {}
    return replace(config, **(windows | options.parameters))
