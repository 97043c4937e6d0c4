"""Masked dense attention: what every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from bsa_export.ops import window as windows


def unavailable() -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def clear_cache() -> None:
    """Nothing is kept between calls."""


def refuses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    block: int,
    *,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    rpe: Tensor | None,
    scale: float,
    window: tuple[int, int] | None = None,
) -> str | None:
    """None: any device, dtype and mask will do."""
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    block: int,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    rpe: Tensor | None = None,
    scale: float,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Attention over the kept blocks, by a dense score matrix: plain PyTorch, differentiable.

    The products run in the inputs' dtype, the softmax in float32 at least, as `transformers` does in eager mode;
    float64 inputs give the exact answer. A row without keys becomes zeros.

    Args:
        query, key, value: `[batch, heads, seq, head_dim]`.
        layout: `[heads or 1, ceil(seq / block), ceil(seq / block)]`, nonzero where a block is kept.
        block: side of a block, in tokens.
        key_padding_mask: added to the scores, `[batch, seq]`.
        attn_mask, rpe: added to the scores, broadcast to `[batch, heads, seq, seq]`.
        scale: what the scores are multiplied by.
        window: tokens to the left and to the right of a query that it attends to.
    Returns:
        `[batch, heads, seq, head_dim]`.
    """
    seq = query.shape[2]
    kept = layout.to(query.device).ne(0).repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :seq, :seq]
    scores = (query @ key.mT) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if key_padding_mask is not None:
        scores = scores + key_padding_mask[:, None, None, :]
    for mask in (attn_mask, rpe):
        if mask is not None:
            scores = scores + mask
    if window is not None:
        position = torch.arange(seq, device=query.device)
        scores = scores + windows.mask(position, position, window)
    scores = scores.masked_fill(~kept, float("-inf"))
    empty = scores.isneginf().all(-1, keepdim=True)
    # Filled before the softmax too: the gradient of a softmax over nothing is NaN.
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return weights.to(value.dtype) @ value
