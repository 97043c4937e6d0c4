"""Where a program of the fused kernels finds what it works on, and how it reads and writes it: items, rows, columns, tiles.

What a sequence is, and the prefixes of names: `triton_kernels.py`.
"""

import triton
import triton.language as tl

# Items of a list that are read at once where a program looks through its steps.
CHUNK: tl.constexpr = tl.constexpr(32)


@triton.jit
def sequence(offsets, i_text, seq, VARLEN: tl.constexpr):
    """Where a sequence lies, (row of the batch, first token, length)."""
    i_b, o_text, length = i_text, i_text * 0, seq
    if VARLEN:
        i_b = i_text * 0
        o_text = tl.load(offsets + i_text)
        length = tl.load(offsets + i_text + 1) - o_text
    return i_b, o_text, length


@triton.jit
def steps_below(columns, begin, end, limit, SIZE: tl.constexpr, UNIT: tl.constexpr, LANE: tl.constexpr = 0):
    """How many of the steps `[begin, end)`, whose columns ascend, have their unit LANE begin before token `limit`."""
    count = begin * 0
    for first in range(begin, end, CHUNK):
        o_step = first + tl.arange(0, CHUNK)
        o_column = tl.load(columns + o_step * (SIZE // UNIT) + LANE, mask=o_step < end, other=0) * UNIT
        count += tl.sum(((o_step < end) & (o_column < limit)).to(tl.int32), 0)
    return count


@triton.jit
def work_item(items, rows, columns, offsets, texts, seq, SIZE: tl.constexpr, UNIT: tl.constexpr, VARLEN: tl.constexpr):
    """What this program does, (head, tile, begin, solid, whole, run, end, slot), where its sequence lies, (text, row of the
    batch, first token, length), and whether there is nothing to do, as the text ends before the tile. Sequences of one item run
    side by side, long items first."""
    pid = tl.program_id(0)
    i_text = pid % texts
    p_item = items + (pid // texts) * 9
    i_head, i_tile, begin = tl.load(p_item), tl.load(p_item + 1), tl.load(p_item + 2)
    solid, whole, run = tl.load(p_item + 3), tl.load(p_item + 4), tl.load(p_item + 5)
    end, slot = tl.load(p_item + 6), tl.load(p_item + 7)
    i_b, o_text, length = sequence(offsets, i_text, seq, VARLEN)
    beyond = False
    if VARLEN:
        o_first = i_tile * SIZE
        if UNIT < SIZE:
            o_first = tl.load(rows + i_tile * (SIZE // UNIT)) * UNIT
        beyond = o_first >= length
        if not beyond:
            # Solid steps read tiles, also of the next text: those that do not end within this one become steps that need a mask.
            # A tile of several units has its steps in another order than their columns, so that only all of them can be left out.
            solid = begin + steps_below(columns, begin, solid, length - SIZE + 1, SIZE, UNIT)
            if UNIT == SIZE:
                whole = solid
                end = begin + steps_below(columns, begin, end, length, SIZE, UNIT)
                run = end
            elif tl.load(p_item + 8) * UNIT >= length:
                solid, whole, run, end = begin, begin, begin, begin
    return i_head, i_tile, begin, solid, whole, run, end, slot, i_text, i_b, o_text, length, beyond


@triton.jit
def shared_row(splits, offsets, texts, seq, VARLEN: tl.constexpr):
    """A shared row, (head, tile, slot, number of slots), and where its sequence lies."""
    pid = tl.program_id(0)
    i_text = pid % texts
    p_split = splits + (pid // texts) * 4
    i_head, i_tile, slot, n = tl.load(p_split), tl.load(p_split + 1), tl.load(p_split + 2), tl.load(p_split + 3)
    i_b, o_text, length = sequence(offsets, i_text, seq, VARLEN)
    return i_head, i_tile, slot, n, i_text, i_b, o_text, length


@triton.jit
def first_unit(i_text, o_text, seq, UNIT: tl.constexpr, VARLEN: tl.constexpr):
    """Where the units of a sequence begin among those of all; between texts there may be gaps."""
    if VARLEN:
        return o_text // UNIT + i_text
    else:
        return i_text * ((seq + UNIT - 1) // UNIT)


@triton.jit
def row_offsets(rows, i_tile, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Token offsets `[SIZE]` of a tile's rows."""
    o_m = tl.arange(0, SIZE)
    if UNIT == SIZE:
        return i_tile * SIZE + o_m
    else:
        return tl.load(rows + i_tile * (SIZE // UNIT) + o_m // UNIT) * UNIT + o_m % UNIT


@triton.jit
def row_units(rows, i_tile, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """The unit rows of a tile, `[SIZE / UNIT]`."""
    if UNIT == SIZE:
        return i_tile + tl.arange(0, 1)
    else:
        return tl.load(rows + i_tile * (SIZE // UNIT) + tl.arange(0, SIZE // UNIT))


@triton.jit
def step_unit(columns, i_step, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """The first unit of a step. Loops read it a step ahead: a copy that has to wait for its address comes late."""
    return tl.load(columns + i_step * (SIZE // UNIT))


@triton.jit
def run_columns(i_unit, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Token offsets `[SIZE]` of a step that reads consecutive columns."""
    return i_unit * UNIT + tl.arange(0, SIZE)


@triton.jit
def step_columns(columns, i_step, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Token offsets `[SIZE]` of any step; loops that gather read them a step ahead too."""
    if UNIT == SIZE:
        return run_columns(step_unit(columns, i_step, SIZE, UNIT), SIZE, UNIT)
    else:
        o_n = tl.arange(0, SIZE)
        return tl.load(columns + i_step * (SIZE // UNIT) + o_n // UNIT) * UNIT + o_n % UNIT


@triton.jit
def step_mask(words, i_step, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Mask `[SIZE, SIZE]` of a step: the units that its word keeps."""
    o_unit = tl.arange(0, SIZE) // UNIT
    bit = o_unit[:, None] * (SIZE // UNIT) + o_unit[None, :]
    return ((tl.load(words + i_step) >> bit) & 1) == 1


@triton.jit
def load_rows(
    pointer, i_b, i_head, o_row, stride_b, stride_h, stride_n, length, DIM: tl.constexpr, PADDED: tl.constexpr
):
    """Rows `o_row` of one head of `[batch, heads, seq, DIM]`, `[len(o_row), PADDED]`; zeros outside of `length` and DIM."""
    o_dim = tl.arange(0, PADDED)
    p_rows = (
        pointer
        + i_b.to(tl.int64) * stride_b
        + i_head.to(tl.int64) * stride_h
        + o_row[:, None].to(tl.int64) * stride_n
        + o_dim[None, :]
    )
    m_rows = (o_row < length)[:, None]
    if DIM == PADDED:
        return tl.load(p_rows, mask=m_rows, other=0.0)
    else:
        return tl.load(p_rows, mask=m_rows & (o_dim < DIM)[None, :], other=0.0)


@triton.jit
def load_consecutive(tiles, i_b, i_head, i_row, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Consecutive rows from `i_row` on, `[SIZE, PADDED]`, in one copy by the hardware; zeros outside of the tensor."""
    return tiles.load([i_b, i_head, i_row, 0]).reshape(SIZE, PADDED)


@triton.jit
def load_step(
    pointer, tiles, i_b, i_head, o_text, o_c, stride_b, stride_h, stride_n, i_unit, length,
    SIZE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The rows that a step reads, `[SIZE, PADDED]`: a tile of consecutive ones, else gathered."""
    if RUN:
        return load_consecutive(tiles, i_b, i_head, o_text + i_unit * UNIT, SIZE, PADDED)
    else:
        return load_rows(pointer, i_b, i_head, o_text + o_c, stride_b, stride_h, stride_n, o_text + length, DIM, PADDED)


@triton.jit
def load_tile(
    tiles, pointer, i_b, i_head, o_text, i_tile, o_m, stride_b, stride_h, stride_n, length,
    SIZE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The rows of a tile, `[SIZE, PADDED]`."""
    if UNIT == SIZE:
        return load_consecutive(tiles, i_b, i_head, o_text + i_tile * SIZE, SIZE, PADDED)
    else:
        return load_rows(pointer, i_b, i_head, o_text + o_m, stride_b, stride_h, stride_n, o_text + length, DIM, PADDED)


@triton.jit
def store_rows(
    pointer, b_value, i_b, i_head, o_row, stride_b, stride_h, stride_n, length, DIM: tl.constexpr, PADDED: tl.constexpr
):
    """Writes `[len(o_row), PADDED]`, but nothing outside of `length` and DIM."""
    o_dim = tl.arange(0, PADDED)
    p_head = pointer + i_b.to(tl.int64) * stride_b + i_head.to(tl.int64) * stride_h
    p_rows = p_head + o_row[:, None].to(tl.int64) * stride_n + o_dim[None, :]
    tl.store(p_rows, b_value.to(pointer.dtype.element_ty), mask=(o_row < length)[:, None] & (o_dim < DIM)[None, :])


@triton.jit
def store_tile(
    tiles, pointer, b_value, i_b, i_head, o_text, i_tile, o_m, stride_b, stride_h, stride_n, length,
    SIZE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Writes the rows of a tile, in one copy by the hardware where they are consecutive and the tensor ends with the sequence."""
    if UNIT == SIZE and not VARLEN:
        tiles.store([i_b, i_head, i_tile * SIZE, 0], b_value.to(pointer.dtype.element_ty).reshape(1, 1, SIZE, PADDED))
    else:
        store_rows(
            pointer, b_value, i_b, i_head, o_text + o_m, stride_b, stride_h, stride_n, o_text + length, DIM, PADDED
        )
