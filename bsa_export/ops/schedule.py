"""Layout -> work list: which key blocks each tile of query rows visits, in what order, and how long rows are shared out.

A *tile* is `size` consecutive rows of the score matrix, a *step* up to `size` of its columns. Both are cut into *units*: blocks,
or parts of a block that is larger than a tile. Unit rows that share a tile visit the union of their kept units; a bit of the
step's word says for each (row, column) of units whether it is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

# Columns of `Schedule.items`; the kernels read them by position.
ITEM_FIELDS = ("head", "tile", "begin", "solid", "whole", "end", "slot")
# Columns of `Schedule.splits`.
SPLIT_FIELDS = ("head", "tile", "slot", "slots")

MIN_STEPS_TO_SPLIT = 32
SPLIT_ABOVE_MEAN = 4
LONG_ABOVE_MEAN = 2
HEAVY_ABOVE_MEAN = 2


@dataclass(frozen=True)
class Tile:
    """How the score matrix is cut: a program computes `size` rows and reads `size` columns a step, in units of `unit` tokens."""

    size: int
    unit: int

    @property
    def units(self) -> int:
        """Units in a tile's rows, and in a step's columns."""
        return self.size // self.unit


@dataclass(frozen=True)
class Schedule:
    """The work of one layout, its few long items first.

    Attributes:
        items: int32 `[n_items, 7]`, `ITEM_FIELDS`. Steps `[begin, solid)` read consecutive columns, `[begin, whole)` keep all
            that they read, `[whole, end)` need a mask; `slot` is -1, or where the partial result of a shared row goes.
        columns: int32 `[n_steps, tile.units]`, the units of a step (repeated where a step is not full).
        words: int32 `[n_steps]`, bit `row * tile.units + column` is 1 where that unit is kept.
        splits: int32 `[n_splits, 4]`, `SPLIT_FIELDS`: the rows shared between several items.
        slots: number of partial results, per sequence of the batch.
    """

    items: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    words: torch.Tensor
    splits: torch.Tensor
    slots: int


def build_schedule(layout: np.ndarray, block: int, seq: int, tile: Tile, device: torch.device) -> Schedule:
    """Makes the work list of `layout` (bool `[heads, n, n]`, `n = ceil(seq / block)`), on `device`.

    For the gradients of keys and values pass the transposed layout: its rows are then key blocks.
    """
    across = tile.units
    kept, head_of = _distinct_heads(layout)
    units = -(-seq // tile.unit)
    if block > tile.unit:
        times = block // tile.unit
        kept = kept.repeat(times, axis=1).repeat(times, axis=2)[:, :units, :units]
    rows = _rows_of_tiles(kept, across)
    n_tiles = rows.shape[1]

    # one bit for each unit row of the tile; a missing row has none
    if across == 1:
        bits, full = kept.view(np.uint8), np.uint8(1)
    else:
        padded = np.pad(kept, ((0, 0), (0, 1), (0, -units % across)))
        bits = np.zeros((len(kept), n_tiles, padded.shape[2]), np.uint8)
        for row in range(across):
            for i in range(len(kept)):
                bits[i] |= padded[i, rows[i, :, row]].view(np.uint8) << row
        full = ((rows < units) << np.arange(across)).sum(2, dtype=np.uint8)[:, :, None]
    # 0 solid, 1 whole, 2 masked: the order of the steps of a row
    kind = np.where(bits == full, np.uint8(1), np.uint8(2))
    if seq % tile.unit:
        kind[:, :, units - 1] = 2
    kind[:, :, units:] = 2
    solid = (kind == 1).reshape(*kind.shape[:2], -1, across).all(3)
    kind -= solid.repeat(across, axis=2)

    flat = np.flatnonzero(bits)
    row_id, unit = np.divmod(flat, bits.shape[2])
    row_bits, kind = bits.reshape(-1)[flat].astype(np.int64), kind.reshape(-1)[flat]
    if across > 1 or seq % tile.unit:
        order = np.argsort(row_id * 3 + kind, kind="stable")
        unit, row_bits, kind, row_id = unit[order], row_bits[order], kind[order], row_id[order]

    n_rows = len(kept) * n_tiles
    count = np.bincount(row_id, minlength=n_rows)
    n_solid = np.bincount(row_id[kind == 0], minlength=n_rows) // across
    n_whole = np.bincount(row_id[kind < 2], minlength=n_rows) // across
    steps = -(-count // across)
    first_step = steps.cumsum() - steps
    step, lane = np.divmod(np.arange(len(row_id)) - (count.cumsum() - count)[row_id], across)
    step += first_step[row_id]

    n_steps = int(steps.sum())
    # a step that is not full repeats its first unit, with its bits at 0
    columns = np.empty((n_steps, across), np.int64)
    columns[step[lane == 0]] = unit[lane == 0][:, None]
    columns[step, lane] = unit
    words = np.zeros(n_steps, np.int64)
    spread = sum(((row_bits >> row) & 1) << (row * across) for row in range(across)) << lane
    for column in range(across):
        words[step[lane == column]] |= spread[lane == column]

    items, splits, slots = _items(first_step, n_solid, n_whole, steps, n_tiles, across, head_of)
    parts = (items, rows.reshape(-1, across), columns, words, splits)
    return Schedule(*(torch.from_numpy(part.astype(np.int32)).to(device) for part in parts), slots)


def _distinct_heads(layout: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[distinct, n, n]` and, for each head, which of them it is."""
    first: dict[bytes, int] = {}
    head_of = [first.setdefault(np.packbits(head).tobytes(), len(first)) for head in layout]
    return layout[[head_of.index(i) for i in range(len(first))]], np.array(head_of)


def _rows_of_tiles(kept: np.ndarray, across: int) -> np.ndarray:
    """The unit rows of each tile, `[distinct, n_tiles, across]` ascending; a missing one is the number of units.

    Rows that keep much more than the mean, such as global ones, share tiles of their own: light rows beside them would visit
    all their columns in vain.
    """
    distinct, units, _ = kept.shape
    natural = np.arange(units)
    if across == 1:
        return np.broadcast_to(natural[:, None], (distinct, units, 1))
    count = kept.sum(2)
    heavy = count > HEAVY_ABOVE_MEAN * count.mean(1, keepdims=True)
    n_tiles = max(sum(-(-int(part.sum()) // across) for part in (of_head, ~of_head)) for of_head in heavy)
    rows = np.full((distinct, n_tiles * across), units)
    for of_head, places in zip(heavy, rows, strict=True):
        light = natural[~of_head]
        begin = -(-len(light) // across) * across
        places[: len(light)] = light
        places[begin : begin + int(of_head.sum())] = natural[of_head]
    return rows.reshape(distinct, n_tiles, across)


def _items(first_step, n_solid, n_whole, steps, n_tiles, across, head_of):
    """Shares rows much longer than the mean out over several items, and puts long ones first."""
    cap = max(MIN_STEPS_TO_SPLIT, int(SPLIT_ABOVE_MEAN * steps.mean()))
    parts = np.maximum(-(-steps // cap), 1)
    length = -(-steps // parts)
    row = np.repeat(np.arange(len(steps)), parts)
    part = np.arange(len(row)) - (parts.cumsum() - parts)[row]
    begin = np.minimum(part * length[row], steps[row])
    end = np.minimum(begin + length[row], steps[row])
    bounds = [begin, n_solid[row].clip(begin, end), n_whole[row].clip(begin, end), end]

    of_distinct = [np.flatnonzero(row // n_tiles == distinct) for distinct in range(head_of.max() + 1)]
    pick = np.concatenate([of_distinct[distinct] for distinct in head_of])
    head = np.repeat(np.arange(len(head_of)), [len(of_distinct[distinct]) for distinct in head_of])
    shared = parts[row[pick]] > 1
    slot = np.where(shared, shared.cumsum() - 1, -1)
    tile = row[pick] if across > 1 else row[pick] % n_tiles
    items = np.stack([head, tile, *((first_step[row] + bound)[pick] for bound in bounds), slot], 1)
    starts = shared & (part[pick] == 0)
    splits = np.stack([head[starts], tile[starts], slot[starts], parts[row[pick]][starts]], 1)
    # Only rows far above the mean go first, so that they do not end last. The others stay in their order: neighbours read
    # the same keys at the same time, from the cache.
    length = items[:, 5] - items[:, 2]
    order = np.argsort(np.where(length > LONG_ABOVE_MEAN * steps.mean(), -length, 0), kind="stable")
    return items[order], splits, int(shared.sum())


class ScheduleCache:
    """Schedules by (layout's storage, block, length, tile, device), for the `capacity` used last.

    An entry keeps its layout alive, so that the address in its key cannot come to mean other data, and is dropped when the
    layout was written to since (its version changed). Looking one up synchronises nothing.
    """

    def __init__(self, capacity: int = 512):
        self.capacity = capacity
        self._entries: OrderedDict[tuple, tuple[torch.Tensor, int | None, Schedule]] = OrderedDict()
        self._by_content: OrderedDict[tuple, Schedule] = OrderedDict()

    def get(
        self, layout: torch.Tensor, block: int, seq: int, tile: Tile, device: torch.device, transposed: bool
    ) -> Schedule:
        """The schedule of `layout[:, :n, :n]`, of its transpose if `transposed`; built at the first call."""
        version = None if layout.is_inference() else layout._version
        key = (
            layout.data_ptr(), layout.shape, layout.stride(), layout.dtype, layout.device,
            block, seq, tile, device, transposed,
        )  # fmt: skip
        entry = self._entries.get(key)
        if entry is not None and entry[1] == version:
            self._entries.move_to_end(key)
            return entry[2]
        oriented = layout.transpose(1, 2) if transposed else layout
        host = np.ascontiguousarray((oriented != 0).cpu().numpy())
        # layers with equal layouts share one schedule
        content = (np.packbits(host).tobytes(), host.shape, *key[5:])
        schedule = self._by_content.get(content)
        if schedule is None:
            schedule = self._by_content[content] = build_schedule(host, block, seq, tile, device)
        self._entries[key] = (layout, version, schedule)
        for entries in (self._entries, self._by_content):
            while len(entries) > self.capacity:
                entries.popitem(last=False)
        return schedule
