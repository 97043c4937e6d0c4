"""The kernel of rotary positions."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["vectors", "positions"])
def rotary_kernel(
    x,
    cos,
    sin,
    turned,
    vectors,
    heads,
    positions,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    DIRECTION: tl.constexpr,
):
    """Turns `ROWS` vectors of `x`, `[batch * seq * heads, HEAD_DIM]`, by the angles of their tokens.

    `cos` and `sin` are `[positions, HALF]`, where positions are seq, or batch * seq. `WIDTH` and `REST` are HALF and
    the elements that pass, rounded up to powers of 2. `DIRECTION` is 1, or -1 to turn back.
    """
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_h = tl.arange(0, WIDTH)  # [WIDTH]
    m_m = o_m < vectors
    m_h = m_m[:, None] & (o_h < HALF)[None, :]
    p_x = o_m.to(tl.int64)[:, None] * HEAD_DIM + o_h[None, :]  # [ROWS, WIDTH]
    p_angle = ((o_m // heads) % positions)[:, None] * HALF + o_h[None, :]
    b_cos = tl.load(cos + p_angle, mask=m_h, other=0.0).to(tl.float32)
    b_sin = tl.load(sin + p_angle, mask=m_h, other=0.0).to(tl.float32) * DIRECTION
    b_first = tl.load(x + p_x, mask=m_h, other=0.0).to(tl.float32)
    b_second = tl.load(x + p_x + HALF, mask=m_h, other=0.0).to(tl.float32)
    kind = turned.dtype.element_ty
    tl.store(turned + p_x, (b_first * b_cos - b_second * b_sin).to(kind), mask=m_h)
    tl.store(turned + p_x + HALF, (b_second * b_cos + b_first * b_sin).to(kind), mask=m_h)
    if HEAD_DIM > 2 * HALF:
        o_r = 2 * HALF + tl.arange(0, REST)  # [REST]
        m_r = m_m[:, None] & (o_r < HEAD_DIM)[None, :]
        p_rest = o_m.to(tl.int64)[:, None] * HEAD_DIM + o_r[None, :]
        tl.store(turned + p_rest, tl.load(x + p_rest, mask=m_r), mask=m_r)
