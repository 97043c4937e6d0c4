"""Schedules: every kept block is visited once, nothing else is, and heavy rows are shared out."""

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from bsa_export.ops import schedule
from bsa_export.ops.schedule import ITEM_FIELDS, ScheduleCache, Tile, build_schedule
from bsa_export.sparsity.configs import MODES, windowed_for

CPU = torch.device("cpu")
BEGIN, END, SLOT = map(ITEM_FIELDS.index, ("begin", "end", "slot"))


def visited(made, heads: int, units: int, tile: Tile, seq: int, plain: np.ndarray | None = None) -> np.ndarray:
    """How often each (head, unit row, unit column) is computed, int `[heads, units, units]`, as the kernels read a
    made. With a window, `plain` are the pairs of units that need no mask."""
    counts = np.zeros((heads, units + tile.units, units + tile.units), int)
    across = tile.units
    for item in made.items.tolist():
        fields = dict(zip(ITEM_FIELDS, item, strict=True))
        rows = made.row_indices[fields["tile"]].tolist() if across > 1 else [fields["tile"]]
        columns = made.column_indices[fields["begin"] : fields["end"]]
        assert fields["lowest_unit"] == (columns.min().item() if columns.numel() else 0)
        spans = [("begin", "end_full_run")]
        if across == 1:
            spans = [("begin", "end")] if plain is None else [*spans, ("end_full", "end")]
        for first, last in spans:
            ascending = made.column_indices[fields[first] : fields[last], 0]
            assert torch.equal(ascending, ascending.sort().values)
        apart = made.column_indices[fields["end_full_run"] : fields["end_full"]].reshape(-1)
        assert torch.equal(apart, apart.sort().values)
        if across == 1:
            assert (fields["end_full"], fields["end_run"]) == (fields["end_full_run"], fields["end"]), "a unit is a run"
        for step in range(fields["begin"], fields["end"]):
            columns = made.column_indices[step].tolist()
            if step < fields["end_full_run"] or fields["end_full"] <= step < fields["end_run"]:
                assert columns == list(range(columns[0], columns[0] + across)), "these steps read consecutive columns"
            word = made.bit_masks[step].item()
            for i, row in enumerate(rows):
                for j, column in enumerate(columns):
                    kept = word >> (i * across + j) & 1
                    if step < fields["end_full"]:
                        assert kept or row >= units, "steps without a mask keep all that they read"
                        assert (column + 1) * tile.unit <= seq
                        assert plain is None or row >= units or plain[row, column]
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


@settings(max_examples=150)
@given(layouts(), st.sampled_from([16, 32, 64, 128]), st.sampled_from([32, 64, 128]), st.booleans(), st.data())
def test_every_kept_block_is_visited_once(layout, block, size, transposed, data):
    tile = Tile(size, min(block, size))
    assume(tile.units <= 4)  # a word has 32 bits
    seq = layout.shape[1] * block - data.draw(st.integers(0, block - 1))
    made = build_schedule(layout, block, seq, tile, CPU, transposed)
    layout = layout.transpose(0, 2, 1) if transposed else layout
    units = -(-seq // tile.unit)
    times = block // tile.unit
    expected = layout.repeat(times, axis=1).repeat(times, axis=2)[:, :units, :units]
    np.testing.assert_array_equal(visited(made, len(layout), units, tile, seq), expected)


@settings(max_examples=150)
@given(layouts(), st.sampled_from([16, 64, 128]), st.sampled_from([32, 64]), st.booleans(), st.data())
def test_a_window_leaves_the_units_with_a_pair_of_tokens_in_it(layout, block, size, transposed, data):
    tile = Tile(size, min(block, size))
    seq = layout.shape[1] * block - data.draw(st.integers(0, block - 1))
    left, right = (data.draw(st.integers(0, 3 * block)) for _ in range(2))
    made = build_schedule(layout, block, seq, tile, CPU, transposed, window=(left, right))
    units, times = -(-seq // tile.unit), block // tile.unit
    at = np.arange(units * tile.unit)
    inside = (at[None, :] >= at[:, None] - left) & (at[None, :] <= at[:, None] + right)
    kept = layout.repeat(times, axis=1).repeat(times, axis=2)[:, :units, :units]
    if transposed:
        inside, kept = inside.T, kept.transpose(0, 2, 1)
    inside = inside.reshape(units, tile.unit, units, tile.unit)
    found = visited(made, len(layout), units, tile, seq, plain=inside.all((1, 3)))
    np.testing.assert_array_equal(found, kept & inside.any((1, 3)))


def test_every_row_has_an_item_even_without_a_kept_block():
    layout = np.zeros((2, 4, 4), bool)
    made = build_schedule(layout, 64, 256, Tile(64, 64), CPU)
    assert sorted(map(tuple, made.items[:, :2].tolist())) == [(head, tile) for head in range(2) for tile in range(4)]


def test_a_global_row_is_shared_out_and_comes_first():
    layout = MODES["bslongformer"](1, block=64, num_sliding_window_blocks=3).make_layout(65536).astype(bool)
    made = build_schedule(layout, 64, 65536, Tile(64, 64), CPU)
    lengths = (made.items[:, END] - made.items[:, BEGIN]).tolist()
    slots = made.items[:, SLOT].tolist()
    assert max(lengths) <= 32
    assert made.splits.tolist() == [[0, 0, 0, 32]]
    assert slots[:32] == list(range(32))
    assert set(slots[32:]) == {-1}


def test_a_global_row_is_not_shared_out_where_the_others_take_as_long():
    layout = MODES["bslongformer"](12, block=64, num_sliding_window_blocks=7).make_layout(4096).astype(bool)
    alone, among_eight = (build_schedule(layout, 64, 4096, Tile(64, 64), CPU, sequences=n) for n in (1, 8))
    assert alone.slots == 12 * 2
    assert among_eight.slots == 0
    assert (among_eight.items[:12, END] - among_eight.items[:12, BEGIN]).tolist() == [64] * 12, "it comes first"


def test_global_rows_in_small_blocks_do_not_drag_their_neighbours_along():
    """The gradient of keys under `fixed` at block 16: every fourth key block is seen by all, the others by their
    window."""
    layout = MODES["fixed"](1, block=16).make_layout(4096).astype(bool)
    made = build_schedule(layout, 16, 4096, Tile(64, 16), CPU, transposed=True)
    steps = int((made.items[:, END] - made.items[:, BEGIN]).sum())
    assert steps <= 1.15 * layout.sum() / 16


@pytest.mark.parametrize("block", [16, 32])
def test_the_ends_of_windows_are_read_as_tiles(block):
    """A run is read by one copy; what is gathered waits for its addresses."""
    layout = MODES["local"](1, block=block, num_sliding_window_blocks=512 // block + 1).make_layout(4096).astype(bool)
    items = build_schedule(layout, block, 4096, Tile(64, block), CPU).items.numpy()
    end_full_run, end_full, end_run, end = (
        items[:, ITEM_FIELDS.index(name)] for name in ("end_full_run", "end_full", "end_run", "end")
    )
    assert (end_full == end_full_run).all()
    assert (end_run == end).all()
    assert (end_run > end_full).all()


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
        assert len(self.get(cache, layout).column_indices) == len(before.column_indices) - 1

    @pytest.mark.parametrize(
        "other", [torch.eye(2, dtype=torch.uint8)[None], torch.ones(1, 2, 2, dtype=torch.int64)[:, :, [0, 0]]]
    )
    def test_layouts_do_not_mix(self, other):
        cache = ScheduleCache()
        ones = self.get(cache, torch.ones(1, 2, 2, dtype=torch.uint8))
        assert (self.get(cache, other) is ones) == bool(other.ne(0).all())

    def test_lengths_that_end_in_the_same_unit_share_a_schedule(self):
        cache, layout = ScheduleCache(), torch.ones(1, 2, 2, dtype=torch.uint8)
        part = self.get(cache, layout, 65)
        assert all(self.get(cache, layout, seq) is part for seq in (66, 100, 127))
        assert self.get(cache, layout, 128) is not part

    def test_batches_of_about_the_same_size_share_a_schedule(self):
        cache, layout = ScheduleCache(), torch.ones(1, 2, 2, dtype=torch.uint8)
        made = [cache.get(layout, 64, 128, Tile(64, 64), CPU, False, sequences) for sequences in (4, 5, 7, 8)]
        assert made[0] is made[1] is made[2] is not made[3]

    def test_more_lengths_than_anyone_has_are_read_once(self, reads):
        """25 lengths of 24 layers, forward and back."""
        cache, layouts = ScheduleCache(), [torch.ones(1, 26, 26, dtype=torch.uint8) for _ in range(24)]
        for _ in range(2):
            for layout, blocks, transposed in product(layouts, range(1, 26), (False, True)):
                cache.get(layout[:, :blocks, :blocks], 64, blocks * 64, Tile(64, 64), CPU, transposed)
        assert len(reads) == 24 * 25 * 2

    def test_windows_do_not_mix(self):
        cache, layout = ScheduleCache(), torch.ones(1, 2, 2, dtype=torch.uint8)
        options = (layout, 64, 128, Tile(64, 64), CPU, False, 1, "")
        made = [cache.get(*options, window) for window in (None, (0, 0), (0, 64), (0, 0))]
        assert made[1] is made[3]
        assert [len(one.bit_masks) for one in made] == [4, 2, 3, 2]

    def test_it_keeps_what_was_used_last_within_its_bytes(self):
        layouts = [torch.eye(4, dtype=torch.uint8)[None].roll(i, 2) for i in range(3)]
        a, b, c = (self.get(ScheduleCache(), layout, 256) for layout in layouts)
        cache = ScheduleCache(most_bytes=a.nbytes + b.nbytes)
        a = self.get(cache, layouts[0].clone(), 256)
        b = self.get(cache, layouts[1].clone(), 256)
        assert self.get(cache, layouts[0].clone(), 256) is a
        c = self.get(cache, layouts[2], 256)
        assert self.get(cache, layouts[2], 256) is c
        assert self.get(cache, layouts[0], 256) is a
        assert self.get(cache, layouts[1], 256) is not b, "used longest ago"

    def test_layouts_are_not_kept_alive(self, monkeypatch):
        monkeypatch.setattr(schedule, "MOST_LAYOUTS", 8)
        cache = ScheduleCache()
        storages = []
        for _ in range(50):
            master = torch.ones(2, 3, 3, dtype=torch.uint8)
            storages.append(StorageWeakRef(master.untyped_storage()))
            self.get(cache, master[:1, :2, :2])
        del master
        assert all(storage.expired() for storage in storages)
        assert len(cache._layouts) <= 8

    def test_an_address_never_comes_to_mean_other_data(self):
        cache = ScheduleCache()
        for i in range(50):
            layout = torch.full((1, 2, 2), i % 2, dtype=torch.uint8)
            assert len(self.get(cache, layout).bit_masks) == 4 * (i % 2)
            del layout

    def test_a_layout_without_a_version_is_read_again(self):
        cache = ScheduleCache()
        with torch.inference_mode():
            layout = torch.ones(1, 2, 2, dtype=torch.uint8)
            before = self.get(cache, layout)
            layout[0, 0, 1] = 0
            assert len(self.get(cache, layout).column_indices) == len(before.column_indices) - 1

    def test_memory_that_a_compiled_graph_uses_again_is_read_again(self):
        """It writes without a new version: by numpy here."""
        cache, layout = ScheduleCache(), torch.ones(1, 2, 2, dtype=torch.uint8)
        options = (64, 128, Tile(64, 64), CPU, False, 1)
        before = cache.get(layout, *options, "first place")
        layout.numpy()[0, 0, 1] = 0
        assert cache.get(layout, *options, "first place") is before
        assert len(cache.get(layout, *options, "second place").column_indices) == len(before.column_indices) - 1

    def test_what_a_cuda_graph_reads_stays(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        cache, layout = ScheduleCache(most_bytes=0), torch.ones(1, 2, 2, dtype=torch.uint8)
        monkeypatch.setattr(schedule, "build_schedule", lambda *inputs: build_schedule(*inputs[:4], CPU, *inputs[5:]))
        captured = weakref.ref(cache.get(layout, 64, 128, Tile(64, 64), torch.device("cuda"), False))
        self.get(cache, torch.eye(2, dtype=torch.uint8)[None])
        gc.collect()
        assert captured() is not None

    def test_threads_share_it(self):
        """As the main thread and autograd's do."""
        cache = ScheduleCache(most_bytes=300)
        layouts = [torch.eye(4, dtype=torch.uint8)[None].roll(i, 2) for i in range(4)]

        def work(first):
            for i in range(300):
                layout = layouts[(first + i) % 4]
                found = self.get(cache, layout, 256).column_indices[:-1, 0].tolist()
                assert found == layout[0].argmax(1).tolist()

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))


@pytest.fixture
def reads(monkeypatch) -> list:
    """Grows when a layout is read."""
    done = []
    monkeypatch.setattr(schedule, "sha256", lambda data: done.append(1) or sha256(data))
    return done
