"""Sparsity configs against DeepSpeed's own classes, their JSON forms, and the default layout's promise."""

import __future__

import importlib.util
import inspect
import json
import random
import subprocess
import sys
import time
import tracemalloc
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bsa_export.errors import BsaError, SparsityError
from bsa_export.sparsity.configs import (
    MODES,
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    CustomSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
    VariableSparsityConfig,
    WindowedSparsityConfig,
    windowed_for,
)
from bsa_export.sparsity.layouts import make_layouts
from bsa_export.sparsity.sections import config_class_path, sparsity_config, sparsity_config_from_class_path

DEEPSPEED_MODES = ["dense", "fixed", "variable", "bigbird", "bslongformer", "local"]


@pytest.fixture(scope="session")
def deepspeed():
    """DeepSpeed's module of sparsity configs, from its file, which spares the 10 s that the package takes to import."""
    package = importlib.util.find_spec("deepspeed")
    if package is None:
        pytest.skip("deepspeed is not installed")
    path = Path(package.submodule_search_locations[0], "ops", "sparse_attention", "sparsity_config.py")
    if not path.is_file():
        pytest.skip("this deepspeed has no sparse attention: it ended with 0.19.6")
    spec = importlib.util.spec_from_file_location("deepspeed_sparsity_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def deepspeed_layouts(module, mode, parameters, seq_len, seed, layers=1):
    """What DeepSpeed makes after `random.seed(seed)`, a list of numpy arrays; raises what it raises."""
    state = random.getstate()
    random.seed(seed)
    try:
        config = getattr(module, MODES[mode].__name__)(**parameters)
        return [config.make_layout(seq_len).numpy() for _ in range(layers)]
    finally:
        random.setstate(state)


indices = st.lists(st.integers(-3, 14), min_size=0, max_size=3)
COMMON = {"num_heads": st.integers(1, 4), "block": st.sampled_from([1, 16, 64])}
HEADS_DIFFER = {"different_layout_per_head": st.booleans()}
ATTENTION = {"attention": st.sampled_from(["bidirectional", "unidirectional"])}
GLOBAL_INDICES = {
    "global_block_indices": indices,
    "global_block_end_indices": st.none() | indices.map(lambda ends: [end + 3 for end in ends]),
}
PARAMETERS = {
    "dense": HEADS_DIFFER,
    "fixed": HEADS_DIFFER
    | ATTENTION
    | {
        "num_local_blocks": st.integers(1, 9),
        "num_global_blocks": st.integers(1, 4),
        "horizontal_global_attention": st.booleans(),
        "num_different_global_patterns": st.integers(1, 4),
    },
    "variable": HEADS_DIFFER
    | ATTENTION
    | GLOBAL_INDICES
    | {
        "num_random_blocks": st.integers(0, 4),
        "local_window_blocks": st.lists(st.integers(1, 7), min_size=1, max_size=4),
        "horizontal_global_attention": st.booleans(),
    },
    "bigbird": HEADS_DIFFER
    | ATTENTION
    | {
        "num_random_blocks": st.integers(0, 4),
        "num_sliding_window_blocks": st.integers(0, 8),
        "num_global_blocks": st.integers(0, 4),
    },
    "bslongformer": HEADS_DIFFER | ATTENTION | GLOBAL_INDICES | {"num_sliding_window_blocks": st.integers(0, 8)},
    "local": ATTENTION | {"num_sliding_window_blocks": st.integers(0, 8)},
}


@pytest.mark.parametrize("mode", DEEPSPEED_MODES)
def test_layouts_equal_deepspeeds_bit_for_bit(deepspeed, mode):
    """Over random parameters, left out at random; where DeepSpeed refuses them, so do we."""
    # Our default of this one parameter is not DeepSpeed's.
    always = {"num_heads", "attention"} if mode == "local" else {"num_heads"}
    strategies = COMMON | PARAMETERS[mode]

    @settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
    @given(
        parameters=st.fixed_dictionaries(
            {name: strategies[name] for name in strategies if name in always},
            optional={name: strategies[name] for name in strategies if name not in always},
        ),
        blocks=st.integers(1, 20),
        seed=st.integers(0, 2**32),
    )
    def compare(parameters, blocks, seed):
        seq_len = blocks * parameters.get("block", 16)
        try:
            theirs = deepspeed_layouts(deepspeed, mode, parameters, seq_len, seed)[0]
        except (ValueError, NotImplementedError, IndexError):
            with pytest.raises(SparsityError):
                MODES[mode](**parameters).make_layout(seq_len, random.Random(seed))
            assume(False)
        ours = MODES[mode](**parameters).make_layout(seq_len, random.Random(seed))
        assert ours.dtype == np.uint8
        assert np.array_equal(ours, theirs)

    compare()


@pytest.mark.parametrize("mode", DEEPSPEED_MODES)
def test_parameters_defaults_and_attributes_are_deepspeeds(deepspeed, mode):
    ours, theirs = MODES[mode], getattr(deepspeed, MODES[mode].__name__)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    expected = vars(theirs(3))
    if mode == "local":
        assert expected["attention"] == "unidirectional"
        expected["attention"] = "bidirectional"
    assert {name: getattr(ours(3), name) for name in expected} == expected


INVALID = [
    ("fixed", {"num_local_blocks": 4, "num_global_blocks": 3}),
    ("fixed", {"num_global_blocks": 0}),
    ("fixed", {"attention": "causal"}),
    ("fixed", {"attention": "unidirectional", "horizontal_global_attention": True}),
    ("fixed", {"num_different_global_patterns": 2}),
    ("fixed", {"num_different_global_patterns": 5, "different_layout_per_head": True}),
    ("fixed", {"num_different_global_patterns": 0}),
    ("variable", {"local_window_blocks": []}),
    ("variable", {"local_window_blocks": [2, 0]}),
    ("variable", {"global_block_indices": [1, 2], "global_block_end_indices": [3]}),
    ("variable", {"global_block_indices": [3], "global_block_end_indices": [3]}),
    ("variable", {"global_block_indices": [-9]}),
    ("variable", {"attention": "causal"}),
    ("variable", {"attention": "unidirectional", "horizontal_global_attention": True}),
    ("variable", {"num_random_blocks": 9}),
    ("bigbird", {"num_random_blocks": 9}),
    ("bigbird", {"num_random_blocks": -1}),
    ("bigbird", {"num_sliding_window_blocks": 9}),
    ("bigbird", {"num_global_blocks": 9}),
    ("bigbird", {"attention": "causal"}),
    ("bigbird", {"attention": "unidirectional", "num_random_blocks": 2}),
    ("bslongformer", {"num_sliding_window_blocks": 9}),
    ("bslongformer", {"global_block_indices": [0, 1], "global_block_end_indices": [1]}),
    ("bslongformer", {"global_block_indices": [2], "global_block_end_indices": [1]}),
    ("bslongformer", {"global_block_indices": [-9]}),
    ("local", {"num_sliding_window_blocks": 9}),
    ("dense", {"block": 48}),
    ("dense", {"block": 0}),
    ("dense", {"num_heads": -1}),
]


@pytest.mark.parametrize("mode, parameters", INVALID, ids=[f"{mode}-{parameters}" for mode, parameters in INVALID])
def test_both_refuse(deepspeed, mode, parameters):
    parameters = {"num_heads": 2} | parameters
    with pytest.raises((ValueError, ArithmeticError, LookupError, UnboundLocalError, RuntimeError)):
        deepspeed_layouts(deepspeed, mode, parameters, 8 * 16, 0)
    with pytest.raises(SparsityError) as refusal:
        MODES[mode](**parameters).make_layout(8 * 16)
    assert isinstance(refusal.value, ValueError)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "mode, parameters",
    [
        ("local", {"attention": "causal"}),
        ("bslongformer", {"attention": "causal"}),
        ("variable", {"local_window_blocks": [0, 2]}),
        ("dense", {"num_heads": 0}),
        ("dense", {"different_layout_per_head": "no"}),
        ("local", {"num_sliding_window_blocks": -2}),
    ],
)
def test_what_deepspeed_lets_pass_without_meaning_is_refused(deepspeed, mode, parameters):
    parameters = {"num_heads": 2} | parameters
    deepspeed_layouts(deepspeed, mode, parameters, 8 * 16, 0)
    with pytest.raises(SparsityError):
        MODES[mode](**parameters)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: FixedSparsityConfig(12, num_local_blocks=4, num_global_blocks=3),
            "fixed: num_global_blocks: expected a divisor of num_local_blocks 4, found 3",
        ),
        (
            lambda: BigBirdSparsityConfig(12, num_random_blocks="3"),
            "bigbird: num_random_blocks: expected an integer of at least 0, found '3'",
        ),
        (
            lambda: BigBirdSparsityConfig(12, num_random_blocks=9).make_layout(128),
            "bigbird: num_random_blocks: expected at most the 8 blocks of 128 tokens, found 9",
        ),
        (
            lambda: FixedSparsityConfig(12, block=64).make_layout(1000),
            "fixed: expected a length that is a multiple of block 64, found 1000",
        ),
        (
            lambda: sparsity_config({"mode": "local", "window": 3}, 12),
            "local: expected parameters among num_heads, block, num_sliding_window_blocks, attention, found 'window'",
        ),
        (
            lambda: sparsity_config({"mode": "big_bird"}, 12),
            "sparse_attention: mode: expected one of windowed, dense, fixed, variable, bigbird, bslongformer, local, custom, "  # noqa: E501
            "found 'big_bird'",
        ),
        (
            lambda: sparsity_config({"mode": "dense", "num_heads": 4}, 12),
            "sparse_attention: num_heads: expected 12, found 4",
        ),
        (
            lambda: sparsity_config({"mode": "variable", "local_window_blocks": 4}, 12),
            "variable: local_window_blocks: expected a list of integers, found 4",
        ),
        (
            lambda: CustomSparsityConfig(3, 16, layout=np.zeros((1, 2, 2), int)).make_layout(32),
            "custom: layout: head 0, row 0: keeps no block, its softmax would run over nothing; "
            "keep at least the block on the diagonal",
        ),
        (
            lambda: sparsity_config({"mode": "dense", "block": []}, 12),
            "dense: block: expected an integer of at least 1, found []",
        ),
        (lambda: sparsity_config(["fixed"], 12), "sparse_attention: expected an object, found list"),
    ],
)
def test_messages(make, message):
    with pytest.raises(BsaError) as refusal:
        make()
    assert str(refusal.value) == message


@pytest.mark.parametrize("mode", ["variable", "bigbird"])
@pytest.mark.parametrize("heads_differ", [False, True], ids=["shared-heads", "own-heads"])
def test_layers_that_differ_draw_as_a_deepspeed_model_built_layer_by_layer(deepspeed, mode, heads_differ):
    parameters = {"num_heads": 3, "num_random_blocks": 2, "different_layout_per_head": heads_differ}
    theirs = deepspeed_layouts(deepspeed, mode, parameters, 512, seed=7, layers=4)
    config = MODES[mode](**parameters)
    ours = make_layouts(config, 512, 4, seed=7, different_layout_per_layer=True)
    assert [layout.tolist() for layout in ours] == [layout.tolist() for layout in theirs]
    assert not np.array_equal(ours[0], ours[1])
    shared = make_layouts(config, 512, 4, seed=7)
    assert all(layout is shared[0] for layout in shared)
    assert np.array_equal(shared[0], ours[0])
    assert not np.array_equal(make_layouts(config, 512, 1, seed=8)[0], ours[0])


def test_layers_of_a_pattern_without_random_blocks_share_one_array():
    layouts = make_layouts(FixedSparsityConfig(4), 256, 3, different_layout_per_layer=True)
    assert all(layout is layouts[0] for layout in layouts)


def test_a_layout_without_rng_is_always_the_same_and_leaves_the_global_generator_alone():
    config = BigBirdSparsityConfig(4, different_layout_per_head=True, num_random_blocks=3)
    state = random.getstate()
    assert np.array_equal(config.make_layout(1024), config.make_layout(1024, random.Random(0)))
    assert random.getstate() == state
    assert not np.array_equal(config.make_layout(1024)[0], config.make_layout(1024)[1])


def test_the_global_generator_can_be_passed_as_deepspeed_uses_it():
    config = BigBirdSparsityConfig(2, num_random_blocks=2)
    state = random.getstate()
    random.seed(5)
    drawn = config.make_layout(512, random)
    random.setstate(state)
    assert np.array_equal(drawn, config.make_layout(512, random.Random(5)))


def test_a_slice_of_the_master_layout_is_not_the_layout_of_that_length(deepspeed):
    """DeepSpeed at run time slices the master layout; so the stored one and its slices count, not new ones."""
    config = FixedSparsityConfig(1)
    assert config.make_layout(2048)[:, :33, :33].sum() == 361
    assert config.make_layout(528).sum() == 393
    assert deepspeed_layouts(deepspeed, "fixed", {"num_heads": 1}, 528, 0)[0].sum() == 393


def test_unidirectional_quirks_of_deepspeed_are_kept(deepspeed):
    """A wide global window and random blocks of `variable` look ahead even when unidirectional."""
    wide = {"num_heads": 1, "num_global_blocks": 2, "attention": "unidirectional"}
    ahead = {"num_heads": 1, "num_random_blocks": 3, "attention": "unidirectional"}
    for mode, parameters in (("fixed", wide), ("variable", ahead)):
        layout = MODES[mode](**parameters).make_layout(256, random.Random(1))
        assert np.triu(layout[0], 1).any()
        assert np.array_equal(layout, deepspeed_layouts(deepspeed, mode, parameters, 256, 1)[0])


def test_heads_that_do_not_differ_have_the_first_heads_layout():
    layout = BigBirdSparsityConfig(5, num_random_blocks=3).make_layout(1024)
    assert (layout == layout[0]).all()


CONFIGS = {
    "windowed": WindowedSparsityConfig(4, num_local_blocks=4, num_sliding_window_blocks=5),
    "dense": MODES["dense"](4),
    "fixed": FixedSparsityConfig(4, 32, True, num_local_blocks=8, num_different_global_patterns=4),
    "variable": VariableSparsityConfig(4, 64, True, 2, [2, 4], [0, 5], [2, 6], "bidirectional", True),
    "bigbird": BigBirdSparsityConfig(4, num_random_blocks=3, attention="bidirectional"),
    "bslongformer": BSLongformerSparsityConfig(4, global_block_indices=[0, 7]),
    "local": LocalSlidingWindowSparsityConfig(4, attention="unidirectional"),
    "custom": CustomSparsityConfig(4, 32),
}


@pytest.mark.parametrize("mode", MODES)
def test_round_trip_through_json(mode):
    config = CONFIGS[mode]
    section = json.loads(json.dumps(config.to_dict()))
    assert section["mode"] == mode and "num_heads" not in section
    assert sparsity_config(section, 4) == config
    assert sparsity_config(section | {"num_heads": 4}, 4) == config


@pytest.mark.parametrize("mode", MODES)
def test_round_trip_through_the_class_path(mode):
    config = CONFIGS[mode]
    parameters = json.loads(json.dumps(config.to_parameters()))
    assert parameters["num_heads"] == 4 and "mode" not in parameters
    assert sparsity_config_from_class_path(config_class_path(config), parameters, 4) == config
    assert type(config)(**parameters) == config


@pytest.mark.parametrize("mode", DEEPSPEED_MODES)
def test_deepspeeds_class_takes_what_is_written_beside_its_path(deepspeed, mode):
    config = CONFIGS[mode]
    module, name = config_class_path(config).split(":")
    assert module == "deepspeed.ops.sparse_attention"
    state = random.getstate()
    random.seed(3)
    theirs = getattr(deepspeed, name)(**config.to_parameters()).make_layout(1024)
    random.setstate(state)
    assert np.array_equal(theirs.numpy(), config.make_layout(1024, random.Random(3)))


def test_a_section_takes_deepspeeds_json_defaults(deepspeed):
    assert sparsity_config({}, 4) == FixedSparsityConfig(4)
    assert sparsity_config({"mode": "bigbird"}, 4).num_random_blocks == 0
    assert BigBirdSparsityConfig(4).num_random_blocks == 1


@pytest.mark.parametrize("mode", ["dense", "fixed", "variable", "bigbird", "bslongformer"])
def test_json_defaults_are_those_of_deepspeeds_reader(mode):
    constants = pytest.importorskip("deepspeed.runtime.constants", reason="deepspeed is not installed")
    if not hasattr(constants, "SPARSE_ATTENTION"):
        pytest.skip("this deepspeed has no sparse attention: it ended with 0.19.6")
    from deepspeed.runtime.config import get_sparse_attention

    section = get_sparse_attention({"sparse_attention": {"mode": mode}})
    read = sparsity_config({"mode": mode}, 4)
    assert {name: value for name, value in read.to_dict().items() if name in section} == section


def test_absent_parameters_beside_a_class_path_take_that_class_default():
    name = "LocalSlidingWindowSparsityConfig"
    theirs = sparsity_config_from_class_path(f"deepspeed.ops.sparse_attention:{name}", {"num_heads": 4}, 4)
    ours = sparsity_config_from_class_path(f"bsa_export.sparsity:{name}", {"num_heads": 4}, 4)
    assert (theirs.attention, ours.attention) == ("unidirectional", "bidirectional")
    path = "deepspeed.ops.sparse_attention:BigBirdSparsityConfig"
    assert sparsity_config_from_class_path(path, {}, 4).num_random_blocks == 1


@pytest.mark.parametrize(
    "path",
    [
        "os:system",
        "deepspeed.ops.sparse_attention:SparsityConfig",
        "FixedSparsityConfig",
        "evil:FixedSparsityConfig",
        None,
    ],
)
def test_other_class_paths_are_refused(path):
    with pytest.raises(SparsityError, match="sparse_config_cls: expected one of .*:FixedSparsityConfig, .*found"):
        sparsity_config_from_class_path(path, {}, 4)


def test_a_mode_that_contradicts_the_class_path_is_refused():
    with pytest.raises(SparsityError, match="sparse_attention: mode: expected fixed, found .bigbird."):
        sparsity_config_from_class_path("deepspeed.ops.sparse_attention:FixedSparsityConfig", {"mode": "bigbird"}, 4)


def test_parameters_are_copied():
    windows = [2, 4]
    config = VariableSparsityConfig(4, local_window_blocks=windows, global_block_indices=(0, np.int64(3)))
    windows.append(8)
    assert config.local_window_blocks == [2, 4]
    assert json.dumps(config.to_dict()["global_block_indices"]) == "[0, 3]"
    assert VariableSparsityConfig(4).global_block_indices is not VariableSparsityConfig(4).global_block_indices


@given(
    source_blocks=st.integers(1, 12),
    short_by=st.integers(0, 15),
    times=st.integers(1, 6),
    heads=st.integers(1, 3),
)
def test_the_default_keeps_every_block_up_to_the_sources_length(source_blocks, short_by, times, heads):
    source_length = source_blocks * 16 - short_by
    config = windowed_for(source_length, heads, 16)
    layout = config.make_layout(source_blocks * times * 16)
    assert layout[:, :source_blocks, :source_blocks].all()


def test_the_default_for_a_512_token_model_is_the_measured_one():
    config = windowed_for(512, 12)
    assert config == WindowedSparsityConfig(12, 64, num_local_blocks=8, num_sliding_window_blocks=9)
    layout = config.make_layout(4096)[0]
    rows, columns = np.indices(layout.shape)
    assert np.array_equal(layout, (rows // 8 == columns // 8) | (abs(rows - columns) <= 4))
    assert config.make_layout(512).all() and config.make_layout(64).all()
    assert np.array_equal(WindowedSparsityConfig(12, attention="unidirectional").make_layout(4096)[0], np.tril(layout))


def test_the_default_for_a_source_of_one_block_has_no_sliding_window():
    assert np.array_equal(windowed_for(64, 1).make_layout(256)[0], np.eye(4))
    assert np.array_equal(windowed_for(40, 1).make_layout(256)[0], np.eye(4))


def test_a_custom_layout_is_sliced_and_spread_over_heads():
    layout = np.tril(np.ones((1, 4, 4), bool))
    config = CustomSparsityConfig(3, 16, layout=layout)
    assert np.array_equal(config.make_layout(48), np.tril(np.ones((3, 3, 3))))
    assert config.make_layout(64).dtype == np.uint8
    with pytest.raises(SparsityError, match=r"custom: layout: expected \[3, 5, 5\] or more blocks, found \[1, 4, 4\]"):
        config.make_layout(80)
    with pytest.raises(SparsityError, match="comes from a file or a checkpoint"):
        CustomSparsityConfig(3).make_layout(64)


def test_a_pattern_of_ones_own():
    class Diagonal(SparsityConfig):
        def _patterns(self, n):
            return [np.eye(n, dtype=bool)]

    assert np.array_equal(Diagonal(2).make_layout(64), np.stack([np.eye(4)] * 2))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "custom"])
@pytest.mark.parametrize("heads_differ", [False, True], ids=["shared-heads", "own-heads"])
def test_65536_tokens_at_block_64_take_under_200_ms(mode, heads_differ):
    parameters = {"num_heads": 12, "block": 64}
    if heads_differ and mode != "local":
        parameters["different_layout_per_head"] = True
    if mode in ("variable", "bigbird"):
        parameters["num_random_blocks"] = 3
    times = []
    for _ in range(5):
        start = time.perf_counter()
        layout = MODES[mode](**parameters).make_layout(65536)
        times.append(time.perf_counter() - start)
    assert layout.shape == (12, 1024, 1024)
    assert min(times) < 0.2, f"best of {len(times)}: {min(times):.3f} s"


def test_sparsity_and_layout_import_no_heavy_library():
    code = "import sys, bsa_export.sparsity.configs, bsa_export.sparsity.facts, bsa_export.conversion.summary; print(sorted(sys.modules))"  # noqa: E501
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [
        name for name in ("torch", "triton", "deepspeed", "transformers", "matplotlib") if f"'{name}'" in loaded
    ]


def test_parameters_are_checked_by_type_whatever_the_annotations_are():
    """Classes of modules without `from __future__ import annotations` have types there, others have text."""
    namespace = {"dataclass": dataclass, "field": field, "SparsityConfig": SparsityConfig}
    source = """
@dataclass
class Mine(SparsityConfig):
    width: int = 3
    names: "list[str] | None" = None
    wide: bool = False
    share: float = 0.5
    offset: int = field(default=-2)
"""
    classes = []
    for flags in (0, __future__.annotations.compiler_flag):
        exec(compile(source, "mine", "exec", flags, dont_inherit=True), namespace)
        classes.append(namespace["Mine"])
    for cls in classes:
        assert cls(2, names=("a",)).names == ["a"] and cls(2, offset=-7).offset == -7
        for wrong in (
            {"width": "seven"},
            {"width": True},
            {"names": [1]},
            {"names": 3},
            {"wide": 1},
            {"share": "half"},
            {"width": 10**400},
        ):
            with pytest.raises(SparsityError, match=f": {next(iter(wrong))}: expected"):
                cls(2, **wrong)


ODD = [
    None,
    True,
    -1,
    0,
    3,
    2**31,
    10**30,
    10**5000,
    1.5,
    float("nan"),
    "",
    "7",
    "bidirectional",
    [],
    [0],
    [-1],
    [[1]],
    [2**40],
    [None],
    [True],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("mode", MODES)
def test_odd_values_of_a_section_are_refused_or_make_a_layout(mode):
    names = [*MODES[mode].parameter_names(), "mode", "unknown", 7]
    for name, value in product(names, ODD):
        try:
            config = sparsity_config({"mode": mode} | {name: value}, 4)
            layout = config.make_layout(8 * config.block)
        except SparsityError as refusal:
            assert "\n" not in str(refusal) and len(str(refusal)) < 2500
        else:
            assert layout.shape == (4, 8, 8) and set(np.unique(layout)) <= {0, 1}
    for section in ODD:
        if not isinstance(section, dict):
            with pytest.raises(SparsityError):
                sparsity_config(section, 4)
        with pytest.raises(SparsityError):
            sparsity_config_from_class_path(section, {}, 4)


def test_parameters_cannot_ask_for_work_out_of_proportion():
    many = list(range(-2000, 14000))
    sections = [
        {"mode": "variable", "global_block_indices": many, "global_block_end_indices": [2**31 - 1] * len(many)},
        {"mode": "variable", "local_window_blocks": [2**31 - 1] * 16000, "global_block_indices": [0] * 16000},
        {"mode": "fixed", "num_local_blocks": 2**31 - 1, "num_different_global_patterns": 2**31 - 1, "different_layout_per_head": True},  # noqa: E501
        {"mode": "windowed", "num_local_blocks": 2**31 - 1, "num_sliding_window_blocks": 2**31 - 1},
    ]  # fmt: skip
    for section in sections:
        config = sparsity_config(section, 4)
        tracemalloc.start()
        config.make_layout(1024 * config.block)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 << 20
    with pytest.raises(SparsityError, match="at most"):
        sparsity_config({"mode": "bigbird", "different_layout_per_head": True}, 4096).make_layout(16384 * 16)


@pytest.mark.parametrize("differ", [False, True])
def test_heads_that_are_alike_share_memory_until_they_are_to_be_written(differ):
    config = BigBirdSparsityConfig(3, 16, differ)
    shared, own = config.shared_layout(256), config.make_layout(256)
    assert np.array_equal(shared, own) and not shared.flags.writeable
    assert shared.strides[0] == (16 * 16 if differ else 0)
    own[1, 2, 3] ^= 1  # one head, of an array of its own
    assert np.count_nonzero(shared != own) == 1 and np.array_equal(config.shared_layout(256), shared)
