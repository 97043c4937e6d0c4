"""The sparsity config and the layouts of a conversion: as the options describe them, or as a sparse source has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bsa_export.bert.encoder import Encoder
from bsa_export.checkpoint.dtypes import read
from bsa_export.checkpoint.table import Tensor
from bsa_export.conversion.options import Options
from bsa_export.conversion.resources import refuse_large_layouts
from bsa_export.errors import SparsityError
from bsa_export.sparsity.configs import (
    DEEPSPEED_LENGTH,
    MAX_BLOCKS,
    MODES,
    CustomSparsityConfig,
    SparsityConfig,
    windowed_for,
)
from bsa_export.sparsity.facts import check_layout, layout_hash
from bsa_export.sparsity.layout_file import load_layouts
from bsa_export.sparsity.layouts import make_layouts, with_local_layers
from bsa_export.sparsity.sections import sparsity_config, sparsity_config_from_class_path

BLOCKS = (64, 32, 16)  # tried in this order unless the user names a block
TIMES_LONGER = 8  # the new length in units of the source's, unless the user names a length
WINDOW_MODES = ("windowed", "local")  # modes with `window`, in tokens, instead of these parameters
WINDOW_PARAMETERS = ("num_local_blocks", "num_sliding_window_blocks")
DEEPSPEED_BLOCK = 16  # the default of DeepSpeed's classes
LONG_ENOUGH = 4096  # a source of at least so many tokens keeps its length, unless the user names a length


def chosen_layouts(options: Options, encoder: Encoder) -> tuple[SparsityConfig, list[np.ndarray]]:
    """The sparsity config that the options describe, and its layouts: one array for all layers unless they differ.

    Local layers keep the blocks that their band touches, whatever the config is.
    """
    config, layouts = _of_all_layers(options, encoder.longest, encoder.heads, encoder.layers)
    return config, with_local_layers(layouts, encoder.windows, config.block)


def _of_all_layers(
    options: Options, source_length: int, heads: int, layers: int
) -> tuple[SparsityConfig, list[np.ndarray]]:
    config = _chosen_config(options, source_length, heads)
    if (config.mode == "custom") != (options.layout is not None):
        raise SparsityError(
            "the mode custom needs a layout file, and a layout file needs the mode custom",
            found=f"mode {config.mode}",
            where="--layout",
        )
    if options.layout is not None:
        blocks = None if options.max_length is None else _whole_blocks(options.max_length, config.block)
        return config, load_layouts(options.layout, layers, heads, blocks)
    if options.different_layout_per_layer and not getattr(config, "num_random_blocks", 0):
        raise SparsityError(
            "layers differ only in random blocks",
            found=f"{config.mode} without any",
            where="--different-layout-per-layer",
        )
    length = config.block * (
        _whole_blocks(options.max_length, config.block)
        if options.max_length
        else -(-default_length(source_length) // config.block)
    )
    distinct = layers if options.different_layout_per_layer else 1
    if length <= MAX_BLOCKS * config.block:
        refuse_large_layouts(length // config.block, config.block, config.num_layout_heads * distinct)
    layouts = make_layouts(config, length, layers, options.seed, options.different_layout_per_layer)
    for layout in {id(layout): layout for layout in layouts}.values():
        check_layout(layout, f"{config.mode} at {length:,} tokens")
    return config, layouts


def default_length(source_length: int) -> int:
    """The tokens that the new model reads where no length is named, before they are rounded up to whole blocks."""
    return source_length if source_length >= LONG_ENOUGH else TIMES_LONGER * source_length


def _chosen_config(options: Options, source_length: int, heads: int) -> SparsityConfig:
    """The sparsity config that the options describe."""
    if options.section is not None:
        section = {key: value for key, value in options.section.items() if key != "sparse_config_cls"}
        config = _configured_sparsity(options.section, section, heads)
        if config.mode == "custom" and options.layout is None:
            raise SparsityError(
                "a custom layout comes from a file", where="sparse_attention: mode", hint="name it with --layout"
            )
        return config
    length = options.max_length or default_length(source_length)
    block = options.block or _default_block(options.window or source_length, length, options.max_length is not None)
    mode = options.mode or ("custom" if options.layout else "windowed")
    if options.window is not None:
        if options.window > length:
            raise SparsityError(
                f"expected at most the {length:,} tokens that the new model reads",
                found=f"{options.window:,}",
                where="--window",
            )
        _whole_blocks(options.window, block, "--window")
    windows = windowed_for(options.window or source_length, heads, block)
    if mode == "windowed":
        return replace(windows, **options.parameters)
    parameters = dict(options.parameters)
    if options.window is not None:
        parameters["num_sliding_window_blocks"] = windows.num_sliding_window_blocks
    return MODES[mode](num_heads=heads, block=block, **parameters)


def _whole_blocks(length: int, block: int, where: str = "--max-length") -> int:
    """The blocks of a length that the user named. Raises SparsityError where they are not whole."""
    if length % block == 0:
        return length // block
    below, above = length - length % block, length - length % block + block
    choices = " or ".join(f"{choice:,}" for choice in (below, above) if choice)
    raise SparsityError(
        f"expected a length in whole blocks of {block} tokens",
        found=f"{length:,}",
        where=where,
        hint=f"choose {choices}",
    )


def _default_block(window: int, length: int, is_named: bool) -> int:
    """The largest of BLOCKS that divides the window and the length, so that a window is not rounded up; else the
    length."""
    for lengths in ((window, length), (length,)):
        for block in BLOCKS:
            if not any(tokens % block for tokens in lengths):
                return block
    return BLOCKS[0] if is_named else BLOCKS[-1]  # no length named: it is rounded up, to as little as possible


def kept_layouts(
    tensors: Mapping[str, Tensor],
    stored: Mapping[int, str],
    encoder: Encoder,
    options: Options,
) -> tuple[SparsityConfig, list[np.ndarray]]:
    """The sparsity config and layouts of a source that is sparse already: as stored, else as configured."""
    config, source_length = encoder.config, encoder.longest
    if options.chooses_sparsity or options.max_length not in (None, source_length) or options.positions != "tile":
        raise SparsityError(
            "the source is sparse already, and its layouts are kept",
            where="source",
            hint="leave the options for sparsity, length and positions out, or convert it with --to-dense first",
        )
    layers, heads = encoder.layers, encoder.heads
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
    layouts = _stored_layouts(tensors, [stored[layer] for layer in range(layers)], heads)
    n = layouts[0].shape[1]
    described = _described_sparsity(config, section, heads)
    sparsity = described or CustomSparsityConfig(heads, section.get("block") or _block_of(n, source_length))
    # Positions and layout may have been made for different lengths: the model reads what both cover.
    n = min(n, source_length // sparsity.block)
    if n < 1:
        raise SparsityError(
            f"expected at least a block of {sparsity.block} tokens", found=f"{source_length} positions", where="source"
        )
    same = {id(layout): np.ascontiguousarray(layout[:, :n, :n], np.uint8) for layout in layouts}
    return sparsity, [same[id(layout)] for layout in layouts]


def _stored_layouts(tensors: Mapping[str, Tensor], names: list[str], heads: int) -> list[np.ndarray]:
    """The layouts that a source stores, one a layer, checked; equal ones are one array."""
    layouts: list[np.ndarray] = []
    distinct: dict[str, np.ndarray] = {}
    for name in names:
        layout = read(tensors[name])
        check_layout(layout, name)
        n = layouts[0].shape[1] if layouts else layout.shape[1]
        if layout.shape != (heads, n, n):
            raise SparsityError(f"expected [{heads}, {n}, {n}]", found=list(layout.shape), where=name)
        layouts.append(distinct.setdefault(layout_hash(layout), layout))
    return layouts


def _configured_sparsity(config: Mapping[str, Any], section: Mapping[str, Any], heads: int) -> SparsityConfig:
    path = config.get("sparse_config_cls")
    return sparsity_config_from_class_path(path, section, heads) if path else sparsity_config(section, heads)


def _described_sparsity(config: Mapping[str, Any], section: Mapping[str, Any], heads: int) -> SparsityConfig | None:
    """The sparsity config that describes stored layouts; None without a section, or without a class for it."""
    if not section:
        return None
    try:
        return _configured_sparsity(config, section, heads)
    except SparsityError:
        return None


def _block_of(blocks: int, source_length: int) -> int:
    """The block of a stored layout that no config describes: from the source's length or that of DeepSpeed's class.

    With that class and its default block a layout has 128 blocks a row.
    """
    if blocks * DEEPSPEED_BLOCK == DEEPSPEED_LENGTH:
        return DEEPSPEED_BLOCK
    lengths = sorted({source_length, DEEPSPEED_LENGTH})
    found = {length // blocks: length for length in lengths if not length % blocks}
    found = {block: length for block, length in found.items() if block in (16, 32, 64, 128)}
    if len(found) == 1:
        return next(iter(found))
    choices = " or ".join(f"{block} tokens a block for {length:,}" for block, length in found.items())
    raise SparsityError(
        f"its layouts have {blocks} blocks a row, and no config states the tokens of a block",
        found=choices or None,
        where="source",
        hint='add "sparse_attention": {"block": ...} to config.json',
    )
