"""What every backend gets from `block_sparse_attention` before it computes: autocast, empty inputs, refusals."""

from __future__ import annotations

import pytest
import torch

from bsa_export.errors import AttentionError
from bsa_export.ops import block_sparse_attention

BACKENDS = ["torch", "reference"]
LAYOUT = torch.eye(8, dtype=torch.uint8)[None]
LAYOUT[0, :, 2] = LAYOUT[0, 1, 5] = 1


def tensors(*shape) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_mixed_dtypes(backend):
    """As `scaled_dot_product_attention` does: a projection under autocast next to a float32 cache, say."""
    query, key, value = tensors(1, 2, 128, 16)
    expected = block_sparse_attention(*(x.bfloat16() for x in (query, key, value)), LAYOUT, 16, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = block_sparse_attention(query.bfloat16(), key, value, LAYOUT, 16, backend=backend)
    assert torch.equal(actual, expected)


def test_mixed_dtypes_without_autocast_are_refused():
    query, key, value = tensors(1, 2, 128, 16)
    with pytest.raises(AttentionError, match="key: expected torch.bfloat16"):
        block_sparse_attention(query.bfloat16(), key, value, LAYOUT, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_within_an_autocast_region(backend):
    inputs = tensors(1, 2, 128, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block_sparse_attention(*inputs, LAYOUT, 16, backend=backend).float().sum()
        within = torch.autograd.grad(out, inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(within, torch.autograd.grad(out, inputs), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_refused_in_a_sentence(backend):
    inputs = tensors(1, 2, 128, 16)
    said = "dropout_p: expected 0: block-sparse attention has no dropout on the probabilities, found 0.1"
    with pytest.raises(AttentionError, match=said):
        block_sparse_attention(*inputs, LAYOUT, 16, dropout_p=0.1, backend=backend)
    block_sparse_attention(*inputs, LAYOUT, 16, dropout_p=0.0, backend=backend)


@pytest.mark.parametrize("shape", [(0, 2, 32, 16), (1, 2, 0, 16), (1, 2, 32, 0)], ids=["batch", "seq", "head_dim"])
def test_nothing_has_gradients_of_nothing(shape):
    inputs = tensors(*shape)
    out = block_sparse_attention(*inputs, LAYOUT, 16)
    assert out.shape == shape
    assert [x.shape for x in torch.autograd.grad(out.sum(), inputs)] == [shape] * 3
