"""The conversion without the disk: a table and a config.json in, the table and config.json of the sparse model out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np

from bsa_export.bert.encoder import Encoder
from bsa_export.bert.expected_tensors import compare, sparse_spec
from bsa_export.bert.families import ROTARY, Family
from bsa_export.bert.misfits import refuse_misfits
from bsa_export.bert.positions import extend, scaling_that_depends_on_length
from bsa_export.bert.structure import STORED_LAYOUT, TOKEN_TYPES, WORDS
from bsa_export.checkpoint.comparison import same_bytes
from bsa_export.checkpoint.dtypes import DTYPES, TORCH_NAMES, cast, read
from bsa_export.checkpoint.table import Computed, Tensor, tied
from bsa_export.conversion.config_fields import ATTENTION, BLOCK_SPARSE, taken_out
from bsa_export.conversion.layouts import chosen_layouts, kept_layouts
from bsa_export.conversion.options import BARE, Options
from bsa_export.converted.records import Change, DropReason, Note, NoteKind, Positions, StoredBuffer, Training
from bsa_export.errors import FamilyError
from bsa_export.sparsity.configs import SparsityConfig
from bsa_export.sparsity.facts import LayoutFacts, attention_flops, layout_facts
from bsa_export.sparsity.sections import config_class_path
from bsa_export.text import some


@dataclass(frozen=True)
class Plan:
    """What a conversion does, name by name, before anything is written.

    Attributes:
        family: of the source.
        tensors: what is written, in order.
        config: content of the new config.json.
        source_config: content of the source's.
        source_length, max_length: tokens that the source and the new model read.
        head_dim: elements of a head.
        sparsity: the sparsity config; its layouts are `layouts`, uint8 `[heads, n, n]` one a layer.
        windows: how many tokens to each side a layer attends to at most; None for a layer without such a bound.
        renamed: source's name -> written name.
        changed: written name -> what is done to its values.
        added: written names of tensors that the source does not have.
        dropped: source's name -> why it is left out.
        tied: source's name that is not written -> written name with the same bytes.
        positions: how the position embeddings are extended; None where they stay.
        sparse_source: whether the source was sparse already, so that its own layouts are kept.
        skipped: what is stored next to the source's tensors -> why it is not read.
        notes: what a user should know.
        removed_fields: fields of the source's config.json that are taken out.
        implied_config: fields of the new config.json that the source's tensors decided.
        buffers: source's name, one of `dropped` -> its values, which the way back needs.
        trained_from: the earlier conversion that the source was trained from.
    """

    family: Family
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    source_config: dict[str, Any]
    source_length: int
    max_length: int
    head_dim: int
    sparsity: SparsityConfig
    layouts: list[np.ndarray]
    windows: list[int | None]
    renamed: dict[str, str]
    changed: dict[str, Change]
    added: list[str]
    dropped: dict[str, DropReason]
    tied: dict[str, str]
    positions: Positions | None
    sparse_source: bool
    notes: list[Note]
    removed_fields: list[str] = field(default_factory=list)
    implied_config: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, StoredBuffer] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    trained_from: Training | None = None

    @property
    def copied(self) -> list[str]:
        """The written names whose bytes are the source's."""
        own = {*self.changed, *self.added}
        return [name for name in self.tensors if name not in own]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(row.nbytes for row in self.tensors.values())

    @property
    def keeps_source_layouts(self) -> bool:
        """Whether the layouts are those that the source stored, bit for bit."""
        return any(change.layout for change in self.changed.values())

    @cached_property
    def facts(self) -> LayoutFacts:
        """What the layouts mean for this model."""
        interpolated = self.positions is not None and self.positions.interpolated
        return layout_facts(self.layouts, self.sparsity.block, self.source_length, interpolated, self.windows)

    def attention_flops(self, density: float) -> float:
        """Floating-point operations of one input of the longest length, in all attention layers."""
        heads, layers = self.config["num_attention_heads"], self.config["num_hidden_layers"]
        return attention_flops(density, self.max_length, self.head_dim, heads, layers)


@dataclass
class _Draft:
    """An unfinished plan, to which every step adds. `stored` are the source's layouts, layer -> name."""

    written: dict[str, Tensor] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    changed: dict[str, Change] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    dropped: dict[str, DropReason] = field(default_factory=dict)
    buffers: dict[str, StoredBuffer] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    stored: dict[int, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)


def plan(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: Options = BARE, where: object = None
) -> Plan:
    """Works out the conversion of a table, dense or sparse already (then its layouts stay). Reads small tensors only.

    Args:
        tensors: the source's (`open_checkpoint(path).tensors`).
        config: content of its config.json.
        options: what the user chose.
        where: the source, for messages.

    Raises:
        FamilyError: it is of no BERT family, or its tensors do not fit the config.
        SparsityError: the sparsity or the length is not possible.
    """
    draft = _Draft()
    tensors = _without_ignored(draft, tensors, options.ignore_tensors)
    encoder = Encoder.find(tensors, config, prefix=options.prefix)
    tensors = _without_other_encoders(draft, encoder, tensors)
    _map_names(draft, encoder, tensors, where)
    _note_implied_fields(draft, encoder, config)
    _leave_out_tied(draft, encoder)
    _add_token_types(draft, encoder)
    ignored = [name for name, why in draft.dropped.items() if why is DropReason.IGNORED]
    refuse_misfits(draft.written, encoder, tensors, ignored, where)

    sparse_source = bool(
        draft.stored or encoder.config.get("sparse_attention") or encoder.config.get("sparse_config_cls")
    )
    if sparse_source:
        sparsity, layouts = kept_layouts(tensors, draft.stored, encoder, options)
        _note_kept_layouts(draft, encoder, tensors, sparsity, layouts)
    else:
        sparsity, layouts = chosen_layouts(options, encoder)
    max_length = layouts[0].shape[-1] * sparsity.block

    positions = _extend_positions(draft, encoder, max_length, options)
    _cast(draft, options)
    _store_layouts(draft, encoder, layouts)
    removed = _note_removed_fields(draft, config)
    new_config = _sparse_config(encoder, removed, max_length, sparsity, options)
    compare(
        draft.written, sparse_spec(encoder.family, new_config, encoder.written_prefix, encoder.structure)
    ).raise_if_any(where)
    if (head := encoder.family.class_without_equal(config)) is not None:
        start = encoder.family.encoder_class.removesuffix("Model")
        kept = (
            f"{start} has no class like {head}: its head's tensors are kept, but only the encoder runs in transformers"
        )
        draft.notes.insert(0, Note(NoteKind.HEAD_WITHOUT_CLASS, kept))
    return Plan(
        family=encoder.family,
        tensors=dict(sorted(draft.written.items(), key=lambda item: _natural(item[0]))),
        config=new_config,
        source_config=dict(config),
        source_length=encoder.longest,
        max_length=max_length,
        head_dim=encoder.head_dim,
        sparsity=sparsity,
        layouts=layouts,
        windows=encoder.windows,
        renamed=draft.renamed,
        changed=draft.changed,
        added=draft.added,
        dropped=draft.dropped,
        tied=draft.tied,
        positions=positions,
        sparse_source=sparse_source,
        notes=draft.notes,
        removed_fields=removed,
        implied_config=dict(encoder.implied),
        buffers=draft.buffers,
    )


def _without_ignored(draft: _Draft, tensors: Mapping[str, Tensor], patterns: Iterable[str]) -> dict[str, Tensor]:
    """The tensors that no pattern of --ignore-tensors names."""
    ignored: list[str] = []
    for pattern in patterns:
        matching = [name for name in tensors if fnmatchcase(name, pattern)]
        if not matching:
            raise FamilyError(
                f"no tensor matches {pattern!r}", found=f"names such as {some(tensors, 2)}", where="--ignore-tensors"
            )
        ignored += matching
    if ignored:
        draft.dropped |= dict.fromkeys(ignored, DropReason.IGNORED)
        names = some(dict.fromkeys(ignored))
        text = f"ignored, as asked: {names}. Outputs differ from the source's if it computes with them"
        draft.notes.append(Note(NoteKind.IGNORED_TENSORS, text))
    return {name: row for name, row in tensors.items() if name not in draft.dropped}


def _without_other_encoders(draft: _Draft, encoder: Encoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors except those of encoders that are not converted."""
    others = [name for name in tensors if encoder.is_of_other(name)]
    if others:
        draft.dropped |= dict.fromkeys(others, DropReason.OTHER_ENCODER)
        prefixes = ", ".join(repr(prefix.removesuffix(".")) for prefix in encoder.other_prefixes)
        text = f"{len(others)} tensors of other encoders are left out, those with the prefixes {prefixes}"
        draft.notes.append(Note(NoteKind.OTHER_ENCODER, text))
    return {name: row for name, row in tensors.items() if name not in draft.dropped}


def _note_removed_fields(draft: _Draft, config: Mapping[str, Any]) -> list[str]:
    """The fields of config.json that are taken out; a note says why where a user should know."""
    removed = taken_out(config)
    for name, why in removed.items():
        if why is not None:
            draft.notes.append(Note(NoteKind.CONFIG_FIELD, f"{name} is removed from config.json: {why}"))
    return list(removed)


def _map_names(draft: _Draft, encoder: Encoder, tensors: Mapping[str, Tensor], where: object) -> None:
    """Sets the written name of every tensor, except buffers, which are dropped, and stored layouts."""
    for name, row in tensors.items():
        if encoder.is_frequencies(name):
            draft.dropped[name] = DropReason.BUFFER
            draft.buffers[name] = StoredBuffer(row.dtype, read(row, float32=row.dtype != "F64").tolist())
            continue
        if encoder.is_buffer(name):
            draft.dropped[name] = DropReason.BUFFER if _is_usual_buffer(name, row) else DropReason.CHANGED_BUFFER
            continue
        if match := STORED_LAYOUT.fullmatch(name):
            draft.stored[int(match[2])] = name
            continue
        new = encoder.written_name(name)
        if new in draft.written:
            raise FamilyError(f"two of its tensors would be written as {new}", where=where)
        draft.written[new] = row
        if new != name:
            draft.renamed[name] = new


def _note_implied_fields(draft: _Draft, encoder: Encoder, config: Mapping[str, Any]) -> None:
    """Notes where the tensors overrule config.json, and where the model computes with finer frequencies than stored."""
    stated, words = config.get("vocab_size"), encoder.implied.get("vocab_size")
    if stated is not None and words is not None:
        text = (
            f"vocab_size is {words:,}, the padded rows of the word embeddings; the source's config.json has {stated:,}"
        )
        draft.notes.append(Note(NoteKind.CONFIG_FIELD, text))
    if rounded := {buffer.dtype for buffer in draft.buffers.values()} & {"F16", "BF16"}:
        text = f"the source stores its rotary frequencies as {min(rounded)}; the model computes them in float32"
        draft.notes.append(Note(NoteKind.FREQUENCIES, text))


def _leave_out_tied(draft: _Draft, encoder: Encoder) -> None:
    """Leaves out the head's tensors that transformers ties to others that are written."""
    source_names = {new: old for old, new in draft.renamed.items()}
    for new, holder in _ties(draft.written, encoder).items():
        old = source_names.get(new, new)
        draft.tied[old] = holder
        del draft.written[new]
        draft.renamed.pop(old, None)


def _add_token_types(draft: _Draft, encoder: Encoder) -> None:
    """Adds the token types that the written class has and the source's family lacks: zeros change nothing."""
    name = f"{encoder.written_prefix}{TOKEN_TYPES}"
    words = draft.written.get(f"{encoder.written_prefix}{WORDS}")
    if encoder.family.lacks_token_types and name not in draft.written and words is not None and len(words.shape) == 2:
        draft.added.append(name)
        draft.written[name] = _zeros(words.dtype, (encoder.sizes.type_vocab_size, words.shape[1]))


def _note_kept_layouts(
    draft: _Draft, encoder: Encoder, tensors: Mapping[str, Tensor], sparsity: SparsityConfig, layouts: list[np.ndarray]
) -> None:
    """Notes where the kept layouts are not those of the training, or do not cover all positions."""
    if not draft.stored and getattr(sparsity, "num_random_blocks", None):
        redrawn = (
            "the checkpoint stores no layouts: random blocks are drawn again and differ from those used in training"
        )
        draft.notes.append(Note(NoteKind.LAYOUTS_REDRAWN, redrawn))
    covered = tensors[draft.stored[0]].shape[-1] * sparsity.block if draft.stored else encoder.longest
    if (reads := layouts[0].shape[-1] * sparsity.block) < max(covered, encoder.longest):
        has = f"it has {encoder.longest:,} positions and layouts for {covered:,} tokens"
        cut = f"{has}: it reads the {reads:,} that both cover"
        draft.notes.append(Note(NoteKind.LENGTHS_DIFFER, cut))


def _extend_positions(draft: _Draft, encoder: Encoder, max_length: int, options: Options) -> Positions | None:
    """Extends the position embeddings to `max_length` tokens. Returns what was done, None for nothing."""
    if encoder.position_name is None and options.positions != "tile":
        raise FamilyError(
            "rotary positions have no embeddings that could be extended", where="--positions", hint="leave it out"
        )
    if max_length == encoder.longest:
        return None
    name, method = encoder.position_name, options.positions if max_length > encoder.longest else "tile"
    if name is None:
        refuse_scaling_by_length(encoder)
        return None
    table = draft.written[name]
    positions = Positions(method, encoder.reserved, table.shape[0], encoder.reserved + max_length)
    draft.written[name] = extend(name, table, max_length, encoder.reserved, method)
    draft.changed[name] = Change(rows=(positions.source_rows, positions.rows), method=method)
    return positions


def refuse_scaling_by_length(encoder: Encoder) -> None:
    """Raises FamilyError where another length would change how positions are rotated."""
    if encoder.family.positions == ROTARY and (kind := scaling_that_depends_on_length(encoder.config)):
        raise FamilyError(
            f"the {kind} scaling of its rotary positions is computed from max_position_embeddings, which changes",
            where="config.json: rope_parameters",
            hint="state original_max_position_embeddings and factor there, or keep the source's length",
        )


def _cast(draft: _Draft, options: Options) -> None:
    """Rounds floating tensors to the chosen dtype."""
    if options.dtype == "keep":
        return
    for name, row in draft.written.items():
        narrowed = cast(name, row, DTYPES[options.dtype])
        if narrowed is row:
            continue
        draft.written[name] = narrowed
        if name not in draft.added:
            before = draft.changed.get(name, Change())
            draft.changed[name] = Change(before.rows, before.method, (row.dtype, narrowed.dtype))


def _store_layouts(draft: _Draft, encoder: Encoder, layouts: list[np.ndarray]) -> None:
    """Writes each layer's layout, one uint8 for each block."""
    for layer, layout in enumerate(layouts):
        name = encoder.layout_name(layer)
        draft.written[name] = _layout_row(layout)
        if layer not in draft.stored:
            draft.added.append(name)
            continue
        if draft.stored[layer] != name:
            draft.renamed[draft.stored[layer]] = name
        draft.changed[name] = Change(layout=True)


def _sparse_config(
    encoder: Encoder, removed: Iterable[str], max_length: int, sparsity: SparsityConfig, options: Options
) -> dict[str, Any]:
    """The config.json of the sparse model."""
    config = {name: value for name, value in encoder.config.items() if name not in removed}
    config[ATTENTION] = BLOCK_SPARSE
    if options.dtype != "keep":
        config["dtype" if "dtype" in config else "torch_dtype"] = TORCH_NAMES[options.dtype]
    config["max_position_embeddings"] = encoder.reserved + max_length
    config["sparse_config_cls"] = config_class_path(sparsity)
    config["sparse_attention"] = sparsity.to_parameters()
    return config


def buffer_values(name: str, rows: int) -> np.ndarray:
    """What a model stores under one of BUFFERS: int64 `[1, rows]`, the positions in order or zeros."""
    return (np.arange(rows) if name.endswith("position_ids") else np.zeros(rows)).astype("<i8")[None]


def _is_usual_buffer(name: str, row: Tensor) -> bool:
    return (
        row.dtype == "I64" and row.shape[:1] == (1,) and np.array_equal(read(row), buffer_values(name, row.shape[-1]))
    )


def _natural(name: str) -> list:
    """Sorts layer 2 before layer 10, so that the order does not depend on how the source was stored."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _ties(written: Mapping[str, Tensor], encoder: Encoder) -> dict[str, str]:
    """Written names of a head that transformers ties to another, where they hold the same bytes: name -> the other.

    They share storage, or hold equal bytes where a format or a shard forced a copy. Nothing is tied where the config
    says so: then transformers looks for both names.
    """
    by_default = encoder.family.defaults.get("tie_word_embeddings", True)
    if not encoder.config.get("tie_word_embeddings", by_default):
        return {}
    shared = tied(written)
    ties = {}
    for name, holder in encoder.family.tied.items():
        holder = f"{encoder.written_prefix}{holder[1:]}" if holder.startswith(".") else holder
        if name not in written or holder not in written:
            continue
        if shared.get(name, name) == shared.get(holder, holder) or same_bytes(written[name], written[holder]):
            ties[name] = holder
    return ties


def _zeros(dtype: str, shape: tuple[int, ...]) -> Tensor:
    row = Tensor(dtype, shape, Computed(lambda: iter(())))
    return Tensor(dtype, shape, Computed(lambda: iter([bytes(row.nbytes)])))


def _layout_row(layout: np.ndarray) -> Tensor:
    """The tensor of a layout `[heads, n, n]`, made head by head: heads may share one array."""

    def chunks() -> Iterator[memoryview]:
        return (np.ascontiguousarray(head).reshape(-1).data for head in layout)

    return Tensor("U8", layout.shape, Computed(chunks))
