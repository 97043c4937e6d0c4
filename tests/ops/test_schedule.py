"""Schedules: every kept block is visited once, nothing else is, and heavy rows are shared out."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa_export.ops.schedule import ITEM_FIELDS, ScheduleCache, Tile, build_schedule
from bsa_export.sparsity import MODES, windowed_for

CPU = torch.device("cpu")


def visited(schedule, heads: int, units: int, tile: Tile, seq: int) -> np.ndarray:
    """How often each (head, unit row, unit column) is computed, int `[heads, units, units]`, as the kernels read a schedule."""
    counts = np.zeros((heads, units + tile.units, units + tile.units), int)
    across = tile.units
    for item in schedule.items.tolist():
        fields = dict(zip(ITEM_FIELDS, item, strict=True))
        rows = schedule.rows[fields["tile"]].tolist() if across > 1 else [fields["tile"]]
        for step in range(fields["begin"], fields["end"]):
            columns = schedule.columns[step].tolist()
            if step < fields["solid"]:
                assert columns == list(range(columns[0], columns[0] + across)), "solid steps read consecutive columns"
                assert (columns[-1] + 1) * tile.unit <= seq
            word = schedule.words[step].item()
            for i, row in enumerate(rows):
                for j, column in enumerate(columns):
                    kept = word >> (i * across + j) & 1
                    if step < fields["whole"]:
                        assert kept or row >= units, "steps without a mask keep all that they read"
                        assert (column + 1) * tile.unit <= seq
                    if kept:
                        counts[fields["head"], row, column] += 1
    assert not counts[:, units:].any()
    return counts[:, :units, :units]


@st.composite
def layouts(draw):
    heads, n = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layout = rng.random((heads, n, n)) < draw(st.sampled_from([0.05, 0.3, 0.7, 1.0]))
    if draw(st.booleans()):
        layout[:, rng.integers(n)] = True
    if draw(st.booleans()):
        layout[:] = layout[0]
    return layout


@settings(deadline=None, max_examples=150)
@given(layouts(), st.sampled_from([16, 32, 64, 128]), st.sampled_from([32, 64]), st.data())
def test_every_kept_block_is_visited_once(layout, block, size, data):
    tile = Tile(size, min(block, size))
    seq = layout.shape[1] * block - data.draw(st.integers(0, block - 1))
    schedule = build_schedule(layout, block, seq, tile, CPU)
    units = -(-seq // tile.unit)
    times = block // tile.unit
    expected = layout.repeat(times, axis=1).repeat(times, axis=2)[:, :units, :units]
    np.testing.assert_array_equal(visited(schedule, len(layout), units, tile, seq), expected)


def test_every_row_has_an_item_even_without_a_kept_block():
    layout = np.zeros((2, 4, 4), bool)
    schedule = build_schedule(layout, 64, 256, Tile(64, 64), CPU)
    assert sorted(map(tuple, schedule.items[:, :2].tolist())) == [
        (head, tile) for head in range(2) for tile in range(4)
    ]


def test_a_global_row_is_shared_out_and_comes_first():
    layout = MODES["bslongformer"](1, block=64, num_sliding_window_blocks=3).make_layout(65536).astype(bool)
    schedule = build_schedule(layout, 64, 65536, Tile(64, 64), CPU)
    lengths = (schedule.items[:, 5] - schedule.items[:, 2]).tolist()
    slots = schedule.items[:, 6].tolist()
    assert max(lengths) <= 32
    assert schedule.splits.tolist() == [[0, 0, 0, 32]]
    assert slots[:32] == list(range(32))
    assert set(slots[32:]) == {-1}


def test_global_rows_in_small_blocks_do_not_drag_their_neighbours_along():
    """The gradient of keys under `fixed` at block 16: every fourth key block is seen by all, the others by their window."""
    layout = MODES["fixed"](1, block=16).make_layout(4096).astype(bool).transpose(0, 2, 1)
    schedule = build_schedule(np.ascontiguousarray(layout), 16, 4096, Tile(64, 16), CPU)
    steps = int((schedule.items[:, 5] - schedule.items[:, 2]).sum())
    assert steps <= 1.15 * layout.sum() / 16


def test_a_long_layout_is_scheduled_in_no_time():
    """65,536 tokens, block 64, 12 heads: under 50 ms on an idle machine; the bound here leaves room for a busy one."""
    layout = windowed_for(512, 12).make_layout(65536).astype(bool)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        build_schedule(layout, 64, 65536, Tile(64, 64), CPU)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.25


class TestCache:
    def get(self, cache, layout, seq=128):
        return cache.get(layout, 64, seq, Tile(64, 64), CPU, False)

    def test_a_layout_is_scheduled_once(self):
        cache, layout = ScheduleCache(), torch.ones(1, 2, 2, dtype=torch.uint8)
        assert self.get(cache, layout) is self.get(cache, layout)
        assert self.get(cache, layout) is self.get(cache, layout.clone()), "equal layouts share a schedule"

    def test_a_layout_that_is_written_to_is_scheduled_again(self):
        cache, layout = ScheduleCache(), torch.ones(1, 2, 2, dtype=torch.uint8)
        before = self.get(cache, layout)
        layout[0, 0, 1] = 0
        assert len(self.get(cache, layout).columns) == len(before.columns) - 1

    @pytest.mark.parametrize(
        "other", [torch.eye(2, dtype=torch.uint8)[None], torch.ones(1, 2, 2, dtype=torch.int64)[:, :, [0, 0]]]
    )
    def test_layouts_do_not_mix(self, other):
        cache = ScheduleCache()
        ones = self.get(cache, torch.ones(1, 2, 2, dtype=torch.uint8))
        assert (self.get(cache, other) is ones) == bool(other.ne(0).all())

    def test_it_does_not_grow_without_bound(self):
        cache = ScheduleCache(capacity=3)
        for seed in range(10):
            layout = (torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(seed)) < 0.5).to(torch.uint8)
            self.get(cache, layout, 256)
        assert len(cache._entries) == len(cache._by_content) == 3
