"""The fused kernels: forward, gradient of queries, gradients of keys and values, and the sums over keys and over shared rows.

After FlashAttention-2 (Dao, 2023, arXiv:2307.08691): one pass with a running maximum and sum, no score matrix in memory, backward
from saved statistics of the rows. Scores are in units of log2, so that exp2 serves. The work comes from `schedule.py`; a program is
one item of one sequence. No atomics: each output is written by one program, partial results are summed in a fixed order.

Sequences are the rows of a batch, or, with VARLEN, texts one after another in the only row, text i at `[offsets[i], offsets[i + 1])`.
Statistics are float32 `[3 or 1, batch, heads, seq]`: log2 of each row's sum of exponentials; with a bias, whose values may be so low
that the sum would vanish beside them, also the row's maximum and the log2 of the sum relative to it.

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
ANY_VALUE = ["batch", "heads", "seq", "slots", "texts", "units"]

# Units whose sums of keys are read at once.
LANES: tl.constexpr = tl.constexpr(16)

# Parts of a row's sum that are kept apart until the end: of this many columns a tensor core gives each thread its own, so that no
# step pays for exchanging them.
PARTS: tl.constexpr = tl.constexpr(8)

# Biases beyond this, in units of log2, count like it where a mean of keys is weighted by them: sums of weights stay in range.
FARTHEST_BIAS: tl.constexpr = tl.constexpr(30.0)


@triton.jit
def _rounded(b_products):
    """Products, each rounded before anything is added to it. Where threads exchange them for a sum, a thread would else add
    another's to its own unrounded one: each would get another sum, and which of them is used would be chance."""
    return b_products + 0.0


@triton.jit
def _part_sums(b_tile, SIZE: tl.constexpr):
    """The sums of rows in parts, `[SIZE, PARTS]`."""
    return tl.sum(tl.reshape(b_tile, [SIZE, SIZE // PARTS, PARTS]), 1)


@triton.jit
def _add_product(b_sum, b_left, b_right, PRECISION: tl.constexpr):
    """`b_sum + b_left @ b_right`. In float32 the product is summed on its own first (an imprecise accumulator, which only fp8 has,
    keeps the compiler from joining the sums): one sum over all steps loses a digit, and delta, which comes from the output, too."""
    if PRECISION == "ieee":
        return b_sum + tl.dot(b_left, b_right, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


@triton.jit
def _scores(
    b_q, b_k, p_bias, words, i_step, o_c, length, scale,
    SIZE: tl.constexpr, UNIT: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `[SIZE, SIZE]` of queries (rows) and keys (columns), -inf where there is none; in units of log2 if BIASED, else still
    without `scale`."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if BIASED:
        b_s = b_s * scale + tl.load(p_bias + o_c)[None, :]
    elif MASKED:
        b_s = tl.where((o_c < length)[None, :], b_s, float("-inf"))
    if MASKED and UNIT < SIZE:
        b_s = tl.where(step_mask(words, i_step, SIZE, UNIT), b_s, float("-inf"))
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
    """What probabilities are relative to: for a row that has met no key yet, any finite number, which makes them exp2(-inf) = 0."""
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
    b_q, b_acc, b_max, b_sum, k, v, k_tiles, v_tiles, p_bias, i_b, i_head, o_text, length,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, words, i_step, i_unit, o_c, scale,
    SIZE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BIASED: tl.constexpr,
    RUN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_k = load_step(k, k_tiles, i_b, i_head, o_text, o_c, stride_kb, stride_kh, stride_kn, i_unit, length, SIZE, UNIT, DIM, PADDED, RUN)  # fmt: skip
    b_s = _scores(b_q, b_k, p_bias, words, i_step, o_c, length, scale, SIZE, UNIT, BIASED, MASKED, PRECISION)
    b_max, b_alpha = _next_maximum(b_s, b_max, scale, BIASED, MASKED)
    b_p = _probabilities(b_s, b_max, scale, BIASED, MASKED)
    b_sum = b_sum * b_alpha[:, None] + _part_sums(b_p, SIZE)
    b_v = load_step(v, v_tiles, i_b, i_head, o_text, o_c, stride_vb, stride_vh, stride_vn, i_unit, length, SIZE, UNIT, DIM, PADDED, RUN)  # fmt: skip
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
    """The statistics by which probabilities are made again, (maximum, log2 of the sum): exp2((score - maximum) - log), the log 0 if
    not BIASED. A row without any key gets (inf, 0), which makes them 0."""
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
    q, k, v, q_tiles, k_tiles, v_tiles, out_tiles, bias, spans, out, lse, partial, partial_lse,
    items, rows, columns, words, offsets,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_bias, batch, heads, seq, texts, slots, scale,
    SIZE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BIASED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out `[batch, heads, seq, DIM]`, lse the rows' statistics; `partial` float32 `[texts, slots, SIZE, PADDED]`."""
    i_head, i_tile, begin, solid, whole, run, end, slot, i_text, i_b, o_text, length, beyond = work_item(items, rows, columns, offsets, texts, seq, SIZE, UNIT, VARLEN)  # fmt: skip
    if beyond:
        return
    o_m = row_offsets(rows, i_tile, SIZE, UNIT)
    b_q = load_tile(q_tiles, q, i_b, i_head, o_text, i_tile, o_m, stride_qb, stride_qh, stride_qn, length, SIZE, UNIT, DIM, PADDED)  # fmt: skip
    p_bias = bias + i_b.to(tl.int64) * stride_bias

    b_acc = tl.zeros([SIZE, PADDED], tl.float32)
    b_max = tl.full([SIZE], float("-inf"), tl.float32)
    b_sum = tl.zeros([SIZE, PARTS], tl.float32)
    first, last, live, start = split_steps(columns, spans, i_b, begin, solid, whole, seq, SIZE, UNIT, BIASED)
    if first < last:
        # The scores of a step are computed in the one before it: the copies that they need arrive during its softmax. And the sum
        # shrinks for them there: at the beginning of their own step, it would be carried between them in two layouts.
        i_unit, i_next = step_unit(columns, first, SIZE, UNIT), step_unit(columns, first + 1, SIZE, UNIT)
        b_k = load_consecutive(k_tiles, i_b, i_head, o_text + i_unit * UNIT, SIZE, PADDED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_max, b_alpha = _next_maximum(b_s, b_max, scale, False, False)
        for i_step in range(first, last - 1):
            i_value, i_key = step_unit(columns, i_step + 1, SIZE, UNIT), step_unit(columns, i_step + 2, SIZE, UNIT)
            b_p = _probabilities(b_s, b_max, scale, False, False)
            b_sum += _part_sums(b_p, SIZE)
            b_v = load_consecutive(v_tiles, i_b, i_head, o_text + i_unit * UNIT, SIZE, PADDED)
            b_acc = _add_product(b_acc, b_p.to(b_v.dtype), b_v, PRECISION)
            b_k = load_consecutive(k_tiles, i_b, i_head, o_text + i_next * UNIT, SIZE, PADDED)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_max, b_alpha = _next_maximum(b_s, b_max, scale, False, False)
            b_acc *= b_alpha[:, None]
            b_sum *= b_alpha[:, None]
            i_unit, i_next = i_value, i_key
        b_p = _probabilities(b_s, b_max, scale, False, False)
        b_sum += _part_sums(b_p, SIZE)
        b_v = load_consecutive(v_tiles, i_b, i_head, o_text + i_unit * UNIT, SIZE, PADDED)
        b_acc = _add_product(b_acc, b_p.to(b_v.dtype), b_v, PRECISION)
    if UNIT < SIZE:
        first_apart, last_apart, live_apart, start_apart = split_steps(columns, spans, i_b, solid, whole, run, seq, SIZE, UNIT, BIASED)  # fmt: skip
        o_next = step_columns(columns, first_apart, SIZE, UNIT)
        for i_step in range(first_apart, last_apart):
            o_c, o_next = o_next, step_columns(columns, i_step + 1, SIZE, UNIT)
            b_acc, b_max, b_sum = _forward_step(
                b_q, b_acc, b_max, b_sum, k, v, k_tiles, v_tiles, p_bias, i_b, i_head, o_text, length,
                stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, words, i_step, 0, o_c, scale,
                SIZE, UNIT, DIM, PADDED, False, False, VARLEN, PRECISION,
            )  # fmt: skip
    for i_masked in tl.range(start, run, num_stages=1 if UNIT == SIZE and not BIASED else None):
        i_step = masked_step(i_masked, first, last, live, whole, BIASED)
        i_unit = step_unit(columns, i_step, SIZE, UNIT)
        b_acc, b_max, b_sum = _forward_step(
            b_q, b_acc, b_max, b_sum, k, v, k_tiles, v_tiles, p_bias, i_b, i_head, o_text, length,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, words, i_step, i_unit, run_columns(i_unit, SIZE, UNIT), scale,
            SIZE, UNIT, DIM, PADDED, BIASED, not VARLEN, True, PRECISION,
        )  # fmt: skip
    if UNIT < SIZE:
        for i_masked in tl.range(start_apart, end, num_stages=1):
            i_step = masked_step(i_masked, first_apart, last_apart, live_apart, run, BIASED)
            o_c = step_columns(columns, i_step, SIZE, UNIT)
            b_acc, b_max, b_sum = _forward_step(
                b_q, b_acc, b_max, b_sum, k, v, k_tiles, v_tiles, p_bias, i_b, i_head, o_text, length,
                stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, words, i_step, 0, o_c, scale,
                SIZE, UNIT, DIM, PADDED, BIASED, False, True, PRECISION,
            )  # fmt: skip

    b_sum = tl.sum(b_sum, 1)
    b_out = b_acc * (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    if slot < 0:
        store_tile(out_tiles, out, b_out, i_b, i_head, o_text, i_tile, o_m, stride_ob, stride_oh, stride_on, length, SIZE, UNIT, DIM, PADDED, VARLEN)  # fmt: skip
        o_stat = (i_b.to(tl.int64) * heads + i_head) * seq + o_text + o_m
        _store_statistics(lse, b_max, b_sum, o_stat, batch.to(tl.int64) * heads * seq, o_m < length, BIASED)
    else:
        o_slot = (i_text.to(tl.int64) * slots + slot) * SIZE + tl.arange(0, SIZE)
        tl.store(partial + o_slot[:, None] * PADDED + tl.arange(0, PADDED)[None, :], b_out)
        tl.store(partial_lse + o_slot, b_max)
        tl.store(partial_lse + texts.to(tl.int64) * slots * SIZE + o_slot, _log_sum(b_sum))


@triton.jit(do_not_specialize=ANY_VALUE)
def combine_kernel(
    out, lse, partial, partial_lse, splits, rows, offsets, stride_ob, stride_oh, stride_on, batch, heads, seq, texts, slots,
    SIZE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BIASED: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """Joins the partial results of one shared row of tiles, each weighted by its share of the sum."""
    i_head, i_tile, slot, n, i_text, i_b, o_text, length = shared_row(splits, offsets, texts, seq, VARLEN)
    o_m = tl.arange(0, SIZE)
    o_dim = tl.arange(0, PADDED)
    b_acc = tl.zeros([SIZE, PADDED], tl.float32)
    b_max = tl.full([SIZE], float("-inf"), tl.float32)
    b_sum = tl.zeros([SIZE], tl.float32)
    for i_slot in range(slot, slot + n):
        o_slot = (i_text.to(tl.int64) * slots + i_slot) * SIZE + o_m
        b_part = tl.load(partial_lse + o_slot)
        b_log = tl.load(partial_lse + texts.to(tl.int64) * slots * SIZE + o_slot)
        b_new = tl.maximum(b_max, b_part)
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_old, b_weight = tl.exp2(b_max - b_ref), tl.exp2(b_part - b_ref + b_log)
        b_values = tl.load(partial + o_slot[:, None] * PADDED + o_dim[None, :])
        b_acc = b_acc * b_old[:, None] + b_values * b_weight[:, None]
        b_sum = b_sum * b_old + b_weight
        b_max = b_new
    b_out = b_acc * (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    o_row = row_offsets(rows, i_tile, SIZE, UNIT)
    store_rows(out, b_out, i_b, i_head, o_text + o_row, stride_ob, stride_oh, stride_on, o_text + length, DIM, PADDED)
    o_stat = (i_b.to(tl.int64) * heads + i_head) * seq + o_text + o_row
    _store_statistics(lse, b_max, b_sum, o_stat, batch.to(tl.int64) * heads * seq, o_row < length, BIASED)


@triton.jit(do_not_specialize=ANY_VALUE)
def key_sums_kernel(
    k, bias, sums, weights, offsets, stride_kb, stride_kh, stride_kn, stride_bias, heads, seq, texts, units,
    KEYS: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BIASED: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Sums of the keys of each unit, float32 `[heads, units, PADDED]`, a key weighted by exp2 of its bias, and of these weights,
    `[heads, units]`; a program sums KEYS keys. What -inf removes is not read."""
    ACROSS: tl.constexpr = KEYS // UNIT
    pid = tl.program_id(0)
    i_text = pid % texts
    i_head = (pid // texts) % heads
    i_tile = pid // texts // heads
    i_b, o_text, length = sequence(offsets, i_text, seq, VARLEN)
    # Neighbouring rows are of different units, so that a thread, which has every eighth or sixteenth, sums most of a unit alone.
    o_n = tl.arange(0, KEYS)
    o_m = i_tile * KEYS + o_n % ACROSS * UNIT + o_n // ACROSS
    b_weight = (o_m < length).to(tl.float32)
    if BIASED:
        b_bias = tl.load(bias + i_b.to(tl.int64) * stride_bias + o_m, mask=o_m < length, other=float("-inf"))
        b_near = tl.minimum(tl.maximum(b_bias, -FARTHEST_BIAS), FARTHEST_BIAS)
        b_weight = tl.where(b_bias == float("-inf"), 0.0, tl.exp2(b_near))
    o_row = o_text + tl.where(b_weight > 0.0, o_m, length)
    b_k = load_rows(k, i_b, i_head, o_row, stride_kb, stride_kh, stride_kn, o_text + length, DIM, PADDED)
    b_k = _rounded(b_k.to(tl.float32) * b_weight[:, None])

    o_unit = i_tile * ACROSS + tl.arange(0, ACROSS)
    m_unit = o_unit * UNIT < length
    o_sum = i_head.to(tl.int64) * units + first_unit(i_text, o_text, seq, UNIT, VARLEN) + o_unit
    p_sums = sums + o_sum[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
    tl.store(p_sums, tl.sum(tl.reshape(b_k, [UNIT, ACROSS, PADDED]), 0), mask=m_unit[:, None])
    tl.store(weights + o_sum, tl.sum(tl.reshape(b_weight, [UNIT, ACROSS]), 0), mask=m_unit)


@triton.jit(do_not_specialize=ANY_VALUE)
def keys_met_kernel(
    sums, weights, met, met_weights, partial_met, partial_weights, items, rows, columns, words, offsets,
    heads, seq, texts, units, slots,
    SIZE: tl.constexpr, UNIT: tl.constexpr, PADDED: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Adds up what each row meets: the sums of the keys, float32 `[heads, units, PADDED]`, and the weights, `[heads, units]`, once for
    the rows of a unit, which meet the same keys. Of shared rows each item's part: `[texts, slots, SIZE / UNIT, PADDED]`."""
    ACROSS: tl.constexpr = SIZE // UNIT
    i_head, i_tile, begin, solid, whole, run, end, slot, i_text, i_b, o_text, length, beyond = work_item(items, rows, columns, offsets, texts, seq, SIZE, UNIT, VARLEN)  # fmt: skip
    if beyond:
        return
    o_first = i_head.to(tl.int64) * units + first_unit(i_text, o_text, seq, UNIT, VARLEN)
    o_across = tl.arange(0, ACROSS)
    o_dim = tl.arange(0, PADDED)
    b_met = tl.zeros([ACROSS, PADDED], tl.float32)
    b_weight = tl.zeros([ACROSS], tl.float32)
    last = end * ACROSS
    for first in range(begin * ACROSS, last, LANES):
        o_lane = first + tl.arange(0, LANES)
        o_unit = tl.load(columns + o_lane, mask=o_lane < last, other=0)
        m_unit = (o_lane < last) & (o_unit * UNIT < length)
        b_sums = tl.load(sums + (o_first + o_unit)[:, None] * PADDED + o_dim[None, :], mask=m_unit[:, None], other=0.0)
        b_weights = tl.load(weights + o_first + o_unit, mask=m_unit, other=0.0)
        b_word = tl.load(words + o_lane // ACROSS, mask=o_lane < last, other=0)
        m_kept = ((b_word[None, :] >> (o_across[:, None] * ACROSS + (o_lane % ACROSS)[None, :])) & 1) == 1
        b_met += tl.sum(tl.where(m_kept[:, :, None], b_sums[None, :, :], 0.0), 1)
        b_weight += tl.sum(tl.where(m_kept, b_weights[None, :], 0.0), 1)
    if slot < 0:
        o_row = row_units(rows, i_tile, SIZE, UNIT)
        m_row = o_row * UNIT < length
        tl.store(met + (o_first + o_row)[:, None] * PADDED + o_dim[None, :], b_met, mask=m_row[:, None])
        tl.store(met_weights + o_first + o_row, b_weight, mask=m_row)
    else:
        o_slot = (i_text.to(tl.int64) * slots + slot) * ACROSS + o_across
        tl.store(partial_met + o_slot[:, None] * PADDED + o_dim[None, :], b_met)
        tl.store(partial_weights + o_slot, b_weight)


@triton.jit
def _centered(b_dq, b_rest, b_met, b_weight):
    """`b_dq` without what `b_rest` of the mean of the keys adds to it, see `query_gradient_kernel`."""
    return b_dq - b_rest[:, None] * (b_met / tl.where(b_weight == 0.0, 1.0, b_weight)[:, None])


@triton.jit
def _query_gradient_step(
    b_q, b_do, b_max, b_log, b_delta, b_dq, b_rest, k, v, k_tiles, v_tiles, p_bias, i_b, i_head, o_text, length,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, words, i_step, i_unit, o_c, scale,
    SIZE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BIASED: tl.constexpr,
    RUN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_k = load_step(k, k_tiles, i_b, i_head, o_text, o_c, stride_kb, stride_kh, stride_kn, i_unit, length, SIZE, UNIT, DIM, PADDED, RUN)  # fmt: skip
    b_v = load_step(v, v_tiles, i_b, i_head, o_text, o_c, stride_vb, stride_vh, stride_vn, i_unit, length, SIZE, UNIT, DIM, PADDED, RUN)  # fmt: skip
    b_s = _scores(b_q, b_k, p_bias, words, i_step, o_c, length, scale, SIZE, UNIT, BIASED, MASKED, PRECISION)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    if BIASED:
        b_p = tl.exp2((b_s - b_max[:, None]) - b_log[:, None])
    else:
        b_p = tl.exp2(b_s * scale - b_max[:, None])
    b_ds = b_p * (b_dp - b_delta[:, None])
    if PRECISION == "ieee":
        b_ds = _rounded(b_ds)  # without tensor cores threads exchange them for the sums of rows
    return _add_product(b_dq, b_ds.to(b_k.dtype), b_k, PRECISION), b_rest + _part_sums(b_ds, SIZE)


@triton.jit(do_not_specialize=ANY_VALUE)
def query_gradient_kernel(
    q, k, v, out, d_out, k_tiles, v_tiles, d_q_tiles, bias, spans, met, met_weights, lse, delta, d_q, partial, partial_rest,
    items, rows, columns, words, offsets,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn, stride_db, stride_dh, stride_dn, stride_bias,
    batch, heads, seq, texts, units, slots, scale, grad_scale,
    SIZE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BIASED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_q, and delta = sum(out * d_out) per row, float32 `[batch, heads, seq]`, for the kernel of keys and values.

    The gradients of a row's scores sum to 0. Those computed here leave a rest, because `out`, from which delta comes, is rounded,
    and the rest adds a part of the mean of the row's keys under its probabilities, as large as that may be. It is taken out again
    with the mean of the same keys under their biases: what remains is the rest of their spread. Only keys that the row meets may
    count, since others may be of any size. Their sums come from `keys_met_kernel`: here every program would wait for them, there
    so many run at once that none matters. The parts of a shared row leave rests that are no rounding errors: `sum_kernel` adds
    them up first.
    """
    i_head, i_tile, begin, solid, whole, run, end, slot, i_text, i_b, o_text, length, beyond = work_item(items, rows, columns, offsets, texts, seq, SIZE, UNIT, VARLEN)  # fmt: skip
    if beyond:
        return
    o_m = row_offsets(rows, i_tile, SIZE, UNIT)
    # Pointers, not copies by the hardware: those wait for each other.
    b_q = load_rows(q, i_b, i_head, o_text + o_m, stride_qb, stride_qh, stride_qn, o_text + length, DIM, PADDED)
    b_do = load_rows(d_out, i_b, i_head, o_text + o_m, stride_gb, stride_gh, stride_gn, o_text + length, DIM, PADDED)
    b_o = load_rows(out, i_b, i_head, o_text + o_m, stride_ob, stride_oh, stride_on, o_text + length, DIM, PADDED)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    o_stat = (i_b.to(tl.int64) * heads + i_head) * seq + o_text + o_m
    # every item of a shared row computes the same delta
    tl.store(delta + o_stat, b_delta, mask=o_m < length)
    plane = batch.to(tl.int64) * heads * seq
    b_max, b_log = _load_statistics(lse, o_stat, plane, o_m < length, BIASED, True)
    b_lse, b_none = _load_statistics(lse, o_stat, plane, o_m < length, False, True)
    p_bias = bias + i_b.to(tl.int64) * stride_bias

    b_dq = tl.zeros([SIZE, PADDED], tl.float32)
    b_rest = tl.zeros([SIZE, PARTS], tl.float32)
    first, last, live, start = split_steps(columns, spans, i_b, begin, solid, whole, seq, SIZE, UNIT, BIASED)
    i_next = step_unit(columns, first, SIZE, UNIT)
    for i_step in range(first, last):
        i_unit, i_next = i_next, step_unit(columns, i_step + 1, SIZE, UNIT)
        b_dq, b_rest = _query_gradient_step(
            b_q, b_do, b_lse, b_none, b_delta, b_dq, b_rest, k, v, k_tiles, v_tiles, p_bias, i_b, i_head, o_text, length,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, words, i_step, i_unit, run_columns(i_unit, SIZE, UNIT), scale,
            SIZE, UNIT, DIM, PADDED, False, True, False, PRECISION,
        )  # fmt: skip
    if UNIT < SIZE:
        first_apart, last_apart, live_apart, start_apart = split_steps(columns, spans, i_b, solid, whole, run, seq, SIZE, UNIT, BIASED)  # fmt: skip
        o_next = step_columns(columns, first_apart, SIZE, UNIT)
        for i_step in range(first_apart, last_apart):
            o_c, o_next = o_next, step_columns(columns, i_step + 1, SIZE, UNIT)
            b_dq, b_rest = _query_gradient_step(
                b_q, b_do, b_lse, b_none, b_delta, b_dq, b_rest, k, v, k_tiles, v_tiles, p_bias, i_b, i_head, o_text, length,
                stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, words, i_step, 0, o_c, scale,
                SIZE, UNIT, DIM, PADDED, False, False, VARLEN, PRECISION,
            )  # fmt: skip
    for i_masked in tl.range(start, run, num_stages=1 if UNIT == SIZE and not BIASED else None):
        i_step = masked_step(i_masked, first, last, live, whole, BIASED)
        i_unit = step_unit(columns, i_step, SIZE, UNIT)
        b_dq, b_rest = _query_gradient_step(
            b_q, b_do, b_max, b_log, b_delta, b_dq, b_rest, k, v, k_tiles, v_tiles, p_bias, i_b, i_head, o_text, length,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, words, i_step, i_unit, run_columns(i_unit, SIZE, UNIT), scale,
            SIZE, UNIT, DIM, PADDED, BIASED, not VARLEN, True, PRECISION,
        )  # fmt: skip
    if UNIT < SIZE:
        for i_masked in tl.range(start_apart, end, num_stages=1):
            i_step = masked_step(i_masked, first_apart, last_apart, live_apart, run, BIASED)
            o_c = step_columns(columns, i_step, SIZE, UNIT)
            b_dq, b_rest = _query_gradient_step(
                b_q, b_do, b_max, b_log, b_delta, b_dq, b_rest, k, v, k_tiles, v_tiles, p_bias, i_b, i_head, o_text, length,
                stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, words, i_step, 0, o_c, scale,
                SIZE, UNIT, DIM, PADDED, BIASED, False, True, PRECISION,
            )  # fmt: skip
    b_rest = tl.sum(b_rest, 1)
    if slot < 0:
        o_row = i_tile + tl.arange(0, 1) if UNIT == SIZE else o_m // UNIT
        m_row = o_row * UNIT < length
        o_met = i_head.to(tl.int64) * units + first_unit(i_text, o_text, seq, UNIT, VARLEN) + o_row
        b_met = tl.load(met + o_met[:, None] * PADDED + tl.arange(0, PADDED)[None, :], mask=m_row[:, None], other=0.0)
        b_weight = tl.load(met_weights + o_met, mask=m_row, other=0.0)
        b_dq = _centered(b_dq, b_rest, b_met, b_weight) * grad_scale
        store_tile(d_q_tiles, d_q, b_dq, i_b, i_head, o_text, i_tile, o_m, stride_db, stride_dh, stride_dn, length, SIZE, UNIT, DIM, PADDED, VARLEN)  # fmt: skip
    else:
        o_slot = (i_text.to(tl.int64) * slots + slot) * SIZE + tl.arange(0, SIZE)
        tl.store(partial + o_slot[:, None] * PADDED + tl.arange(0, PADDED)[None, :], b_dq)
        tl.store(partial_rest + o_slot, b_rest)


@triton.jit
def _key_gradient_step(
    b_k, b_v, b_bias, b_dk, b_dv, q, d_out, q_tiles, d_out_tiles, lse, delta, o_stats, plane, i_b, i_head, o_text, length,
    stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn, words, i_step, i_unit, o_c, scale,
    SIZE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BIASED: tl.constexpr,
    RUN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_q = load_step(q, q_tiles, i_b, i_head, o_text, o_c, stride_qb, stride_qh, stride_qn, i_unit, length, SIZE, UNIT, DIM, PADDED, RUN)  # fmt: skip
    b_do = load_step(d_out, d_out_tiles, i_b, i_head, o_text, o_c, stride_gb, stride_gh, stride_gn, i_unit, length, SIZE, UNIT, DIM, PADDED, RUN)  # fmt: skip
    # queries beyond the sequence get probability 0 from their statistics
    b_max, b_log = _load_statistics(lse, o_stats + o_c, plane, o_c < length, BIASED, MASKED)
    if MASKED:
        b_delta = tl.load(delta + o_stats + o_c, mask=o_c < length, other=0.0)
    else:
        b_delta = tl.load(delta + o_stats + o_c)
    # Queries are the rows, for a thread holds few rows and many columns, and their statistics with them; and the second product
    # waits until the first one's registers are free.
    b_s = tl.dot(b_q, tl.trans(b_k) if PRECISION == "ieee" else b_k, input_precision=PRECISION) * scale
    if BIASED:
        b_p = tl.exp2(((b_s + b_bias[None, :]) - b_max[:, None]) - b_log[:, None])
    else:
        b_p = tl.exp2(b_s - b_max[:, None])
    if MASKED and UNIT < SIZE:
        b_p = tl.where(tl.trans(step_mask(words, i_step, SIZE, UNIT)), b_p, 0.0)
    b_dv = _add_product(b_dv, tl.trans(b_p.to(b_do.dtype)), b_do, PRECISION)
    b_dp = tl.dot(b_do, tl.trans(b_v) if PRECISION == "ieee" else b_v, input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    b_dk = _add_product(b_dk, tl.trans(b_ds.to(b_q.dtype)), b_q, PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=ANY_VALUE)
def key_gradient_kernel(
    q, k, v, d_out, q_tiles, d_out_tiles, d_k_tiles, d_v_tiles, bias, spans, lse, delta, d_k, d_v, partial_k, partial_v,
    items, rows, columns, words, offsets,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn, stride_bias,
    batch, heads, seq, texts, slots, scale, grad_scale,
    SIZE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BIASED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_k and d_v; the tiles are key rows and the steps query columns, from the schedule of the transposed layout."""
    i_head, i_tile, begin, solid, whole, run, end, slot, i_text, i_b, o_text, length, beyond = work_item(items, rows, columns, offsets, texts, seq, SIZE, UNIT, VARLEN)  # fmt: skip
    if beyond:
        return
    o_m = row_offsets(rows, i_tile, SIZE, UNIT)
    b_k = load_rows(k, i_b, i_head, o_text + o_m, stride_kb, stride_kh, stride_kn, o_text + length, DIM, PADDED)
    b_v = load_rows(v, i_b, i_head, o_text + o_m, stride_vb, stride_vh, stride_vn, o_text + length, DIM, PADDED)
    if PRECISION != "ieee":
        # Once, for all steps: triton 3.9 leaves in a loop what it finds there. Without tensor cores, at a step they spill less.
        b_k, b_v = tl.trans(b_k), tl.trans(b_v)
    b_none = tl.zeros([SIZE], tl.float32)
    # Where the loops of steps that the mask changes begin and end: of consecutive queries `[begin, runs)`, of any `[masked, end)`.
    runs, masked = begin, whole
    if BIASED:
        plain, live = span_of_rows(spans, i_b, o_m, length)
        if not live:
            solid, whole, masked, end = begin, begin, begin, begin
        elif not plain:
            if UNIT < SIZE:
                runs = solid
            solid, whole, masked = begin, begin, runs
    o_stats = (i_b.to(tl.int64) * heads + i_head) * seq + o_text
    plane = batch.to(tl.int64) * heads * seq

    b_dk = tl.zeros([SIZE, PADDED], tl.float32)
    b_dv = tl.zeros([SIZE, PADDED], tl.float32)
    i_next = step_unit(columns, begin, SIZE, UNIT)
    for i_step in range(begin, solid):
        i_unit, i_next = i_next, step_unit(columns, i_step + 1, SIZE, UNIT)
        b_dk, b_dv = _key_gradient_step(
            b_k, b_v, b_none, b_dk, b_dv, q, d_out, q_tiles, d_out_tiles, lse, delta, o_stats, plane, i_b, i_head, o_text, length,
            stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn, words, i_step, i_unit, run_columns(i_unit, SIZE, UNIT), scale,
            SIZE, UNIT, DIM, PADDED, False, True, False, PRECISION,
        )  # fmt: skip
    if UNIT < SIZE:
        o_next = step_columns(columns, solid, SIZE, UNIT)
        for i_step in range(solid, whole):
            o_c, o_next = o_next, step_columns(columns, i_step + 1, SIZE, UNIT)
            b_dk, b_dv = _key_gradient_step(
                b_k, b_v, b_none, b_dk, b_dv, q, d_out, q_tiles, d_out_tiles, lse, delta, o_stats, plane, i_b, i_head, o_text, length,
                stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn, words, i_step, 0, o_c, scale,
                SIZE, UNIT, DIM, PADDED, False, False, VARLEN, PRECISION,
            )  # fmt: skip
    b_bias = b_none
    if BIASED:
        b_bias = tl.load(bias + i_b.to(tl.int64) * stride_bias + o_m, mask=o_m < length, other=float("-inf"))
    if BIASED and UNIT < SIZE:
        for i_step in range(begin, runs):
            i_unit = step_unit(columns, i_step, SIZE, UNIT)
            b_dk, b_dv = _key_gradient_step(
                b_k, b_v, b_bias, b_dk, b_dv, q, d_out, q_tiles, d_out_tiles, lse, delta, o_stats, plane, i_b, i_head, o_text, length,
                stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn, words, i_step, i_unit, run_columns(i_unit, SIZE, UNIT), scale,
                SIZE, UNIT, DIM, PADDED, True, True, False, PRECISION,
            )  # fmt: skip
    for i_step in tl.range(masked, end, num_stages=None if BIASED else 1):
        i_unit = step_unit(columns, i_step, SIZE, UNIT)
        o_c = step_columns(columns, i_step, SIZE, UNIT)
        b_dk, b_dv = _key_gradient_step(
            b_k, b_v, b_bias, b_dk, b_dv, q, d_out, q_tiles, d_out_tiles, lse, delta, o_stats, plane, i_b, i_head, o_text, length,
            stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn, words, i_step, i_unit, o_c, scale,
            SIZE, UNIT, DIM, PADDED, BIASED, UNIT == SIZE and not VARLEN, True, PRECISION,
        )  # fmt: skip
    if slot < 0:
        b_dk = b_dk * grad_scale
        store_tile(d_k_tiles, d_k, b_dk, i_b, i_head, o_text, i_tile, o_m, stride_dkb, stride_dkh, stride_dkn, length, SIZE, UNIT, DIM, PADDED, VARLEN)  # fmt: skip
        store_tile(d_v_tiles, d_v, b_dv, i_b, i_head, o_text, i_tile, o_m, stride_dvb, stride_dvh, stride_dvn, length, SIZE, UNIT, DIM, PADDED, VARLEN)  # fmt: skip
    else:
        o_slot = (i_text.to(tl.int64) * slots + slot) * SIZE + tl.arange(0, SIZE)
        o_dim = tl.arange(0, PADDED)
        tl.store(partial_k + o_slot[:, None] * PADDED + o_dim[None, :], b_dk)
        tl.store(partial_v + o_slot[:, None] * PADDED + o_dim[None, :], b_dv)


@triton.jit(do_not_specialize=ANY_VALUE)
def sum_kernel(
    target, partial, partial_rest, partial_met, partial_weights, splits, rows, offsets, stride_b, stride_h, stride_n,
    heads, seq, texts, slots, factor,
    SIZE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, VARLEN: tl.constexpr,
    CENTERED: tl.constexpr,
):  # fmt: skip
    """Adds the partial gradients of one shared row of tiles, in the order of their slots, and multiplies them by `factor`; with
    CENTERED, those of queries, whose rest is taken out of the sum."""
    i_head, i_tile, slot, n, i_text, i_b, o_text, length = shared_row(splits, offsets, texts, seq, VARLEN)
    o_m = tl.arange(0, SIZE)
    o_dim = tl.arange(0, PADDED)
    b_acc = tl.zeros([SIZE, PADDED], tl.float32)
    b_met = tl.zeros([SIZE, PADDED], tl.float32)
    b_rest = tl.zeros([SIZE], tl.float32)
    b_weight = tl.zeros([SIZE], tl.float32)
    for i_slot in range(slot, slot + n):
        o_slot = (i_text.to(tl.int64) * slots + i_slot) * SIZE + o_m
        b_acc += tl.load(partial + o_slot[:, None] * PADDED + o_dim[None, :])
        if CENTERED:
            b_rest += tl.load(partial_rest + o_slot)
            b_met += tl.load(partial_met + (o_slot // UNIT)[:, None] * PADDED + o_dim[None, :])
            b_weight += tl.load(partial_weights + o_slot // UNIT)
    if CENTERED:
        b_acc = _centered(b_acc, b_rest, b_met, b_weight)
    o_row = o_text + row_offsets(rows, i_tile, SIZE, UNIT)
    store_rows(target, b_acc * factor, i_b, i_head, o_row, stride_b, stride_h, stride_n, o_text + length, DIM, PADDED)


@triton.jit(do_not_specialize=ANY_VALUE)
def outside_kernel(
    target, offsets, stride_b, stride_h, stride_n, heads, seq, texts,
    SIZE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Zeros for the tokens of no text, before the first one and behind the last."""
    pid = tl.program_id(0)
    o_row = pid // heads * SIZE + tl.arange(0, SIZE)
    begin, end = tl.load(offsets), tl.load(offsets + texts)
    if (pid // heads * SIZE >= begin) & (pid // heads * SIZE + SIZE <= end):
        return
    o_row = tl.where((o_row < begin) | (o_row >= end), o_row, seq)
    b_zero = tl.zeros([SIZE, PADDED], tl.float32)
    store_rows(target, b_zero, pid * 0, pid % heads, o_row, stride_b, stride_h, stride_n, seq, DIM, PADDED)
