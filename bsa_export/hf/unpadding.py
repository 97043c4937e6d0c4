"""Padding left out of an encoder: `unpad_input` packs the real tokens of a batch into one row, `pad_input` puts them back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from bsa_export.errors import AttentionError
from bsa_export.hf.stored_layout import NAME


class Unpadded(NamedTuple):
    """What puts the tokens of a row back: `batch`, `seq`, and int64 `indices [tokens]` in the flattened batch."""

    batch: int
    seq: int
    indices: torch.Tensor


class Texts(NamedTuple):
    """Where texts lie in a row, one after another: int32 `cu_seqlens [texts + 1]`, and the tokens of the longest."""

    cu_seqlens: torch.Tensor
    max_seqlen: int


def unpad_input(encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Lays the real tokens of a right-padded batch `[batch, seq, hidden]` into one row: no layer works on padding.

    Any other padding is left to the mask: a text has to start where the layout does. Stays out of `torch.compile` and
    `torch.jit.trace` (the shapes depend on the data), of calls that ask for every layer's hidden states, and of feed-forward
    in chunks, which divide the batch's length. A row that the caller packed, in transformers' own form (`cu_seq_lens_q`), is
    taken as it is.
    """
    if encoder.config._attn_implementation != NAME:
        return None
    hidden = args[0] if args else kwargs.pop("hidden_states")
    args = (hidden, *args[1:])
    mask, ends = kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_q")
    if ends is not None:
        longest = kwargs.get("max_length_q")
        texts = Texts(ends.to(torch.int32), int(ends.diff().max() if longest is None else longest))
        return args, kwargs | {"texts": texts}
    if mask is None or mask.ndim != 2:
        return args, kwargs
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return args, kwargs
    if kwargs.get("output_hidden_states") or encoder.config.output_hidden_states:
        return args, kwargs
    if any(getattr(layer, "chunk_size_feed_forward", 0) for layer in encoder.layer):
        return args, kwargs
    if mask.shape != hidden.shape[:2]:
        raise AttentionError(f"expected an attention_mask of {tuple(hidden.shape[:2])}", found=tuple(mask.shape))
    sizes = mask.sum(1)
    in_front = torch.arange(mask.shape[1], device=mask.device) < sizes[:, None]
    *lengths, right_padded = torch.cat([sizes, (mask == in_front).all()[None]]).tolist()  # the one synchronisation
    if not right_padded or not any(lengths):
        return args, kwargs
    kwargs = kwargs | {"attention_mask": None}
    if (tokens := sum(lengths)) < mask.numel():
        sizes = sizes.to(hidden.device)
        ends = nn.functional.pad(sizes.cumsum(0), (1, 0))
        padding_before = torch.arange(len(lengths), device=hidden.device) * mask.shape[1] - ends[:-1]
        padding_before = padding_before.repeat_interleave(sizes, output_size=tokens)
        indices = torch.arange(tokens, device=hidden.device) + padding_before
        kwargs |= {"unpadded": Unpadded(*mask.shape, indices), "texts": Texts(ends.to(torch.int32), max(lengths))}
        args = (hidden.flatten(0, 1).index_select(0, indices)[None], *args[1:])
    return args, kwargs


def pad_input(encoder: nn.Module, args: tuple, kwargs: dict, output):
    """Puts the tokens back where they came from; padding gets zeros."""
    unpadded = kwargs.get("unpadded")
    if unpadded is None:
        return output
    hidden = output.last_hidden_state[0]
    indices = unpadded.indices.to(hidden.device)  # the last layer may be on another one than the first
    padded = hidden.new_zeros(unpadded.batch * unpadded.seq, hidden.shape[-1]).index_copy(0, indices, hidden)
    output.last_hidden_state = padded.unflatten(0, (unpadded.batch, unpadded.seq))
    return output
