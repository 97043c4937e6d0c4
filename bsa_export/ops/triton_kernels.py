"""The fused kernels: forward, gradient of queries, gradients of keys and values, and the sums over keys and over shared
rows.

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

from bsa_export.ops.triton_masks import masked_step, span_of_rows, split_steps
from bsa_export.ops.triton_tiles import (
    first_unit,
    load_consecutive,
    load_rows,
    load_step,
    load_tile,
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

# Arguments whose value must not cause another compilation.
ANY_VALUE = ["batch", "heads", "seq", "slots", "sequences", "units"]

# Units whose sums of keys are read at once.
LANES: tl.constexpr = tl.constexpr(16)

# Parts of a row's sum that are kept apart until the end: of this many columns a tensor core gives each thread its own,
# so that no step pays for exchanging them.
PARTS: tl.constexpr = tl.constexpr(8)

# Biases beyond this, in units of log2, count like it where a mean of keys is weighted by them: sums of weights stay in
# range.
FARTHEST_BIAS: tl.constexpr = tl.constexpr(30.0)


@triton.jit
def _rounded(b_products):
    """Products, each rounded before anything is added to it. Where threads exchange them for a sum, a thread would else
    add another's to its own unrounded one: each would get another sum, and which of them is used would be chance."""
    return b_products + 0.0


@triton.jit
def _part_sums(b_tile, SIZE: tl.constexpr):
    """The sums of rows in parts, `[SIZE, PARTS]`."""
    return tl.sum(tl.reshape(b_tile, [SIZE, SIZE // PARTS, PARTS]), 1)


@triton.jit
def _add_product(b_sum, b_left, b_right, PRECISION: tl.constexpr):
    """`b_sum + b_left @ b_right`. In float32 the product is summed on its own first (an imprecise accumulator, which
    only fp8 has, keeps the compiler from joining the sums): one sum over all steps loses a digit, and delta, which
    comes from the output, too."""
    if PRECISION == "ieee":
        return b_sum + tl.dot(b_left, b_right, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


@triton.jit
def _scores(
    b_q,
    b_k,
    p_bias,
    bit_masks,
    i_step,
    o_c,
    length,
    scale,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores `[SIZE, SIZE]` of queries (rows) and keys (columns), -inf where there is none; in units of log2 if BIASED,
    else still without `scale`."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if BIASED:
        b_s = b_s * scale + tl.load(p_bias + o_c)[None, :]
    elif MASKED:
        b_s = tl.where((o_c < length)[None, :], b_s, float("-inf"))
    if MASKED and UNIT < SIZE:
        b_s = tl.where(step_mask(bit_masks, i_step, SIZE, UNIT), b_s, float("-inf"))
    return b_s


@triton.jit
def _next_maximum(b_s, b_max, scale, BIASED: tl.constexpr, MASKED: tl.constexpr):
    """The maximum with a step's `_scores` in units of log2, and by what earlier probabilities shrink."""
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
    """The probabilities of a step's `_scores` relative to the maximum."""
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
    PRECISION: tl.constexpr,
):
    """`b_acc`, `b_max` and `b_sum` after one more step of keys."""
    b_k = load_step(keys, k_tiles, place, o_c, i_unit, SIZE, UNIT, DIM, PADDED, RUN)
    b_s = _scores(b_q, b_k, p_bias, bit_masks, i_step, o_c, place[3], scale, SIZE, UNIT, BIASED, MASKED, PRECISION)
    b_max, b_alpha = _next_maximum(b_s, b_max, scale, BIASED, MASKED)
    b_p = _probabilities(b_s, b_max, scale, BIASED, MASKED)
    b_sum = b_sum * b_alpha[:, None] + _part_sums(b_p, SIZE)
    b_v = load_step(values, v_tiles, place, o_c, i_unit, SIZE, UNIT, DIM, PADDED, RUN)
    return _add_product(b_acc * b_alpha[:, None], b_p.to(b_v.dtype), b_v, PRECISION), b_max, b_sum


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
    PRECISION: tl.constexpr,
):
    """out `[batch, heads, seq, DIM]`, lse the rows' statistics; `partial` float32 `[sequences, slots, SIZE,
    PADDED]`."""
    (i_head, i_tile, begin, end_full_run, end_full, end_run, end, slot, i_seq, i_b, o_seq, length, beyond) = work_item(
        items, row_indices, column_indices, cu_seqlens, sequences, seq, SIZE, UNIT, VARLEN
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
    first, last, live, start = split_steps(
        column_indices, spans, i_b, begin, end_full_run, end_full, seq, SIZE, UNIT, BIASED
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
            b_sum += _part_sums(b_p, SIZE)
            b_v = load_consecutive(v_tiles, i_b, i_head, o_seq + i_unit * UNIT, SIZE, PADDED)
            b_acc = _add_product(b_acc, b_p.to(b_v.dtype), b_v, PRECISION)
            b_k = load_consecutive(k_tiles, i_b, i_head, o_seq + i_next * UNIT, SIZE, PADDED)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_max, b_alpha = _next_maximum(b_s, b_max, scale, False, False)
            b_acc *= b_alpha[:, None]
            b_sum *= b_alpha[:, None]
            i_unit, i_next = i_value, i_key
        b_p = _probabilities(b_s, b_max, scale, False, False)
        b_sum += _part_sums(b_p, SIZE)
        b_v = load_consecutive(v_tiles, i_b, i_head, o_seq + i_unit * UNIT, SIZE, PADDED)
        b_acc = _add_product(b_acc, b_p.to(b_v.dtype), b_v, PRECISION)
    if UNIT < SIZE:
        first_apart, last_apart, live_apart, start_apart = split_steps(
            column_indices, spans, i_b, end_full_run, end_full, end_run, seq, SIZE, UNIT, BIASED
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
                PRECISION=PRECISION,
            )
    for i_masked in tl.range(start, end_run, num_stages=1 if UNIT == SIZE and not BIASED else None):
        i_step = masked_step(i_masked, first, last, live, end_full, BIASED)
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
    b_k = _rounded(b_k.to(tl.float32) * b_weight[:, None])

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
    keys,
    values,
    k_tiles,
    v_tiles,
    place,
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
    PRECISION: tl.constexpr,
):
    """`b_dq` and `b_rest` after one more step of keys."""
    b_k = load_step(keys, k_tiles, place, o_c, i_unit, SIZE, UNIT, DIM, PADDED, RUN)
    b_v = load_step(values, v_tiles, place, o_c, i_unit, SIZE, UNIT, DIM, PADDED, RUN)
    b_s = _scores(b_q, b_k, p_bias, bit_masks, i_step, o_c, place[3], scale, SIZE, UNIT, BIASED, MASKED, PRECISION)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    if BIASED:
        b_p = tl.exp2((b_s - b_max[:, None]) - b_log[:, None])
    else:
        b_p = tl.exp2(b_s * scale - b_max[:, None])
    b_ds = b_p * (b_dp - b_delta[:, None])
    if PRECISION == "ieee":
        b_ds = _rounded(b_ds)  # without tensor cores threads exchange them for the sums of rows
    return _add_product(b_dq, b_ds.to(b_k.dtype), b_k, PRECISION), b_residual + _part_sums(b_ds, SIZE)


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
    PRECISION: tl.constexpr,
):
    """d_q, and delta = sum(out * d_out) per row, float32 `[batch, heads, seq]`, for the kernel of keys and values.

    The gradients of a row's scores sum to 0. Those computed here have a residual, because `out`, from which delta
    comes, is rounded, and the residual adds a part of the mean of the row's keys under its probabilities, as large as
    that may be. It is subtracted with the mean of the same keys under their biases: what remains is the residual of
    their spread. Only keys that the row attends to may count, since others may be of any size. Their sums come from
    `visible_keys_kernel`: here every program would wait for them, there so many run at once that none matters. The
    parts of a shared row leave residuals that are not rounding errors: `sum_kernel` adds them up first.
    """
    (i_head, i_tile, begin, end_full_run, end_full, end_run, end, slot, i_seq, i_b, o_seq, length, beyond) = work_item(
        items, row_indices, column_indices, cu_seqlens, sequences, seq, SIZE, UNIT, VARLEN
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
    first, last, live, start = split_steps(
        column_indices, spans, i_b, begin, end_full_run, end_full, seq, SIZE, UNIT, BIASED
    )
    i_next = step_unit(column_indices, first, SIZE, UNIT)
    for i_step in range(first, last):
        i_unit, i_next = i_next, step_unit(column_indices, i_step + 1, SIZE, UNIT)
        b_dq, b_residual = _query_gradient_step(
            b_q,
            b_do,
            b_max=b_lse,
            b_log=b_none,
            b_delta=b_delta,
            b_dq=b_dq,
            b_residual=b_residual,
            keys=keys,
            values=values,
            k_tiles=k_tiles,
            v_tiles=v_tiles,
            place=place,
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
            PRECISION=PRECISION,
        )
    if UNIT < SIZE:
        first_apart, last_apart, live_apart, start_apart = split_steps(
            column_indices, spans, i_b, end_full_run, end_full, end_run, seq, SIZE, UNIT, BIASED
        )
        o_next = step_columns(column_indices, first_apart, SIZE, UNIT)
        for i_step in range(first_apart, last_apart):
            o_c, o_next = o_next, step_columns(column_indices, i_step + 1, SIZE, UNIT)
            b_dq, b_residual = _query_gradient_step(
                b_q,
                b_do,
                b_max=b_lse,
                b_log=b_none,
                b_delta=b_delta,
                b_dq=b_dq,
                b_residual=b_residual,
                keys=keys,
                values=values,
                k_tiles=k_tiles,
                v_tiles=v_tiles,
                place=place,
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
                PRECISION=PRECISION,
            )
    for i_masked in tl.range(start, end_run, num_stages=1 if UNIT == SIZE and not BIASED else None):
        i_step = masked_step(i_masked, first, last, live, end_full, BIASED)
        i_unit = step_unit(column_indices, i_step, SIZE, UNIT)
        b_dq, b_residual = _query_gradient_step(
            b_q,
            b_do,
            b_max,
            b_log,
            b_delta,
            b_dq,
            b_residual,
            keys,
            values,
            k_tiles,
            v_tiles,
            place,
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
            PRECISION=PRECISION,
        )
    if UNIT < SIZE:
        for i_masked in tl.range(start_apart, end, num_stages=1):
            i_step = masked_step(i_masked, first_apart, last_apart, live_apart, end_run, BIASED)
            o_c = step_columns(column_indices, i_step, SIZE, UNIT)
            b_dq, b_residual = _query_gradient_step(
                b_q,
                b_do,
                b_max,
                b_log,
                b_delta,
                b_dq,
                b_residual,
                keys,
                values,
                k_tiles,
                v_tiles,
                place,
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
                PRECISION=PRECISION,
            )
    b_residual = tl.sum(b_residual, 1)
    if slot < 0:
        o_row = i_tile + tl.arange(0, 1) if UNIT == SIZE else o_m // UNIT
        m_row = o_row * UNIT < length
        o_visible = i_head.to(tl.int64) * units + first_unit(i_seq, o_seq, seq, UNIT, VARLEN) + o_row
        b_visible = tl.load(
            visible + o_visible[:, None] * PADDED + tl.arange(0, PADDED)[None, :], mask=m_row[:, None], other=0.0
        )
        b_weight = tl.load(visible_weights + o_visible, mask=m_row, other=0.0)
        b_dq = _centered(b_dq, b_residual, b_visible, b_weight) * grad_scale
        store_tile(q_gradients, d_q_tiles, b_dq, place, i_tile, o_m, SIZE, UNIT, DIM, PADDED, VARLEN)
    else:
        o_slot = (i_seq.to(tl.int64) * slots + slot) * SIZE + tl.arange(0, SIZE)
        tl.store(partial + o_slot[:, None] * PADDED + tl.arange(0, PADDED)[None, :], b_dq)
        tl.store(partial_residual + o_slot, b_residual)


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
    b_dv = _add_product(b_dv, tl.trans(b_p.to(b_do.dtype)), b_do, PRECISION)
    b_dp = tl.dot(b_do, tl.trans(b_v) if PRECISION == "ieee" else b_v, input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    b_dk = _add_product(b_dk, tl.trans(b_ds.to(b_q.dtype)), b_q, PRECISION)
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
    PRECISION: tl.constexpr,
):
    """d_k and d_v; the tiles are key rows and the steps query columns, from the schedule of the transposed layout."""
    (i_head, i_tile, begin, end_full_run, end_full, end_run, end, slot, i_seq, i_b, o_seq, length, beyond) = work_item(
        items, row_indices, column_indices, cu_seqlens, sequences, seq, SIZE, UNIT, VARLEN
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
                PRECISION=PRECISION,
            )
    for i_step in tl.range(masked, end, num_stages=None if BIASED else 1):
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
):
    """Adds the partial gradients of one shared row of tiles, in the order of their slots, and multiplies them by
    `factor`; with CENTERED, those of queries, whose residual is subtracted."""
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
            b_visible += tl.load(partial_visible + (o_slot // UNIT)[:, None] * PADDED + o_dim[None, :])
            b_weight += tl.load(partial_weights + o_slot // UNIT)
    if CENTERED:
        b_acc = _centered(b_acc, b_residual, b_visible, b_weight)
    o_row = o_seq + row_offsets(row_indices, i_tile, SIZE, UNIT)
    targets = (target, stride_b, stride_h, stride_n)
    store_rows(targets, b_acc * factor, i_b, i_head, o_row, o_seq + length, DIM, PADDED)


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
