"""Facts about layouts, computed from the arrays whatever made them. numpy alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bsa_export.errors import SparsityError


def check_layout(layout: np.ndarray, where: object = None) -> None:
    """Checks that a layout can be attended with: `[heads, n, n]` of 0 and 1 (integer or bool), each row with a kept
    block.

    Raises:
        SparsityError: it cannot; the message begins with `where`, then head and row.
    """
    prefix = "layout" if where is None else where
    if layout.ndim != 3 or layout.shape[1] != layout.shape[2] or not layout.size:
        raise SparsityError("expected a layout [heads, n, n]", found=list(layout.shape), where=prefix)
    if layout.dtype.kind not in "bui":
        raise SparsityError("expected integers or booleans", found=layout.dtype, where=prefix)
    layout = _distinct_part(layout)
    if layout.dtype == bool:
        layout = layout.view(np.uint8)  # a file may hold any byte
    if layout.min() < 0 or layout.max() > 1:
        head, row, column = np.argwhere((layout != 0) & (layout != 1))[0]
        found = f"{layout[head, row, column]} in column {column}"
        raise SparsityError("expected only 0 and 1", found=found, where=f"{prefix}: head {head}, row {row}")
    kept = layout.any(axis=2)
    if not kept.all():
        head, row = np.argwhere(~kept)[0]
        raise SparsityError(
            "keeps no block, its softmax would run over nothing",
            where=f"{prefix}: head {head}, row {row}",
            hint="keep at least the block on the diagonal",
        )


def _distinct_part(layout: np.ndarray) -> np.ndarray:
    """The first head of a layout whose heads are one array in memory (`SparsityConfig.shared_layout`), else all of
    it."""
    return layout[:1] if layout.strides[0] == 0 else layout


def layout_hash(layout: np.ndarray) -> str:
    """The sha256 of a layout's shape and bits, the same for every integer and bool dtype."""
    digest = hashlib.sha256(repr(tuple(int(size) for size in layout.shape)).encode())
    # As many heads at a time as fill whole bytes with their bits.
    at_once = 1 if layout[:1].size % 8 == 0 else 8
    shared = np.packbits(layout[:1]).tobytes() if layout.strides[0] == 0 and at_once == 1 else None
    for first in range(0, len(layout), at_once):
        digest.update(shared or np.packbits(layout[first : first + at_once]).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class HeadLayout:
    """A distinct layout of a head: `pattern` `[n, n]`, and the (layer, head) pairs that share it."""

    pattern: np.ndarray
    members: list[tuple[int, int]]


def distinct_heads(layouts: Sequence[np.ndarray]) -> list[HeadLayout]:
    """Groups the heads of all layers, `[heads, n, n]` each, by equal layout, in the order of first appearance."""
    layouts = list(layouts)  # holds them, so that an id stands for one array
    groups: dict[bytes, HeadLayout] = {}
    seen: dict[int, list[bytes]] = {}
    for layer, layout in enumerate(layouts):
        if id(layout) not in seen:
            distinct = _distinct_part(layout)
            digests = [hashlib.sha256(np.packbits(pattern).tobytes()).digest() for pattern in distinct]
            seen[id(layout)] = digests * (len(layout) // max(len(digests), 1))
        for head, key in enumerate(seen[id(layout)]):
            groups.setdefault(key, HeadLayout(layout[head], [])).members.append((layer, head))
    return list(groups.values())


def density(layouts: np.ndarray | Sequence[np.ndarray]) -> float:
    """The share of blocks that is kept, of one layout `[heads, n, n]` or the mean of one a layer."""
    if isinstance(layouts, np.ndarray):
        layouts = [layouts]
    parts = {id(layout): _distinct_part(layout) for layout in layouts}
    by_id = {key: np.count_nonzero(part) / part.size for key, part in parts.items()}
    return float(sum(by_id[id(layout)] for layout in layouts) / len(layouts))


def kept_share(layout: np.ndarray, block: int, length: int) -> float:
    """The share of blocks that is kept within the first `length` tokens, of a layout `[..., n, n]`; 1.0 is exact."""
    n = -(-length // block)
    part = layout[..., :n, :n]
    return float(np.count_nonzero(part) / part.size)


@dataclass(frozen=True)
class LayoutFacts:
    """What a layout means for a model that was trained on `source_length` tokens and whose positions are tiled beyond.

    Attributes:
        block: side of a block, in tokens.
        seq_len: tokens that the layout covers.
        source_length: tokens that the dense model reads.
        density: share of blocks that is kept.
        kept_share: the same within the source's length.
        kept_length: tokens up to which every block is kept, at most the source's length.
        reach: tokens between a query and the farthest key that it attends to, the largest over all queries and kept
            blocks.
        local_reach: the same within the unbroken stretch of kept blocks around a query's own. Blocks count that are
            kept in both directions (in one, if the layout is causal). Queries in a global block (one whose row or
            column is full) do not count, unless all are; a global block next to a sliding window is part of its
            stretch.
        far_share: share of the kept blocks that are outside that stretch and hold keys at `source_length` or farther,
            where the dense model never looked: global and random blocks.
        interpolated: whether positions are interpolated instead of tiled, so that no input has the positions that it
            knows.
    """

    block: int
    seq_len: int
    source_length: int
    density: float
    kept_share: float
    kept_length: int
    reach: int
    local_reach: int
    far_share: float
    interpolated: bool = False

    @property
    def short_inputs_differ(self) -> bool:
        """Whether outputs differ from the dense model's for inputs that it can read."""
        return self.interpolated or self.kept_share < 1

    @property
    def repeats_positions(self) -> bool:
        """Whether the local stretch includes a key that has the query's own tiled position."""
        return not self.interpolated and self.local_reach >= self.source_length

    @property
    def needs_training(self) -> bool:
        """Whether the model needs training before it is about as good as the dense one: blocks that it knows are
        missing, positions differ, or there are keys farther away than any that it knows."""
        return self.short_inputs_differ or self.repeats_positions or self.far_share > 0


def layout_facts(
    layouts: Sequence[np.ndarray],
    block: int,
    source_length: int,
    interpolated: bool = False,
    windows: Sequence[int | None] = (),
) -> LayoutFacts:
    """Computes the facts of the layouts `[heads, n, n]` of all layers, whichever mode or file they come from.

    Layers with a window are local in the source too: they count for the density only, unless there are no others.
    """
    n = layouts[0].shape[-1]
    is_global = [window is None for window in windows] if None in windows else [True] * len(layouts)
    heads = distinct_heads([layout for layout, counts in zip(layouts, is_global, strict=True) if counts])
    total = sum(len(head.members) for head in heads)
    farthest, stretch, kept, kept_within, far = 0, 0, 0, 0.0, 0
    for head in heads:
        head_farthest, head_stretch, head_far = _reach_in_blocks(head.pattern, max(source_length // block, 1))
        farthest, stretch = max(farthest, head_farthest), max(stretch, head_stretch)
        far += head_far * len(head.members)
        kept += np.count_nonzero(head.pattern) * len(head.members)
        kept_within += kept_share(head.pattern, block, source_length) * len(head.members)
    return LayoutFacts(
        block=block,
        seq_len=n * block,
        source_length=source_length,
        density=density(layouts) if not all(is_global) else float(kept / (total * n * n)),
        kept_share=float(kept_within / total),
        kept_length=min([source_length, n * block, *(_kept_blocks(head.pattern) * block for head in heads)]),
        reach=max(farthest * block - 1, 0),
        local_reach=max(stretch * block - 1, 0),
        far_share=float(far / max(kept, 1)),
        interpolated=interpolated,
    )


def _kept_blocks(pattern: np.ndarray) -> int:
    """How many blocks at the beginning of one head's `[n, n]` keep every pair among them."""
    dropped = pattern == 0
    first = dropped.argmax(axis=1)  # that the rows drop
    rows = np.flatnonzero(dropped.any(axis=1))
    return int(np.maximum(rows, first[rows]).min(initial=len(pattern)))


def _reach_in_blocks(pattern: np.ndarray, far: int) -> tuple[int, int, int]:
    """For one head's `[n, n]`, in blocks: how far kept blocks are from the diagonal, and the longest stretch to one
    side of a diagonal block, both with that block; and how many kept blocks at `far` or more from the diagonal are
    outside of such stretches. See `LayoutFacts`."""
    n = len(pattern)
    rows = np.arange(n)
    kept = pattern.view(bool) if pattern.dtype == np.uint8 else pattern != 0
    columns_kept = np.ascontiguousarray(kept.T)
    first, last, count = kept.argmax(axis=1), n - 1 - kept[:, ::-1].argmax(axis=1), kept.sum(axis=1, dtype=np.int32)
    attends = count > 0
    farthest = int(np.maximum(rows - first, last - rows)[attends].max(initial=-1)) + 1

    causal = bool((last <= rows)[attends].all())
    dropped = ~(kept if causal else kept & columns_kept)
    # The dropped blocks next to the diagonal: the last one before it and the first one behind it.
    before, behind = dropped & np.tri(n, n, 0, bool), dropped & ~np.tri(n, n, -1, bool)
    left = np.where(before.any(axis=1), rows - (n - 1 - before[:, ::-1].argmax(axis=1)), rows + 1)
    right = np.where(behind.any(axis=1), behind.argmax(axis=1) - rows, n - rows)
    full_row = count == (rows + 1 if causal else n)
    full_column = columns_kept.sum(axis=1, dtype=np.int32) == (n - rows if causal else n)
    is_global = full_row | full_column
    if not is_global.all():
        left[is_global] = right[is_global] = 0
    stretch = int(max(left.max(), right.max()))
    in_stretch = np.clip(left - far, 0, None).sum() + np.clip(right - far, 0, None).sum()
    is_far = np.tri(n, n, -far, bool) | ~np.tri(n, n, far - 1, bool)
    return farthest, stretch, int(np.count_nonzero(kept & is_far) - in_stretch)


def attention_flops(density: float, seq_len: int, head_dim: int, heads: int, layers: int) -> float:
    """Floating-point operations of attention in one forward pass: `query @ key` and `weights @ value` over kept blocks,
    2 operations a multiply-add; projections and softmax are not in it. Density 1 is the cost of dense attention."""
    return 4.0 * seq_len**2 * head_dim * heads * layers * density
