"""The attention function and the mask function that stock transformers classes call."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import nn

from bsa_export.errors import AttentionError
from bsa_export.hf.stored_layout import NAME, StoredLayout
from bsa_export.hf.unpadding import Packed
from bsa_export.ops import block_sparse_attention, block_sparse_attention_varlen

log = logging.getLogger(__name__)


def key_padding_mask(
    *, attention_mask: torch.Tensor | None, mask_function: Any, config: Any, **kwargs: Any
) -> torch.Tensor | None:
    """The mask function: passes the tokenizer's mask `[batch, seq]` on as bool.

    Dense attention makes a mask of `[batch, 1, seq, seq]` from it.

    Registered with `transformers.masking_utils.AttentionMaskInterface`. transformers does not call it for a 4-D mask.
    The band of a local layer is no part of the mask: the layer passes it to `attention` as `sliding_window`.

    Raises:
        AttentionError: a causal or custom mask function, or a mask of another shape.
    """
    from transformers.masking_utils import bidirectional_mask_function

    # create_bidirectional_sliding_window_mask passes both, and the second one only without a function of the caller's.
    is_band = kwargs.get("local_size") is not None and kwargs.get("allow_is_bidirectional_skip", False)
    if mask_function is not bidirectional_mask_function and not is_band:
        raise AttentionError("block-sparse attention runs encoders only", found="a causal or custom mask function")
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise AttentionError(
            "expected an attention_mask of [batch, seq] or [batch, heads or 1, seq, seq]",
            found=tuple(attention_mask.shape),
        )
    return attention_mask.bool()[:]  # never the caller's own tensor, which may be written to: `hf.unpadding` marks it


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Packed | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: block-sparse self-attention over the layout that `module` stores.

    Registered with `transformers.modeling_utils.AttentionInterface` (transformers 5.0 to 5.x).

    Args:
        module: a layer's self-attention.
        query, key, value: `[batch, heads, seq, head_dim]`; with grouped queries, key and value have fewer heads.
        attention_mask: None; bool `[batch, seq]` from `key_padding_mask`; or the caller's own 4-D mask, which
            broadcasts to `[batch, heads, seq, seq]`: bool (True takes part) or added to the scores.
        sliding_window: tokens to each side that a local layer attends to, and its own; None for a global layer.
        packed: sequences packed into one row, from `unpad_input`; then batch is 1 and there is no mask.

    Returns:
        `[batch, seq, heads, head_dim]` in the query's dtype, and None instead of the attention probabilities.

    Raises:
        AttentionError: for what a stored layout cannot do: probabilities, cross-attention, a cache, more tokens.
    """
    stored = getattr(module, "sparse_self_attention", None)
    if not isinstance(stored, StoredLayout):
        raise AttentionError(
            f"{type(module).__name__} has no stored layout",
            hint=f'load the converted folder with attn_implementation="{NAME}"; a dense model cannot switch to it, and '
            "there is no cross-attention",
        )
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise AttentionError(
            "output_attentions=True: block-sparse attention never holds the probabilities",
            hint='for a short text load the model with attn_implementation="eager"',
        )
    if dropout and not torch.compiler.is_compiling():
        _say_no_dropout(dropout)
    if key.shape[2] != query.shape[2]:
        raise AttentionError(
            "block-sparse attention is self-attention without a cache",
            found=f"{query.shape[2]} queries and {key.shape[2]} keys",
        )
    stored = vars(stored).get("replica_of", stored)
    stored.check()
    if key.shape[1] != query.shape[1]:  # grouped queries
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))

    window = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    if packed is not None:
        context = block_sparse_attention_varlen(
            query,
            key,
            value,
            stored.master_layout,
            stored.block,
            packed.cu_seqlens,
            packed.max_seqlen,
            scale=scaling,
            window=window,
        )
        return context.transpose(1, 2), None
    padding = pairs = None
    if attention_mask is not None:
        if attention_mask.ndim == 2:
            padding = attention_mask
        elif attention_mask.shape[1:3] == (1, 1):
            padding = attention_mask[:, 0, 0].expand(query.shape[0], -1)
        else:
            pairs = attention_mask
    context = block_sparse_attention(
        query,
        key,
        value,
        stored.master_layout,
        stored.block,
        key_padding_mask=padding,
        attn_mask=pairs,
        scale=scaling,
        window=window,
    )
    return context.transpose(1, 2), None


@cache
def _say_no_dropout(dropout: float) -> None:
    log.warning(
        "attention_probs_dropout_prob=%s has no effect: block-sparse attention has no dropout on the probabilities",
        dropout,
    )
