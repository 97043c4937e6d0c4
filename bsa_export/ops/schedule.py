"""Layout -> work list: which key blocks each tile of query rows visits, in what order, and how long rows are split.

A *tile* is `size` consecutive rows of the score matrix, a *step* up to `size` of its columns. Both are cut into
*units*: blocks, or parts of a block that is larger than a tile. Unit rows that share a tile visit the union of their
kept units; a bit of the step's bit mask says for each (row, column) of units whether it is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from bsa_export.ops import window as windows

# Columns of `Schedule.items`; the kernels read them by position.
ITEM_FIELDS = ("head", "tile", "begin", "end_full_run", "end_full", "end_run", "end", "slot", "lowest_unit")
# Columns of `Schedule.splits`.
SPLIT_FIELDS = ("head", "tile", "slot", "slots")

MIN_STEPS_TO_SPLIT = 32
SPLIT_ABOVE_MEAN = 4
# Programs that a large GPU runs at once: an H100 has 132 multiprocessors with 3 to 5 each.
PROGRAMS = 512
LONG_ABOVE_MEAN = 2
HEAVY_ABOVE_MEAN = 2

# Bytes that the schedules of a cache may take; layouts that it remembers before it removes those that were freed.
MOST_BYTES = 512 << 20
MOST_LAYOUTS = 4096


@dataclass(frozen=True)
class Tile:
    """How the score matrix is cut: a program computes `size` rows and reads `size` columns a step, in units of `unit`
    tokens."""

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
        items: int32 `[n_items, 9]`, `ITEM_FIELDS`. Steps `[begin, end_full_run)` and `[end_full, end_run)` read
            consecutive columns. Steps `[begin, end_full)` keep all that they read, `[end_full, end)` need a mask.
            Columns ascend within `[begin, end_full_run)` and within `[end_full_run, end_full)`; where a tile is one
            unit also within `[end_full, end)`, and without a window over all steps. `slot` is -1, or where the partial
            result of a shared row is stored. `lowest_unit` is the first unit that the item reads.
        row_indices: int32 `[n_tiles, tile.units]`, the unit rows of each tile.
        column_indices: int32 `[n_steps + 1, tile.units]`, the units of a step, repeated where a step is not full. The
            last row is not a step: loops read ahead.
        bit_masks: int32 `[n_steps]`, bit `row * tile.units + column` is 1 where that unit is kept.
        splits: int32 `[n_splits, 4]`, `SPLIT_FIELDS`: the rows shared between several items.
        slots: number of partial results, per sequence of the batch.
    """

    items: torch.Tensor
    row_indices: torch.Tensor
    column_indices: torch.Tensor
    bit_masks: torch.Tensor
    splits: torch.Tensor
    slots: int

    @cached_property
    def steps(self) -> dict[str, torch.Tensor]:
        """The lists that a program works through, by the names of the kernels' parameters."""
        names = ("items", "row_indices", "column_indices", "bit_masks")
        return {name: getattr(self, name) for name in names}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.steps.values(), self.splits))


def build_schedule(
    layout: np.ndarray,
    block: int,
    seq: int,
    tile: Tile,
    device: torch.device,
    transposed: bool = False,
    sequences: int = 1,
    window: tuple[int, int] | None = None,
) -> Schedule:
    """Makes the work list of a layout on a device.

    Args:
        layout: bool `[heads, n, n]`, `n = ceil(seq / block)`.
        transposed: the list of its transpose, as the gradients of keys and values need it: rows are then key blocks.
        sequences: how many run at the same time: the more, the longer a row may be before it is split.
        window: tokens to the left and to the right of a query that it attends to. Units outside of it are left out;
            units that are partly outside need a mask.
    """
    across = tile.units
    kept, head_of = _distinct_heads(layout)
    if transposed:
        kept = torch.from_numpy(kept).mT.contiguous().numpy()
        window = window and window[::-1]
    units = -(-seq // tile.unit)
    if block > tile.unit:
        times = block // tile.unit
        kept = kept.repeat(times, axis=1).repeat(times, axis=2)[:, :units, :units]
    if window is not None:
        kept = windows.kept_within(kept, tile.unit, window)
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
        full = ((rows < units) << np.arange(across)).sum(2, dtype=np.uint8)

    flat = np.flatnonzero(bits)
    row_id, unit = np.divmod(flat, bits.shape[2])
    row_bits = bits.reshape(-1)[flat].astype(np.int64)
    is_full = row_bits == full if across == 1 else row_bits == full.reshape(-1)[row_id]
    if seq % tile.unit:
        is_full &= unit != units - 1
    if window is not None:
        is_full &= _is_within(window, rows, row_id, unit, units, tile)
    in_run, in_full_run = _runs(flat, unit, is_full, across)
    # 0 full and consecutive, 1 full, 2 consecutive, 3 neither: the order of the steps of a row
    kind = np.where(in_run, np.where(in_full_run, 0, 2), np.where(is_full, 1, 3))
    if across > 1:
        # full units that do not fill a step come last
        scattered = np.flatnonzero(kind == 1)
        n_scattered = np.bincount(row_id[scattered], minlength=len(kept) * n_tiles)
        rank = np.arange(len(scattered)) - (n_scattered.cumsum() - n_scattered)[row_id[scattered]]
        kind[scattered[rank < (n_scattered % across)[row_id[scattered]]]] = 3
    if across > 1 or seq % tile.unit or window is not None:
        order = np.argsort(row_id * 4 + kind, kind="stable")
        unit, row_bits, kind, row_id = unit[order], row_bits[order], kind[order], row_id[order]

    n_rows = len(kept) * n_tiles
    count = np.bincount(row_id, minlength=n_rows)
    bounds = [np.bincount(row_id[kind <= last], minlength=n_rows) // across for last in range(3)]
    steps = -(-count // across)
    first_step = steps.cumsum() - steps
    if across == 1:
        column_indices, bit_masks = np.append(unit, 0)[:, None], row_bits
    else:
        n_steps = int(steps.sum())
        step, lane = np.divmod(np.arange(len(row_id)) - (count.cumsum() - count)[row_id], across)
        step += first_step[row_id]
        # a step that is not full repeats its first unit, with its bits at 0
        column_indices = np.zeros((n_steps + 1, across), np.int64)
        column_indices[step[lane == 0]] = unit[lane == 0][:, None]
        column_indices[step, lane] = unit
        bit_masks = np.zeros(n_steps, np.int64)
        spread = sum(((row_bits >> row) & 1) << (row * across) for row in range(across)) << lane
        for column in range(across):
            bit_masks[step[lane == column]] |= spread[lane == column]

    items, splits, slots = _items(
        first_step, bounds, steps, column_indices[:-1].min(1), n_tiles, across, head_of, sequences
    )
    parts = (items, rows.reshape(-1, across), column_indices, bit_masks, splits)
    on_device = _on_device(parts, device)
    return Schedule(on_device[0], on_device[1], on_device[2], on_device[3], on_device[4], slots)


def _on_device(parts: tuple[np.ndarray, ...], device: torch.device) -> list[torch.Tensor]:
    """`parts` as int32, in memory that is theirs. What this thread allocates may become a CUDA graph's: torch.compile
    with `mode="reduce-overhead"` first runs what it will record, gives the graph all memory that is allocated
    meanwhile, and refuses to go on where any of it outlives the run."""
    with ThreadPoolExecutor(1) as thread:
        return list(thread.map(lambda part: torch.from_numpy(part.astype(np.int32)).to(device), parts))


def _runs(flat: np.ndarray, unit: np.ndarray, is_full: np.ndarray, across: int) -> tuple[np.ndarray | bool, np.ndarray]:
    """Cuts consecutive units of a row, as far as they go, into groups of `across`: which units are in one, and in one
    of full ones."""
    if across == 1:
        return True, is_full
    place = np.arange(len(flat))
    begins = (unit == 0) | (np.diff(flat, prepend=-1) != 1)
    i_run = begins.cumsum() - 1
    place_in_run = place - np.flatnonzero(begins)[i_run]
    first = place - place_in_run % across  # of the group
    in_run = place_in_run - place_in_run % across + across <= np.bincount(i_run)[i_run]
    return in_run, np.bincount(first[is_full], minlength=len(flat))[first] == across


def _is_within(
    window: tuple[int, int], rows: np.ndarray, row_id: np.ndarray, unit: np.ndarray, units: int, tile: Tile
) -> np.ndarray:
    """Whether all rows of the tile `row_id` have all columns of the unit `unit` in their window."""
    left, right = window
    lowest, highest = rows.min(2).reshape(-1)[row_id], np.where(rows < units, rows, -1).max(2).reshape(-1)[row_id]
    farthest_left, farthest_right = highest - unit, unit - lowest
    return (farthest_left * tile.unit + tile.unit - 1 <= left) & (farthest_right * tile.unit + tile.unit - 1 <= right)


def _distinct_heads(layout: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[distinct, n, n]` and, for each head, which of them it is."""
    first: dict[bytes, int] = {}
    head_of = [first.setdefault(np.packbits(head).tobytes(), len(first)) for head in layout]
    return layout[[head_of.index(i) for i in range(len(first))]], np.array(head_of)


def _rows_of_tiles(kept: np.ndarray, across: int) -> np.ndarray:
    """The unit rows of each tile, `[distinct, n_tiles, across]` ascending; a missing one is the number of units.

    Rows that keep much more than the mean, such as global ones, share tiles of their own: light rows next to them would
    visit all their columns for nothing.
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


def _items(
    first_step: np.ndarray,
    bounds: list[np.ndarray],
    steps: np.ndarray,
    lowest: np.ndarray,
    n_tiles: int,
    across: int,
    head_of: np.ndarray,
    sequences: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Splits rows that would still run when all others have ended into several items, and puts long ones first."""
    of_all = sequences * int(steps.reshape(-1, n_tiles).sum(1)[head_of].sum())
    cap = max(MIN_STEPS_TO_SPLIT, int(SPLIT_ABOVE_MEAN * steps.mean()), of_all // PROGRAMS)
    parts = np.maximum(-(-steps // cap), 1)
    length = -(-steps // parts)
    row = np.repeat(np.arange(len(steps)), parts)
    part = np.arange(len(row)) - (parts.cumsum() - parts)[row]
    begin = np.minimum(part * length[row], steps[row])
    end = np.minimum(begin + length[row], steps[row])
    bounds = [begin, *(bound[row].clip(begin, end) for bound in bounds), end]
    lowest_unit = np.zeros(len(row), np.int64)
    # one part begins where the one before it ends
    lowest_unit[begin < end] = np.minimum.reduceat(lowest, (first_step[row] + begin)[begin < end]) if len(lowest) else 0

    of_distinct = [np.flatnonzero(row // n_tiles == distinct) for distinct in range(head_of.max() + 1)]
    pick = np.concatenate([of_distinct[distinct] for distinct in head_of])
    head = np.repeat(np.arange(len(head_of)), [len(of_distinct[distinct]) for distinct in head_of])
    shared = parts[row[pick]] > 1
    slot = np.where(shared, shared.cumsum() - 1, -1)
    tile = row[pick] if across > 1 else row[pick] % n_tiles
    items = np.stack([head, tile, *((first_step[row] + bound)[pick] for bound in bounds), slot, lowest_unit[pick]], 1)
    starts = shared & (part[pick] == 0)
    splits = np.stack([head[starts], tile[starts], slot[starts], parts[row[pick]][starts]], 1)
    # Only rows far above the mean go first, so that they do not end last. The others stay in their order: neighbours
    # read the same keys at the same time, from the cache.
    length = items[:, ITEM_FIELDS.index("end")] - items[:, ITEM_FIELDS.index("begin")]
    order = np.argsort(np.where(length > LONG_ABOVE_MEAN * steps.mean(), -length, 0), kind="stable")
    return items[order], splits, int(shared.sum())


class ScheduleCache:
    """Schedules by (layout, block, units, tile, device, sequences, window): those used last, up to `most_bytes`.
    Threads may share it.

    A layout is known again by its storage, as long as that lives and was not written to since (its version changed);
    looking it up synchronises nothing. Any other is read. Layouts are not kept alive, and equal ones share a schedule.
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes = most_bytes
        self._bytes = 0
        self._layouts: dict[tuple[Any, ...], tuple[StorageWeakRef, int, tuple[Any, ...]]] = {}
        self._most_layouts = MOST_LAYOUTS
        self._schedules: OrderedDict[tuple[Any, ...], Schedule] = OrderedDict()
        self._captured: dict[tuple[Any, ...], Schedule] = {}
        self._lock = Lock()

    def get(
        self,
        layout: torch.Tensor,
        block: int,
        seq: int,
        tile: Tile,
        device: torch.device,
        transposed: bool,
        sequences: int = 1,
        site: str = "",
        window: tuple[int, int] | None = None,
    ) -> Schedule:
        """The schedule of `layout[:, :n, :n]`, of its transpose if `transposed`; built at the first call.

        Args:
            sequences: how many run at the same time, rounded down to a power of two, so that few schedules are made.
            site: where in a compiled graph the call is. Such a graph writes another layout into the memory of one
                that it no longer needs, and no version counter shows it; but one site reads a layout once in a run.
        """
        # All lengths that end in the same unit, with it or within it, have one schedule.
        sequences = 1 << max(sequences, 1).bit_length() - 1
        options = (block, -(-seq // tile.unit), seq % tile.unit != 0, tile, device, transposed, sequences, window)
        # A reference to a storage, weak too, keeps its address from becoming another's.
        storage = layout.untyped_storage()
        where = (storage._cdata, layout.data_ptr(), layout.shape, layout.stride(), layout.dtype, layout.device)
        key = (site, *where, *options)
        # Inference tensors have no version.
        version = None if layout.is_inference() else layout._version
        with self._lock:
            _, known_version, content = self._layouts.get(key, (None, None, ()))
            schedule = self._schedules.get(content) if known_version == version is not None else None
            if schedule is None:
                host = np.ascontiguousarray((layout != 0).cpu().numpy())
                content = (sha256(np.packbits(host).tobytes()).digest(), host.shape, *options)
                schedule = self._schedules.get(content)
                if schedule is None:
                    schedule = build_schedule(host, block, seq, tile, device, transposed, sequences, window)
                    self._add(content, schedule)
                if version is not None:
                    self._remember(key, (StorageWeakRef(storage), version, content))
            self._schedules.move_to_end(content)
            # A CUDA graph reads it whenever it is replayed.
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                self._captured[content] = schedule
            return schedule

    def clear(self) -> None:
        """Forgets all schedules but those that a CUDA graph reads."""
        with self._lock:
            self._layouts.clear()
            self._schedules.clear()
            self._bytes = 0

    def _add(self, content: tuple[Any, ...], schedule: Schedule) -> None:
        self._schedules[content] = schedule
        self._bytes += schedule.nbytes
        while self._bytes > self.most_bytes and len(self._schedules) > 1:
            self._bytes -= self._schedules.popitem(last=False)[1].nbytes

    def _remember(self, key: tuple[Any, ...], entry: tuple[StorageWeakRef, int, tuple[Any, ...]]) -> None:
        if len(self._layouts) >= self._most_layouts:
            self._layouts = {
                key: known
                for key, known in self._layouts.items()
                if not known[0].expired() and known[2] in self._schedules
            }
            self._most_layouts = max(MOST_LAYOUTS, 2 * len(self._layouts))
        self._layouts[key] = entry
