"""Key masks: what they leave of a sequence as it is, and what that makes of the steps of the fused kernels.

A mask costs time only where it changes something. Steps whose keys are all *plain*, neither removed nor with a number
added to their scores, are computed as without a mask. Steps whose keys are all removed are left out. `key_mask_kernel`
finds both kinds at the beginning and the end of a sequence; all other steps pass through the loops of masked steps.
"""

import math

import triton
import triton.language as tl

from bsa_export.ops.triton_tiles import steps_below

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))


@triton.jit(do_not_specialize=["seq"])
def key_mask_kernel(mask, bias, spans, seq, stride_bias, KEYS: tl.constexpr):
    """A key mask, float32 `[batch, seq]`, in units of log2, -inf behind `seq` (bias `[batch, stride_bias]`); and int32
    `[batch, 4]`, where the longer of the spans begins and ends that are at the beginning or the end of a sequence and
    whose keys all are plain (0), and where those that are not removed (-inf)."""
    i_b = tl.program_id(0)
    b_first = tl.full([KEYS], 0, tl.int32) + seq
    b_last = tl.full([KEYS], -1, tl.int32)
    b_live, b_live_last = b_first, b_last
    for begin in range(0, stride_bias, KEYS):
        o_n = begin + tl.arange(0, KEYS)
        m_n = o_n < seq
        b_mask = tl.load(mask + i_b.to(tl.int64) * seq + o_n, mask=m_n, other=float("-inf"))
        tl.store(bias + i_b.to(tl.int64) * stride_bias + o_n, b_mask * LOG2_E, mask=o_n < stride_bias)
        m_changed, m_live = m_n & (b_mask != 0.0), b_mask != float("-inf")
        b_first = tl.where(m_changed, tl.minimum(b_first, o_n), b_first)
        b_last = tl.where(m_changed, o_n, b_last)
        b_live = tl.where(m_live, tl.minimum(b_live, o_n), b_live)
        b_live_last = tl.where(m_live, o_n, b_live_last)
    first, end = tl.min(b_first, 0), tl.max(b_last, 0) + 1
    at_begin = first >= seq - end
    p_span = spans + i_b * 4
    tl.store(p_span, tl.where(at_begin, 0, end))
    tl.store(p_span + 1, tl.where(at_begin, first, seq))
    tl.store(p_span + 2, tl.min(b_live, 0))
    tl.store(p_span + 3, tl.max(b_live_last, 0) + 1)


@triton.jit
def split_steps(
    column_indices,
    spans,
    i_b,
    begin,
    end,
    masked,
    length,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BIASED: tl.constexpr,
    CUT: tl.constexpr = False,
):
    """Splits the steps `[begin, end)`, whose columns ascend, by a key mask: (first, last, live, start).

    Steps `[first, last)` are plain. Those before them and those behind them, up to `live`, pass through the loop of
    masked steps. That loop's own steps begin at `masked`; with these it begins at `start`, see `masked_step`. Steps
    whose keys are all removed are left out. Without a mask, not BIASED, all steps are plain. CUT: keys behind `length`
    count as removed."""
    first, last, live, start = begin, end, end, masked
    if CUT:
        last = begin + steps_below(column_indices, begin, end, length - SIZE + 1, SIZE, UNIT)
        live = begin + steps_below(column_indices, begin, end, length, SIZE, UNIT)
        start = masked - (live - last)
    if not BIASED:
        return first, last, live, start
    p_span = spans + i_b * 4
    plain, plain_end = tl.load(p_span), tl.load(p_span + 1)
    o_live, o_live_end = tl.load(p_span + 2), tl.load(p_span + 3)
    if (plain > 0) | (plain_end < length):
        LAST: tl.constexpr = SIZE // UNIT - 1
        first_live = begin + steps_below(column_indices, begin, end, o_live - UNIT + 1, SIZE, UNIT, LAST)
        live = tl.maximum(begin + steps_below(column_indices, begin, end, o_live_end, SIZE, UNIT), first_live)
        first = begin + steps_below(column_indices, begin, end, plain, SIZE, UNIT)
        first = tl.minimum(tl.maximum(first, first_live), live)
        last = begin + steps_below(column_indices, begin, end, plain_end - UNIT + 1, SIZE, UNIT, LAST)
        last = tl.minimum(tl.maximum(last, first), live)
        start = masked - (first - first_live) - (live - last)
    return first, last, live, start


@triton.jit
def span_of_rows(spans, i_b, o_m, length):
    """Whether a key mask leaves all rows of a tile as they are, and whether it leaves any."""
    p_span = spans + i_b * 4
    first, last = tl.min(o_m, 0), tl.minimum(tl.max(o_m, 0) + 1, length)
    plain = (first >= tl.load(p_span)) & (last <= tl.load(p_span + 1))
    return plain, (first < tl.load(p_span + 3)) & (last > tl.load(p_span + 2))


@triton.jit
def masked_step(i_step, first, last, live, masked, MOVED: tl.constexpr):
    """The step at place `i_step` of the loop of masked steps. First come those that `split_steps` left to it, the steps
    before `first` and then `[last, live)`, then the loop's own. Not MOVED: there are only the loop's own."""
    if not MOVED:
        return i_step
    i_early = i_step - (masked - (live - last))
    return tl.where(i_step >= masked, i_step, tl.where(i_early >= 0, last + i_early, first + i_early))
