"""Backend `triton`: fused block-sparse attention, forward and backward, as an operator that torch.compile and CUDA graphs know."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, wraps
from itertools import count

import torch

from bsa_export.ops.launch import start, warmup
from bsa_export.ops.once import second_derivative
from bsa_export.ops.schedule import ScheduleCache, Tile

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from bsa_export.ops import triton_kernels as kernels
    from bsa_export.ops.triton_masks import key_mask_kernel
except ImportError as error:
    triton = None
    _NO_TRITON = f"triton is not installed ({error})"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS = (16, 32, 64, 128)
MAX_HEAD_DIM = 128
OLDEST = (8, 0)
LOG2_E = math.log2(math.e)

# Tokens whose zeros one program writes.
ROWS = 64

# Elements of the keys that one program sums, with so many warps; with a mask, as keys and weights need twice the registers.
ELEMENTS, WARPS = 32768, 2
MASKED_ELEMENTS, MASKED_WARPS = 16384, 4
# Values of a key mask that a program reads at once.
MASK_VALUES = 4096
# A row of what is added to scores has a multiple of these: any tile of keys lies within it, and Triton knows its alignment.
BIAS_ROW = 128

# Texts share the memory for partial results in groups that fit into this.
PARTIAL_BYTES = 256 << 20

_schedules = ScheduleCache()
_sites = count(1)

# The kinds of calls whose kernels were compiled for a forward and backward pass.
_warm: set[tuple] = set()


def _constant(function):
    """Has torch.compile call `function` while it traces, as `torch.compiler.assume_constant_result`, which takes a second to import."""
    function._dynamo_marked_constant = True
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
# tests/benchmarks/tune_attention.py: small tiles win, because more of them run on a multiprocessor at once, and each waits for its
# keys while others compute. Where head_dim leaves room for few of them, a block of 128 is a tile: its keys are read half as often.
_HALF = {
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
# float32. 255 is what a thread may have: where that does not suffice, ptxas falls back to 32 or 64 registers unless it is told.
_FULL = {
    ("forward", 64): Launch(32, 4, 2),
    ("forward", 128): Launch(16, 4, 2, 255),
    ("query", 64): Launch(32, 4, 2),
    ("query", 128): Launch(32, 4, 2, 255),
    ("key", 64): Launch(32, 4, 2, 255),
    ("key", 128): Launch(32, 8, 2, 255),
}
# Not measured: chosen so that few registers are spilled, which tests/ops/compile_kernels.py tells of any GPU.
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
    """Whether matrices are multiplied from shared memory (compute capability 9 and 10); elsewhere they pass through registers."""
    return device.type != "cuda" or _capability(device.index)[0] in (9, 10)


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, or None."""
    if triton is None:
        return _NO_TRITON
    if torch.cuda.is_available():
        return _too_old(torch.cuda.current_device())
    return None if _interpreted() else "no CUDA GPU (TRITON_INTERPRET=1 runs it on a CPU, slowly)"


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


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuses(query, key, value, layout, block, *, key_padding_mask=None, attn_mask=None, rpe=None, scale=None):
    """Why this backend cannot compute the call, or None."""
    if triton is None:
        return _NO_TRITON
    if attn_mask is not None or rpe is not None:
        return "the fused kernel takes neither attn_mask nor rpe"
    if block not in BLOCKS:
        return f"the fused kernel has blocks {', '.join(map(str, BLOCKS))}, not {block}"
    if query.dtype not in DTYPES:
        return f"the fused kernel computes float16, bfloat16 and float32, not {query.dtype}"
    if not 16 <= query.shape[-1] <= MAX_HEAD_DIM:
        return f"the fused kernel has head_dim 16 to {MAX_HEAD_DIM}, not {query.shape[-1]}"
    if query.device.type != "cuda" and not _interpreted():
        return f"the fused kernel runs on CUDA GPUs, not on {query.device.type}"
    if query.device.type != "cuda" and query.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly"
    return _too_old(query.device.index) if query.device.type == "cuda" else None


def attend(query, key, value, layout, block, *, key_padding_mask=None, attn_mask=None, rpe=None, scale=None):
    """`[batch, heads, seq, head_dim]`, in the strides of the query."""
    mask = None if key_padding_mask is None else key_padding_mask.detach().contiguous()
    return _attend(query, key, value, layout, mask, None, query.shape[2], block, scale)


def attend_texts(query, key, value, layout, block, offsets, longest, scale):
    """Attention of texts one after another, without padding: `[1, heads, tokens, head_dim]`.

    Args:
        offsets: int32 `[texts + 1]`, where each text begins, and the end of the last.
        longest: tokens of the longest text.
    """
    return _attend(query, key, value, layout, None, offsets, longest, block, scale)


@_constant
def _site() -> str:
    """A name for the place in a graph that torch.compile is at; text, which it never takes for a size that may vary."""
    return str(next(_sites))


def _attend(query, key, value, layout, mask, offsets, longest, block, scale):
    if scale <= 0:  # the kernels scale a row's largest score after they found it, and what is masked, which is -inf
        query, scale = (-query, -scale) if scale else (query * 0, 1.0)
    inputs = (query, key, value, layout, mask, offsets, longest, block, scale)
    # The operator is for torch.compile: calling it costs more time on the CPU than a short input on the GPU.
    if torch.compiler.is_compiling():
        return _operator(*inputs, _site())[0]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _Attention.apply(*inputs)
    return _forward(*inputs)[0]


def _warm_up(query, key, value, layout, mask, offsets, longest, block, scale) -> None:
    """Compiles the kernels of a forward and backward pass, all at once, where a call is the first of its kind."""
    kind = (query.dtype, query.shape[-1], block, mask is None, offsets is None, query.device)
    if kind in _warm or query.device.type != "cuda":
        return
    _warm.add(kind)
    inputs, options = (query, key, value, layout, mask, offsets), (longest, block, scale)
    with warmup(query.device):
        out, lse = _forward(*inputs, *options)
        _backward(out, *inputs, out, lse, *options)


class _Attention(torch.autograd.Function):
    """The operator without the dispatcher between Python and the kernels."""

    @staticmethod
    def forward(ctx, *inputs):
        _warm_up(*inputs)
        output = _forward(*inputs)
        _setup_context(ctx, (*inputs, ""), output)
        return output[0]

    @staticmethod
    def backward(ctx, d_out):
        # With gradients enabled, whoever asked for these wants to differentiate them.
        backward = _Gradients.apply if torch.is_grad_enabled() else _backward
        return _gradients(ctx, d_out, backward)[:-1]


class _Gradients(torch.autograd.Function):
    """The gradients, which know their inputs."""

    @staticmethod
    def forward(ctx, *inputs):
        return _backward(*inputs)

    backward = staticmethod(second_derivative)


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Whether a tensor descriptor can address the strides: contiguous rows at multiples of 16 bytes."""
    units = 16 // tensor.element_size()
    batch, heads, rows, one = tensor.stride()
    return one == 1 and batch % units == heads % units == rows % units == 0 and min(batch, heads, rows) > 0


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy that a tensor descriptor can address."""
    if _is_aligned(tensor) and tensor.data_ptr() % 16 == 0:
        return tensor
    return _empty_rows(tensor).copy_(tensor)


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor in the order of the strides of `tensor`, which a tensor descriptor can address."""
    empty = torch.empty_like(tensor)
    return empty if _is_aligned(empty) else _empty_rows(tensor)


def _empty_rows(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor of that shape whose rows begin at multiples of 16 bytes."""
    batch, heads, rows, head_dim = tensor.shape
    units = 16 // tensor.element_size()
    return tensor.new_empty(batch, heads, rows, -(-head_dim // units) * units)[..., :head_dim]


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


class _Tiles(TensorDescriptor if triton else object):
    """A tensor as the hardware copies it, a tile of one head at a time. `_aligned` has checked what a TensorDescriptor would check
    again at each call, which takes as long as a launch."""

    def __init__(self, tensor: torch.Tensor, size: int, padded: int):
        self.base, self.shape, self.strides = tensor, tensor.shape, tensor.stride()
        self.block_shape, self.padding = [1, 1, size, padded], "zero"


@cache
def _constants(shape: Launch, dtype, head_dim, block, biased, varlen) -> tuple[Tile, dict, dict]:
    """How the scores are cut, the constants of all kernels of a call, and those of its main one."""
    tile = shape.tile(block)
    common = {"SIZE": tile.size, "UNIT": tile.unit, "DIM": head_dim, "PADDED": _padded(head_dim), "VARLEN": varlen}
    constants = common | {
        "BIASED": biased,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        "enable_fp_fusion": True,  # the default, up to triton 3.9
    }
    if shape.max_registers:
        constants["maxnreg"] = shape.max_registers
    return tile, common, constants


class _Call:
    """What the launches of one call have in common."""

    def __init__(self, kernel, query, layout, mask, offsets, longest, block, site):
        if layout.shape[0] != query.shape[1]:
            layout = layout.expand(query.shape[1], -1, -1)
        self.batch, self.heads, self.seq, self.head_dim = query.shape
        shape = launch(kernel, query.dtype, self.head_dim, block, query.device)
        tile, self.common, self.constants = _constants(
            shape, query.dtype, self.head_dim, block, mask is not None, offsets is not None
        )
        self.size, self.unit, self.padded = tile.size, tile.unit, self.common["PADDED"]
        sequences = self.batch * self.seq // longest
        self.schedule = _schedules.get(layout, block, longest, tile, query.device, kernel == "key", sequences, site)
        self.longest, self.offsets = longest, offsets

    def tiles(self, *tensors: torch.Tensor) -> list[_Tiles]:
        """The tensors as the hardware copies them."""
        return [_Tiles(tensor, self.size, self.padded) for tensor in tensors]

    def groups(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The sequences that run together, (offsets, how many): all of a batch, or as many texts as may have partial results."""
        if self.offsets is None:
            yield self.schedule.items, self.batch
            return
        texts = len(self.offsets) - 1
        bytes_each = max(1, self.schedule.slots * self.size * self.padded * 8)
        at_once = max(1, PARTIAL_BYTES // bytes_each)
        for first in range(0, texts, at_once):
            n = min(at_once, texts - first)
            yield self.offsets[first : first + n + 1], n

    def units(self, texts: int) -> int:
        """How many units all sequences have room for, see `first_unit`."""
        if self.offsets is None:
            return texts * -(-self.seq // self.unit)
        return self.seq // self.unit + texts + 1

    def partial(self, like: torch.Tensor, texts: int, *shape: int) -> torch.Tensor:
        """Room for the partial results of shared rows, float32 `[texts, slots, *shape]`; `like` where there are none."""
        slots = self.schedule.slots
        return like.new_empty((texts, slots, *shape), dtype=torch.float32) if slots else like

    def sum(self, target: torch.Tensor, partial: torch.Tensor, offsets: torch.Tensor, texts: int, factor: float, *rest):
        """Adds the partial results of shared rows into `target`, and takes out the rest where they have one."""
        schedule = self.schedule
        if schedule.slots:
            start(
                kernels.sum_kernel, len(schedule.splits) * texts,
                target, partial, *(rest or [partial] * 3), schedule.splits, schedule.rows, offsets,
                *target.stride()[:3], self.heads, self.seq, texts, schedule.slots, factor, CENTERED=bool(rest), **self.common,
            )  # fmt: skip


def _read_mask(mask: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(bias, spans, values in a row of the bias) of a key mask, see `key_mask_kernel`; `like` stands for both where there is none."""
    if mask is None:
        return like, like, BIAS_ROW
    batch, seq = mask.shape
    row = -(-seq // BIAS_ROW) * BIAS_ROW
    bias, spans = mask.new_empty(batch, row), mask.new_empty(batch, 4, dtype=torch.int32)
    start(key_mask_kernel, batch, mask, bias, spans, seq, row, KEYS=MASK_VALUES, num_warps=8)
    return bias, spans, row


def _on_its_device(function):
    """Calls `function` with the device of its first argument as the current one, on which Triton launches."""

    @wraps(function)
    def guarded(tensor, *inputs):
        with torch.cuda.device_of(tensor):
            return function(tensor, *inputs)

    return guarded


@_on_its_device
def _forward(query, key, value, layout, mask, offsets, longest, block, scale, site=""):
    """(out, statistics); see the operator."""
    out, lse = _empty_outputs(query, mask)
    if query.numel() == 0:
        return out, lse
    if offsets is not None:
        _zero_outside(offsets, out)
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    call = _Call("forward", query, layout, mask, offsets, longest, block, site)
    schedule = call.schedule
    bias, spans, row = _read_mask(mask, lse)
    for offsets, texts in call.groups():
        partial = call.partial(lse, texts, call.size, call.padded)
        partial_lse = lse.new_empty(2, texts, schedule.slots, call.size) if schedule.slots else lse
        start(
            kernels.forward_kernel, len(schedule.items) * texts,
            query, key, value, *call.tiles(query, key, value, out), bias, spans, out, lse, partial, partial_lse,
            schedule.items, schedule.rows, schedule.columns, schedule.words, offsets, *_strides(query, key, value, out), row,
            call.batch, call.heads, call.seq, texts, schedule.slots, scale * LOG2_E, **call.constants,
        )  # fmt: skip
        if schedule.slots:
            start(
                kernels.combine_kernel, len(schedule.splits) * texts,
                out, lse, partial, partial_lse, schedule.splits, schedule.rows, offsets, *out.stride()[:3],
                call.batch, call.heads, call.seq, texts, schedule.slots, BIASED=mask is not None, **call.common,
            )  # fmt: skip
    return out, lse


def _zero_outside(offsets, *targets) -> None:
    """Zeros for the tokens of no text."""
    for target in targets:
        _, heads, seq, head_dim = target.shape
        start(
            kernels.outside_kernel, -(-seq // ROWS) * heads,
            target, offsets, *target.stride()[:3], heads, seq, len(offsets) - 1,
            SIZE=ROWS, DIM=head_dim, PADDED=_padded(head_dim),
        )  # fmt: skip


def _empty_outputs(query, mask):
    batch, heads, seq, _ = query.shape
    lse = torch.empty((1 if mask is None else 3, batch, heads, seq), dtype=torch.float32, device=query.device)
    return _empty_like(query), lse


@_on_its_device
def _backward(d_out, query, key, value, layout, mask, offsets, out, lse, longest, block, scale, site=""):
    """The gradients of query, key and value."""
    gradients = _empty_like(query), _empty_like(key), _empty_like(value)
    if query.numel() == 0:
        return gradients
    if offsets is not None:
        _zero_outside(offsets, *gradients)
    query, key, value, d_out = _aligned(query), _aligned(key), _aligned(value), _aligned(d_out)
    delta = torch.empty_like(lse[0])
    read = _read_mask(mask, lse)
    inputs = (query, key, value, layout, mask, read, offsets, longest, block, scale, site, d_out, lse, delta)
    _query_gradient(*inputs, out, gradients[0])
    _key_gradient(*inputs, *gradients[1:])
    return gradients


def _query_gradient(
    query, key, value, layout, mask, read, offsets, longest, block, scale, site, d_out, lse, delta, out, d_query
) -> None:
    """Writes `d_query`, and `delta` for `_key_gradient`."""
    call = _Call("query", query, layout, mask, offsets, longest, block, site)
    bias, spans, row = read
    schedule = call.schedule
    for offsets, texts in call.groups():
        met, partial_met = _keys_met(call, key, lse, bias, row, offsets, texts)
        partial, rest = call.partial(lse, texts, call.size, call.padded), call.partial(lse, texts, call.size)
        start(
            kernels.query_gradient_kernel, len(schedule.items) * texts,
            query, key, value, out, d_out, *call.tiles(key, value, d_query), bias, spans, *met,
            lse, delta, d_query, partial, rest, schedule.items, schedule.rows, schedule.columns, schedule.words, offsets,
            *_strides(query, key, value, out, d_out, d_query), row, call.batch, call.heads, call.seq, texts, call.units(texts), schedule.slots,
            scale * LOG2_E, scale, **call.constants,
        )  # fmt: skip
        call.sum(d_query, partial, offsets, texts, scale, rest, *partial_met)


def _keys_met(call, key, lse, bias, row, offsets, texts):
    """What the rows of the queries meet of the keys, as `keys_met_kernel` tells: (sums, weights), and the same of shared rows."""
    schedule, units = call.schedule, call.units(texts)
    sums, met = (lse.new_empty(call.heads, units, call.padded) for _ in range(2))
    weights, met_weights = (lse.new_empty(call.heads, units) for _ in range(2))
    across = call.size // call.unit
    partial = call.partial(lse, texts, across, call.padded), call.partial(lse, texts, across)
    biased = call.constants["BIASED"]
    elements, warps = (MASKED_ELEMENTS, MASKED_WARPS) if biased else (ELEMENTS, WARPS)
    keys = max(call.unit, elements // call.padded)
    constants = {name: call.common[name] for name in ("UNIT", "PADDED", "VARLEN")}
    start(
        kernels.key_sums_kernel, -(-call.longest // keys) * call.heads * texts,
        key, bias, sums, weights, offsets, *key.stride()[:3], row, call.heads, call.seq, texts, units,
        KEYS=keys, DIM=call.head_dim, BIASED=biased, num_warps=warps, **constants,
    )  # fmt: skip
    start(
        kernels.keys_met_kernel, len(schedule.items) * texts,
        sums, weights, met, met_weights, *partial, schedule.items, schedule.rows, schedule.columns, schedule.words, offsets,
        call.heads, call.seq, texts, units, schedule.slots, SIZE=call.size, num_warps=1, **constants,
    )  # fmt: skip
    return (met, met_weights), partial


def _key_gradient(
    query, key, value, layout, mask, read, offsets, longest, block, scale, site, d_out, lse, delta, d_key, d_value
) -> None:
    """Writes `d_key` and `d_value`."""
    call = _Call("key", query, layout, mask, offsets, longest, block, site)
    bias, spans, row = read
    schedule = call.schedule
    for offsets, texts in call.groups():
        partial_key, partial_value = (call.partial(lse, texts, call.size, call.padded) for _ in range(2))
        start(
            kernels.key_gradient_kernel, len(schedule.items) * texts,
            query, key, value, d_out, *call.tiles(query, d_out, d_key, d_value), bias, spans, lse, delta,
            d_key, d_value, partial_key, partial_value,
            schedule.items, schedule.rows, schedule.columns, schedule.words, offsets,
            *_strides(query, key, value, d_out, d_key, d_value), row, call.batch, call.heads, call.seq, texts, schedule.slots,
            scale * LOG2_E, scale, **call.constants,
        )  # fmt: skip
        call.sum(d_key, partial_key, offsets, texts, scale)
        call.sum(d_value, partial_value, offsets, texts, 1.0)


@torch.library.custom_op("bsa_export::block_sparse_attention", mutates_args=())
def _operator(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: torch.Tensor, mask: torch.Tensor | None,
    offsets: torch.Tensor | None, longest: int, block: int, scale: float, site: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, statistics of the rows, float32 `[1, batch, heads, seq]`, or `[3, ...]` with a mask; triton_kernels.py tells them)."""
    return _forward(query, key, value, layout, mask, offsets, longest, block, scale, site)


@_operator.register_fake
def _(query, key, value, layout, mask, offsets, longest, block, scale, site):
    return _empty_outputs(query, mask)


@torch.library.custom_op("bsa_export::block_sparse_attention_backward", mutates_args=())
def _backward_operator(
    d_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: torch.Tensor,
    mask: torch.Tensor | None, offsets: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, longest: int, block: int,
    scale: float, site: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _backward(d_out, query, key, value, layout, mask, offsets, out, lse, longest, block, scale, site)


@_backward_operator.register_fake
def _(d_out, query, key, value, layout, mask, offsets, out, lse, longest, block, scale, site):
    return _empty_like(query), _empty_like(key), _empty_like(value)


def _setup_context(ctx, inputs, output):
    query, key, value, layout, mask, offsets, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, layout, mask, offsets, *output)


def _gradients(ctx, d_out, backward):
    gradients = backward(d_out, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * 7


_backward_operator.register_autograd(second_derivative)
_operator.register_autograd(
    lambda ctx, d_out, d_lse: _gradients(ctx, d_out, _backward_operator), setup_context=_setup_context
)
