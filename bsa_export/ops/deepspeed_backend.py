"""Backend `deepspeed`: DeepSpeed's own kernels, forward and backward, as a judge; `packed_tables()` is for
benchmarks."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsa_export.ops import deepspeed_kernels as kernels
from bsa_export.ops import window as windows
from bsa_export.ops.deepspeed_kernels import packed_tables
from bsa_export.ops.triton_version import unusable

__all__ = ["attend", "packed_tables", "refuses", "unavailable"]

BLOCKS = (16, 32, 64, 128)

# The kernels count elements in 32 bits.
MOST_ELEMENTS = 2**31

# Layouts whose look-up tables are kept: DeepSpeed takes seconds for a long one.
MOST_OPERATORS = 32


def unavailable() -> str | None:
    """Why DeepSpeed's kernels cannot run on this machine, or None."""
    if (reason := unusable(descriptors=False)) is not None:
        return reason
    operators = kernels.operators()
    if isinstance(operators, str):
        return operators
    if torch.cuda.is_available() or kernels.interpreted():
        return None
    return "no CUDA GPU (TRITON_INTERPRET=1 runs it on a CPU, slowly)"


def clear_cache() -> None:
    """Forgets DeepSpeed's look-up tables."""
    _cache.clear()


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
    """What DeepSpeed refuses, what its kernels would compute wrong, and what is not installed. See `contract.py`."""
    batch, heads, seq, head_dim = query.shape
    if (reason := unavailable()) is not None:
        return reason
    if not query.is_cuda and not kernels.interpreted():
        return f"DeepSpeed's kernels run on CUDA GPUs, not on {query.device.type}"
    if query.dtype != torch.float16:
        return f"DeepSpeed computes float16 only, not {query.dtype}"
    if block not in BLOCKS:
        return f"DeepSpeed's kernels have blocks {', '.join(map(str, BLOCKS))}, not {block}"
    if seq % block:
        return f"DeepSpeed needs a length that is a multiple of the block {block}, not {seq}"
    if head_dim % 16:
        return f"DeepSpeed needs a head_dim that is a multiple of 16, not {head_dim}"
    if attn_mask is not None and any(size != 1 for size in attn_mask.shape[:-2]):
        return f"DeepSpeed's attn_mask is [seq, seq] for all sequences and heads, not {list(attn_mask.shape)}"
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask), ("rpe", rpe)):
        if mask is not None and ((mask.abs() > torch.finfo(torch.float16).max) & ~mask.isneginf()).any():
            return f"DeepSpeed casts {name} to float16, which does not hold its lowest or largest value"
    operators = _cache.get(layout, heads, block, query.device)
    if operators is None:
        return "DeepSpeed needs a kept block in every head"
    largest = max(
        batch * operators.num_blocks * block * block,
        *map(_extent, (query, key, value)),
        0 if rpe is None else rpe.numel(),
    )
    if largest >= MOST_ELEMENTS:
        return f"DeepSpeed's kernels count elements in 32 bits, and {largest} are to be addressed"
    return None


def attend(
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
) -> Tensor:
    """See `reference.attend`. As DeepSpeed's `SparseSelfAttention` does it: scores, softmax in place, context. A
    window is a part of its `attn_mask`."""
    batch, heads, seq, _ = query.shape
    if window is not None:
        position = torch.arange(seq, device=query.device)
        in_window = windows.mask(position, position, window)
        attn_mask = in_window if attn_mask is None else attn_mask + in_window
    operators = _cache.get(layout, heads, block, query.device)
    assert operators is not None, "refuses() comes first"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        # DeepSpeed's backward pass fails where one operand of a product needs no gradient.
        query, key, value = (x if x.requires_grad else x.detach().requires_grad_() for x in (query, key, value))
    with torch.cuda.device_of(query):
        scores = operators.scores(query, key)  # [batch, kept, block, block]
        weights = operators.softmax(
            scores,
            scale=float(scale),
            rpe=None if rpe is None else _half(rpe, seq).expand(batch, heads, seq, seq),
            key_padding_mask=None if key_padding_mask is None else _half(key_padding_mask, seq),
            attn_mask=None if attn_mask is None else _half(attn_mask, seq).view(-1, seq).expand(seq, seq),
        )
        empty = operators.rows_without_keys(key_padding_mask, attn_mask, rpe)
        if empty is not None:
            # Through `.data`: the softmax saved this very tensor for its backward pass, which is to see the zeros too.
            weights.data.masked_fill_(empty, 0)
        return operators.context(weights, value)


def _extent(tensor: Tensor) -> int:
    """Elements between the first and the last one of a tensor in memory."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _half(mask: Tensor, seq: int) -> Tensor:
    """A mask in float16, its last dimension `seq` long and contiguous: the kernels step through it by 1."""
    return mask.expand(*mask.shape[:-1], seq).to(torch.float16).contiguous()


class _Operators:
    """DeepSpeed's three operators for one layout and device; they make their look-up tables at their first call.

    Args:
        layout: bool `[heads, n, n]` on the CPU.
    """

    def __init__(self, layout: Tensor, block: int, device: torch.device):
        classes = kernels.operators()
        assert not isinstance(classes, str), classes
        self.block = block
        self.num_blocks = int(layout.sum())
        self.layout = layout.to(device)
        head, row, _ = layout.nonzero().to(device).unbind(1)
        self.block_row = head * layout.shape[1] + row  # [kept]
        tables = layout.long()
        self.scores = classes.MatMul(tables, block, "sdd", trans_a=False, trans_b=True)
        self.softmax = classes.Softmax(tables, block)
        self.context = classes.MatMul(tables, block, "dsd", trans_a=False, trans_b=False)

    def rows_without_keys(self, *masks: Tensor | None) -> Tensor | None:
        """Which rows of the kept blocks have only keys that a mask removes, bool `[batch or 1, kept, block or 1, 1]`.

        Args:
            masks: key_padding_mask `[batch, seq]`, attn_mask and rpe, which broadcast to `[batch, heads, seq, seq]`.
        """
        key_padding_mask, *pair_masks = masks
        added = [] if key_padding_mask is None else [key_padding_mask[:, None, None, :]]
        added += [mask for mask in pair_masks if mask is not None]
        if not added:
            return None
        heads, n, _ = self.layout.shape
        total = added[0]
        for mask in added[1:]:
            total = total + mask
        removed = total.isneginf()
        removed = removed.expand(*removed.shape[:-1], n * self.block)[(None,) * (4 - removed.ndim)]
        no_key = removed.unflatten(-1, (n, self.block)).all(-1)  # [batch or 1, heads or 1, seq or 1, n]
        rows = (n, self.block) if no_key.shape[2] > 1 else (1, 1)
        no_key = no_key.unflatten(2, rows)  # [batch or 1, heads or 1, n or 1, block or 1, n]
        empty = (no_key | ~self.layout[None, :, :, None, :]).all(-1)  # [batch or 1, heads, n, block or 1]
        return empty.flatten(1, 2)[:, self.block_row, :, None]


class _Cache:
    """Operators by (layout's content, block, device, packing), for the `MOST_OPERATORS` used last."""

    def __init__(self) -> None:
        self._by_content: OrderedDict[tuple[Any, ...], _Operators | None] = OrderedDict()
        self._by_tensor: OrderedDict[tuple[Any, ...], tuple[Tensor, int, _Operators | None]] = OrderedDict()

    def clear(self) -> None:
        self._by_content.clear()
        self._by_tensor.clear()

    def get(self, layout: Tensor, heads: int, block: int, device: torch.device) -> _Operators | None:
        """The operators of `layout [heads or 1, n, n]`, or None if a head keeps no block."""
        # A tensor that was not written to since is not read again. The entry holds it, so that its address stays its
        # own.
        version = None if layout.is_inference() else layout._version
        options = (heads, block, device, kernels.packing())
        key = (layout.data_ptr(), layout.shape, layout.stride(), layout.dtype, layout.device, *options)
        known, known_version, operators = self._by_tensor.get(key, (None, None, None))
        if known is not None and known_version == version is not None:
            self._by_tensor.move_to_end(key)
            return operators
        kept = layout.ne(0).cpu().expand(heads, *layout.shape[1:]).contiguous()
        content = (sha256(np.packbits(kept.numpy()).tobytes()).digest(), kept.shape, *options)
        if content not in self._by_content:
            whole = bool(kept.flatten(1).any(1).all())
            self._by_content[content] = _Operators(kept, block, device) if whole else None
        operators = self._by_content[content]
        self._by_content.move_to_end(content)
        if version is not None:
            self._by_tensor[key] = (layout, version, operators)
        while len(self._by_content) > MOST_OPERATORS:
            self._by_content.popitem(last=False)
        while len(self._by_tensor) > MOST_OPERATORS:
            self._by_tensor.popitem(last=False)
        return operators


_cache = _Cache()
