"""Padding removal: `unpad_input` packs the real tokens of a batch into one row, `pad_input` puts them back.

The words are those of FlashAttention and ModernBERT: `indices`, `cu_seqlens`, `max_seqlen`. Both functions are hooks
of an encoder; they pass the keyword argument `packed` to the layers. Models that loop over their layers themselves have
no encoder: there `unpad_layer` and `pad_layer` are hooks of the layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from bsa_export.errors import AttentionError
from bsa_export.hf.stored_layout import NAME


class Packed(NamedTuple):
    """Sequences packed into one row, one after another.

    Attributes:
        cu_seqlens: where each sequence starts and the last one ends, int32 `[sequences + 1]`.
        max_seqlen: tokens of the longest sequence.
        indices: place of each token in the flattened batch, int64 `[tokens]`; None where the caller packed the row.
        batch_shape: batch size and padded length, for `pad_input`; None as above.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    indices: torch.Tensor | None = None
    batch_shape: tuple[int, int] | None = None


def unpad_input(
    encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Packs the real tokens of a right-padded batch into one row, so that no layer computes on padding.

    A pre-forward hook of the encoder: `hidden_states` change from `[batch, seq, hidden]` to `[1, tokens, hidden]`,
    `attention_mask` (bool `[batch, seq]`) becomes None, and the layers get `packed`. A row that the caller packed, with
    transformers' `cu_seq_lens_q`, stays as it is.

    Any other padding is left to the mask: a sequence has to start where the layout does. Nothing is packed inside
    `torch.compile` and `torch.jit.trace` (the shapes depend on the data), where all hidden states are asked for, and
    with feed-forward in chunks, which have to divide the length.

    Raises:
        AttentionError: an attention_mask of another shape than the batch.
    """
    if encoder.config._attn_implementation != NAME:
        return None
    hidden = args[0] if args else kwargs.pop("hidden_states")
    if len(args) > 1:  # by position
        kwargs["attention_mask"] = args[1]
    _check_mask(kwargs.get("attention_mask"), hidden)
    packed, kwargs = _packed(encoder.config, hidden, kwargs)
    if packed is not None and packed.indices is not None:
        hidden = _picked(hidden, packed.indices)
    return (hidden, *args[2:]), kwargs


def _check_mask(mask: torch.Tensor | None, hidden: torch.Tensor) -> None:
    if mask is not None and mask.ndim == 2 and mask.shape != hidden.shape[:2]:
        raise AttentionError(f"expected an attention_mask of {tuple(hidden.shape[:2])}", found=tuple(mask.shape))


def _packed(config: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> tuple[Packed | None, dict[str, Any]]:
    """How the hidden states of a call are packed, or are to be, and the keyword arguments for that."""
    mask, cu_seqlens = kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        longest = kwargs.get("max_length_q")
        max_seqlen = int(cu_seqlens.diff().max() if longest is None else longest)
        packed = Packed(cu_seqlens.to(torch.int32), max_seqlen)
        return packed, kwargs | {"packed": packed}
    if mask is None or mask.ndim != 2 or not _can_pack(config, kwargs):
        return None, kwargs
    if not hasattr(mask, "bsa_packing"):  # all layers of a call get the same mask
        mask.bsa_packing = _packing(mask, hidden)
    found = mask.bsa_packing
    if found is CANNOT:
        return None, kwargs
    kwargs = kwargs | {"attention_mask": None}
    if found is None:
        return None, kwargs
    if (turns := kwargs.get("position_embeddings")) is not None:  # cosines and sines, [1 or batch, seq, size] each
        batch, _ = found.batch_shape
        kwargs["position_embeddings"] = tuple(_picked(turn.expand(batch, -1, -1), found.indices) for turn in turns)
    return found, kwargs | {"packed": found}


CANNOT = object()  # what `_packing` returns for padding that is left to the mask


def _packing(mask: torch.Tensor, hidden: torch.Tensor) -> Any:
    """How the batch of a bool mask `[batch, seq]` is packed: None where nothing is padded, CANNOT where the padding is
    not on the right."""
    batch, seq = mask.shape
    seqlens = mask.sum(1)
    right_padded_mask = torch.arange(seq, device=mask.device) < seqlens[:, None]
    right_padded = (mask == right_padded_mask).all()
    *lengths, is_right_padded = torch.cat([seqlens, right_padded[None]]).tolist()  # the one synchronisation
    tokens = sum(lengths)
    if not is_right_padded or not tokens:
        return CANNOT
    if tokens == mask.numel():
        return None
    seqlens = seqlens.to(hidden.device)
    cu_seqlens = nn.functional.pad(seqlens.cumsum(0), (1, 0))
    padding_before = torch.arange(batch, device=hidden.device) * seq - cu_seqlens[:-1]
    padding_before = padding_before.repeat_interleave(seqlens, output_size=tokens)
    indices = torch.arange(tokens, device=hidden.device) + padding_before
    return Packed(cu_seqlens.to(torch.int32), max(lengths), indices, (batch, seq))


def _picked(rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`[batch, seq, size]` as one row of the tokens that `indices` names, `[1, tokens, size]`."""
    return rows.flatten(0, 1).index_select(0, indices.to(rows.device))[None]


def _can_pack(config: Any, kwargs: dict[str, Any]) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if kwargs.get("output_hidden_states") or config.output_hidden_states:
        return False
    return not getattr(config, "chunk_size_feed_forward", 0)


def pad_input(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Puts the tokens back to where `unpad_input` took them from; padding gets zeros.

    A forward hook: `output.last_hidden_state` changes from `[1, tokens, hidden]` to `[batch, seq, hidden]`.
    """
    packed: Packed | None = kwargs.get("packed")
    if packed is None or packed.indices is None or packed.batch_shape is None:
        return output
    if isinstance(output, tuple):  # return_dict=False in the config
        return _padded(output[0], packed), *output[1:]
    output.last_hidden_state = _padded(output.last_hidden_state, packed)
    return output


def _padded(hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
    """`[1, tokens, hidden]` as `[batch, seq, hidden]`, zeros where padding is."""
    assert packed.indices is not None and packed.batch_shape is not None
    indices = packed.indices.to(hidden.device)  # the last layer may be on another device than the first
    batch, seq = packed.batch_shape
    padded = hidden.new_zeros(batch * seq, hidden.shape[-1]).index_copy(0, indices, hidden[0])
    return padded.unflatten(0, (batch, seq))


def unpad_layer(
    config: Any, is_first: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """`unpad_input` for a model that loops over its layers itself: a pre-forward hook of each layer.

    The first layer packs the hidden states. Every layer gets the arguments for that, which the model passes anew.
    """
    if config._attn_implementation != NAME:
        return None
    hidden = args[0] if args else kwargs.pop("hidden_states")
    if is_first:
        _check_mask(kwargs.get("attention_mask"), hidden)
    packed, kwargs = _packed(config, hidden, kwargs)
    if is_first and packed is not None and packed.indices is not None:
        hidden = _picked(hidden, packed.indices)
    return (hidden, *args[1:]), kwargs


def pad_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """`pad_input` for the last layer of such a model: a forward hook."""
    packed: Packed | None = kwargs.get("packed")
    if packed is None or packed.indices is None:
        return output
    return _padded(output, packed)
