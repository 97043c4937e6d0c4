"""What the fused kernels do with a tile of scores: the scores of a step, sums and products that threads share.

The prefixes of names: `triton_forward.py`.
"""

import triton
import triton.language as tl

from bsa_export.ops.triton_tiles import step_mask

# Arguments whose value must not cause another compilation.
ANY_VALUE = ["batch", "heads", "seq", "slots", "sequences", "units"]

# Parts of a row's sum that are kept apart until the end, so that threads need not exchange sums in each step. A tensor
# core gives a thread its own columns out of this many.
PARTS: tl.constexpr = tl.constexpr(8)


@triton.jit
def rounded(b_products):
    """Products, each rounded before anything is added to it. Where threads exchange products for a sum, each thread
    would otherwise add the rounded products of others to its own unrounded one. Their sums would differ, and it would
    be chance which of them is used."""
    return b_products + 0.0


@triton.jit
def part_sums(b_tile, SIZE: tl.constexpr):
    """The sums of rows in parts, `[SIZE, PARTS]`."""
    return tl.sum(tl.reshape(b_tile, [SIZE, SIZE // PARTS, PARTS]), 1)


@triton.jit
def add_product(b_sum, b_left, b_right, PRECISION: tl.constexpr):
    """`b_sum + b_left @ b_right`. In float32 the product is summed on its own first, because one sum over all steps
    loses a digit, also in delta, which is computed from the output. `max_num_imprecise_acc`, which only has a meaning
    for fp8, keeps the compiler from joining the sums."""
    if PRECISION == "ieee":
        return b_sum + tl.dot(b_left, b_right, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


@triton.jit
def in_window(b_tile, o_query, o_key, length, nothing, WINDOW: tl.constexpr):
    """`b_tile`, of queries (rows) and keys (columns), with `nothing` outside of the window and of the sequence."""
    if WINDOW is None:
        return b_tile
    else:
        o_first = o_query - WINDOW[0]
        o_last = tl.minimum(o_query + WINDOW[1], length - 1)
        m_window = (o_key[None, :] >= o_first[:, None]) & (o_key[None, :] <= o_last[:, None])
        return tl.where(m_window, b_tile, nothing)


@triton.jit
def scores(
    b_q,
    b_k,
    p_bias,
    bit_masks,
    i_step,
    o_m,
    o_c,
    length,
    scale,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores `[SIZE, SIZE]` of queries (rows) and keys (columns), -inf where there is none; in units of log2 if BIASED,
    else still without `scale`."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if BIASED:
        b_s = b_s * scale + tl.load(p_bias + o_c)[None, :]
    elif MASKED and WINDOW is None:
        b_s = tl.where((o_c < length)[None, :], b_s, float("-inf"))
    if MASKED and UNIT < SIZE:
        b_s = tl.where(step_mask(bit_masks, i_step, SIZE, UNIT), b_s, float("-inf"))
    if MASKED:
        b_s = in_window(b_s, o_m, o_c, length, float("-inf"), WINDOW)
    return b_s
