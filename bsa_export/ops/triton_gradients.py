"""The fused kernels of the backward pass: gradient of queries, with the sums of the keys that it needs, gradients of
keys and values, and the sums over shared rows.

What they have in common with the forward pass, and the prefixes of names: `triton_forward.py`.
"""

import triton
import triton.language as tl

from bsa_export.ops.triton_masks import masked_step, span_of_rows, split_steps
from bsa_export.ops.triton_scores import ANY_VALUE, PARTS, add_product, in_window, part_sums, rounded, scores
from bsa_export.ops.triton_tiles import (
    first_unit,
    load_rows,
    load_step,
    row_offsets,
    row_units,
    run_columns,
    sequence,
    shared_row,
    step_columns,
    step_mask,
    step_unit,
    store_rows,
    store_tile,
    work_item,
)

# Units whose sums of keys are read at once.
LANES: tl.constexpr = tl.constexpr(16)

# Biases beyond this, in units of log2, count like it where a mean of keys is weighted by them: sums of weights stay in
# range.
FARTHEST_BIAS: tl.constexpr = tl.constexpr(30.0)


@triton.jit
def _load_statistics(lse, o_stat, plane, m_row, BIASED: tl.constexpr, MASKED: tl.constexpr):
    """The statistics from which probabilities are recomputed, (maximum, log2 of the sum): exp2((score - maximum) -
    log), the log 0 if not BIASED. A row without any key gets (inf, 0), which makes them 0."""
    p_max = lse + plane + o_stat if BIASED else lse + o_stat
    b_max = tl.load(p_max, mask=m_row, other=float("inf")) if MASKED else tl.load(p_max)
    b_log = tl.zeros_like(b_max)
    if BIASED:
        b_log = tl.load(lse + 2 * plane + o_stat, mask=m_row, other=0.0)
        b_log = tl.where(b_max == float("-inf"), 0.0, b_log)
    # a step without a bias or a mask has a key for each of its rows
    if BIASED or MASKED:
        b_max = tl.where(b_max == float("-inf"), float("inf"), b_max)
    return b_max, b_log


@triton.jit(do_not_specialize=ANY_VALUE)
def key_sums_kernel(
    k,
    bias,
    sums,
    weights,
    cu_seqlens,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_bias,
    heads,
    seq,
    sequences,
    units,
    KEYS: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BIASED: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Sums of the keys of each unit, float32 `[heads, units, PADDED]`, a key weighted by exp2 of its bias, and of these
    weights, `[heads, units]`; a program sums KEYS keys. What -inf removes is not read."""
    ACROSS: tl.constexpr = KEYS // UNIT
    pid = tl.program_id(0)
    i_seq = pid % sequences
    i_head = (pid // sequences) % heads
    i_tile = pid // sequences // heads
    i_b, o_seq, length = sequence(cu_seqlens, i_seq, seq, VARLEN)
    # Neighbouring rows are of different units, so that a thread, which has every eighth or sixteenth, sums most of a
    # unit alone.
    o_n = tl.arange(0, KEYS)
    o_m = i_tile * KEYS + o_n % ACROSS * UNIT + o_n // ACROSS
    b_weight = (o_m < length).to(tl.float32)
    if BIASED:
        b_bias = tl.load(bias + i_b.to(tl.int64) * stride_bias + o_m, mask=o_m < length, other=float("-inf"))
        b_near = tl.minimum(tl.maximum(b_bias, -FARTHEST_BIAS), FARTHEST_BIAS)
        b_weight = tl.where(b_bias == float("-inf"), 0.0, tl.exp2(b_near))
    o_row = o_seq + tl.where(b_weight > 0.0, o_m, length)
    keys = (k, stride_kb, stride_kh, stride_kn)
    b_k = load_rows(keys, i_b, i_head, o_row, o_seq + length, DIM, PADDED)
    b_k = rounded(b_k.to(tl.float32) * b_weight[:, None])

    o_unit = i_tile * ACROSS + tl.arange(0, ACROSS)
    m_unit = o_unit * UNIT < length
    o_sum = i_head.to(tl.int64) * units + first_unit(i_seq, o_seq, seq, UNIT, VARLEN) + o_unit
    p_sums = sums + o_sum[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
    tl.store(p_sums, tl.sum(tl.reshape(b_k, [UNIT, ACROSS, PADDED]), 0), mask=m_unit[:, None])
    tl.store(weights + o_sum, tl.sum(tl.reshape(b_weight, [UNIT, ACROSS]), 0), mask=m_unit)


@triton.jit(do_not_specialize=ANY_VALUE)
def visible_keys_kernel(
    sums,
    weights,
    visible,
    visible_weights,
    partial_visible,
    partial_weights,
    items,
    row_indices,
    column_indices,
    bit_masks,
    cu_seqlens,
    heads,
    seq,
    sequences,
    units,
    slots,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    PADDED: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Adds up the keys that each row attends to: their sums, float32 `[heads, units, PADDED]`, and the weights,
    `[heads, units]`, once for the rows of a unit, which attend to the same keys. For shared rows, the part of each
    item: `[sequences, slots, SIZE / UNIT, PADDED]`."""
    ACROSS: tl.constexpr = SIZE // UNIT
    (i_head, i_tile, begin, end_full_run, end_full, end_run, end, slot, i_seq, i_b, o_seq, length, beyond) = work_item(
        items, row_indices, column_indices, cu_seqlens, sequences, seq, SIZE, UNIT, VARLEN
    )
    if beyond:
        return
    o_first = i_head.to(tl.int64) * units + first_unit(i_seq, o_seq, seq, UNIT, VARLEN)
    o_across = tl.arange(0, ACROSS)
    o_dim = tl.arange(0, PADDED)
    b_visible = tl.zeros([ACROSS, PADDED], tl.float32)
    b_weight = tl.zeros([ACROSS], tl.float32)
    last = end * ACROSS
    for first in range(begin * ACROSS, last, LANES):
        o_lane = first + tl.arange(0, LANES)
        o_unit = tl.load(column_indices + o_lane, mask=o_lane < last, other=0)
        m_unit = (o_lane < last) & (o_unit * UNIT < length)
        b_sums = tl.load(sums + (o_first + o_unit)[:, None] * PADDED + o_dim[None, :], mask=m_unit[:, None], other=0.0)
        b_weights = tl.load(weights + o_first + o_unit, mask=m_unit, other=0.0)
        b_word = tl.load(bit_masks + o_lane // ACROSS, mask=o_lane < last, other=0)
        m_kept = ((b_word[None, :] >> (o_across[:, None] * ACROSS + (o_lane % ACROSS)[None, :])) & 1) == 1
        b_visible += tl.sum(tl.where(m_kept[:, :, None], b_sums[None, :, :], 0.0), 1)
        b_weight += tl.sum(tl.where(m_kept, b_weights[None, :], 0.0), 1)
    if slot < 0:
        o_row = row_units(row_indices, i_tile, SIZE, UNIT)
        m_row = o_row * UNIT < length
        tl.store(visible + (o_first + o_row)[:, None] * PADDED + o_dim[None, :], b_visible, mask=m_row[:, None])
        tl.store(visible_weights + o_first + o_row, b_weight, mask=m_row)
    else:
        o_slot = (i_seq.to(tl.int64) * slots + slot) * ACROSS + o_across
        tl.store(partial_visible + o_slot[:, None] * PADDED + o_dim[None, :], b_visible)
        tl.store(partial_weights + o_slot, b_weight)


@triton.jit
def _centered(b_dq, b_residual, b_visible, b_weight):
    """`b_dq` without what `b_rest` of the mean of the keys adds to it, see `query_gradient_kernel`."""
    return b_dq - b_residual[:, None] * (b_visible / tl.where(b_weight == 0.0, 1.0, b_weight)[:, None])


@triton.jit
def _query_gradient_step(
    b_q,
    b_do,
    b_max,
    b_log,
    b_delta,
    b_dq,
    b_residual,
    b_mean,
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
    """`b_dq` and `b_residual` after one more step of keys; with a window also `b_mean`, that of the keys under their
    probabilities."""
    b_k = load_step(keys, k_tiles, place, o_c, i_unit, SIZE, UNIT, DIM, PADDED, RUN)
    b_v = load_step(values, v_tiles, place, o_c, i_unit, SIZE, UNIT, DIM, PADDED, RUN)
    b_s = scores(
        b_q, b_k, p_bias, bit_masks, i_step, o_m, o_c, place[3], scale, SIZE, UNIT, BIASED, MASKED, WINDOW, PRECISION
    )
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    if BIASED:
        b_p = tl.exp2((b_s - b_max[:, None]) - b_log[:, None])
    else:
        b_p = tl.exp2(b_s * scale - b_max[:, None])
    b_ds = b_p * (b_dp - b_delta[:, None])
    if PRECISION == "ieee":
        b_ds = rounded(b_ds)  # without tensor cores threads exchange them for the sums of rows
    if WINDOW is not None:
        b_mean = add_product(b_mean, b_p.to(b_k.dtype), b_k, PRECISION)
    return add_product(b_dq, b_ds.to(b_k.dtype), b_k, PRECISION), b_residual + part_sums(b_ds, SIZE), b_mean


@triton.jit(do_not_specialize=ANY_VALUE)
def query_gradient_kernel(
    q,
    k,
    v,
    out,
    d_out,
    k_tiles,
    v_tiles,
    d_q_tiles,
    bias,
    spans,
    visible,
    visible_weights,
    lse,
    delta,
    d_q,
    partial,
    partial_residual,
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
    stride_gb,
    stride_gh,
    stride_gn,
    stride_db,
    stride_dh,
    stride_dn,
    stride_bias,
    batch,
    heads,
    seq,
    sequences,
    units,
    slots,
    scale,
    grad_scale,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BIASED: tl.constexpr,
    VARLEN: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_q, and delta = sum(out * d_out) per row, float32 `[batch, heads, seq]`, for the kernel of keys and values.

    The exact gradients of a row's scores sum to 0. Those computed here sum to a residual, because delta comes from
    `out`, which is rounded. This adds to d_q the residual times the mean of the row's keys, weighted by their
    probabilities, and that mean may be large. So the residual times a mean of the same keys, weighted by their biases,
    is subtracted; what remains depends only on how far the keys differ from each other. Only keys that the row attends
    to count, since others may be of any size. Their sums come from `visible_keys_kernel`: here every program would wait
    for them, there many programs run at once. The residual of a part of a shared row is more than a rounding error:
    `sum_kernel` adds the parts first.

    With a window the rows of a unit attend to different keys. The mean of the keys, weighted by their probabilities, is
    then computed here, with one more matrix product in each step; for the parts of shared rows it is stored in
    `visible`, float32 `[sequences, slots, SIZE, PADDED]`. The residual is then also added to delta, for the kernel of
    keys and values: the first rows under a window such as (64, 0) have few keys, whose gradients get the whole
    residual.
    """
    (i_head, i_tile, begin, end_full_run, end_full, end_run, end, slot, i_seq, i_b, o_seq, length, beyond) = work_item(
        items, row_indices, column_indices, cu_seqlens, sequences, seq, SIZE, UNIT, VARLEN, WINDOW
    )
    if beyond:
        return
    queries = (q, stride_qb, stride_qh, stride_qn)
    keys = (k, stride_kb, stride_kh, stride_kn)
    values = (v, stride_vb, stride_vh, stride_vn)
    outputs = (out, stride_ob, stride_oh, stride_on)
    out_gradients = (d_out, stride_gb, stride_gh, stride_gn)
    q_gradients = (d_q, stride_db, stride_dh, stride_dn)
    place = (i_b, i_head, o_seq, length)
    o_m = row_offsets(row_indices, i_tile, SIZE, UNIT)
    # Pointers, not copies by the hardware: those wait for each other.
    b_q = load_rows(queries, i_b, i_head, o_seq + o_m, o_seq + length, DIM, PADDED)
    b_do = load_rows(out_gradients, i_b, i_head, o_seq + o_m, o_seq + length, DIM, PADDED)
    b_o = load_rows(outputs, i_b, i_head, o_seq + o_m, o_seq + length, DIM, PADDED)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    o_stat = (i_b.to(tl.int64) * heads + i_head) * seq + o_seq + o_m
    # every item of a shared row computes the same delta
    tl.store(delta + o_stat, b_delta, mask=o_m < length)
    plane = batch.to(tl.int64) * heads * seq
    b_max, b_log = _load_statistics(lse, o_stat, plane, o_m < length, BIASED, True)
    b_lse, b_none = _load_statistics(lse, o_stat, plane, o_m < length, False, True)
    p_bias = bias + i_b.to(tl.int64) * stride_bias

    b_dq = tl.zeros([SIZE, PADDED], tl.float32)
    b_residual = tl.zeros([SIZE, PARTS], tl.float32)
    b_mean = tl.zeros([SIZE, PADDED], tl.float32)
    # Packed sequences with a window: steps that do not end within a sequence pass through the loop of masked ones.
    CUT: tl.constexpr = VARLEN and UNIT == SIZE and WINDOW is not None
    first, last, live, start = split_steps(
        column_indices, spans, i_b, begin, end_full_run, end_full, length, SIZE, UNIT, BIASED, CUT
    )
    i_next = step_unit(column_indices, first, SIZE, UNIT)
    for i_step in range(first, last):
        i_unit, i_next = i_next, step_unit(column_indices, i_step + 1, SIZE, UNIT)
        b_dq, b_residual, b_mean = _query_gradient_step(
            b_q,
            b_do,
            b_max=b_lse,
            b_log=b_none,
            b_delta=b_delta,
            b_dq=b_dq,
            b_residual=b_residual,
            b_mean=b_mean,
            keys=keys,
            values=values,
            k_tiles=k_tiles,
            v_tiles=v_tiles,
            place=place,
            o_m=o_m,
            p_bias=p_bias,
            bit_masks=bit_masks,
            i_step=i_step,
            i_unit=i_unit,
            o_c=run_columns(i_unit, SIZE, UNIT),
            scale=scale,
            SIZE=SIZE,
            UNIT=UNIT,
            DIM=DIM,
            PADDED=PADDED,
            BIASED=False,
            RUN=True,
            MASKED=False,
            WINDOW=WINDOW,
            PRECISION=PRECISION,
        )
    if UNIT < SIZE:
        first_apart, last_apart, live_apart, start_apart = split_steps(
            column_indices, spans, i_b, end_full_run, end_full, end_run, length, SIZE, UNIT, BIASED
        )
        o_next = step_columns(column_indices, first_apart, SIZE, UNIT)
        for i_step in range(first_apart, last_apart):
            o_c, o_next = o_next, step_columns(column_indices, i_step + 1, SIZE, UNIT)
            b_dq, b_residual, b_mean = _query_gradient_step(
                b_q,
                b_do,
                b_max=b_lse,
                b_log=b_none,
                b_delta=b_delta,
                b_dq=b_dq,
                b_residual=b_residual,
                b_mean=b_mean,
                keys=keys,
                values=values,
                k_tiles=k_tiles,
                v_tiles=v_tiles,
                place=place,
                o_m=o_m,
                p_bias=p_bias,
                bit_masks=bit_masks,
                i_step=i_step,
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
        b_dq, b_residual, b_mean = _query_gradient_step(
            b_q,
            b_do,
            b_max,
            b_log,
            b_delta,
            b_dq,
            b_residual,
            b_mean,
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
            b_dq, b_residual, b_mean = _query_gradient_step(
                b_q,
                b_do,
                b_max,
                b_log,
                b_delta,
                b_dq,
                b_residual,
                b_mean,
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
    b_residual = tl.sum(b_residual, 1)
    if slot < 0:
        if WINDOW is not None:
            b_dq -= b_residual[:, None] * b_mean
            tl.store(delta + o_stat, b_delta + b_residual, mask=o_m < length)
        else:
            o_row = i_tile + tl.arange(0, 1) if UNIT == SIZE else o_m // UNIT
            m_row = o_row * UNIT < length
            o_visible = i_head.to(tl.int64) * units + first_unit(i_seq, o_seq, seq, UNIT, VARLEN) + o_row
            b_visible = tl.load(
                visible + o_visible[:, None] * PADDED + tl.arange(0, PADDED)[None, :], mask=m_row[:, None], other=0.0
            )
            b_weight = tl.load(visible_weights + o_visible, mask=m_row, other=0.0)
            b_dq = _centered(b_dq, b_residual, b_visible, b_weight)
        b_dq = b_dq * grad_scale
        store_tile(q_gradients, d_q_tiles, b_dq, place, i_tile, o_m, SIZE, UNIT, DIM, PADDED, VARLEN)
    else:
        o_slot = (i_seq.to(tl.int64) * slots + slot) * SIZE + tl.arange(0, SIZE)
        tl.store(partial + o_slot[:, None] * PADDED + tl.arange(0, PADDED)[None, :], b_dq)
        tl.store(partial_residual + o_slot, b_residual)
        if WINDOW is not None:
            tl.store(visible + o_slot[:, None] * PADDED + tl.arange(0, PADDED)[None, :], b_mean)


@triton.jit
def _key_gradient_step(
    b_k,
    b_v,
    b_bias,
    b_dk,
    b_dv,
    queries,
    out_gradients,
    q_tiles,
    d_out_tiles,
    lse,
    delta,
    o_stats,
    plane,
    place,
    o_m,
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
    """`b_dk` and `b_dv` after one more step of queries."""
    b_q = load_step(queries, q_tiles, place, o_c, i_unit, SIZE, UNIT, DIM, PADDED, RUN)
    b_do = load_step(out_gradients, d_out_tiles, place, o_c, i_unit, SIZE, UNIT, DIM, PADDED, RUN)
    # queries beyond the sequence get probability 0 from their statistics
    b_max, b_log = _load_statistics(lse, o_stats + o_c, plane, o_c < place[3], BIASED, MASKED)
    if MASKED:
        b_delta = tl.load(delta + o_stats + o_c, mask=o_c < place[3], other=0.0)
    else:
        b_delta = tl.load(delta + o_stats + o_c)
    # Queries are the rows, for a thread holds few rows and many columns, and their statistics with them; and the second
    # product waits until the first one's registers are free.
    b_s = tl.dot(b_q, tl.trans(b_k) if PRECISION == "ieee" else b_k, input_precision=PRECISION) * scale
    if BIASED:
        b_p = tl.exp2(((b_s + b_bias[None, :]) - b_max[:, None]) - b_log[:, None])
    else:
        b_p = tl.exp2(b_s - b_max[:, None])
    if MASKED and UNIT < SIZE:
        b_p = tl.where(tl.trans(step_mask(bit_masks, i_step, SIZE, UNIT)), b_p, 0.0)
    if MASKED:
        b_p = in_window(b_p, o_c, o_m, place[3], 0.0, WINDOW)
    b_dv = add_product(b_dv, tl.trans(b_p.to(b_do.dtype)), b_do, PRECISION)
    b_dp = tl.dot(b_do, tl.trans(b_v) if PRECISION == "ieee" else b_v, input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    b_dk = add_product(b_dk, tl.trans(b_ds.to(b_q.dtype)), b_q, PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=ANY_VALUE)
def key_gradient_kernel(
    q,
    k,
    v,
    d_out,
    q_tiles,
    d_out_tiles,
    d_k_tiles,
    d_v_tiles,
    bias,
    spans,
    lse,
    delta,
    d_k,
    d_v,
    partial_k,
    partial_v,
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
    stride_gb,
    stride_gh,
    stride_gn,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    stride_bias,
    batch,
    heads,
    seq,
    sequences,
    slots,
    scale,
    grad_scale,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BIASED: tl.constexpr,
    VARLEN: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_k and d_v; the tiles are key rows and the steps query columns, from the schedule of the transposed layout."""
    (i_head, i_tile, begin, end_full_run, end_full, end_run, end, slot, i_seq, i_b, o_seq, length, beyond) = work_item(
        items, row_indices, column_indices, cu_seqlens, sequences, seq, SIZE, UNIT, VARLEN, WINDOW
    )
    if beyond:
        return
    queries = (q, stride_qb, stride_qh, stride_qn)
    keys = (k, stride_kb, stride_kh, stride_kn)
    values = (v, stride_vb, stride_vh, stride_vn)
    out_gradients = (d_out, stride_gb, stride_gh, stride_gn)
    k_gradients = (d_k, stride_dkb, stride_dkh, stride_dkn)
    v_gradients = (d_v, stride_dvb, stride_dvh, stride_dvn)
    place = (i_b, i_head, o_seq, length)
    o_m = row_offsets(row_indices, i_tile, SIZE, UNIT)
    b_k = load_rows(keys, i_b, i_head, o_seq + o_m, o_seq + length, DIM, PADDED)
    b_v = load_rows(values, i_b, i_head, o_seq + o_m, o_seq + length, DIM, PADDED)
    if PRECISION != "ieee":
        # Once, for all steps: triton 3.9 leaves in a loop what it finds there. Without tensor cores, at a step they
        # spill less.
        b_k, b_v = tl.trans(b_k), tl.trans(b_v)
    b_none = tl.zeros([SIZE], tl.float32)
    # Where the loops of steps that the mask changes begin and end: of consecutive queries `[begin, runs)`, of any
    # `[masked, end)`.
    end_biased_run, masked = begin, end_full
    # Packed sequences with a window: steps that do not end within a sequence pass through the loop of masked ones.
    CUT: tl.constexpr = VARLEN and UNIT == SIZE and WINDOW is not None
    first, last, live_steps, start = split_steps(
        column_indices, spans, i_b, begin, end_full_run, end_full, length, SIZE, UNIT, False, CUT
    )
    if CUT:
        end_full_run, masked = last, start
    if BIASED:
        plain, live = span_of_rows(spans, i_b, o_m, length)
        if not live:
            end_full_run, end_full, masked, end = begin, begin, begin, begin
        elif not plain:
            if UNIT < SIZE:
                end_biased_run = end_full_run
            end_full_run, end_full, masked = begin, begin, end_biased_run
    o_stats = (i_b.to(tl.int64) * heads + i_head) * seq + o_seq
    plane = batch.to(tl.int64) * heads * seq

    b_dk = tl.zeros([SIZE, PADDED], tl.float32)
    b_dv = tl.zeros([SIZE, PADDED], tl.float32)
    i_next = step_unit(column_indices, begin, SIZE, UNIT)
    for i_step in range(begin, end_full_run):
        i_unit, i_next = i_next, step_unit(column_indices, i_step + 1, SIZE, UNIT)
        b_dk, b_dv = _key_gradient_step(
            b_k,
            b_v,
            b_bias=b_none,
            b_dk=b_dk,
            b_dv=b_dv,
            queries=queries,
            out_gradients=out_gradients,
            q_tiles=q_tiles,
            d_out_tiles=d_out_tiles,
            lse=lse,
            delta=delta,
            o_stats=o_stats,
            plane=plane,
            place=place,
            o_m=o_m,
            bit_masks=bit_masks,
            i_step=i_step,
            i_unit=i_unit,
            o_c=run_columns(i_unit, SIZE, UNIT),
            scale=scale,
            SIZE=SIZE,
            UNIT=UNIT,
            DIM=DIM,
            PADDED=PADDED,
            BIASED=False,
            RUN=True,
            MASKED=False,
            WINDOW=WINDOW,
            PRECISION=PRECISION,
        )
    if UNIT < SIZE:
        o_next = step_columns(column_indices, end_full_run, SIZE, UNIT)
        for i_step in range(end_full_run, end_full):
            o_c, o_next = o_next, step_columns(column_indices, i_step + 1, SIZE, UNIT)
            b_dk, b_dv = _key_gradient_step(
                b_k,
                b_v,
                b_bias=b_none,
                b_dk=b_dk,
                b_dv=b_dv,
                queries=queries,
                out_gradients=out_gradients,
                q_tiles=q_tiles,
                d_out_tiles=d_out_tiles,
                lse=lse,
                delta=delta,
                o_stats=o_stats,
                plane=plane,
                place=place,
                o_m=o_m,
                bit_masks=bit_masks,
                i_step=i_step,
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
    b_bias = b_none
    if BIASED:
        b_bias = tl.load(bias + i_b.to(tl.int64) * stride_bias + o_m, mask=o_m < length, other=float("-inf"))
    if BIASED and UNIT < SIZE:
        for i_step in range(begin, end_biased_run):
            i_unit = step_unit(column_indices, i_step, SIZE, UNIT)
            b_dk, b_dv = _key_gradient_step(
                b_k,
                b_v,
                b_bias,
                b_dk,
                b_dv,
                queries,
                out_gradients,
                q_tiles,
                d_out_tiles,
                lse,
                delta,
                o_stats,
                plane,
                place,
                o_m,
                bit_masks,
                i_step,
                i_unit,
                o_c=run_columns(i_unit, SIZE, UNIT),
                scale=scale,
                SIZE=SIZE,
                UNIT=UNIT,
                DIM=DIM,
                PADDED=PADDED,
                BIASED=True,
                RUN=True,
                MASKED=False,
                WINDOW=WINDOW,
                PRECISION=PRECISION,
            )
    # With a window, the columns (queries) of gathered units must not be copied ahead. Triton 3.6 would take the
    # position of each query for a multiple of UNIT, and compare it with several neighbouring keys at once.
    AHEAD: tl.constexpr = BIASED if WINDOW is None else UNIT == SIZE
    for i_masked in tl.range(masked, end, num_stages=None if AHEAD else 1):
        i_step = masked_step(i_masked, first, last, live_steps, end_full, CUT)
        i_unit = step_unit(column_indices, i_step, SIZE, UNIT)
        o_c = step_columns(column_indices, i_step, SIZE, UNIT)
        b_dk, b_dv = _key_gradient_step(
            b_k,
            b_v,
            b_bias,
            b_dk,
            b_dv,
            queries,
            out_gradients,
            q_tiles,
            d_out_tiles,
            lse,
            delta,
            o_stats,
            plane,
            place,
            o_m,
            bit_masks,
            i_step,
            i_unit,
            o_c,
            scale,
            SIZE=SIZE,
            UNIT=UNIT,
            DIM=DIM,
            PADDED=PADDED,
            BIASED=BIASED,
            RUN=UNIT == SIZE and not VARLEN,
            MASKED=True,
            WINDOW=WINDOW,
            PRECISION=PRECISION,
        )
    if slot < 0:
        b_dk = b_dk * grad_scale
        store_tile(k_gradients, d_k_tiles, b_dk, place, i_tile, o_m, SIZE, UNIT, DIM, PADDED, VARLEN)
        store_tile(v_gradients, d_v_tiles, b_dv, place, i_tile, o_m, SIZE, UNIT, DIM, PADDED, VARLEN)
    else:
        o_slot = (i_seq.to(tl.int64) * slots + slot) * SIZE + tl.arange(0, SIZE)
        o_dim = tl.arange(0, PADDED)
        tl.store(partial_k + o_slot[:, None] * PADDED + o_dim[None, :], b_dk)
        tl.store(partial_v + o_slot[:, None] * PADDED + o_dim[None, :], b_dv)


@triton.jit(do_not_specialize=ANY_VALUE)
def sum_kernel(
    target,
    partial,
    partial_residual,
    partial_visible,
    partial_weights,
    delta,
    splits,
    row_indices,
    cu_seqlens,
    stride_b,
    stride_h,
    stride_n,
    heads,
    seq,
    sequences,
    slots,
    factor,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    VARLEN: tl.constexpr,
    CENTERED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Adds the partial gradients of one shared row of tiles, in the order of their slots, and multiplies them by
    `factor`. CENTERED: they are gradients of queries, whose residual is subtracted. WINDOWED: `partial_visible` are the
    parts of the mean of the keys, and the residual is added to `delta`."""
    i_head, i_tile, slot, n, i_seq, i_b, o_seq, length = shared_row(splits, cu_seqlens, sequences, seq, VARLEN)
    o_m = tl.arange(0, SIZE)
    o_dim = tl.arange(0, PADDED)
    b_acc = tl.zeros([SIZE, PADDED], tl.float32)
    b_visible = tl.zeros([SIZE, PADDED], tl.float32)
    b_residual = tl.zeros([SIZE], tl.float32)
    b_weight = tl.zeros([SIZE], tl.float32)
    for i_slot in range(slot, slot + n):
        o_slot = (i_seq.to(tl.int64) * slots + i_slot) * SIZE + o_m
        b_acc += tl.load(partial + o_slot[:, None] * PADDED + o_dim[None, :])
        if CENTERED:
            b_residual += tl.load(partial_residual + o_slot)
            if WINDOWED:
                b_visible += tl.load(partial_visible + o_slot[:, None] * PADDED + o_dim[None, :])
            else:
                b_visible += tl.load(partial_visible + (o_slot // UNIT)[:, None] * PADDED + o_dim[None, :])
                b_weight += tl.load(partial_weights + o_slot // UNIT)
    o_row = o_seq + row_offsets(row_indices, i_tile, SIZE, UNIT)
    if CENTERED:
        b_acc = _centered(b_acc, b_residual, b_visible, b_weight)
        if WINDOWED:
            p_delta = delta + (i_b.to(tl.int64) * heads + i_head) * seq + o_row
            m_row = o_row < o_seq + length
            tl.store(p_delta, tl.load(p_delta, mask=m_row, other=0.0) + b_residual, mask=m_row)
    targets = (target, stride_b, stride_h, stride_n)
    store_rows(targets, b_acc * factor, i_b, i_head, o_row, o_seq + length, DIM, PADDED)
