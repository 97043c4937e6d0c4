"""Headers of safetensors, judged by the safetensors library."""

import json
import struct

import pytest
import torch
from checkpoint_files import safetensors_bytes, same, small_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from bsa_export.checkpoint.safetensors_file import read_safetensors
from bsa_export.errors import CheckpointError


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path):
    state = small_state() | {"u16": torch.ones(2, dtype=torch.uint16), "f8": torch.ones(3).to(torch.float8_e4m3fn)}
    state |= {"c64": torch.ones(2, dtype=torch.complex64), "f8e5": torch.ones(1).to(torch.float8_e5m2)}
    path = tmp_path / "model.safetensors"
    save_file(state, path, {"format": "pt", "note": "x"})
    table, metadata = read_safetensors(path)
    judge = load_file(path)
    assert set(table) == set(judge)
    assert all(same(table[name], judge[name]) for name in judge)
    assert metadata == {"format": "pt", "note": "x"}


def test_a_real_model_is_read_as_safetensors_reads_it(minilm):
    table, metadata = read_safetensors(minilm / "model.safetensors")
    with safe_open(minilm / "model.safetensors", "pt") as judge:
        assert set(table) == set(judge.keys())
        assert metadata == judge.metadata()
        assert all(same(table[name], judge.get_tensor(name)) for name in table)


GOOD = safetensors_bytes({"w": entry()}, bytes(8))
DAMAGED = {
    "empty": (b"", "a safetensors header"),
    "seven bytes": (GOOD[:7], "a safetensors header"),
    "header cut": (GOOD[:30], f"expected a safetensors header of at most 22 bytes, found a length of {len(GOOD) - 16}"),
    "data cut": (GOOD[:-1], f"expected {len(GOOD)} bytes, found {len(GOOD) - 1}; is the download complete?"),
    "data too long": (GOOD + b"x", f"expected {len(GOOD)} bytes, found {len(GOOD) + 1}"),
    "length of 2^63": (struct.pack("<Q", 1 << 63) + GOOD[8:], "found a length of 9,223,372,036,854,775,808"),
    "length of zero": (struct.pack("<Q", 0) + GOOD[8:], "found a length of 0"),
    "length one too small": (struct.pack("<Q", len(GOOD) - 17) + GOOD[8:], "header is damaged"),
    "not JSON": (safetensors_bytes(b"{'w': 1}"), "header is damaged"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "header is damaged"),
    "a list": (safetensors_bytes(b"[1, 2]"), "header is damaged"),
    "deep": (safetensors_bytes(b'{"a":' + b"[" * 100_000), "header is damaged"),
    "a number of 100,000 digits": (safetensors_bytes(b'{"a":' + b"9" * 100_000 + b"}"), "header is damaged"),
    "name twice": (
        safetensors_bytes(b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "'w' is there twice",
    ),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__ of strings"),
    "dtype unknown": (safetensors_bytes({"w": entry("F7")}, bytes(8)), "w has the dtype F7; known are BOOL"),
    "dtype missing": (
        safetensors_bytes({"w": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        "w: expected dtype, shape and data_offsets",
    ),
    "negative size": (
        safetensors_bytes({"w": entry(shape=(-2,))}, bytes(8)),
        "entries that are not sizes|not a list of sizes",
    ),
    "sizes that are floats": (
        safetensors_bytes({"w": entry(shape=(2.0,))}, bytes(8)),
        "entries that are not sizes|not a list of sizes",
    ),
    "33 dimensions": (safetensors_bytes({"w": entry(shape=(2,) + (1,) * 32)}, bytes(8)), "33 dimensions"),
    "shape larger than the range": (
        safetensors_bytes({"w": entry(shape=(3,))}, bytes(8)),
        "12 bytes, but its range is 0 to 8",
    ),
    "range before the data": (safetensors_bytes({"w": entry(begin=-8, end=0)}, bytes(8)), "its range is -8 to 0"),
    "range reversed": (safetensors_bytes({"w": entry(begin=8, end=0)}, bytes(8)), "its range is 8 to 0"),
    "range beyond the file": (
        safetensors_bytes({"w": entry(begin=0, end=8), "v": entry(begin=8, end=16)}, bytes(8)),
        "found",
    ),
    "overlap": (
        safetensors_bytes({"w": entry(), "v": entry(begin=4, end=12)}, bytes(12)),
        "v starts at byte .* overlaps the tensor before",
    ),
    "same range twice": (safetensors_bytes({"w": entry(), "v": entry()}, bytes(8)), "overlaps the tensor before"),
    "hole": (safetensors_bytes({"w": entry(), "v": entry(begin=12, end=20)}, bytes(20)), "leaves a hole before it"),
    "hole at the start": (safetensors_bytes({"w": entry(begin=4, end=12)}, bytes(12)), "leaves a hole before it"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_header_is_refused(tmp_path, damage):
    data, match = DAMAGED[damage]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_safetensors(path)
    assert str(caught.value).startswith(f"{path}: ")
    if damage not in ("name twice", "33 dimensions"):  # the library takes the last of two names
        with pytest.raises(SafetensorError):
            load_file(path)


def test_the_undamaged_header_is_read(tmp_path):
    (tmp_path / "a").write_bytes(GOOD)
    assert list(read_safetensors(tmp_path / "a")[0]) == ["w"]
