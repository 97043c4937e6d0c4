"""Windows: the reference by its definition, packed sequences, shared rows, and what is refused. The other backends are
compared with a mask in test_sweep.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attention_cases import Case, make_inputs, within

from bsa_export.errors import AttentionError
from bsa_export.ops import backends, block_sparse_attention, block_sparse_attention_varlen, schedule, triton_backend
from bsa_export.ops import window as windows
from bsa_export.ops.schedule import ScheduleCache
from bsa_export.verify.tolerance import errors, judge, results

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = ("query", "key", "value")
needs_triton = pytest.mark.skipif(backends()["triton"] is not None, reason=f"triton: {backends()['triton']}")


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("window", [(3, 5), (0, 2), (4, 0), (0, 0), (-1, 1), (2, -1)])
def test_a_query_attends_to_the_kept_keys_in_its_window(window, backend):
    """Key by key, with a row that is left without keys, in float64."""
    inputs = make_inputs(Case(pattern="random", block=4, blocks=3, short=1, head_dim=8, batch=1), 0, "cpu")
    layout = inputs["layout"]
    layout[0, 0] = torch.tensor([0, 1, 0])
    query, key, value = (inputs[name].double().requires_grad_() for name in NAMES)
    left, right = (side if side >= 0 else 99 for side in window)
    rows = []
    for head in range(2):
        for i in range(11):
            kept = [j for j in range(11) if layout[head, i // 4, j // 4] and i - left <= j <= i + right]
            weights = (key[0, head, kept] @ query[0, head, i] * 8**-0.5).softmax(0)
            rows.append(weights @ value[0, head, kept])
    expected = torch.stack(rows).view(1, 2, 11, 8)
    assert any(not row.any() for row in rows) or left + right > 7
    actual = block_sparse_attention(query, key, value, layout, 4, window=window, backend=backend)
    torch.testing.assert_close(actual, expected)
    grad = inputs["grad_output"].double()
    pairs = (torch.autograd.grad(out, (query, key, value), grad) for out in (actual, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(
    ("dtype", "block", "window"),
    [("fp16", 16, (20, 5)), ("fp16", 64, (64, 64)), ("fp16", 64, (-1, 10)), ("fp32", 64, (90, 3))],
)
def test_a_packed_sequence_gets_what_it_gets_alone(dtype, block, window, backend, device):
    """By the rule, though the others are NaN: nothing of them is read, not even as zero times NaN."""
    bounds = torch.tensor([0, 20, 150, 310], device=device, dtype=torch.int32)
    text = slice(20, 150)
    case = Case(block=310, blocks=1, pattern="all", heads=1, batch=1, head_dim=16, dtype=dtype)
    inputs = make_inputs(case, 0, device)
    inputs |= {"layout": torch.ones(1, 10, 10, dtype=torch.uint8, device=device), "block": block}
    names = (*NAMES, "grad_output")
    alone = inputs | {name: inputs[name][:, :, text].clone() for name in names}
    for name in names:
        inputs[name].fill_(torch.nan)[:, :, text] = alone[name]
    packed = partial(block_sparse_attention_varlen, cu_seqlens=bounds, max_seqlen=160, window=window, backend=backend)
    stated = partial(block_sparse_attention, attn_mask=within(130, window, device), backend="reference")
    actual, plain, exact = results(packed, inputs), results(stated, alone), results(stated, alone, torch.float64)
    for name, found in actual.items():
        error = errors(found[:, :, text], plain[name], exact[name])
        assert error.passed, (name, error)


@needs_triton
@pytest.mark.parametrize("padding", ["none", "bool"])
@pytest.mark.parametrize("block", [16, 64])
def test_rows_that_are_shared_out(block, padding, monkeypatch):
    """Every row of three steps and more is, so that the parts of the mean of the keys have to be put together."""
    monkeypatch.setattr(schedule, "MIN_STEPS_TO_SPLIT", 2)
    monkeypatch.setattr(schedule, "SPLIT_ABOVE_MEAN", 0)
    monkeypatch.setattr(triton_backend, "_schedules", ScheduleCache())
    case = Case(pattern="all", block=block, blocks=320 // block, heads=1, head_dim=16, alike=True, padding=padding)
    inputs = make_inputs(case, 0, "cpu") | {"attn_mask": within(320, (100, 60))}

    def attention(attn_mask, **called):
        return block_sparse_attention(**called, window=(100, 60), backend="triton")

    found = judge(attention, inputs)
    assert all(e.passed for e in found.values()), found


@pytest.mark.parametrize("window", [3, (1,), (1, 2, 3), (-2, 0), (0, -2), (1.0, 2), (True, 1), "11", torch.ones(2)])
def test_what_is_not_a_window_is_refused(window):
    x = torch.zeros(1, 1, 20, 16)
    layout, bounds = torch.ones(1, 2, 2, dtype=torch.uint8), torch.tensor([0, 20], dtype=torch.int32)
    with pytest.raises(AttentionError, match="^window: expected two integers of at least -1"):
        block_sparse_attention(x, x, x, layout, 16, window=window)
    with pytest.raises(AttentionError, match="^window: expected two integers of at least -1"):
        block_sparse_attention_varlen(x, x, x, layout, 16, bounds, 20, window=window)


def test_a_window_that_removes_nothing_is_none():
    assert [windows.checked(window, 100) for window in (None, (-1, -1), (99, 99), (10**30, -1))] == [None] * 4
    assert windows.checked((98, 99), 100) == (98, 99)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_compiles_without_a_break(backend):
    inputs = make_inputs(Case(pattern="all", blocks=4, head_dim=16, dtype="fp32"), 0, "cpu")
    grad, leaves = inputs["grad_output"], [inputs[name].requires_grad_() for name in NAMES]

    def step(*leaves):
        return block_sparse_attention(*leaves, inputs["layout"], 16, window=(20, 3), backend=backend) * 2

    expected, compiled = step(*leaves), torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, expected)
    pairs = (torch.autograd.grad(out, leaves, grad) for out in (compiled, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)
