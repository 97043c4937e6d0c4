"""Every backend against float64, by the rule of `bsa_export.verify.tolerance`; and damaged attention, which the rule
must find."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from attention_cases import Case, cases, make_inputs, within

from bsa_export.errors import AttentionError
from bsa_export.ops import backends, block_sparse_attention
from bsa_export.verify.tolerance import FACTOR, Errors, in_half, judge, plain_beside, results

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["torch", "triton", "deepspeed"]

# Triton's interpreter takes a second for what a GPU does in microseconds: on a CPU its backends get the part of the
# sweep that still has every property once.
INTERPRETED = {
    "triton": [
        Case(blocks=5, head_dim=32),
        Case(pattern="fixed", blocks=4, heads=3, head_dim=16, batch=1),
        Case(pattern="random", blocks=4, dtype="fp32", short=1, batch=1),
        Case(pattern="one", blocks=4, dtype="fp32", padding="whole", head_dim=16),
        Case(pattern="shared", blocks=4, padding="additive", short=15, head_dim=32),
        Case(pattern="random", block=32, blocks=6, padding="left", head_dim=16, heads=1),
        Case(pattern="random", blocks=12, padding="both", head_dim=16, heads=1),
        Case(pattern="all", block=64, blocks=4, short=5, padding="both", head_dim=16, heads=1),
        Case(pattern="random", blocks=4, padding="whole-finite", head_dim=16),
        Case(pattern="windowed", block=32, blocks=3, head_dim=80, batch=1),
        Case(pattern="all", alike=True, padding="bool", batch=1),
        Case(pattern="random", alike=True, dtype="fp32", block=64, blocks=3, heads=1, batch=1),
        Case(pattern="random", block=64, blocks=3, short=37, head_dim=96, heads=1, batch=1),
        Case(pattern="all", block=128, blocks=2, short=65, head_dim=128, heads=1, batch=1),
        Case(pattern="all", apart=3, padding="bool", head_dim=32, heads=1),
        Case(pattern="all", apart=1000, padding="bool", dtype="fp32", heads=1, short=3),
        Case(pattern="windowed", apart=30, padding="finite", head_dim=32),
        Case(pattern="halves", apart=3, blocks=6, heads=1, batch=1),
        Case(pattern="halves", apart=30, block=64, blocks=4, heads=1, batch=1),
        Case(pattern="all", window=(20, 20), dtype="fp32", head_dim=16, heads=1, short=5),
        Case(pattern="all", window=(0, 3), head_dim=16, heads=1),
        Case(pattern="random", window=(-1, 5), blocks=12, head_dim=16, heads=1, padding="both"),
        Case(pattern="one", window=(5, 5), head_dim=16, padding="additive"),
        Case(pattern="all", window=(64, 64), block=64, blocks=4, short=37, head_dim=16, heads=1, padding="left"),
        Case(pattern="all", window=(64, 0), block=64, blocks=3, heads=1, batch=1, alike=True),
        Case(pattern="random", window=(100, 40), block=128, blocks=2, short=65, head_dim=128, heads=1, batch=1),
        Case(strides="bert", blocks=3, head_dim=16, padding="bool", short=3),
        Case(strides="packed", blocks=3, head_dim=16, padding="bool", short=3),
        Case(strides="columns", blocks=3, head_dim=16, padding="bool", short=3),
        Case(strides="surrounded", blocks=3, head_dim=16, padding="bool", short=3),
    ],
    "deepspeed": [
        Case(blocks=6, head_dim=32, heads=1, batch=1),
        Case(pattern="fixed", blocks=4, head_dim=16, batch=1),
        Case(pattern="one", blocks=3, padding="whole", head_dim=16, heads=1),
        Case(pattern="shared", blocks=3, padding="additive", head_dim=32, batch=1, strides="bert"),
        Case(pattern="random", blocks=3, padding="finite", rpe="shared", head_dim=16, heads=1, strides="surrounded"),
        Case(pattern="random", blocks=3, rpe="heads", head_dim=16, batch=1, strides="columns"),
        Case(pattern="random", blocks=3, padding="bool", attn_mask="bool", head_dim=16, heads=1),
        Case(pattern="windowed", block=32, blocks=3, heads=1, batch=1),
        Case(pattern="random", block=64, blocks=2, heads=1, batch=1),
        Case(pattern="all", block=128, blocks=1, heads=1, batch=1, head_dim=144),
        Case(pattern="random", window=(9, 3), blocks=3, padding="bool", attn_mask="bool", head_dim=16, heads=1),
    ],
}  # fmt: skip


def _refuses(backend: str, case: Case, device: str) -> str | None:
    """What a backend says of a case that it may refuse, as a pattern. It has to compute all others."""
    if backend == "triton":
        if case.attn_mask != "none" or case.rpe != "none":
            return "does not support attn_mask or rpe"
        if device == "cpu" and case.dtype == "bf16":
            return "interpreter multiplies bfloat16 matrices wrongly"
    if backend == "deepspeed":
        if case.dtype != "fp16":
            return "computes float16 only, not torch"
        if case.short:
            return "needs a length that is a multiple of the block"
        if case.padding == "whole-finite":  # fp16 has no number as low as float32's lowest
            return "casts key_padding_mask to float16"
        if case.attn_mask == "heads":
            return r"attn_mask is \[seq, seq\] for all sequences and heads"
    return None


def _larger(case: Case) -> Case:
    """The case at a length that gives a GPU something to do."""
    return replace(case, blocks=case.blocks * (8 if case.block < 64 else 4))


def _parameters(device: str):
    for backend in BACKENDS:
        chosen = [case for case in cases() if _refuses(backend, case, device) is None]
        if device == "cuda":
            chosen += [_larger(case) for case in chosen]
        elif backend in INTERPRETED:
            chosen = INTERPRETED[backend]
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for case in chosen:
            yield pytest.param(backend, case, device, marks=marks, id=f"{backend}-{device}-{case}")


@pytest.fixture(autouse=True)
def nan_in_empty_memory():
    """`torch.empty` gives NaN, so that what a backend leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _needs(backend: str) -> None:
    reason = backends()[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def _judge(backend: str, inputs: dict) -> dict[str, Errors]:
    """By the rule; plain PyTorch keeps the probabilities in the dtype that the backend keeps them in, and a window is
    a mask to it."""
    attention = partial(block_sparse_attention, backend=backend)
    if "window" in inputs:
        inputs = dict(inputs)
        window, mask = inputs.pop("window"), inputs.get("attn_mask")
        inside = within(inputs["query"].shape[2], window, inputs["query"].device)
        if mask is None:
            inputs["attn_mask"] = inside
        else:
            inputs["attn_mask"] = mask & inside if mask.dtype == torch.bool else mask.masked_fill(~inside, -torch.inf)

        def attention(**called):
            return block_sparse_attention(**called | {"attn_mask": mask}, window=window, backend=backend)

    return judge(attention, inputs, plain_beside(backend))


def _report(found: dict[str, Errors]) -> str:
    return "; ".join(
        f"{name} {e.largest:.2g} (plain {e.plain_largest:.2g}), x {e.ratio:.2f}" for name, e in found.items()
    )


@pytest.mark.parametrize(("backend", "case", "device"), [*_parameters("cpu"), *_parameters("cuda")])
def test_error_is_at_most_twice_that_of_plain_pytorch(backend, case, device):
    _needs(backend)
    found = _judge(backend, make_inputs(case, seed=0, device=device))
    assert all(e.passed for e in found.values()), _report(found)


def _refused(device: str):
    marks = [pytest.mark.gpu] if device == "cuda" else []
    for backend in BACKENDS:
        for case in cases():
            said = _refuses(backend, case, device)
            if said is not None:
                yield pytest.param(backend, case, device, said, marks=marks, id=f"{backend}-{device}-{case}")


@pytest.mark.parametrize(("backend", "case", "device", "said"), [*_refused("cpu"), *_refused("cuda")])
def test_what_a_backend_does_not_compute_it_refuses_in_a_sentence(backend, case, device, said):
    _needs(backend)
    inputs = make_inputs(case, seed=0, device=device)
    inputs.pop("grad_output")
    with pytest.raises(AttentionError, match=f"^backend {backend}: .*{said}"):
        block_sparse_attention(**inputs, backend=backend)


def _dropped_block(query, key, value, layout, block, **options):
    layout = layout.clone()
    head, row, column = layout.nonzero()[len(layout.nonzero()) // 2]
    layout[head, row, column] = 0
    return block_sparse_attention(query, key, value, layout, block, **options)


def _added_block(query, key, value, layout, block, **options):
    layout = layout.clone()
    head, row, column = (layout == 0).nonzero()[-1]
    layout[head, row, column] = 1
    return block_sparse_attention(query, key, value, layout, block, **options)


def _swapped_heads(query, key, value, layout, block, **options):
    return block_sparse_attention(query, key, value, layout.flip(0), block, **options)


def _scale_off_by_one_percent(query, *inputs, **options):
    return block_sparse_attention(query, *inputs, scale=1.01 * query.shape[-1] ** -0.5, **options)


def _masked_key_forgotten(*inputs, key_padding_mask, **options):
    key_padding_mask = key_padding_mask.clone()
    key_padding_mask[0] = True
    return block_sparse_attention(*inputs, key_padding_mask=key_padding_mask, **options)


FAULTS = [_dropped_block, _added_block, _swapped_heads, _scale_off_by_one_percent, _masked_key_forgotten]


RULES = {"fp16": judge, "bf16": judge, "fp32": judge, "in half": partial(judge, plain=in_half)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_fault_is_found(fault, rule, seed):
    """In every result: the output and all three gradients."""
    dtype = "fp16" if rule == "in half" else rule
    inputs = make_inputs(Case(pattern="random", head_dim=32, dtype=dtype, padding="bool"), seed=seed, device="cpu")
    found = RULES[rule](partial(fault, backend="reference"), inputs)
    assert not any(e.passed for e in found.values()), _report(found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fault_of_a_backend_is_found(backend):
    """A block that is missing from what the rule is for."""
    _needs(backend)
    inputs = make_inputs(Case(pattern="random", blocks=3, head_dim=16, padding="bool"), seed=0, device="cpu")
    found = judge(partial(_dropped_block, backend=backend), inputs, plain_beside(backend))
    assert not any(e.passed for e in found.values()), _report(found)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [c for c in cases() if not any(_refuses(b, c, "cuda") for b in ("triton", "deepspeed"))], ids=str
)
def test_triton_agrees_with_deepspeed(case):
    """Directly: they differ by no more than two right results may."""
    _needs("deepspeed")
    inputs = make_inputs(_larger(case), seed=1, device="cuda")
    actual, other = (results(partial(block_sparse_attention, backend=b), inputs) for b in ("triton", "deepspeed"))
    ours, theirs = (_judge(b, inputs) for b in ("triton", "deepspeed"))
    for name in actual:
        difference = (actual[name] - other[name]).abs().max().item()
        assert difference <= FACTOR * (ours[name].plain_largest + theirs[name].plain_largest), name
