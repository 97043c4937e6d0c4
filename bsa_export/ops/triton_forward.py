"""The fused forward kernel, the kernel that joins shared rows, and the one that writes zeros outside of sequences.

After FlashAttention-2 (Dao, 2023, arXiv:2307.08691): one pass with a running maximum and sum, no score matrix in
memory, backward from saved statistics of the rows. Scores are in units of log2, so that exp2 serves. The work comes
from `schedule.py`; a program is one item of one sequence. No atomics: each output is written by one program, partial
results are summed in a fixed order.

Sequences are the rows of a batch, or, with VARLEN, packed into the only row, sequence i at `[cu_seqlens[i],
cu_seqlens[i + 1])`. A `tensor` of the helpers is (pointer, stride of batch, of heads, of rows), a `place` (row of the
batch, head, first token, length). Statistics are float32 `[3 or 1, batch, heads, seq]`: log2 of each row's sum of
exponentials; with a bias, whose values may be so low that the sum would vanish next to them, also the row's maximum and
the log2 of the sum relative to it.

Prefixes: i_ index, o_ offsets, m_ mask, p_ pointer, b_ block of values.
"""

import triton
import triton.language as tl

from bsa_export.ops.triton_masks import masked_step, split_steps
from bsa_export.ops.triton_scores import ANY_VALUE, PARTS, add_product, part_sums, scores
from bsa_export.ops.triton_tiles import (
    load_consecutive,
    load_step,
    load_tile,
    row_offsets,
    run_columns,
    shared_row,
    step_columns,
    step_unit,
    store_rows,
    store_tile,
    work_item,
)


@triton.jit
def _next_maximum(b_s, b_max, scale, BIASED: tl.constexpr, MASKED: tl.constexpr):
    """The maximum with a step's `scores` in units of log2, and by what earlier probabilities shrink."""
    b_new = tl.max(b_s, 1)
    if not BIASED:
        b_new *= scale
    b_new = tl.maximum(b_max, b_new)
    return b_new, tl.exp2(b_max - _reference(b_new, BIASED or MASKED))


@triton.jit
def _reference(b_max, ALSO_NONE: tl.constexpr):
    """What probabilities are relative to: for a row without a key so far, any finite number, which makes them
    exp2(-inf) = 0."""
    if ALSO_NONE:
        return tl.where(b_max == float("-inf"), 0.0, b_max)
    else:
        return b_max


@triton.jit
def _probabilities(b_s, b_max, scale, BIASED: tl.constexpr, MASKED: tl.constexpr):
    """The probabilities of a step's `scores` relative to the maximum."""
    if not BIASED:
        b_s *= scale
    return tl.exp2(b_s - _reference(b_max, BIASED or MASKED)[:, None])


@triton.jit
def _forward_step(
    b_q,
    b_acc,
    b_max,
    b_sum,
    keys,
    values,
    k_tiles,
    v_tiles,
    place,
    o_m,
    p_bias,
    bit_masks,
    i_step,
    i_unit,
    o_c,
    scale,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BIASED: tl.constexpr,
    RUN: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`b_acc`, `b_max` and `b_sum` after one more step of keys."""
    b_k = load_step(keys, k_tiles, place, o_c, i_unit, SIZE, UNIT, DIM, PADDED, RUN)
    b_s = scores(
        b_q, b_k, p_bias, bit_masks, i_step, o_m, o_c, place[3], scale, SIZE, UNIT, BIASED, MASKED, WINDOW, PRECISION
    )
    b_max, b_alpha = _next_maximum(b_s, b_max, scale, BIASED, MASKED)
    b_p = _probabilities(b_s, b_max, scale, BIASED, MASKED)
    b_sum = b_sum * b_alpha[:, None] + part_sums(b_p, SIZE)
    b_v = load_step(values, v_tiles, place, o_c, i_unit, SIZE, UNIT, DIM, PADDED, RUN)
    return add_product(b_acc * b_alpha[:, None], b_p.to(b_v.dtype), b_v, PRECISION), b_max, b_sum


@triton.jit
def _log_sum(b_sum):
    return tl.where(b_sum == 0.0, float("-inf"), tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)))


@triton.jit
def _store_statistics(lse, b_max, b_sum, o_stat, plane, m_row, BIASED: tl.constexpr):
    b_log = _log_sum(b_sum)
    tl.store(lse + o_stat, b_max + b_log, mask=m_row)
    if BIASED:
        tl.store(lse + plane + o_stat, b_max, mask=m_row)
        tl.store(lse + 2 * plane + o_stat, b_log, mask=m_row)


@triton.jit(do_not_specialize=ANY_VALUE)
def forward_kernel(
    q,
    k,
    v,
    q_tiles,
    k_tiles,
    v_tiles,
    out_tiles,
    bias,
    spans,
    out,
    lse,
    partial,
    partial_lse,
    items,
    row_indices,
    column_indices,
    bit_masks,
    cu_seqlens,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_bias,
    batch,
    heads,
    seq,
    sequences,
    slots,
    scale,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BIASED: tl.constexpr,
    VARLEN: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out `[batch, heads, seq, DIM]`, lse the rows' statistics; `partial` float32 `[sequences, slots, SIZE,
    PADDED]`."""
    (i_head, i_tile, begin, end_full_run, end_full, end_run, end, slot, i_seq, i_b, o_seq, length, beyond) = work_item(
        items, row_indices, column_indices, cu_seqlens, sequences, seq, SIZE, UNIT, VARLEN, WINDOW
    )
    if beyond:
        return
    queries = (q, stride_qb, stride_qh, stride_qn)
    keys = (k, stride_kb, stride_kh, stride_kn)
    values = (v, stride_vb, stride_vh, stride_vn)
    outputs = (out, stride_ob, stride_oh, stride_on)
    place = (i_b, i_head, o_seq, length)
    o_m = row_offsets(row_indices, i_tile, SIZE, UNIT)
    b_q = load_tile(queries, q_tiles, place, i_tile, o_m, SIZE, UNIT, DIM, PADDED)
    p_bias = bias + i_b.to(tl.int64) * stride_bias

    b_acc = tl.zeros([SIZE, PADDED], tl.float32)
    b_max = tl.full([SIZE], float("-inf"), tl.float32)
    b_sum = tl.zeros([SIZE, PARTS], tl.float32)
    # Packed sequences with a window: steps that do not end within a sequence pass through the loop of masked ones.
    CUT: tl.constexpr = VARLEN and UNIT == SIZE and WINDOW is not None
    first, last, live, start = split_steps(
        column_indices, spans, i_b, begin, end_full_run, end_full, length, SIZE, UNIT, BIASED, CUT
    )
    if first < last:
        # The scores of a step are computed in the one before it: the copies that they need arrive during its softmax.
        # And the sum shrinks for them there: at the beginning of their own step, it would be carried between them in
        # two layouts.
        i_unit, i_next = step_unit(column_indices, first, SIZE, UNIT), step_unit(column_indices, first + 1, SIZE, UNIT)
        b_k = load_consecutive(k_tiles, i_b, i_head, o_seq + i_unit * UNIT, SIZE, PADDED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_max, b_alpha = _next_maximum(b_s, b_max, scale, False, False)
        for i_step in range(first, last - 1):
            i_value, i_key = (
                step_unit(column_indices, i_step + 1, SIZE, UNIT),
                step_unit(column_indices, i_step + 2, SIZE, UNIT),
            )
            b_p = _probabilities(b_s, b_max, scale, False, False)
            b_sum += part_sums(b_p, SIZE)
            b_v = load_consecutive(v_tiles, i_b, i_head, o_seq + i_unit * UNIT, SIZE, PADDED)
            b_acc = add_product(b_acc, b_p.to(b_v.dtype), b_v, PRECISION)
            b_k = load_consecutive(k_tiles, i_b, i_head, o_seq + i_next * UNIT, SIZE, PADDED)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_max, b_alpha = _next_maximum(b_s, b_max, scale, False, False)
            b_acc *= b_alpha[:, None]
            b_sum *= b_alpha[:, None]
            i_unit, i_next = i_value, i_key
        b_p = _probabilities(b_s, b_max, scale, False, False)
        b_sum += part_sums(b_p, SIZE)
        b_v = load_consecutive(v_tiles, i_b, i_head, o_seq + i_unit * UNIT, SIZE, PADDED)
        b_acc = add_product(b_acc, b_p.to(b_v.dtype), b_v, PRECISION)
    if UNIT < SIZE:
        first_apart, last_apart, live_apart, start_apart = split_steps(
            column_indices, spans, i_b, end_full_run, end_full, end_run, length, SIZE, UNIT, BIASED
        )
        o_next = step_columns(column_indices, first_apart, SIZE, UNIT)
        for i_step in range(first_apart, last_apart):
            o_c, o_next = o_next, step_columns(column_indices, i_step + 1, SIZE, UNIT)
            b_acc, b_max, b_sum = _forward_step(
                b_q,
                b_acc,
                b_max,
                b_sum,
                keys,
                values,
                k_tiles,
                v_tiles,
                place,
                o_m,
                p_bias,
                bit_masks,
                i_step,
                i_unit=0,
                o_c=o_c,
                scale=scale,
                SIZE=SIZE,
                UNIT=UNIT,
                DIM=DIM,
                PADDED=PADDED,
                BIASED=False,
                RUN=False,
                MASKED=VARLEN,
                WINDOW=WINDOW,
                PRECISION=PRECISION,
            )
    FEW: tl.constexpr = UNIT == SIZE and not BIASED and WINDOW is None
    for i_masked in tl.range(start, end_run, num_stages=1 if FEW else None):
        i_step = masked_step(i_masked, first, last, live, end_full, BIASED or CUT)
        i_unit = step_unit(column_indices, i_step, SIZE, UNIT)
        b_acc, b_max, b_sum = _forward_step(
            b_q,
            b_acc,
            b_max,
            b_sum,
            keys,
            values,
            k_tiles,
            v_tiles,
            place,
            o_m,
            p_bias,
            bit_masks,
            i_step,
            i_unit,
            o_c=run_columns(i_unit, SIZE, UNIT),
            scale=scale,
            SIZE=SIZE,
            UNIT=UNIT,
            DIM=DIM,
            PADDED=PADDED,
            BIASED=BIASED,
            RUN=not VARLEN,
            MASKED=True,
            WINDOW=WINDOW,
            PRECISION=PRECISION,
        )
    if UNIT < SIZE:
        for i_masked in tl.range(start_apart, end, num_stages=1):
            i_step = masked_step(i_masked, first_apart, last_apart, live_apart, end_run, BIASED)
            o_c = step_columns(column_indices, i_step, SIZE, UNIT)
            b_acc, b_max, b_sum = _forward_step(
                b_q,
                b_acc,
                b_max,
                b_sum,
                keys,
                values,
                k_tiles,
                v_tiles,
                place,
                o_m,
                p_bias,
                bit_masks,
                i_step,
                i_unit=0,
                o_c=o_c,
                scale=scale,
                SIZE=SIZE,
                UNIT=UNIT,
                DIM=DIM,
                PADDED=PADDED,
                BIASED=BIASED,
                RUN=False,
                MASKED=True,
                WINDOW=WINDOW,
                PRECISION=PRECISION,
            )

    b_sum = tl.sum(b_sum, 1)
    b_out = b_acc * (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    if slot < 0:
        store_tile(outputs, out_tiles, b_out, place, i_tile, o_m, SIZE, UNIT, DIM, PADDED, VARLEN)
        o_stat = (i_b.to(tl.int64) * heads + i_head) * seq + o_seq + o_m
        _store_statistics(lse, b_max, b_sum, o_stat, batch.to(tl.int64) * heads * seq, o_m < length, BIASED)
    else:
        o_slot = (i_seq.to(tl.int64) * slots + slot) * SIZE + tl.arange(0, SIZE)
        tl.store(partial + o_slot[:, None] * PADDED + tl.arange(0, PADDED)[None, :], b_out)
        tl.store(partial_lse + o_slot, b_max)
        tl.store(partial_lse + sequences.to(tl.int64) * slots * SIZE + o_slot, _log_sum(b_sum))


@triton.jit(do_not_specialize=ANY_VALUE)
def combine_kernel(
    out,
    lse,
    partial,
    partial_lse,
    splits,
    row_indices,
    cu_seqlens,
    stride_ob,
    stride_oh,
    stride_on,
    batch,
    heads,
    seq,
    sequences,
    slots,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BIASED: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Joins the partial results of one shared row of tiles, each weighted by its share of the sum."""
    i_head, i_tile, slot, n, i_seq, i_b, o_seq, length = shared_row(splits, cu_seqlens, sequences, seq, VARLEN)
    o_m = tl.arange(0, SIZE)
    o_dim = tl.arange(0, PADDED)
    b_acc = tl.zeros([SIZE, PADDED], tl.float32)
    b_max = tl.full([SIZE], float("-inf"), tl.float32)
    b_sum = tl.zeros([SIZE], tl.float32)
    for i_slot in range(slot, slot + n):
        o_slot = (i_seq.to(tl.int64) * slots + i_slot) * SIZE + o_m
        b_part = tl.load(partial_lse + o_slot)
        b_log = tl.load(partial_lse + sequences.to(tl.int64) * slots * SIZE + o_slot)
        b_new = tl.maximum(b_max, b_part)
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_old, b_weight = tl.exp2(b_max - b_ref), tl.exp2(b_part - b_ref + b_log)
        b_values = tl.load(partial + o_slot[:, None] * PADDED + o_dim[None, :])
        b_acc = b_acc * b_old[:, None] + b_values * b_weight[:, None]
        b_sum = b_sum * b_old + b_weight
        b_max = b_new
    b_out = b_acc * (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    o_row = row_offsets(row_indices, i_tile, SIZE, UNIT)
    outputs = (out, stride_ob, stride_oh, stride_on)
    store_rows(outputs, b_out, i_b, i_head, o_seq + o_row, o_seq + length, DIM, PADDED)
    o_stat = (i_b.to(tl.int64) * heads + i_head) * seq + o_seq + o_row
    _store_statistics(lse, b_max, b_sum, o_stat, batch.to(tl.int64) * heads * seq, o_row < length, BIASED)


@triton.jit(do_not_specialize=ANY_VALUE)
def outside_kernel(
    target,
    cu_seqlens,
    stride_b,
    stride_h,
    stride_n,
    heads,
    seq,
    sequences,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Zeros for the tokens that belong to no sequence, before the first one and behind the last."""
    pid = tl.program_id(0)
    o_row = pid // heads * SIZE + tl.arange(0, SIZE)
    begin, end = tl.load(cu_seqlens), tl.load(cu_seqlens + sequences)
    if (pid // heads * SIZE >= begin) & (pid // heads * SIZE + SIZE <= end):
        return
    o_row = tl.where((o_row < begin) | (o_row >= end), o_row, seq)
    b_zero = tl.zeros([SIZE, PADDED], tl.float32)
    targets = (target, stride_b, stride_h, stride_n)
    store_rows(targets, b_zero, pid * 0, pid % heads, o_row, seq, DIM, PADDED)
