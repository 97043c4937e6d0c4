"""Backend `triton`: fused block-sparse attention, forward and backward, as an operator that torch.compile and CUDA
graphs know."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from itertools import count
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from bsa_export.ops.contract import second_derivative
from bsa_export.ops.launch import clear_compiled, one_kind, start, warmup
from bsa_export.ops.schedule import ScheduleCache, Tile
from bsa_export.ops.triton_version import interpreting, unusable

_NO_TRITON = unusable(descriptors=True)
if _NO_TRITON is None or TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from bsa_export.ops import triton_forward, triton_gradients
    from bsa_export.ops.triton_masks import key_mask_kernel

Window = Sequence[int] | None
P = ParamSpec("P")
R = TypeVar("R")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS = (16, 32, 64, 128)
MAX_HEAD_DIM = 128
OLDEST = (8, 0)
LOG2_E = math.log2(math.e)

# Tokens whose zeros one program writes.
ROWS = 64

# Elements of the keys that one program sums, and its warps. With a mask there are fewer elements, as keys and weights
# need twice the registers.
ELEMENTS, WARPS = 32768, 2
MASKED_ELEMENTS, MASKED_WARPS = 16384, 4
# Values of a key mask that a program reads at once.
MASK_VALUES = 4096
# The length of a row of what is added to scores is a multiple of this: any tile of keys is within the row, and Triton
# knows its alignment.
BIAS_ROW = 128

# Packed sequences share the memory for partial results in groups that fit into this.
PARTIAL_BYTES = 256 << 20

_schedules = ScheduleCache()
_sites = count(1)

# The kinds of calls whose kernels were compiled for a forward and backward pass.
_warm: set[tuple] = set()


def _constant(function: Callable[P, R]) -> Callable[P, R]:
    """Has torch.compile call `function` while it traces, as `torch.compiler.assume_constant_result`, which takes a
    second to import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Launch:
    """Shape of one kernel: rows and columns of its score tile, and how many warps and pipeline stages compute it."""

    size: int
    warps: int
    stages: int
    max_registers: int | None = None

    def tile(self, block: int) -> Tile:
        """The tile for a layout of this block size."""
        return Tile(self.size, min(block, self.size))


# (kernel, padded head_dim), or (kernel, padded head_dim, block) -> launch, measured on an H100 with
# tests/benchmarks/tune_attention.py: small tiles win, because more of them run on a multiprocessor at once, and each
# waits for its keys while others compute. Where head_dim leaves room for few of them, a block of 128 is a tile: its
# keys are read half as often.
_HALF: dict[tuple[str, int] | tuple[str, int, int], Launch] = {
    ("forward", 64): Launch(64, 4, 2, 96),
    ("forward", 64, 16): Launch(64, 4, 2, 128),
    ("forward", 64, 32): Launch(64, 4, 2, 128),
    ("forward", 128): Launch(64, 4, 2),
    ("forward", 128, 128): Launch(128, 8, 2),
    ("query", 64): Launch(64, 4, 3, 168),
    ("query", 128): Launch(64, 4, 2),
    ("key", 64): Launch(64, 4, 3, 168),
    ("key", 128): Launch(64, 4, 2),
}
# float32. 255 is what a thread may have: where that does not suffice, ptxas falls back to 32 or 64 registers unless the
# limit is given.
_FULL: dict[tuple[str, int] | tuple[str, int, int], Launch] = {
    ("forward", 64): Launch(32, 4, 2),
    ("forward", 128): Launch(16, 4, 2, 255),
    ("query", 64): Launch(32, 4, 2),
    ("query", 128): Launch(32, 4, 2, 255),
    ("key", 64): Launch(32, 4, 2, 255),
    ("key", 128): Launch(32, 8, 2, 255),
}
# Not measured: chosen so that few registers are spilled, which tests/ops/compile_kernels.py shows for any GPU.
_HALF_FROM_REGISTERS = {64: Launch(32, 4, 2), 128: Launch(32, 8, 2)}
_FULL_FROM_REGISTERS = Launch(16, 8, 2)


def launch(kernel: str, dtype: torch.dtype, head_dim: int, block: int, device: torch.device) -> Launch:
    """The launch of `kernel` (`forward`, `query`, `key`)."""
    padded = max(64, _padded(head_dim))
    if not _multiplies_from_shared(device):
        return _FULL_FROM_REGISTERS if dtype == torch.float32 else _HALF_FROM_REGISTERS[padded]
    table = _FULL if dtype == torch.float32 else _HALF
    return table.get((kernel, padded, block)) or table[kernel, padded]


def _padded(head_dim: int) -> int:
    """The columns of a tile: a power of two that matrices can be multiplied with."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _multiplies_from_shared(device: torch.device) -> bool:
    """Whether matrices are multiplied from shared memory (compute capability 9 and 10); elsewhere they pass through
    registers."""
    return device.type != "cuda" or _capability(device.index)[0] in (9, 10)


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, or None."""
    if _NO_TRITON is not None:
        return _NO_TRITON
    if torch.cuda.is_available():
        return _too_old(torch.cuda.current_device())
    return None if interpreting() else "no CUDA GPU (TRITON_INTERPRET=1 runs it on a CPU, slowly)"


@_constant
def _too_old(index: int) -> str | None:
    """Why the kernels do not run on that GPU, or None."""
    major, minor = _capability(index)
    if (major, minor) >= OLDEST:
        return None
    return f"the fused kernel needs compute capability {OLDEST[0]}.{OLDEST[1]}, this GPU has {major}.{minor}"


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def clear_cache() -> None:
    """Forgets the work lists of layouts (up to 512 MiB), and the compiled kernels of this process."""
    _schedules.clear()
    _warm.clear()
    clear_compiled()


def refuses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    block: int,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    rpe: Tensor | None = None,
    scale: float,
    window: tuple[int, int] | None = None,
) -> str | None:
    """Why this backend cannot compute the call, or None."""
    if _NO_TRITON is not None:
        return _NO_TRITON
    if attn_mask is not None or rpe is not None:
        return "the fused kernel does not support attn_mask or rpe"
    if block not in BLOCKS:
        return f"the fused kernel has blocks {', '.join(map(str, BLOCKS))}, not {block}"
    if query.dtype not in DTYPES:
        return f"the fused kernel computes float16, bfloat16 and float32, not {query.dtype}"
    if not 16 <= query.shape[-1] <= MAX_HEAD_DIM:
        return f"the fused kernel has head_dim 16 to {MAX_HEAD_DIM}, not {query.shape[-1]}"
    if query.device.type != "cuda" and not interpreting():
        return f"the fused kernel runs on CUDA GPUs, not on {query.device.type}"
    if query.device.type != "cuda" and query.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly"
    return _too_old(query.device.index) if query.device.type == "cuda" else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    block: int,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    rpe: Tensor | None = None,
    scale: float,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """`[batch, heads, seq, head_dim]`, in the strides of the query."""
    mask = None if key_padding_mask is None else key_padding_mask.detach().contiguous()
    return _attend(query, key, value, layout, mask, None, query.shape[2], block, scale, window)


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    block: int,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Attention of packed sequences, without padding between them: `[1, heads, tokens, head_dim]`.

    Args:
        cu_seqlens: int32 `[sequences + 1]`, where each sequence begins, and the end of the last.
        longest: tokens of the longest sequence.
    """
    return _attend(query, key, value, layout, None, cu_seqlens, longest, block, scale, window)


@_constant
def _site() -> str:
    """A name for the place in a graph that torch.compile is at; text, which it never takes for a size that may vary."""
    return str(next(_sites))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int,
    block: int,
    scale: float,
    window: Window,
) -> Tensor:
    if scale <= 0:  # the kernels scale a row's largest score after they found it, and what is masked, which is -inf
        query, scale = (-query, -scale) if scale else (query * 0, 1.0)
    inputs = (query, key, value, layout, mask, cu_seqlens, longest, block, scale, window)
    # The operator is for torch.compile: calling it costs more time on the CPU than a short input on the GPU.
    if torch.compiler.is_compiling():
        return _operator(*inputs, _site())[0]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _Attention.apply(*inputs)
    return _forward(*inputs)[0]


def _warm_up(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int,
    block: int,
    scale: float,
    window: Window,
) -> None:
    """Compiles the kernels of a forward and backward pass, all at once, where a call is the first of its kind."""
    kind = (query.dtype, query.shape[-1], block, mask is None, cu_seqlens is None, window, query.device)
    if kind in _warm or query.device.type != "cuda":
        return
    _warm.add(kind)
    with warmup(query.device):
        out, lse = _forward(query, key, value, layout, mask, cu_seqlens, longest, block, scale, window)
        _backward(out, query, key, value, layout, mask, cu_seqlens, out, lse, longest, block, scale, window)


class _Attention(torch.autograd.Function):
    """The operator without the dispatcher between Python and the kernels."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _warm_up(*inputs)
        output = _forward(*inputs)
        _setup_context(ctx, (*inputs, ""), output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        # With gradients enabled, whoever asked for these wants to differentiate them.
        backward = _Gradients.apply if torch.is_grad_enabled() else _backward
        return _gradients(ctx, d_out, backward)[:-1]


class _Gradients(torch.autograd.Function):
    """The gradients, which know their inputs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(*inputs)

    backward = staticmethod(second_derivative)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can address the strides: contiguous rows at multiples of 16 bytes."""
    units = 16 // tensor.element_size()
    batch, heads, rows, one = tensor.stride()
    return one == 1 and (batch | heads | rows) % units == 0 and batch > 0 and heads > 0 and rows > 0


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy that a tensor descriptor can address."""
    if _is_aligned(tensor) and tensor.data_ptr() % 16 == 0:
        return tensor
    return _empty_rows(tensor).copy_(tensor)


def _empty_like(tensor: Tensor) -> Tensor:
    """An empty tensor in the order of the strides of `tensor`, which a tensor descriptor can address."""
    empty = torch.empty_like(tensor)
    return empty if _is_aligned(empty) else _empty_rows(tensor)


def _empty_rows(tensor: Tensor) -> Tensor:
    """An empty tensor of that shape whose rows begin at multiples of 16 bytes."""
    batch, heads, rows, head_dim = tensor.shape
    units = 16 // tensor.element_size()
    return tensor.new_empty(batch, heads, rows, -(-head_dim // units) * units)[..., :head_dim]


# What the kernels call the strides of a tensor: `stride_qb`, `stride_qh`, `stride_qn` of `q`.
_STRIDES = {
    name: (f"stride_{name}b", f"stride_{name}h", f"stride_{name}n")
    for name in ("q", "k", "v", "o", "g", "d", "dk", "dv")
} | {"target": ("stride_b", "stride_h", "stride_n")}


def _strides(**tensors: Tensor) -> dict[str, int]:
    """The strides of batch, heads and rows, by the names that the kernels have for them."""
    named = {}
    for name, tensor in tensors.items():
        batch, heads, rows = _STRIDES[name]
        named[batch], named[heads], named[rows], _ = tensor.stride()
    return named


@one_kind
class _Tiles(TensorDescriptor if _NO_TRITON is None else object):  # type: ignore[misc]
    """A tensor as the hardware copies it, a tile of one head at a time. `_aligned` has checked what a TensorDescriptor
    would check again at each call, which takes as long as a launch."""

    def __init__(self, tensor: Tensor, size: int, padded: int):
        self.base, self.shape, self.strides = tensor, tensor.shape, tensor.stride()
        self.block_shape, self.padding = [1, 1, size, padded], "zero"


@cache
def _constants(
    shape: Launch,
    dtype: torch.dtype,
    head_dim: int,
    block: int,
    biased: bool,
    varlen: bool,
    window: tuple[int, int] | None,
) -> tuple[Tile, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """How the scores are cut, the constants of all kernels of a call, those of its main kernel only, and how that
    one is compiled."""
    tile = shape.tile(block)
    common = {"SIZE": tile.size, "UNIT": tile.unit, "DIM": head_dim, "PADDED": _padded(head_dim), "VARLEN": varlen}
    main = {"BIASED": biased, "WINDOW": window, "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}
    options: dict[str, Any] = {
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        "enable_fp_fusion": True,  # the default, up to triton 3.9
    }
    if shape.max_registers:
        options["maxnreg"] = shape.max_registers
    return tile, common, common | main, options


class _Call:
    """What the launches of one call have in common."""

    def __init__(
        self,
        kernel: str,
        query: Tensor,
        layout: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        longest: int,
        block: int,
        window: Window,
        site: str,
    ):
        if layout.shape[0] != query.shape[1]:
            layout = layout.expand(query.shape[1], -1, -1)
        self.batch, self.heads, self.seq, self.head_dim = query.shape
        self.biased = mask is not None
        self.window = None if window is None else (window[0], window[1])
        shape = launch(kernel, query.dtype, self.head_dim, block, query.device)
        tile, self.common, self.constants, self.options = _constants(
            shape, query.dtype, self.head_dim, block, self.biased, cu_seqlens is not None, self.window
        )
        self.size, self.unit, self.padded = tile.size, tile.unit, self.common["PADDED"]
        side_by_side = self.batch * self.seq // longest
        self.schedule = _schedules.get(
            layout, block, longest, tile, query.device, kernel == "key", side_by_side, site, self.window
        )
        self.longest, self.cu_seqlens = longest, cu_seqlens

    def tiles(self, **tensors: Tensor) -> dict[str, _Tiles]:
        """The tensors as the hardware copies them."""
        size, padded = self.size, self.padded
        return {name: _Tiles(tensor, size, padded) for name, tensor in tensors.items()}

    def groups(self) -> Iterator[tuple[Tensor, int]]:
        """The sequences that run together, (cu_seqlens, how many): all of a batch, or as many packed ones as may have
        partial results."""
        if self.cu_seqlens is None:
            yield self.schedule.items, self.batch
            return
        sequences = len(self.cu_seqlens) - 1
        bytes_each = max(1, self.schedule.slots * self.size * self.padded * 8)
        at_once = max(1, PARTIAL_BYTES // bytes_each)
        for first in range(0, sequences, at_once):
            n = min(at_once, sequences - first)
            yield self.cu_seqlens[first : first + n + 1], n

    def units(self, sequences: int) -> int:
        """How many units all sequences have room for, see `first_unit`."""
        if self.cu_seqlens is None:
            return sequences * -(-self.seq // self.unit)
        return self.seq // self.unit + sequences + 1

    def partial(self, like: Tensor, sequences: int, *shape: int) -> Tensor:
        """Room for the partial results of shared rows, float32 `[sequences, slots, *shape]`; `like` where there are
        none."""
        slots = self.schedule.slots
        return like.new_empty((sequences, slots, *shape), dtype=torch.float32) if slots else like

    def sum(
        self,
        target: Tensor,
        partial: Tensor,
        cu_seqlens: Tensor,
        sequences: int,
        factor: float,
        residual: Tensor | None = None,
        visible: tuple[Tensor, Tensor] | None = None,
        delta: Tensor | None = None,
    ) -> None:
        """Adds the partial results of shared rows into `target`. Their residuals, if they have any, are subtracted, and
        with a window added to `delta`."""
        schedule = self.schedule
        if schedule.slots:
            keys, weights = visible or (partial, partial)
            start(
                triton_gradients.sum_kernel,
                len(schedule.splits) * sequences,
                target=target,
                partial=partial,
                partial_residual=partial if residual is None else residual,
                partial_visible=keys,
                partial_weights=weights,
                delta=partial if delta is None else delta,
                splits=schedule.splits,
                row_indices=schedule.row_indices,
                cu_seqlens=cu_seqlens,
                **_strides(target=target),
                heads=self.heads,
                seq=self.seq,
                sequences=sequences,
                slots=schedule.slots,
                factor=factor,
                CENTERED=residual is not None,
                WINDOWED=residual is not None and self.window is not None,
                **self.common,
            )


def _read_mask(mask: Tensor | None, like: Tensor) -> dict[str, Any]:
    """A key mask as the kernels read it, by their names, see `key_mask_kernel`; `like` stands for both tensors where
    there is no mask."""
    if mask is None:
        return {"bias": like, "spans": like, "stride_bias": BIAS_ROW}
    batch, seq = mask.shape
    row = -(-seq // BIAS_ROW) * BIAS_ROW
    bias, spans = mask.new_empty(batch, row), mask.new_empty(batch, 4, dtype=torch.int32)
    start(
        key_mask_kernel,
        batch,
        {"num_warps": 8},
        mask=mask,
        bias=bias,
        spans=spans,
        seq=seq,
        stride_bias=row,
        KEYS=MASK_VALUES,
    )
    return {"bias": bias, "spans": spans, "stride_bias": row}


def _on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Calls `function` with the device of its first argument as the current one, on which Triton launches."""

    @wraps(function)
    def guarded(*inputs: P.args, **options: P.kwargs) -> R:
        with torch.cuda.device_of(inputs[0]):
            return function(*inputs, **options)

    return guarded


@_on_its_device
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int,
    block: int,
    scale: float,
    window: Window = None,
    site: str = "",
) -> tuple[Tensor, Tensor]:
    """(out, statistics); see the operator."""
    out, lse = _empty_outputs(query, mask)
    if query.numel() == 0:
        return out, lse
    if cu_seqlens is not None:
        _zero_outside(cu_seqlens, out)
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    call = _Call("forward", query, layout, mask, cu_seqlens, longest, block, window, site)
    schedule = call.schedule
    read_mask = _read_mask(mask, lse)
    for bounds, sequences in call.groups():
        partial = call.partial(lse, sequences, call.size, call.padded)
        partial_lse = lse.new_empty(2, sequences, schedule.slots, call.size) if schedule.slots else lse
        start(
            triton_forward.forward_kernel,
            len(schedule.items) * sequences,
            call.options,
            q=query,
            k=key,
            v=value,
            **call.tiles(q_tiles=query, k_tiles=key, v_tiles=value, out_tiles=out),
            out=out,
            lse=lse,
            partial=partial,
            partial_lse=partial_lse,
            **schedule.steps,
            cu_seqlens=bounds,
            **_strides(q=query, k=key, v=value, o=out),
            **read_mask,
            batch=call.batch,
            heads=call.heads,
            seq=call.seq,
            sequences=sequences,
            slots=schedule.slots,
            scale=scale * LOG2_E,
            **call.constants,
        )
        if schedule.slots:
            start(
                triton_forward.combine_kernel,
                len(schedule.splits) * sequences,
                out=out,
                lse=lse,
                partial=partial,
                partial_lse=partial_lse,
                splits=schedule.splits,
                row_indices=schedule.row_indices,
                cu_seqlens=bounds,
                **_strides(o=out),
                batch=call.batch,
                heads=call.heads,
                seq=call.seq,
                sequences=sequences,
                slots=schedule.slots,
                BIASED=call.biased,
                **call.common,
            )
    return out, lse


def _zero_outside(cu_seqlens: Tensor, *targets: Tensor) -> None:
    """Writes zeros for the tokens that belong to no packed sequence."""
    for target in targets:
        _, heads, seq, head_dim = target.shape
        start(
            triton_forward.outside_kernel,
            -(-seq // ROWS) * heads,
            target=target,
            cu_seqlens=cu_seqlens,
            **_strides(target=target),
            heads=heads,
            seq=seq,
            sequences=len(cu_seqlens) - 1,
            SIZE=ROWS,
            DIM=head_dim,
            PADDED=_padded(head_dim),
        )


def _empty_outputs(query: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, heads, seq, _ = query.shape
    lse = query.new_empty((1 if mask is None else 3, batch, heads, seq), dtype=torch.float32)
    return _empty_like(query), lse


@_on_its_device
def _backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    longest: int,
    block: int,
    scale: float,
    window: Window = None,
    site: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    d_query, d_key, d_value = _empty_like(query), _empty_like(key), _empty_like(value)
    if query.numel() == 0:
        return d_query, d_key, d_value
    if cu_seqlens is not None:
        _zero_outside(cu_seqlens, d_query, d_key, d_value)
    query, key, value, d_out = _aligned(query), _aligned(key), _aligned(value), _aligned(d_out)
    delta = torch.empty_like(lse[0])
    read_mask = _read_mask(mask, lse)
    call = _Call("query", query, layout, mask, cu_seqlens, longest, block, window, site)
    _query_gradient(call, query, key, value, out, d_out, read_mask, lse, delta, scale, d_query)
    call = _Call("key", query, layout, mask, cu_seqlens, longest, block, window, site)
    _key_gradient(call, query, key, value, d_out, read_mask, lse, delta, scale, d_key, d_value)
    return d_query, d_key, d_value


def _query_gradient(
    call: _Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    d_out: Tensor,
    read_mask: dict[str, Any],
    lse: Tensor,
    delta: Tensor,
    scale: float,
    d_query: Tensor,
) -> None:
    """Writes `d_query`, and `delta` for `_key_gradient`."""
    schedule = call.schedule
    for bounds, sequences in call.groups():
        partial = call.partial(lse, sequences, call.size, call.padded)
        if call.window is None:
            (visible, weights), partial_visible = _visible_keys(call, key, lse, read_mask, bounds, sequences)
        else:  # the kernel computes the mean of the keys itself, and writes that of shared rows
            visible, weights = partial_visible = torch.empty_like(partial), lse
        residual = call.partial(lse, sequences, call.size)
        start(
            triton_gradients.query_gradient_kernel,
            len(schedule.items) * sequences,
            call.options,
            q=query,
            k=key,
            v=value,
            out=out,
            d_out=d_out,
            **call.tiles(k_tiles=key, v_tiles=value, d_q_tiles=d_query),
            visible=visible,
            visible_weights=weights,
            lse=lse,
            delta=delta,
            d_q=d_query,
            partial=partial,
            partial_residual=residual,
            **schedule.steps,
            cu_seqlens=bounds,
            **_strides(q=query, k=key, v=value, o=out, g=d_out, d=d_query),
            **read_mask,
            batch=call.batch,
            heads=call.heads,
            seq=call.seq,
            sequences=sequences,
            units=call.units(sequences),
            slots=schedule.slots,
            scale=scale * LOG2_E,
            grad_scale=scale,
            **call.constants,
        )
        call.sum(d_query, partial, bounds, sequences, scale, residual, partial_visible, delta)


def _visible_keys(
    call: _Call, key: Tensor, lse: Tensor, read_mask: dict[str, Any], cu_seqlens: Tensor, sequences: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The sums of the keys that each row of queries attends to, and of their weights, as `visible_keys_kernel` computes
    them; and the same for the parts of shared rows."""
    schedule, units = call.schedule, call.units(sequences)
    sums, visible = (lse.new_empty(call.heads, units, call.padded) for _ in range(2))
    weights, visible_weights = (lse.new_empty(call.heads, units) for _ in range(2))
    across = call.size // call.unit
    partial = call.partial(lse, sequences, across, call.padded), call.partial(lse, sequences, across)
    elements, warps = (MASKED_ELEMENTS, MASKED_WARPS) if call.biased else (ELEMENTS, WARPS)
    keys = max(call.unit, elements // call.padded)
    constants = {name: call.common[name] for name in ("UNIT", "PADDED", "VARLEN")}
    start(
        triton_gradients.key_sums_kernel,
        -(-call.longest // keys) * call.heads * sequences,
        {"num_warps": warps},
        k=key,
        bias=read_mask["bias"],
        sums=sums,
        weights=weights,
        cu_seqlens=cu_seqlens,
        **_strides(k=key),
        stride_bias=read_mask["stride_bias"],
        heads=call.heads,
        seq=call.seq,
        sequences=sequences,
        units=units,
        KEYS=keys,
        DIM=call.head_dim,
        BIASED=call.biased,
        **constants,
    )
    start(
        triton_gradients.visible_keys_kernel,
        len(schedule.items) * sequences,
        {"num_warps": 1},
        sums=sums,
        weights=weights,
        visible=visible,
        visible_weights=visible_weights,
        partial_visible=partial[0],
        partial_weights=partial[1],
        **schedule.steps,
        cu_seqlens=cu_seqlens,
        heads=call.heads,
        seq=call.seq,
        sequences=sequences,
        units=units,
        slots=schedule.slots,
        SIZE=call.size,
        **constants,
    )
    return (visible, visible_weights), partial


def _key_gradient(
    call: _Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_out: Tensor,
    read_mask: dict[str, Any],
    lse: Tensor,
    delta: Tensor,
    scale: float,
    d_key: Tensor,
    d_value: Tensor,
) -> None:
    """Writes `d_key` and `d_value`."""
    schedule = call.schedule
    for bounds, sequences in call.groups():
        partial_key, partial_value = (call.partial(lse, sequences, call.size, call.padded) for _ in range(2))
        start(
            triton_gradients.key_gradient_kernel,
            len(schedule.items) * sequences,
            call.options,
            q=query,
            k=key,
            v=value,
            d_out=d_out,
            **call.tiles(q_tiles=query, d_out_tiles=d_out, d_k_tiles=d_key, d_v_tiles=d_value),
            lse=lse,
            delta=delta,
            d_k=d_key,
            d_v=d_value,
            partial_k=partial_key,
            partial_v=partial_value,
            **schedule.steps,
            cu_seqlens=bounds,
            **_strides(q=query, k=key, v=value, g=d_out, dk=d_key, dv=d_value),
            **read_mask,
            batch=call.batch,
            heads=call.heads,
            seq=call.seq,
            sequences=sequences,
            slots=schedule.slots,
            scale=scale * LOG2_E,
            grad_scale=scale,
            **call.constants,
        )
        call.sum(d_key, partial_key, bounds, sequences, scale)
        call.sum(d_value, partial_value, bounds, sequences, 1.0)


@torch.library.custom_op("bsa_export::block_sparse_attention", mutates_args=())
def _operator(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor, mask: Tensor | None,
    cu_seqlens: Tensor | None, longest: int, block: int, scale: float, window: Sequence[int] | None, site: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, statistics of the rows, float32 `[1, batch, heads, seq]`, or `[3, ...]` with a mask; triton_forward.py
    lists them)."""
    return _forward(query, key, value, layout, mask, cu_seqlens, longest, block, scale, window, site)


@_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, mask: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query, mask)


@torch.library.custom_op("bsa_export::block_sparse_attention_backward", mutates_args=())
def _backward_operator(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: Tensor,
    mask: Tensor | None, cu_seqlens: Tensor | None, out: Tensor, lse: Tensor, longest: int, block: int,
    scale: float, window: Sequence[int] | None, site: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(d_out, query, key, value, layout, mask, cu_seqlens, out, lse, longest, block, scale, window, site)


@_backward_operator.register_fake
def _(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(query), _empty_like(key), _empty_like(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, layout, mask, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, layout, mask, cu_seqlens, *output)


def _gradients(ctx: Any, d_out: Tensor, backward: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor | None, ...]:
    gradients = backward(d_out, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * 8


_backward_operator.register_autograd(second_derivative)
_operator.register_autograd(
    lambda ctx, d_out, d_lse: _gradients(ctx, d_out, _backward_operator), setup_context=_setup_context
)
