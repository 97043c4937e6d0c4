"""Facts about layouts, checked against their definitions written as loops, and custom layouts from files."""

import hashlib
import json
import os
import re
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bsa_export.errors import BsaError, SparsityError
from bsa_export.sparsity.configs import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    WindowedSparsityConfig,
    windowed_for,
)
from bsa_export.sparsity.facts import (
    attention_flops,
    check_layout,
    density,
    distinct_heads,
    kept_share,
    layout_facts,
    layout_hash,
)
from bsa_export.sparsity.layout_file import load_layouts
from bsa_export.sparsity.layouts import make_layouts

UNCHANGED = {"short_inputs_differ": False, "repeats_positions": False, "needs_training": False}


def windowed(local, sliding):
    return WindowedSparsityConfig(2, 64, num_local_blocks=local, num_sliding_window_blocks=sliding)


@pytest.mark.parametrize(
    "config, density, local_reach, short_inputs_differ, repeats_positions, far",
    [
        pytest.param(windowed_for(512, 2), 0.159, 511, False, False, False, id="windowed-8-9-the-default"),
        pytest.param(windowed(8, 1), 0.125, 511, False, False, False, id="windowed-8-alone"),
        pytest.param(windowed(8, 11), 0.176, 511, False, False, False, id="windowed-8-11"),
        pytest.param(windowed(8, 15), 0.221, 511, False, False, False, id="windowed-8-15"),
        pytest.param(windowed(8, 17), 0.248, 575, False, True, False, id="windowed-8-17"),
        pytest.param(windowed(4, 5), 346 / 4096, 255, True, False, False, id="windowed-4-5"),
        pytest.param(DenseSparsityConfig(2, 64), 1.0, 4095, False, True, False, id="dense"),
        pytest.param(FixedSparsityConfig(2, 64, num_local_blocks=8), 0.234, 511, False, False, True, id="fixed-8"),
        pytest.param(FixedSparsityConfig(2, 64), 0.297, 255, True, False, True, id="fixed-4"),
        pytest.param(
            BSLongformerSparsityConfig(2, 64, num_sliding_window_blocks=17),
            0.275,
            639,
            False,
            True,
            True,
            id="bslongformer-17",
        ),
        pytest.param(
            BigBirdSparsityConfig(2, 64, num_random_blocks=3, num_global_blocks=2),
            0.150,
            None,
            True,
            False,
            True,
            id="bigbird",
        ),
        pytest.param(
            LocalSlidingWindowSparsityConfig(2, 64, num_sliding_window_blocks=9),
            0.136,
            319,
            True,
            False,
            False,
            id="local-9",
        ),
    ],
)
def test_facts_of_a_512_token_model_extended_to_4096(
    config, density, local_reach, short_inputs_differ, repeats_positions, far
):
    """The densities are those of the measured table in the documentation."""
    facts = layout_facts(make_layouts(config, 4096, 6), 64, 512)
    assert facts.density == pytest.approx(density, abs=6e-4)
    assert facts.short_inputs_differ is short_inputs_differ
    assert facts.repeats_positions is repeats_positions
    assert (facts.far_share > 0) is far
    assert local_reach is None or facts.local_reach == local_reach
    rows, columns = np.nonzero(make_layouts(config, 4096, 1)[0].any(0))
    assert facts.reach == (abs(rows - columns).max() + 1) * 64 - 1
    assert facts.reach == (4095 if far else facts.local_reach)
    assert facts.needs_training is (short_inputs_differ or repeats_positions or far)
    assert (facts.seq_len, facts.block, facts.source_length) == (4096, 64, 512)


@pytest.mark.parametrize(
    "source_length, block, repeats",
    [
        (512, 64, False),
        (512, 16, False),
        (384, 64, False),
        (128, 64, False),
        (64, 64, False),
        (500, 64, True),
        (40, 64, True),
    ],
)
def test_the_default_needs_no_training_when_its_blocks_fit_the_source(source_length, block, repeats):
    """Windows are whole blocks: those of 512 tokens for a source of 500 meet twelve tiled positions twice, and say
    so."""
    layouts = make_layouts(windowed_for(source_length, 2, block), 4096, 2)
    facts = layout_facts(layouts, block, source_length)
    assert facts.kept_share == 1
    assert facts.repeats_positions is repeats
    assert facts.far_share == 0


@pytest.mark.parametrize("seq_len", [64, 512])
def test_a_default_that_is_not_extended_is_dense(seq_len):
    facts = layout_facts(make_layouts(windowed_for(512, 2), seq_len, 2), 64, 512)
    assert facts.density == 1
    assert {name: getattr(facts, name) for name in UNCHANGED} == UNCHANGED


def test_one_head_that_differs_in_one_layer_changes_the_facts():
    layouts = make_layouts(windowed_for(512, 4), 4096, 3)
    other = layouts[0].copy()
    other[2, 3, 5] = 0
    facts = layout_facts([layouts[0], other, layouts[2]], 64, 512)
    assert facts.short_inputs_differ and facts.needs_training
    assert facts.kept_share == pytest.approx(1 - 1 / (64 * 4 * 3))
    other = layouts[0].copy()
    other[2, 60, 5] = 1
    facts = layout_facts([layouts[0], other, layouts[2]], 64, 512)
    assert not facts.short_inputs_differ and facts.needs_training
    assert facts.far_share == pytest.approx(1 / (3 * layouts[0].sum() + 1))


def facts_by_loops(pattern, block, source_length):
    """`reach`, `local_reach` and the number of far blocks as `LayoutFacts` defines them."""
    n = len(pattern)
    is_causal = not any(pattern[r][c] for r in range(n) for c in range(r + 1, n))

    def full_row(i):
        return all(pattern[i][c] for c in range(i + 1 if is_causal else n))

    def full_column(i):
        return all(pattern[r][i] for r in range(i if is_causal else 0, n))

    def local(r, c):
        return pattern[r][c] and (is_causal or pattern[c][r])

    counted = [r for r in range(n) if not (full_row(r) or full_column(r))] or list(range(n))
    stretch = set()
    for r in counted:
        for columns in (range(r, -1, -1), range(r, n)):
            for c in columns:
                if not local(r, c):
                    break
                stretch.add((r, c))
    reach = max(((abs(r - c) + 1) * block - 1 for r, c in stretch), default=0)
    far = [
        (r, c)
        for r in range(n)
        for c in range(n)
        if pattern[r][c] and r != c and (abs(r - c) + 1) * block - 1 >= source_length and (r, c) not in stretch
    ]
    farthest = max(((abs(r - c) + 1) * block - 1 for r in range(n) for c in range(n) if pattern[r][c]), default=0)
    return farthest, reach, len(far)


@given(
    pattern=st.one_of(
        arrays(np.uint8, st.integers(1, 9).map(lambda n: (n, n)), elements=st.sampled_from([0, 1, 1])),
        st.integers(1, 9).flatmap(lambda n: arrays(np.uint8, (n, n), elements=st.sampled_from([0, 1, 1])).map(np.tril)),
    ),
    block=st.sampled_from([1, 16]),
    source_length=st.integers(1, 100),
)
def test_reach_and_far_blocks_follow_their_definition(pattern, block, source_length):
    facts = layout_facts([pattern[None]], block, source_length)
    reach, local_reach, far = facts_by_loops(pattern.tolist(), block, source_length)
    assert (facts.reach, facts.local_reach) == (reach, local_reach)
    assert facts.far_share * max(pattern.sum(), 1) == pytest.approx(far)


def test_density_and_kept_share():
    layout = np.zeros((2, 4, 4), np.uint8)
    layout[0, :2, :2] = 1
    assert density(layout) == 4 / 32
    assert density([layout, layout, np.ones_like(layout)]) == pytest.approx((4 / 32 * 2 + 1) / 3)
    assert kept_share(layout, 16, 32) == 0.5
    assert kept_share(layout[:1], 16, 32) == 1
    assert kept_share(layout[:1], 16, 17) == 1
    assert kept_share(layout[:1], 16, 33) == 4 / 9
    assert kept_share(layout[:1], 16, 10_000) == 4 / 16


def test_distinct_heads_group_equal_heads_over_layers():
    layouts = make_layouts(FixedSparsityConfig(4, 16, True, 4, 1, num_different_global_patterns=2), 256, 2)
    heads = distinct_heads([layouts[0], layouts[0][::-1].copy()])
    assert [head.members for head in heads] == [[(0, 0), (0, 2), (1, 1), (1, 3)], [(0, 1), (0, 3), (1, 0), (1, 2)]]
    assert np.array_equal(heads[1].pattern, layouts[0][1])
    assert len(distinct_heads(np.stack([layouts[0], layouts[0] ^ 1]))) == 4


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_the_hash_is_of_shape_and_bits_whatever_the_dtype(dtype):
    layout = windowed_for(512, 3).make_layout(1024)
    assert layout_hash(layout.astype(dtype)) == layout_hash(layout)
    changed = layout.astype(dtype)
    changed[1, 2, 15] = True
    assert layout_hash(changed) != layout_hash(layout)
    assert layout_hash(layout.reshape(1, -1, 16).astype(dtype)) != layout_hash(layout)


def test_flops_of_bert_base():
    """Query times key and weights times value: 2 x 2 x 512^2 x 64 for each of 144 heads."""
    assert attention_flops(1.0, 512, 64, 12, 12) == 4 * 512**2 * 64 * 144
    assert attention_flops(0.25, 512, 64, 12, 12) == 512**2 * 64 * 144


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda x: x[0],
            "layer 3: expected a layout [heads, n, n], found [4, 4]",
        ),
        (lambda x: x[:, :2], "layer 3: expected a layout [heads, n, n], found [2, 2, 4]"),
        (lambda x: x[:0], "layer 3: expected a layout [heads, n, n], found [0, 4, 4]"),
        (lambda x: x.astype(float), "layer 3: expected integers or booleans, found float64"),
        (lambda x: x * 3, "layer 3: head 0, row 0: expected only 0 and 1, found 3 in column 0"),
        (lambda x: -x, "layer 3: head 0, row 0: expected only 0 and 1, found -1 in column 0"),
        (
            lambda x: np.where(np.arange(4)[:, None] == 2, 0, x),
            "layer 3: head 0, row 2: keeps no block, its softmax would run over nothing; "
            "keep at least the block on the diagonal",
        ),
    ],
    ids=["two-dimensions", "not-square", "no-heads", "floats", "a-three", "negative", "empty-row"],
)
def test_a_layout_that_cannot_be_attended_with_is_refused(change, message):
    layout = np.repeat(np.eye(4, dtype=np.int64)[None], 2, axis=0)
    check_layout(layout, "layer 3")
    check_layout(layout.astype(bool))
    with pytest.raises(SparsityError) as refusal:
        check_layout(change(layout), "layer 3")
    assert str(refusal.value) == message


ONE = np.tril(np.ones((1, 4, 4), np.int64))
HEADS = np.concatenate([ONE, ONE.transpose(0, 2, 1)])
LAYERS = np.stack([HEADS, HEADS[::-1], HEADS])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.int64], ids=str)
@pytest.mark.parametrize(
    "stored, expected",
    [
        pytest.param(ONE, [[ONE[0], ONE[0]]] * 3, id="one-head"),
        pytest.param(HEADS, [HEADS] * 3, id="heads"),
        pytest.param(LAYERS, LAYERS, id="layers"),
        pytest.param(LAYERS[:, :1], LAYERS[:, [0, 0]], id="layers-of-one-head"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_layouts_from_a_file(tmp_path, stored, expected, dtype, suffix):
    from safetensors.numpy import save_file

    path = tmp_path / f"layout.{suffix}"
    stored = np.ascontiguousarray(stored.astype(dtype))
    np.save(path, stored) if suffix == "npy" else save_file({"anything": stored}, path)
    layouts = load_layouts(path, 3, 2, 4)
    assert [layout.tolist() for layout in layouts] == np.asarray(expected).tolist()
    assert all(layout.dtype == np.uint8 for layout in layouts)
    assert (layouts[0] is layouts[1]) == (stored.ndim == 3)


@pytest.mark.parametrize(
    "names",
    [
        [f"layer.{number}" for number in range(12)],
        [str(number) for number in range(12)],
        [f"bert.encoder.layer.{n}.attention.self.sparse_self_attention.master_layout" for n in range(12)],
    ],
    ids=["layer.N", "N", "master_layout"],
)
def test_a_safetensors_file_with_one_layout_a_layer(tmp_path, names):
    from safetensors.numpy import save_file

    stored = {name: np.roll(np.eye(12, dtype=np.uint8), number, axis=1)[None] for number, name in enumerate(names)}
    other = {"bert.embeddings.weight": np.ones((3, 3), np.float32)} if "master_layout" in names[0] else {}
    save_file(stored | other, tmp_path / "x.safetensors")
    layouts = load_layouts(tmp_path / "x.safetensors", 12, 2, 12)
    assert [int(layout[0, 0].argmax()) for layout in layouts] == list(range(12))


def safetensors_bytes(dtype, shape, data):
    header = json.dumps({"layout": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def npy_bytes(tmp_path, array, **options):
    np.save(tmp_path / "made.npy", array, **options)
    return (tmp_path / "made.npy").read_bytes()


def npz_bytes(tmp_path, array):
    np.savez(tmp_path / "made.npz", array)
    return (tmp_path / "made.npz").read_bytes()


def npy_header(text):
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text.encode()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.npy", None, "no such file"),
        ("x.json", b"[]", "expected a layout in .npy or .safetensors, found .json"),
        ("x", b"[]", "found no suffix"),
        ("x.npy", b"", "cannot be read as an .npy array"),
        ("x.npy", b"<!doctype html><html>", "cannot be read as an .npy array"),
        ("x.npy", lambda tmp: npy_bytes(tmp, HEADS)[:-8], "cannot be read as an .npy array"),
        ("x.npy", lambda tmp: npy_bytes(tmp, np.array([print], object), allow_pickle=True), "cannot be read as an .npy"),  # noqa: E501
        ("x.npy", lambda tmp: npy_bytes(tmp, HEADS.astype(float)), "layout: expected integers or booleans, found float64"),  # noqa: E501
        ("x.npy", lambda tmp: npy_bytes(tmp, HEADS[:, :2, :2]), "[2, 4, 4] or [1, 4, 4], found [2, 2, 2]"),
        ("x.npy", lambda tmp: npy_bytes(tmp, HEADS[[0, 0, 0]]), "[2, 4, 4] or [1, 4, 4], found [3, 4, 4]"),
        ("x.npy", lambda tmp: npy_bytes(tmp, HEADS[0]), "[2, 4, 4] or [1, 4, 4], found [4, 4]"),
        ("x.npy", lambda tmp: npy_bytes(tmp, LAYERS[:2]), "expected one layout, or one for each of 3 layers, found 2"),
        ("x.npy", lambda tmp: npy_bytes(tmp, LAYERS * np.tri(4, k=-1, dtype=int)), "layout[0]: head 0, row 0: keeps no block"),  # noqa: E501
        ("x.npy", lambda tmp: npz_bytes(tmp, HEADS), "cannot be read as an .npy array"),
        ("x.npz", lambda tmp: npz_bytes(tmp, HEADS), "expected a layout in .npy or .safetensors, found .npz"),
        ("x.npy", lambda tmp: npy_header("(" * 9000), "cannot be read as an .npy array"),
        ("x.npy", lambda tmp: npy_header("{'descr': '|b1', 'fortran_order': False, 'shape': (1, 4, " + "9" * 5000 + ")}"), "cannot be read"),  # noqa: E501
        ("x.npy", lambda tmp: npy_header("{'descr': '|b1', 'fortran_order': False, 'shape': (1, -4, -4)}"), "cannot be read"),  # noqa: E501
        ("x.npy", lambda tmp: npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (3, 4611686018427387904, 4, 4)}"), "cannot be read"),  # noqa: E501
        ("x.npy", lambda tmp: npy_header("{'descr': [('a', 'u1')], 'fortran_order': False, 'shape': (1, 4, 4)}") + bytes(16), "expected integers or booleans"),  # noqa: E501
        ("x.npy", lambda tmp: npy_header("{'descr': '|b1', 'fortran_order': False, 'shape': (1, 4, 4)}") + b"\2" * 16, "expected only 0 and 1"),  # noqa: E501
        ("x.safetensors", b"", "expected a safetensors header"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "expected a safetensors header"),
        ("x.safetensors", safetensors_bytes("U8", [1, 4, 4], b"\1" * 15), "header is damaged: layout is U8 [1, 4, 4], 16 bytes, but its range is 0 to 15"),  # noqa: E501
        ("x.safetensors", safetensors_bytes("BF16", [1, 4, 4], b"\1" * 32), "expected integers or booleans, found BF16"),  # noqa: E501
        ("x.safetensors", safetensors_bytes("F32", [1, 4, 4], b"\0" * 64), "expected integers or booleans, found F32"),
    ],
)  # fmt: skip
def test_files_that_hold_no_such_layouts_are_refused_in_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content(tmp_path) if callable(content) else content)
    with pytest.raises(BsaError, match=re.escape(message)) as refusal:
        load_layouts(path, 3, 2, 4)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "names, message",
    [
        (["a0", "a1"], "expected one layout, or one for each of 3 layers, found 2"),
        (["a0", "a1", "b"], "expected the layer as the only number in each tensor's name, found b"),
        (["a0", "a1", "b1"], "expected the layer as the only number in each tensor's name, found b1"),
        (["a0", "a1", "2a2"], "expected the layer as the only number in each tensor's name, found 2a2"),
        (["a1", "a2", "a3"], "expected layers 0 to 2, found [1, 2, 3]"),
        (["a0", "a1²3", "a2"], "expected the layer as the only number in each tensor's name, found a1"),
        (["a0", "a1", "a" + "2" * 5000], "expected the layer as the only number in each tensor's name, found a222"),
    ],
)
def test_names_that_do_not_say_the_layer_are_refused(tmp_path, names, message):
    from safetensors.numpy import save_file

    save_file({name: HEADS for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(SparsityError, match=re.escape(message)):
        load_layouts(tmp_path / "x.safetensors", 3, 2, 4)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "folder", "device"]
)
def test_only_files_are_read(tmp_path, make, suffix):
    make(tmp_path / f"x{suffix}")
    with pytest.raises(BsaError, match="expected a file"):
        load_layouts(tmp_path / f"x{suffix}", 3, 2, 4)


def test_a_layout_of_another_size_is_refused_before_it_is_read(tmp_path):
    """A file of 1 GB without data takes no time and no memory."""
    rows, size = {"a": (8, 8192, 16384), "b": (8, 8192, 16384)}, 8 * 8192 * 16384
    header = {
        n: {"dtype": "U8", "shape": s, "data_offsets": [i * size, (i + 1) * size]}
        for i, (n, s) in enumerate(rows.items())
    }
    text = json.dumps(header).encode()
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2 * size)
    tracemalloc.start()
    with pytest.raises(BsaError):
        load_layouts(tmp_path / "x.safetensors", 2, 2, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_facts_of_equal_heads_and_layers_take_the_memory_of_one_head():
    """65,536 tokens of a BERT-large: 24 layers of 16 heads of 1 MB."""
    tracemalloc.start()
    layouts = make_layouts(windowed_for(512, 16), 65536, 24)
    for layout in layouts:
        check_layout(layout)
    assert density(layouts) == layout_facts(layouts, 64, 512).density
    assert len(distinct_heads(layouts)) == 1 and len(distinct_heads(layouts)[0].members) == 24 * 16
    layout_hash(layouts[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20, f"{peak:,} bytes"


@pytest.mark.parametrize("n", [3, 4, 8])
def test_a_hash_does_not_depend_on_how_heads_are_stored(n):
    head = np.tri(n, dtype=np.uint8)
    shared, own = np.broadcast_to(head, (9, n, n)), np.repeat(head[None], 9, 0)
    expected = hashlib.sha256(repr((9, n, n)).encode() + np.packbits(own).tobytes()).hexdigest()
    assert (
        layout_hash(shared)
        == layout_hash(own)
        == layout_hash(own.astype(np.int64))
        == layout_hash(own != 0)
        == expected
    )
