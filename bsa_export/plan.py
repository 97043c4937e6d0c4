"""The conversion itself, pure: a table and a config.json in, the table and config.json of the sparse model out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from bsa_export.checkpoint.dtypes import cast, pieces, read
from bsa_export.checkpoint.table import Computed, Tensor, tied
from bsa_export.errors import FamilyError, SparsityError
from bsa_export.families import (
    BUFFER,
    BUFFERS,
    LAYOUT,
    OTHER_BUFFER,
    POSITIONS,
    TOKEN_TYPES,
    WORDS,
    Family,
    bert_config,
    encoder_prefix,
    find_family,
    lost_head,
    reserved_rows,
    written_name,
    written_prefix,
)
from bsa_export.layout import LayoutFacts, attention_flops, check_layout, layout_facts, load_layouts
from bsa_export.position import extend
from bsa_export.sparsity import (
    MODES,
    CustomSparsityConfig,
    SparsityConfig,
    config_class_path,
    make_layouts,
    sparsity_config,
    sparsity_config_from_class_path,
    windowed_for,
)
from bsa_export.state_dict import compare, dense_spec, longest_input, sparse_spec

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
BLOCKS = (64, 32, 16)  # tried in this order where no block is named
DEEPSPEED_LENGTH = 2048  # tokens of the master layout in DeepSpeed's BertSparseSelfAttention
STORED_LAYOUT = re.compile(r"(.*encoder\.layer\.(\d+)\.attention\.self)\.sparse_self_attention\.master_layout")


@dataclass(frozen=True)
class Options:
    """What a user chooses about a conversion; the defaults are those of the bare command.

    Attributes:
        max_length: tokens that the new model reads, a multiple of the block; None keeps the source's.
        mode: one of `sparsity.MODES`; None is `windowed`, or `custom` with a layout.
        block: side of a block in tokens; None is 64, or 32 or 16 where 64 does not divide the length.
        parameters: those of the mode's class, by name.
        section: the `sparse_attention` section of a DeepSpeed config in the place of mode, block and parameters.
        layout: a file of custom layouts (`layout.load_layouts`).
        seed: of random blocks.
        different_layout_per_layer: whether each layer draws its own random blocks.
        positions: one of `position.METHODS`.
        dtype: `keep`, or what floating tensors are rounded to: `fp32`, `fp16` or `bf16`.
    """

    max_length: int | None = None
    mode: str | None = None
    block: int | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    section: Mapping[str, object] | None = None
    layout: Path | None = None
    seed: int = 0
    different_layout_per_layer: bool = False
    positions: str = "tile"
    dtype: str = "keep"

    @property
    def chooses_sparsity(self) -> bool:
        """Whether anything that decides layouts was given."""
        given = (self.mode, self.block, self.section, self.layout)
        return any(value is not None for value in given) or bool(self.parameters) or self.different_layout_per_layer


@dataclass(frozen=True)
class Plan:
    """What a conversion does, name by name, before anything is written.

    Attributes:
        family: of the source.
        tensors: what is written, in order.
        config: content of the new config.json.
        source_config: content of the source's.
        source_length, max_length: tokens that the source and the new model read.
        sparsity: the sparsity config; its layouts are `layouts`, uint8 `[heads, n, n]` one a layer.
        renamed: source's name -> written name.
        changed: written name -> what is done to its values.
        added: written names that no source's tensor stands behind.
        dropped: source's name -> why it is left out.
        tied: source's name that is not written -> written name with the same bytes.
        positions: method, reserved, source_rows and rows of the position embeddings; None where they stay.
        sparse_source: whether the source was sparse already, so that its own layouts are kept.
        skipped: what lies beside the source's tensors -> why it is not read.
        notes: what a user should know, a sentence each.
    """

    family: Family
    tensors: dict[str, Tensor]
    config: dict
    source_config: dict
    source_length: int
    max_length: int
    sparsity: SparsityConfig
    layouts: list[np.ndarray]
    renamed: dict[str, str]
    changed: dict[str, str]
    added: list[str]
    dropped: dict[str, str]
    tied: dict[str, str]
    positions: dict | None
    sparse_source: bool
    notes: list[str]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def copied(self) -> list[str]:
        """The names written whose bytes are the source's."""
        own = {*self.changed, *self.added}
        return [name for name in self.tensors if name not in own]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(row.nbytes for row in self.tensors.values())

    @cached_property
    def facts(self) -> LayoutFacts:
        """What the layouts mean for this model."""
        return layout_facts(self.layouts, self.sparsity.block, self.source_length, is_interpolated(self.positions))

    def attention_flops(self, density: float) -> float:
        """Floating-point operations of one input of the longest length, in all attention layers."""
        heads, layers = self.config["num_attention_heads"], self.config["num_hidden_layers"]
        return attention_flops(density, self.max_length, self.config["hidden_size"] // heads, heads, layers)


BARE = Options()


def plan(tensors: Mapping[str, Tensor], config: Mapping, options: Options = BARE, where: object = None) -> Plan:
    """Works out the conversion of a table, dense or sparse already (then its layouts stay). Reads small tensors only.

    Args:
        tensors: the source's (`open_checkpoint(path).tensors`).
        config: content of its config.json.
        options: what the user chose.
        where: the source, for messages.

    Raises:
        FamilyError: it is of no BERT family, or its tensors do not fit the config.
        SparsityError: the sparsity or the length cannot be.
    """
    prefix = encoder_prefix(tensors)
    position_name = f"{prefix}{POSITIONS}"
    rows = tensors[position_name].shape[0] if position_name in tensors and tensors[position_name].shape else None
    family = find_family(config, tensors, rows)
    own_prefix = written_prefix(family, prefix)
    new_config = bert_config(family, config)
    notes = []
    if head := lost_head(family, config):
        notes.append(
            f"BERT has no equal of the head of {head}: its tensors are kept, but only the encoder runs in transformers"
        )

    renamed, dropped, stored, written = {}, {}, {}, {}
    for name, row in tensors.items():
        inner = name.removeprefix(prefix) if name.startswith(prefix) else name
        if inner in BUFFERS:
            dropped[name] = BUFFER if _is_usual_buffer(inner, row) else OTHER_BUFFER
            continue
        if match := STORED_LAYOUT.fullmatch(name):
            stored[int(match[2])] = name
            continue
        new = written_name(family, prefix, name)
        if new in written:
            raise FamilyError(f"two of its tensors would be written as {new}", where=where)
        written[new] = row
        if new != name:
            renamed[name] = new
    source_names = {new: old for old, new in renamed.items()}
    ties = {
        source_names.get(new, new): holder for new, holder in _ties(written, family, own_prefix, new_config).items()
    }
    for name in ties:
        del written[renamed.get(name, name)]
        renamed.pop(name, None)

    added = []
    if family.name == "distilbert" and f"{own_prefix}{TOKEN_TYPES}" not in written:
        words = written.get(f"{own_prefix}{WORDS}")
        if words is not None and len(words.shape) == 2:
            added.append(f"{own_prefix}{TOKEN_TYPES}")
            written[added[0]] = _zeros(words.dtype, (new_config["type_vocab_size"], words.shape[1]))
    compare(written, dense_spec(family, new_config, own_prefix, where="config.json")).raise_if_any(where)
    source_length = longest_input(family, new_config)
    if source_length < 1:
        raise FamilyError(
            "expected more position rows than reserved ones", found=new_config["max_position_embeddings"], where=where
        )

    layers = new_config["num_hidden_layers"]
    _refuse_more_layers(written, own_prefix, layers, where)
    sparse_source = bool(stored or new_config.get("sparse_attention") or new_config.get("sparse_config_cls"))
    if sparse_source:
        sparsity, layouts = _kept_sparsity(tensors, stored, new_config, source_length, options)
        if not stored and getattr(sparsity, "num_random_blocks", 0):
            notes.append(
                "its layouts are not stored: random blocks are drawn anew, they are not those that it was trained with"
            )
        covered = len(read(tensors[stored[0]])[0]) * sparsity.block if stored else source_length
        if (read_now := layouts[0].shape[-1] * sparsity.block) < max(covered, source_length):
            notes.append(
                f"it has {source_length:,} positions and layouts for {covered:,} tokens: it reads the {read_now:,} that both cover"
            )
    else:
        sparsity, layouts = _chosen_sparsity(options, source_length, new_config["num_attention_heads"], layers)
    max_length = layouts[0].shape[-1] * sparsity.block

    reserved = reserved_rows(family, new_config)
    positions_name = f"{own_prefix}{POSITIONS}"
    positions = None
    changed = {}
    if max_length != source_length:
        source_rows = written[positions_name].shape[0]
        written[positions_name] = extend(
            positions_name, written[positions_name], max_length, reserved, options.positions
        )
        method = options.positions if max_length > source_length else "tile"
        positions = {"method": method, "reserved": reserved, "source_rows": source_rows, "rows": reserved + max_length}
        changed[positions_name] = f"{source_rows} rows to {positions['rows']}, {method}"
    if options.dtype != "keep":
        for name, row in written.items():
            narrowed = cast(name, row, DTYPES[options.dtype])
            if narrowed is not row:
                written[name] = narrowed
                rule = f"{row.dtype} to {narrowed.dtype}"
                changed[name] = f"{changed[name]}, {rule}" if name in changed else rule
        new_config["dtype" if "dtype" in new_config else "torch_dtype"] = TORCH_NAMES[options.dtype]
        changed = {name: rule for name, rule in changed.items() if name not in added}
    for layer, layout in enumerate(layouts):
        name = f"{own_prefix}{LAYOUT.format(layer)}"
        written[name] = _layout_row(layout)
        if layer in stored:
            if stored[layer] != name:
                renamed[stored[layer]] = name
            changed[name] = "the stored layout as U8, one 0 or 1 for each block"
        else:
            added.append(name)

    new_config["max_position_embeddings"] = reserved + max_length
    new_config["sparse_config_cls"] = config_class_path(sparsity)
    new_config["sparse_attention"] = sparsity.to_parameters()
    compare(written, sparse_spec(family, new_config, own_prefix)).raise_if_any(where)
    return Plan(
        family=family,
        tensors=dict(sorted(written.items(), key=lambda item: _natural(item[0]))),
        config=new_config,
        source_config=dict(config),
        source_length=source_length,
        max_length=max_length,
        sparsity=sparsity,
        layouts=layouts,
        renamed=renamed,
        changed=changed,
        added=added,
        dropped=dropped,
        tied=ties,
        positions=positions,
        sparse_source=sparse_source,
        notes=notes,
    )


def is_interpolated(positions: Mapping | None) -> bool:
    """Whether positions, as `Plan` and conversion.json have them, are others than the source's from the first token on."""
    return positions is not None and positions["method"] == "interpolate"


def _refuse_more_layers(names: Iterable[str], prefix: str, layers: int, where: object) -> None:
    """Raises FamilyError for tensors of layers that the config.json does not have: they would never be used."""
    layer = re.compile(re.escape(prefix) + r"encoder\.layer\.(\d+)\.")
    more = [name for name in names if (match := layer.match(name)) and int(match[1]) >= layers]
    if more:
        raise FamilyError(
            f"expected tensors of {layers} layers, which is num_hidden_layers of config.json",
            found=f"{more[0]}" + (f" and {len(more) - 1} more" if len(more) > 1 else ""),
            where=where,
            hint="is this config.json from the same model?",
        )


def buffer_values(inner: str, rows: int) -> np.ndarray:
    """What a model makes of one of BUFFERS: int64 `[1, rows]`, the positions in order or zeros."""
    return (np.arange(rows) if inner.endswith("position_ids") else np.zeros(rows)).astype("<i8")[None]


def _is_usual_buffer(inner: str, row: Tensor) -> bool:
    return (
        row.dtype == "I64" and row.shape[:1] == (1,) and np.array_equal(read(row), buffer_values(inner, row.shape[-1]))
    )


def _natural(name: str) -> list:
    """Sorts layer 2 before layer 10, so that the order does not depend on how the source was stored."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _ties(written: Mapping[str, Tensor], family: Family, prefix: str, config: Mapping) -> dict[str, str]:
    """Written names of a head that transformers ties to another, where they hold the same bytes: name -> the other.

    Shared storage tells; where a format or a shard forced a copy, the bytes do. Nothing is tied where the config says so: then
    transformers looks for both names.
    """
    if not config.get("tie_word_embeddings", True):
        return {}
    shared = tied(written)
    ties = {}
    for name, holder in family.tied.items():
        holder = f"{prefix}{holder[1:]}" if holder.startswith(".") else holder
        if name not in written or holder not in written:
            continue
        if shared.get(name, name) == shared.get(holder, holder) or _same_bytes(written[name], written[holder]):
            ties[name] = holder
    return ties


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(_regular(pieces(one)), _regular(pieces(other)), strict=True))


def _regular(parts: Iterable[memoryview], size: int = 1 << 16) -> Iterator[bytes]:
    """The same bytes in pieces of one size; the last one may be shorter."""
    left = b""
    for part in parts:
        left += bytes(part)
        whole = len(left) - len(left) % size
        yield from (left[start : start + size] for start in range(0, whole, size))
        left = left[whole:]
    if left:
        yield left


def _zeros(dtype: str, shape: tuple[int, ...]) -> Tensor:
    row = Tensor(dtype, shape, Computed(lambda: iter(())))
    return Tensor(dtype, shape, Computed(lambda: iter([bytes(row.nbytes)])))


def _layout_row(layout: np.ndarray) -> Tensor:
    return Tensor("U8", layout.shape, Computed(lambda: iter([memoryview(np.ascontiguousarray(layout).reshape(-1))])))


def _chosen_sparsity(
    options: Options, source_length: int, heads: int, layers: int
) -> tuple[SparsityConfig, list[np.ndarray]]:
    """The sparsity config that the options describe, and its layouts."""
    length = options.max_length or source_length
    if options.section is not None:
        section = {key: value for key, value in options.section.items() if key != "sparse_config_cls"}
        config = _configured_sparsity(options.section, section, heads)
        if config.mode == "custom" and options.layout is None:
            raise SparsityError(
                "a custom layout comes from a file", where="sparse_attention: mode", hint="--layout names it"
            )
    else:
        block = options.block or _default_block(source_length, length)
        mode = options.mode or ("custom" if options.layout else "windowed")
        if mode == "windowed":
            config = windowed_for(source_length, heads, block)
            config = replace(config, **options.parameters)
        else:
            config = MODES[mode](num_heads=heads, block=block, **options.parameters)
    if (config.mode == "custom") != (options.layout is not None):
        raise SparsityError(
            "a layout file goes with the mode custom, and that mode with a layout file",
            found=f"mode {config.mode}",
            where="--layout",
        )
    if length % config.block:
        below, above = length - length % config.block, length - length % config.block + config.block
        choices = " or ".join(f"{choice:,}" for choice in (below, above) if choice)
        raise SparsityError(
            f"expected a length in whole blocks of {config.block} tokens",
            found=f"{length:,}",
            where="--max-length" if options.max_length else "the source's length",
            hint=f"choose {'' if options.max_length else 'another --block, or --max-length '}{choices}",
        )
    if options.layout is not None:
        return config, load_layouts(options.layout, layers, heads, length // config.block)
    if options.different_layout_per_layer and not getattr(config, "num_random_blocks", 0):
        raise SparsityError(
            "layers differ only in random blocks",
            found=f"{config.mode} without any",
            where="--different-layout-per-layer",
        )
    layouts = make_layouts(config, length, layers, options.seed, options.different_layout_per_layer)
    for layout in {id(layout): layout for layout in layouts}.values():
        check_layout(layout, f"{config.mode} at {length:,} tokens")
    return config, layouts


def _default_block(source_length: int, length: int) -> int:
    """The largest of BLOCKS in which both lengths are whole, so that a window is as long as the source; else the new one alone."""
    for lengths in ((source_length, length), (length,)):
        for block in BLOCKS:
            if not any(tokens % block for tokens in lengths):
                return block
    return BLOCKS[0]


def _kept_sparsity(
    tensors: Mapping[str, Tensor], stored: Mapping[int, str], config: dict, source_length: int, options: Options
) -> tuple[SparsityConfig, list[np.ndarray]]:
    """The sparsity config and layouts of a source that is sparse already: as stored, else as configured."""
    if options.chooses_sparsity or options.max_length not in (None, source_length) or options.positions != "tile":
        raise SparsityError(
            "the source is sparse already, and its layouts are kept",
            where="source",
            hint="leave the options for sparsity, length and positions out, or convert it with --to-dense first",
        )
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    section = config.get("sparse_attention") or {}
    if not isinstance(section, Mapping):
        raise SparsityError(
            "expected an object with a block", found=repr(section)[:80], where="config.json: sparse_attention"
        )
    if not stored:
        sparsity = _configured_sparsity(config, section, heads)
        length = source_length - source_length % sparsity.block
        return sparsity, make_layouts(sparsity, length, layers, options.seed)
    if sorted(stored) != list(range(layers)):
        raise SparsityError(
            f"expected a stored layout for each of {layers} layers", found=f"layers {sorted(stored)}", where="source"
        )
    arrays = [read(tensors[stored[layer]]) for layer in range(layers)]
    for layer, array in enumerate(arrays):
        check_layout(array, stored[layer])
        if array.shape != (heads, *arrays[0].shape[1:]):
            raise SparsityError(
                f"expected [{heads}, {arrays[0].shape[1]}, {arrays[0].shape[1]}]",
                found=list(array.shape),
                where=stored[layer],
            )
    n = arrays[0].shape[1]
    try:
        sparsity = _configured_sparsity(config, section, heads)
    except SparsityError:
        sparsity = CustomSparsityConfig(heads, section.get("block") or _block_of(n, source_length))
    # Positions and layout may have been made for different lengths: the model reads what both cover.
    n = min(n, source_length // sparsity.block)
    if n < 1:
        raise SparsityError(
            f"expected at least a block of {sparsity.block} tokens", found=f"{source_length} positions", where="source"
        )
    same = {array.tobytes(): np.ascontiguousarray(array[:, :n, :n], np.uint8) for array in arrays}
    return sparsity, [same[array.tobytes()] for array in arrays]


def _configured_sparsity(config: Mapping, section: Mapping, heads: int) -> SparsityConfig:
    path = config.get("sparse_config_cls")
    return sparsity_config_from_class_path(path, section, heads) if path else sparsity_config(section, heads)


def _block_of(blocks: int, source_length: int) -> int:
    """The block of a stored layout that no config describes: by the positions, else by DeepSpeed's own length."""
    for length in (source_length, DEEPSPEED_LENGTH):
        if length % blocks == 0 and length // blocks in (16, 32, 64, 128):
            return length // blocks
    raise SparsityError(
        f"its layouts have {blocks} blocks a row, and no config tells the tokens of a block",
        where="source",
        hint='add "sparse_attention": {"block": ...} to config.json',
    )
