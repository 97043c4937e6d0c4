"""Block-sparse attention in plain PyTorch, on any device: work and memory follow the number of kept blocks.

Block rows whose kept blocks are consecutive and the same in every head are computed on views. The others are computed
on gathered blocks: the rows of a head that keep the same blocks together, and rows that keep equally many in one batch.
All work is cut into parts of a size. Sums are float32, also for fp16 and bf16 inputs, so every value of a mask keeps
its meaning. The backward pass recomputes the probabilities: nothing but the inputs is kept for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from bsa_export.ops import window as windows
from bsa_export.ops.contract import second_derivative

# Block rows computed together are cut at this many tokens: the backward pass holds their scores.
MAX_ROW_TOKENS = 512

# Bytes that a part takes, for its scores and what it gathers: enough to fill a device. The forward pass does not hold
# the scores; backward they are to stay in a CPU's cache.
PART_BYTES = 256 << 20
CPU_PART_BYTES = {"forward": 32 << 20, "backward": 4 << 20}


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
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    rpe: Tensor | None,
    scale: float,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """See `reference.attend`."""
    return torch_attention(query, key, value, layout, block, key_padding_mask, attn_mask, rpe, scale, window)


class _Operand:
    """An input or a result: `tokens [batch, heads, seq, head_dim]`, and the same as `blocks [batch, heads * n, block *
    head_dim]`.

    The blocks of an input are a copy, zero where the last one lacks tokens. A result is made of whole blocks, in the
    same memory.
    """

    def __init__(self, tokens: Tensor, block: int):
        self.tokens = tokens
        self.block = block

    @cached_property
    def blocks(self) -> Tensor:
        batch, heads, seq, head_dim = self.tokens.shape
        missing = -seq % self.block
        x = pad(self.tokens, (0, 0, 0, missing)) if missing else self.tokens
        return x.reshape(batch, -1, self.block * head_dim)


class _Masks:
    """What is added to the scores: `keys [batch, seq]` or None, `pairs`, each `[batch, heads, seq, seq]`, and -inf
    outside of the `window`."""

    def __init__(
        self,
        query: Tensor,
        window: Sequence[int] | None,
        key_padding_mask: Tensor | None,
        *pair_masks: Tensor | None,
    ):
        self.query = query
        self.window = None if window is None else (window[0], window[1])
        self.keys = key_padding_mask
        batch, heads, seq, _ = query.shape
        self.pairs = [mask.expand(batch, heads, seq, seq) for mask in pair_masks if mask is not None]

    def keys_in_blocks(self, block: int) -> Tensor | None:
        """`[batch, n, block]`, -inf for the tokens that the last block lacks."""
        batch, _, seq, _ = self.query.shape
        keys, missing = self.keys, -seq % block
        if missing:
            keys = self.query.new_zeros(batch, seq, dtype=torch.float32) if keys is None else keys
            keys = pad(keys, (0, missing), value=float("-inf"))
        return None if keys is None else keys.reshape(batch, -1, block)


@dataclass(frozen=True)
class _Windows:
    """A part: windows of some heads, one in each of several sequences, or `count` in one, each `step` tokens after the
    last.

    The `rows` tokens from `row` on attend to the `columns` tokens from `column` on, all taken as views: `[sequences,
    heads, tokens, head_dim]` or `[heads, count, tokens, head_dim]`.
    """

    sequences: slice
    heads: slice
    row: int
    rows: int
    column: int
    columns: int
    step: int
    count: int

    def take_rows(self, x: _Operand) -> Tensor:
        return self._view(x, self.row, self.rows)

    def take_columns(self, x: _Operand) -> Tensor:
        return self._view(x, self.column, self.columns)

    def _view(self, x: _Operand, start: int, size: int) -> Tensor:
        tokens = x.tokens[self.sequences, self.heads, start : self._stop(start, size)]
        return self._without_one(tokens.unfold(2, size, self.step).mT)

    def _stop(self, start: int, size: int) -> int:
        return start + (self.count - 1) * self.step + size

    def _without_one(self, x: Tensor) -> Tensor:
        """`[sequences, heads, count, ...]` without the dimension that is 1, sequences or count."""
        return x.flatten(1, 2) if self.count == 1 else x.flatten(0, 1)

    def put_rows(self, x: _Operand, value: Tensor) -> None:
        self.take_rows(x).copy_(value)

    def add_columns(self, x: _Operand, value: Tensor) -> None:
        total = self.take_columns(x)
        # Windows so far apart have no column in common.
        apart = 1 if self.count == 1 else -(-self.columns // self.step)
        for i in range(min(apart, self.count)):
            total[:, i::apart] += value[:, i::apart]

    def bias(self, masks: _Masks) -> Tensor | None:
        added = []
        for mask in masks.pairs:
            mask = mask[self.sequences, self.heads, self.row :, self.column :]
            *outer, row, column = mask.stride()
            size = (*mask.shape[:2], self.count, self.rows, self.columns)
            added.append(
                mask.as_strided(size, (*outer, self.step * (row + column), row, column), mask.storage_offset())
            )
        if masks.keys is not None:
            keys = masks.keys[self.sequences, self.column : self._stop(self.column, self.columns)]
            added.append(keys.unfold(1, self.columns, self.step)[:, None, :, None, :])
        if masks.window is not None:
            left, right = masks.window
            if self.column < self.row + self.rows - 1 - left or self.column + self.columns - 1 > self.row + right:
                rows, columns = (
                    torch.arange(start, start + size, device=masks.query.device)
                    for start, size in ((self.row, self.rows), (self.column, self.columns))
                )
                added.append(windows.mask(rows, columns, masks.window)[None, None, None])
        return self._without_one(sum(added[1:], added[0])) if added else None


@dataclass(frozen=True)
class _Gather:
    """A part: block rows `rows [G, r]`, and the blocks `columns [G, k]` that the r rows of an entry attend to.

    Both count head * n + block.
    """

    rows: Tensor
    columns: Tensor
    n: int
    block: int

    def take_rows(self, x: _Operand) -> Tensor:
        return self._take(x, self.rows)

    def take_columns(self, x: _Operand) -> Tensor:
        return self._take(x, self.columns)

    def _take(self, x: _Operand, index: Tensor) -> Tensor:
        taken = x.blocks.index_select(1, index.flatten())
        return taken.view(len(taken), len(index), -1, x.tokens.shape[-1])

    def put_rows(self, x: _Operand, value: Tensor) -> None:
        x.blocks[:, self.rows.flatten()] = value.reshape(len(value), self.rows.numel(), -1).to(x.blocks.dtype)

    def add_columns(self, x: _Operand, value: Tensor) -> None:
        x.blocks.index_add_(1, self.columns.flatten(), value.reshape(len(value), self.columns.numel(), -1))

    def bias(self, masks: _Masks) -> Tensor | None:
        keys = masks.keys_in_blocks(self.block)
        bias = None if keys is None else keys[:, self.columns % self.n].flatten(2)[:, :, None]
        if masks.pairs or masks.window is not None:
            last = masks.query.shape[2] - 1
            within = torch.arange(self.block, device=self.rows.device)
            tokens, keys = (
                (x[..., None] % self.n * self.block + within).flatten(1).clamp(max=last)
                for x in (self.rows, self.columns)
            )
            where = (slice(None), self.rows[:, :1, None] // self.n, tokens[:, :, None], keys[:, None, :])
            added = [mask[where] for mask in masks.pairs]
            if masks.window is not None:
                added.append(windows.mask(tokens, keys, masks.window)[None])
            for one in added:
                bias = one if bias is None else bias + one
        return bias


def _parts(
    query: Tensor, layout: Tensor, block: int, way: str, window: tuple[int, int] | None = None
) -> Iterator[_Windows | _Gather]:
    """Cuts the work of a way, `forward` or `backward`. Block rows that keep nothing are in no part."""
    batch, heads, seq, head_dim = query.shape
    n = layout.shape[1]
    most = CPU_PART_BYTES[way] if query.device.type == "cpu" else PART_BYTES
    kept = layout.ne(0).cpu().numpy()
    if window is not None:
        kept = windows.kept_within(kept, block, window)
    if (kept == kept[:1]).all():
        kept = kept[:1].copy()
        runs = _runs(kept[0], seq, block)
        for first, last, _, _ in runs:
            kept[0, first // block : -(-last // block)] = False
        for row, rows, column, columns, step, count in _progressions(runs):
            window_bytes = rows * columns * 4
            step_heads = min(heads, max(1, most // window_bytes))
            at_once = max(1, most // (window_bytes * step_heads))
            step_count, step_batch = (1, at_once) if count == 1 else (at_once, 1)
            for sequence, head, i in product(
                range(0, batch, step_batch), range(0, heads, step_heads), range(0, count, step_count)
            ):
                yield _Windows(
                    slice(sequence, sequence + step_batch),
                    slice(head, head + step_heads),
                    row + i * step,
                    rows,
                    column + i * step,
                    columns,
                    step,
                    min(step_count, count - i),
                )
    for of_rows, of_columns in _groups(np.broadcast_to(kept, (heads, n, n)), block):
        entry_bytes = batch * of_columns.shape[1] * block * (2 * head_dim + of_rows.shape[1] * block) * 4
        at_once = max(1, most // entry_bytes)
        for i in range(0, len(of_rows), at_once):
            piece = [torch.from_numpy(x[i : i + at_once]).to(query.device) for x in (of_rows, of_columns)]
            yield _Gather(piece[0], piece[1], n, block)


def _runs(kept: np.ndarray, seq: int, block: int) -> list[tuple[int, int, int, int]]:
    """The tokens `[first, last)`, whole block rows of `kept [n, n]`, that attend to just the tokens `[start, stop)`."""
    n = len(kept)
    start, stop = kept.argmax(1), n - kept[:, ::-1].argmax(1)
    is_run = kept.any(1) & (kept.sum(1) == stop - start)
    runs: list[list[int]] = []
    for row in np.flatnonzero(is_run).tolist():
        columns = [int(start[row]), int(stop[row])]
        if runs and runs[-1][1:] == [row, *columns] and (row + 1 - runs[-1][0]) * block <= MAX_ROW_TOKENS:
            runs[-1][1] += 1
        else:
            runs.append([row, row + 1, *columns])
    limits = [[min(edge * block, seq) for edge in run] for run in runs]
    return [(first, last, start, stop) for first, last, start, stop in limits]


def _progressions(runs: list[tuple[int, int, int, int]]) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Runs of one shape at equal distances: row, rows, column, columns, step, count, see `_Windows`."""
    alike: dict[tuple[int, int, int], list[int]] = {}
    for first, last, start, stop in runs:
        alike.setdefault((last - first, stop - start, start - first), []).append(first)
    for (rows, columns, offset), firsts in alike.items():
        # Aligned windows joined with sliding ones may have two such rows each.
        lanes = next(
            (lanes for lanes in (1, 2) if len(set(np.subtract(firsts[lanes:], firsts[:-lanes]))) == 1), len(firsts)
        )
        for lane in range(lanes):
            members = firsts[lane::lanes]
            step = members[1] - members[0] if len(members) > 1 else columns
            yield members[0], rows, members[0] + offset, columns, step, len(members)


def _groups(kept: np.ndarray, block: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Block rows of `kept [heads, n, n]` by what they keep: `rows [G, r]` and `columns [G, k]`, see `_Gather`."""
    heads, n, _ = kept.shape
    kept = kept.reshape(heads * n, n)
    head = np.arange(heads * n, dtype=np.uint32) // n
    bits = np.concatenate([np.packbits(kept, axis=1), head[:, None].view(np.uint8)], axis=1)
    _, first, pattern = np.unique(bits.view(f"V{bits.shape[1]}").ravel(), return_index=True, return_inverse=True)
    # The rows of a pattern are neighbours in `order`; long runs are cut.
    order = np.argsort(pattern, kind="stable")
    start = np.searchsorted(pattern[order], np.arange(len(first)))
    length = np.diff(start, append=len(order))
    most = max(1, MAX_ROW_TOKENS // block)
    pieces = -(-length // most)
    which = np.repeat(np.arange(len(first)), pieces)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = start[which] + nth * most
    length = np.minimum(length[which] - nth * most, most)
    keeps = kept.sum(1)[first[which]]
    for r, k in np.unique(np.stack([length, keeps], 1), axis=0):
        if k:
            chosen = np.flatnonzero((length == r) & (keeps == k))
            rows = order[start[chosen][:, None] + np.arange(r)]
            columns = kept[rows[:, 0]].nonzero()[1].reshape(-1, k) + rows[:, :1] // n * n
            yield rows, columns


def _without_empty(bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The bias with 0 in rows that are -inf throughout, and which rows those are, `[batch, G, 1 or r * block, 1]`."""
    if bias is None:
        return None, None
    empty = bias.isneginf().all(-1, keepdim=True)
    return bias.masked_fill(empty, 0), empty


@torch.library.custom_op("bsa_export::torch_attention", mutates_args=())
def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    block: int,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    rpe: Tensor | None,
    scale: float,
    window: Sequence[int] | None,
) -> Tensor:
    """`attend` as an operator, so that torch.compile takes it whole."""
    batch, heads, seq, head_dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    masks = _Masks(query, window, key_padding_mask, attn_mask, rpe)
    q, k, v = (_Operand(x, block) for x in (query, key, value))
    output = _Operand(query.new_zeros(batch, heads, layout.shape[1] * block, head_dim), block)
    for part in _parts(query, layout, block, "forward", masks.window):
        b_q, b_k, b_v = (x.to(dtype) for x in (part.take_rows(q), part.take_columns(k), part.take_columns(v)))
        bias, empty = _without_empty(part.bias(masks))
        bias = bias if bias is None else bias.to(dtype).expand(*b_q.shape[:3], b_k.shape[2])
        if query.device.type == "cpu":
            b_o = scaled_dot_product_attention(b_q, b_k, b_v, attn_mask=bias, scale=scale)
        else:  # the fused kernels of CUDA err 2 to 4 times as much as plain PyTorch in float32
            b_s = (b_q @ b_k.mT).mul_(scale)
            b_o = (b_s if bias is None else b_s.add_(bias)).softmax(-1) @ b_v
        if empty is not None:
            b_o.masked_fill_(empty, 0)
        part.put_rows(output, b_o)
    return output.tokens[:, :, :seq].contiguous()


@torch_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("bsa_export::torch_attention_backward", mutates_args=())
def torch_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    block: int,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    rpe: Tensor | None,
    scale: float,
    window: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    batch, heads, seq, head_dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    masks = _Masks(query, window, key_padding_mask, attn_mask, rpe)
    q, k, v, do = (_Operand(x, block) for x in (query, key, value, grad_output))
    shape = (batch, heads, layout.shape[1] * block, head_dim)
    dq, dk, dv = (_Operand(query.new_zeros(shape, dtype=dtype), block) for _ in range(3))
    # backward() may be called where autocast would cast the products
    with torch.autocast(query.device.type, enabled=False):
        for part in _parts(query, layout, block, "backward", masks.window):
            b_q, b_do = (part.take_rows(x).to(dtype) for x in (q, do))  # [batch, G, rows, head_dim]
            b_k, b_v = (part.take_columns(x).to(dtype) for x in (k, v))  # [batch, G, columns, head_dim]
            bias, empty = _without_empty(part.bias(masks))
            b_p = (b_q @ b_k.mT).mul_(scale)  # [batch, G, rows, columns]
            b_p = (b_p if bias is None else b_p.add_(bias)).softmax(-1)
            if empty is not None:
                b_p.masked_fill_(empty, 0)
            b_dp = b_do @ b_v.mT
            b_ds = b_dp.sub_((b_p * b_dp).sum(-1, keepdim=True)).mul_(b_p).mul_(scale)
            part.put_rows(dq, b_ds @ b_k)
            part.add_columns(dk, b_ds.mT @ b_q)
            part.add_columns(dv, b_p.mT @ b_do)
    d_query, d_key, d_value = (x.tokens[:, :, :seq].to(query.dtype).contiguous() for x in (dq, dk, dv))
    return d_query, d_key, d_value


@torch_attention_backward.register_fake
def _(grad_output: Tensor, query: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(query.new_empty(query.shape) for _ in range(3))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, layout, ctx.block, *masks, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, layout, *masks)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, layout, *masks = ctx.saved_tensors
    options = (*masks, ctx.scale, ctx.window)
    gradients = torch_attention_backward(grad_output, query, key, value, layout, ctx.block, *options)
    return *gradients, *[None] * 7


torch_attention.register_autograd(_backward, setup_context=_save)
torch_attention_backward.register_autograd(second_derivative)
