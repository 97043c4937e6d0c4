"""Elements of tensors: pieces, casts and values that are not finite, judged by torch."""

import subprocess
import sys
from math import inf, nan

import numpy as np
import pytest
import torch
from checkpoint_files import same, small_state
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from bsa_export.checkpoint import dtypes
from bsa_export.checkpoint.dtypes import cast, not_finite, pieces, read
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import Computed, Tensor
from bsa_export.errors import CheckpointError

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def row(array: np.ndarray, dtype: str) -> Tensor:
    return Tensor(dtype, array.shape, Computed(lambda: iter([array.tobytes()])))


def content(tensor: Tensor) -> bytes:
    return b"".join(bytes(memoryview(piece).cast("B")) for piece in pieces(tensor))


@pytest.mark.parametrize("piece_bytes", [8, 16, 64, 8 << 20])
def test_pieces_join_to_the_tensor_and_none_is_too_large(tmp_path, monkeypatch, piece_bytes):
    base = torch.arange(2 * 6 * 5, dtype=torch.float32).reshape(2, 6, 5)
    state = {
        "whole": base,
        "transposed": base.permute(2, 0, 1),
        "columns": base[:, :, 1:3],
        "repeated": base[:1, :1].expand(3, 4, 5),
    }
    torch.save(state, tmp_path / "a.pt")
    table = open_checkpoint(tmp_path / "a.pt").tensors
    monkeypatch.setattr(dtypes, "PIECE_BYTES", piece_bytes)
    for name, tensor in state.items():
        sizes = [memoryview(piece).nbytes for piece in pieces(table[name])]
        assert max(sizes) <= max(piece_bytes, 4)
        assert content(table[name]) == tensor.contiguous().numpy().tobytes()


def test_reading_gives_numpy_the_bits_it_has_no_dtype_for(tmp_path):
    state = small_state()
    torch.save(state, tmp_path / "a.pt")
    table = open_checkpoint(tmp_path / "a.pt").tensors
    assert read(table["encoder.flags"]).dtype == np.bool_
    assert read(table["encoder.bfloat"]).dtype == np.uint16
    for name in (
        "encoder.half",
        "encoder.bfloat",
        "encoder.double",
        "embeddings.word_embeddings.weight",
        "encoder.empty",
    ):
        wide = read(table[name], float32=True)
        assert wide.dtype == np.float32
        assert np.array_equal(wide, state[name].float().numpy())
    with pytest.raises(ValueError, match="I64 does not convert to float32"):
        read(table["embeddings.position_ids"], float32=True)


SPECIAL = [
    0.0,
    -0.0,
    inf,
    -inf,
    nan,
    1.0,
    65504.0,
    65519.99,
    -65519.0,
    2**-24,
    2**-25,
    1.00048828125,
    1.00390625,
    1.01171875,
    3.3895e38,
    1e-40,
]
FLOATS = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.floats(-70000, 70000, width=32))


@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("source", ["F64", "F32", "F16", "BF16"])
@given(values=st_numpy.arrays(np.float32, st.integers(1, 20), elements=FLOATS))
def test_a_cast_rounds_as_torch_does_or_names_the_value_that_overflows(source, target, values):
    original = torch.from_numpy(values).to(TORCH[source])
    expected = original.to(TORCH[target])
    bits = original.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[original.element_size()]).numpy()
    tensor = cast("layer.weight", row(bits, source), target)
    overflows = bool((expected.isinf() & original.isfinite()).any())
    if overflows:
        with pytest.raises(CheckpointError, match=f"^layer.weight: .* is too large for {target}"):
            content(tensor)
        return
    got = torch.frombuffer(bytearray(content(tensor)), dtype=TORCH[target])
    assert tensor.dtype == target
    assert torch.equal(got.isnan(), expected.isnan())
    kept = ~expected.isnan()
    integers = torch.int32 if target == "F32" else torch.int16
    assert torch.equal(got.view(integers)[kept], expected.view(integers)[kept])


def test_a_cast_leaves_other_tensors_alone():
    for dtype in ("I64", "U8", "BOOL", "F16"):
        tensor = row(np.zeros(2, dtypes.NUMPY_DTYPE[dtype]), dtype)
        assert cast("x", tensor, "F16") is tensor
    with pytest.raises(ValueError, match="expected one of F32, F16, BF16, found I8"):
        cast("x", tensor, "I8")


def test_a_cast_tensor_is_written(tmp_path):
    state = small_state()
    torch.save(state, tmp_path / "a.pt")
    table = open_checkpoint(tmp_path / "a.pt").tensors
    assert same(cast("x", table["encoder.half"], "BF16"), state["encoder.half"].bfloat16())
    assert same(cast("x", table["encoder.empty"], "F16"), state["encoder.empty"].half())


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, -1, 5], None),
        ([1, nan, 2], "NaN"),
        ([1, inf, 2], "infinite"),
        ([-inf, 0], "infinite"),
        ([inf, -nan], "NaN"),
        ([], None),
        ("largest", None),
    ],
)
def test_values_that_are_not_finite_are_found(dtype, values, expected):
    torch_dtype = TORCH[dtype]
    values = (
        [torch.finfo(torch_dtype).max, torch.finfo(torch_dtype).min, torch.finfo(torch_dtype).tiny]
        if values == "largest"
        else values
    )
    data = torch.tensor(values, dtype=torch_dtype)
    assert not_finite(data.view(torch.uint8).numpy().tobytes(), dtype) == expected


def test_integers_are_always_finite():
    assert not_finite(b"\xff" * 8, "I64") is None


def test_a_file_that_became_shorter_is_noticed(tmp_path):
    torch.save({"w": torch.zeros(1000), "t": torch.zeros(30, 30).t()}, path := tmp_path / "a.pt")
    table = open_checkpoint(path).tensors
    path.write_bytes(path.read_bytes()[:2000])
    for name in table:
        with pytest.raises(CheckpointError, match="it became shorter while it was being read"):
            content(table[name])


@pytest.mark.parametrize("kind", ["contiguous", "transposed", "cast"])
def test_memory_does_not_grow_with_the_tensor(tmp_path, kind):
    """Streams 256 MiB in a process that may use 64 MiB more than it starts with."""
    with open(tmp_path / "w", "wb") as file:
        file.truncate(256 << 20)
    script = f"""
from pathlib import Path
from bsa_export.checkpoint.dtypes import cast, pieces
from bsa_export.checkpoint.table import FileRange, StridedRange, Tensor
path = Path({str(tmp_path / "w")!r})
whole = Tensor("F32", (8192, 8192), FileRange(path, 0, 256 << 20))
transposed = Tensor("F32", (8192, 8192), StridedRange(path, 0, (1, 8192)))
tensor = dict(contiguous=whole, transposed=transposed, cast=cast("w", whole, "BF16"))[{kind!r}]
def peak():  # ru_maxrss would begin with that of the parent process
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before = peak()
assert sum(memoryview(piece).nbytes for piece in pieces(tensor)) == tensor.nbytes
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert grown < 64 << 10
