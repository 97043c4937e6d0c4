"""Where a program of the fused kernels finds what it works on, and how it reads and writes it: items, rows, columns,
tiles.

What a sequence is, and the prefixes of names: `triton_forward.py`.
"""

import triton
import triton.language as tl

# Items of a list that are read at once where a program looks through its steps.
CHUNK: tl.constexpr = tl.constexpr(32)


@triton.jit
def sequence(cu_seqlens, i_seq, seq, VARLEN: tl.constexpr):
    """Where a sequence is stored, (row of the batch, first token, length)."""
    i_b, o_seq, length = i_seq, i_seq * 0, seq
    if VARLEN:
        i_b = i_seq * 0
        o_seq = tl.load(cu_seqlens + i_seq)
        length = tl.load(cu_seqlens + i_seq + 1) - o_seq
    return i_b, o_seq, length


@triton.jit
def steps_below(column_indices, begin, end, limit, SIZE: tl.constexpr, UNIT: tl.constexpr, LANE: tl.constexpr = 0):
    """How many of the steps `[begin, end)`, whose columns ascend, have their unit LANE begin before token `limit`."""
    count = begin * 0
    for first in range(begin, end, CHUNK):
        o_step = first + tl.arange(0, CHUNK)
        o_column = tl.load(column_indices + o_step * (SIZE // UNIT) + LANE, mask=o_step < end, other=0) * UNIT
        count += tl.sum(((o_step < end) & (o_column < limit)).to(tl.int32), 0)
    return count


@triton.jit
def work_item(
    items,
    row_indices,
    column_indices,
    cu_seqlens,
    sequences,
    seq,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    VARLEN: tl.constexpr,
    WINDOW: tl.constexpr = None,
):
    """What this program does, (head, tile, begin, end_full_run, end_full, end_run, end, slot), where its sequence is
    stored, (sequence, row of the batch, first token, length), and whether there is nothing to do, as the sequence ends
    before the tile. Sequences of one item run at the same time, long items first."""
    pid = tl.program_id(0)
    i_seq = pid % sequences
    p_item = items + (pid // sequences) * 9
    i_head, i_tile, begin = tl.load(p_item), tl.load(p_item + 1), tl.load(p_item + 2)
    end_full_run, end_full, end_run = tl.load(p_item + 3), tl.load(p_item + 4), tl.load(p_item + 5)
    end, slot = tl.load(p_item + 6), tl.load(p_item + 7)
    i_b, o_seq, length = sequence(cu_seqlens, i_seq, seq, VARLEN)
    beyond = False
    if VARLEN:
        o_first = i_tile * SIZE
        if UNIT < SIZE:
            o_first = tl.load(row_indices + i_tile * (SIZE // UNIT)) * UNIT
        beyond = o_first >= length
        if not beyond:
            # Full steps of consecutive columns read tiles, also of the next sequence: those that do not end within this
            # one need a mask. A tile of several units has its steps in another order than their columns, so that only
            # all of them can be left out.
            # With a window other steps need a mask, too: where a tile is one unit, `split_steps` leaves these to them.
            if UNIT < SIZE or WINDOW is None:
                end_full_run = begin + steps_below(column_indices, begin, end_full_run, length - SIZE + 1, SIZE, UNIT)
            if UNIT == SIZE and WINDOW is not None:
                end = end_full + steps_below(column_indices, end_full, end, length, SIZE, UNIT)
                end_run = end
            elif UNIT == SIZE:
                end_full = end_full_run
                end = begin + steps_below(column_indices, begin, end, length, SIZE, UNIT)
                end_run = end
            elif tl.load(p_item + 8) * UNIT >= length:
                end_full_run, end_full, end_run, end = begin, begin, begin, begin
    return i_head, i_tile, begin, end_full_run, end_full, end_run, end, slot, i_seq, i_b, o_seq, length, beyond


@triton.jit
def shared_row(splits, cu_seqlens, sequences, seq, VARLEN: tl.constexpr):
    """A shared row, (head, tile, slot, number of slots), and where its sequence is stored."""
    pid = tl.program_id(0)
    i_seq = pid % sequences
    p_split = splits + (pid // sequences) * 4
    i_head, i_tile, slot, n = tl.load(p_split), tl.load(p_split + 1), tl.load(p_split + 2), tl.load(p_split + 3)
    i_b, o_seq, length = sequence(cu_seqlens, i_seq, seq, VARLEN)
    return i_head, i_tile, slot, n, i_seq, i_b, o_seq, length


@triton.jit
def first_unit(i_seq, o_seq, seq, UNIT: tl.constexpr, VARLEN: tl.constexpr):
    """Where the units of a sequence begin among those of all; between packed sequences there may be gaps."""
    if VARLEN:
        return o_seq // UNIT + i_seq
    else:
        return i_seq * ((seq + UNIT - 1) // UNIT)


@triton.jit
def row_offsets(row_indices, i_tile, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Token offsets `[SIZE]` of a tile's rows."""
    o_m = tl.arange(0, SIZE)
    if UNIT == SIZE:
        return i_tile * SIZE + o_m
    else:
        return tl.load(row_indices + i_tile * (SIZE // UNIT) + o_m // UNIT) * UNIT + o_m % UNIT


@triton.jit
def row_units(row_indices, i_tile, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """The unit rows of a tile, `[SIZE / UNIT]`."""
    if UNIT == SIZE:
        return i_tile + tl.arange(0, 1)
    else:
        return tl.load(row_indices + i_tile * (SIZE // UNIT) + tl.arange(0, SIZE // UNIT))


@triton.jit
def step_unit(column_indices, i_step, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """The first unit of a step. Loops read it a step ahead: a copy that has to wait for its address comes late."""
    return tl.load(column_indices + i_step * (SIZE // UNIT))


@triton.jit
def run_columns(i_unit, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Token offsets `[SIZE]` of a step that reads consecutive columns."""
    return i_unit * UNIT + tl.arange(0, SIZE)


@triton.jit
def step_columns(column_indices, i_step, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Token offsets `[SIZE]` of any step; loops that gather read them a step ahead too."""
    if UNIT == SIZE:
        return run_columns(step_unit(column_indices, i_step, SIZE, UNIT), SIZE, UNIT)
    else:
        o_n = tl.arange(0, SIZE)
        return tl.load(column_indices + i_step * (SIZE // UNIT) + o_n // UNIT) * UNIT + o_n % UNIT


@triton.jit
def step_mask(bit_masks, i_step, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Mask `[SIZE, SIZE]` of a step: the units that its bit mask keeps."""
    o_unit = tl.arange(0, SIZE) // UNIT
    bit = o_unit[:, None] * (SIZE // UNIT) + o_unit[None, :]
    return ((tl.load(bit_masks + i_step) >> bit) & 1) == 1


@triton.jit
def load_rows(tensor, i_b, i_head, o_row, length, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows `o_row` of one head of a `tensor`, `[len(o_row), PADDED]`; zeros outside of `length` and DIM."""
    pointer, stride_b, stride_h, stride_n = tensor
    o_dim = tl.arange(0, PADDED)
    # [len(o_row), PADDED]
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
    tensor,
    tiles,
    place,
    o_c,
    i_unit,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    RUN: tl.constexpr,
):
    """The rows that a step reads, `[SIZE, PADDED]`: a tile of consecutive ones, else gathered."""
    i_b, i_head, o_seq, length = place
    if RUN:
        return load_consecutive(tiles, i_b, i_head, o_seq + i_unit * UNIT, SIZE, PADDED)
    else:
        return load_rows(tensor, i_b, i_head, o_seq + o_c, o_seq + length, DIM, PADDED)


@triton.jit
def load_tile(
    tensor,
    tiles,
    place,
    i_tile,
    o_m,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The rows of a tile, `[SIZE, PADDED]`."""
    i_b, i_head, o_seq, length = place
    if UNIT == SIZE:
        return load_consecutive(tiles, i_b, i_head, o_seq + i_tile * SIZE, SIZE, PADDED)
    else:
        return load_rows(tensor, i_b, i_head, o_seq + o_m, o_seq + length, DIM, PADDED)


@triton.jit
def store_rows(tensor, b_value, i_b, i_head, o_row, length, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Writes `[len(o_row), PADDED]` to rows `o_row` of one head of a `tensor`, but nothing outside of `length` and
    DIM."""
    pointer, stride_b, stride_h, stride_n = tensor
    o_dim = tl.arange(0, PADDED)
    # [len(o_row), PADDED]
    p_head = pointer + i_b.to(tl.int64) * stride_b + i_head.to(tl.int64) * stride_h
    p_rows = p_head + o_row[:, None].to(tl.int64) * stride_n + o_dim[None, :]
    tl.store(p_rows, b_value.to(pointer.dtype.element_ty), mask=(o_row < length)[:, None] & (o_dim < DIM)[None, :])


@triton.jit
def store_tile(
    tensor,
    tiles,
    b_value,
    place,
    i_tile,
    o_m,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Writes the rows of a tile, in one copy by the hardware where they are consecutive and the tensor ends with the
    sequence."""
    i_b, i_head, o_seq, length = place
    if UNIT == SIZE and not VARLEN:
        pointer, stride_b, stride_h, stride_n = tensor
        tiles.store([i_b, i_head, i_tile * SIZE, 0], b_value.to(pointer.dtype.element_ty).reshape(1, 1, SIZE, PADDED))
    else:
        store_rows(tensor, b_value, i_b, i_head, o_seq + o_m, o_seq + length, DIM, PADDED)
