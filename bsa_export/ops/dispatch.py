"""One function for every backend: checks the arguments, brings the masks into one form and chooses a backend."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from bsa_export.errors import AttentionError
from bsa_export.ops import window as windows
from bsa_export.ops.contract import Backend, VarlenBackend

# Where each backend lives, the fastest first. `auto` takes the first that can; `deepspeed` runs only when it is named.
MODULES = {
    "triton": "bsa_export.ops.triton_backend",
    "torch": "bsa_export.ops.torch_backend",
    "reference": "bsa_export.ops.reference",
    "deepspeed": "bsa_export.ops.deepspeed_backend",
}
AUTO = ("triton", "torch", "reference")

# Finite masks are raised to this, so that a sum of several, or one in units of log2, stays finite: only -inf removes a
# key.
LOWEST = -1e30


def _load(name: str) -> Backend | str:
    """The backend's module, or why it cannot be imported here."""
    try:
        return cast(Backend, import_module(MODULES[name]))
    except ImportError as error:
        return "triton is not installed" if error.name == "triton" else f"cannot be imported here: {error}"


# Loaded now, not at the first call, so that torch.compile never traces an import.
_loaded: dict[str, Backend | str] = {name: _load(name) for name in AUTO}


def _backend(name: str) -> Backend | str:
    if name not in _loaded:
        _loaded[name] = _load(name)
    return _loaded[name]


def backends() -> dict[str, str | None]:
    """The name of each backend with None, or with why it is unavailable on this machine."""
    reasons = {}
    for name in MODULES:
        module = _backend(name)
        reasons[name] = module if isinstance(module, str) else module.unavailable()
    return reasons


def clear_caches() -> None:
    """Frees what the backends keep between calls: work lists of layouts (up to 512 MiB), compiled kernels,
    DeepSpeed's look-up tables. The next calls compute them again."""
    for module in _loaded.values():
        if not isinstance(module, str):
            module.clear_cache()


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    block: int,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    rpe: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Self-attention whose softmax runs over the kept blocks of a layout only. Differentiable once in query, key and
    value.

    A mask is bool (True keeps the key) or added to the scores. Keys with False or -inf are removed. A row without keys
    becomes zeros, with zero gradients. Finite values are added as in a dense softmax, also if a row has no others.
    Under autocast inputs are cast, as `scaled_dot_product_attention` does.

    The fused kernel reads a layout back to the CPU at its first call, and reuses what it read while the layout has the
    same memory and PyTorch has not written to it. It cannot see writes that PyTorch does not count: through `.data`, by
    kernels of your own, or by replays of a CUDA graph. Write a new tensor instead. A layout that is new at each call,
    such as one that a compiled function computes or one made in inference mode, is read at each call. That waits for
    the GPU, and is not possible while a CUDA graph is captured. Parameters, buffers and their slices are read once for
    each length in blocks, and in a compiled function once for each place in it.

    Args:
        query, key, value: `[batch, heads, seq, head_dim]` of one floating dtype and device, in any strides.
        layout: `[heads, n, n]`, or `[1, n, n]` for every head, integer or bool, on any device; nonzero keeps a block.
            Its top-left `ceil(seq / block)` blocks count.
        block: side of a square block, in tokens.
        key_padding_mask: `[batch, seq]`, or a shape that broadcasts to it.
        attn_mask: `[seq, seq]`, or any shape that broadcasts to `[batch, heads, seq, seq]`.
        rpe: relative position embedding, added to the scores, shaped as `attn_mask`.
        scale: what the scores are multiplied by before anything is added; `head_dim ** -0.5` unless given.
        window: tokens to the left and to the right of a query, as in FlashAttention. Query i attends to key j only if
            the layout keeps its block and `i - left <= j <= i + right`. -1 is no limit on that side.
        dropout_p: must be 0, because probabilities have no dropout, as in DeepSpeed.
        backend: `auto` (the fastest that can), `triton`, `torch`, `reference` or `deepspeed`.

    Returns:
        `[batch, heads, seq, head_dim]` in the query's dtype.

    Raises:
        AttentionError: an argument does not fit, or the named backend cannot compute this call; the sentence says why.
    """
    if dropout_p:
        message = "expected 0: block-sparse attention has no dropout on the probabilities"
        raise AttentionError(message, found=dropout_p, where="dropout_p")
    _check_tensors(query=query, key=key, value=value, layout=layout)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = _autocast(query, key, value)
        with torch.autocast(device, enabled=False):
            return block_sparse_attention(
                query,
                key,
                value,
                layout,
                block,
                key_padding_mask=key_padding_mask,
                attn_mask=attn_mask,
                rpe=rpe,
                scale=scale,
                window=window,
                backend=backend,
            )
    _check(query, key, value, layout, block)
    _check_length(layout, block, query.shape[2], "query: seq")
    batch, heads, seq, head_dim = query.shape
    masks: dict[str, Tensor | None] = {
        "key_padding_mask": _additive("key_padding_mask", key_padding_mask, query, (batch, seq)),
        "attn_mask": _additive("attn_mask", attn_mask, query, (batch, heads, seq, seq)),
        "rpe": _additive("rpe", rpe, query, (batch, heads, seq, seq)),
    }
    if (keys := masks["key_padding_mask"]) is not None:
        masks["key_padding_mask"] = keys.expand(batch, seq)
    limits = windows.checked(window, seq)
    if query.numel() == 0:
        return query + key + value  # nothing, whose gradients are nothing too
    scale = head_dim**-0.5 if scale is None else scale
    n = -(-seq // block)
    layout = layout[:, :n, :n]
    module = _choose(backend, query, key, value, layout, block, masks, scale, limits)
    return module.attend(query, key, value, layout, block, **masks, scale=scale, window=limits)


def block_sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    block: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """`block_sparse_attention` of packed sequences: of any lengths, one after another, without padding between them.

    The fused kernel computes them in one call, other backends one by one. No sequence attends to another. The fused
    kernel launches as many programs as sequences times `max_seqlen` need: do not pack many short sequences with a very
    long one.

    Args:
        query, key, value: `[1, heads, tokens, head_dim]`, the tokens of all sequences.
        layout, block, scale, window, backend: as in `block_sparse_attention`; each sequence starts at the layout's top
            left.
        cu_seqlens: int32 `[sequences + 1]` on the query's device, where each sequence begins, and the end of the last,
            as in flash-attn's varlen functions: ascending, within the tokens. The fused kernel does not wait for the
            GPU to check that.
        max_seqlen: tokens of the longest sequence, or more. In the fused kernel, the output beyond them is undefined.

    Returns:
        `[1, heads, tokens, head_dim]` in the query's dtype; zeros for tokens that belong to no sequence.

    Raises:
        AttentionError: an argument does not fit, or the named backend cannot compute this call.
    """
    _check_tensors(query=query, key=key, value=value, layout=layout, cu_seqlens=cu_seqlens)
    if (
        cu_seqlens.ndim != 1
        or cu_seqlens.dtype != torch.int32
        or cu_seqlens.device != query.device
        or not len(cu_seqlens)
    ):
        found = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise AttentionError(f"expected int32 [sequences + 1] on {query.device}", found=found, where="cu_seqlens")
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = _autocast(query, key, value)
    _check(query, key, value, layout, block)
    _check_length(layout, block, max_seqlen, "max_seqlen")
    tokens = query.shape[2]
    if query.shape[0] != 1:
        raise AttentionError("expected [1, heads, tokens, head_dim]", found=list(query.shape), where="query")
    if not 0 <= max_seqlen <= tokens:
        message = f"expected at most the {tokens:,} tokens of query"
        raise AttentionError(message, found=max_seqlen, where="max_seqlen")
    limits = windows.checked(window, max_seqlen)
    if query.numel() == 0 or len(cu_seqlens) == 1 or max_seqlen == 0:
        return torch.cat([(query + key + value)[:, :, :0], query.new_zeros(query.shape)], dim=2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    n = -(-max_seqlen // block)
    masks: dict[str, Tensor | None] = dict.fromkeys(("key_padding_mask", "attn_mask", "rpe"))
    module = _choose(backend, query, key, value, layout[:, :n, :n], block, masks, scale, limits)
    if module is _loaded["triton"]:
        varlen = cast(VarlenBackend, module)
        layout = layout[:, :n, :n]
        return varlen.attend_varlen(query, key, value, layout, block, cu_seqlens, max_seqlen, scale, limits)
    bounds = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(bounds)]
    if min(bounds[0], *lengths, tokens - bounds[-1]) < 0 or max(lengths) > max_seqlen:
        message = f"expected ascending bounds within {tokens:,} tokens, of sequences of at most {max_seqlen:,}"
        raise AttentionError(message, found=bounds if len(bounds) < 10 else "others", where="cu_seqlens")
    outside = [query.new_zeros(1, query.shape[1], n, query.shape[3]) for n in (bounds[0], tokens - bounds[-1])]
    outputs = []
    for begin, end in pairwise(bounds):
        one = slice(begin, end)
        q, k, v = query[:, :, one], key[:, :, one], value[:, :, one]
        outputs.append(block_sparse_attention(q, k, v, layout, block, scale=scale, window=window, backend=backend))
    return torch.cat([outside[0], *outputs, outside[1]], dim=2)


def _choose(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    block: int,
    masks: dict[str, Tensor | None],
    scale: float,
    window: tuple[int, int] | None,
) -> Backend:
    """The module of the backend that is to compute this call."""
    if backend == "auto":
        # Triton's interpreter computes on a CPU too, but slower than anything else: only who names it gets it.
        names: tuple[str, ...] = AUTO if query.is_cuda else AUTO[1:]
    elif backend in MODULES:
        names = (backend,)
    else:
        raise AttentionError(f"expected auto, {', '.join(MODULES)}", found=repr(backend), where="backend")
    learned = [name for name, mask in masks.items() if mask is not None and mask.requires_grad]
    reason: str | None = None
    for name in names:
        module = _backend(name)
        if isinstance(module, str):
            reason = module
        elif learned and torch.is_grad_enabled() and name != "reference":
            # It would be as large as the score matrix.
            reason = f"{learned[0]} requires a gradient, which only the reference backend computes"
        else:
            reason = module.refuses(query, key, value, layout, block, **masks, scale=scale, window=window)
            if reason is None:
                return module
    raise AttentionError(str(reason), where=f"backend {names[-1]}")


def _check_tensors(**arguments: Any) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise AttentionError("expected a tensor", found=type(x).__name__, where=name)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype of the autocast region, as PyTorch casts those of an operator that it lists: not
    float64."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def _check(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, block: int) -> None:
    if query.ndim != 4:
        raise AttentionError("expected [batch, heads, seq, head_dim]", found=list(query.shape), where="query")
    if not query.is_floating_point():
        raise AttentionError("expected a floating dtype", found=query.dtype, where="query")
    for name, x in (("key", key), ("value", value)):
        if x.shape != query.shape:
            message = f"expected the query's shape {list(query.shape)} (self-attention only)"
            raise AttentionError(message, found=list(x.shape), where=name)
        if x.dtype != query.dtype or x.device != query.device:
            message = f"expected {query.dtype} on {query.device} as the query"
            raise AttentionError(message, found=f"{x.dtype} on {x.device}", where=name)
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise AttentionError("expected a number of tokens, at least 1", found=repr(block), where="block")
    if layout.ndim != 3 or layout.shape[1] != layout.shape[2] or layout.shape[0] not in (1, query.shape[1]):
        message = f"expected [{query.shape[1]}, n, n] as the query has {query.shape[1]} heads, or [1, n, n]"
        raise AttentionError(message, found=list(layout.shape), where="layout")
    if layout.is_floating_point() or layout.is_complex():
        raise AttentionError("expected an integer or bool dtype", found=layout.dtype, where="layout")


def _check_length(layout: Tensor, block: int, seq: int, where: str) -> None:
    if layout.shape[1] * block < seq:
        message = f"expected at most the {layout.shape[1] * block} tokens of {layout.shape[1]} blocks of {block}"
        raise AttentionError(message, found=seq, where=where, hint="the layout must be made longer")


def _additive(name: str, mask: Tensor | None, query: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A mask as float32 that is added to the scores, its values -inf or at least `LOWEST`, in its own shape."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise AttentionError("expected a tensor", found=type(mask).__name__, where=name)
    sizes = (1,) * (len(shape) - mask.ndim) + tuple(mask.shape)
    if len(sizes) != len(shape) or any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        message = f"expected {list(shape)} or a shape that broadcasts to it"
        raise AttentionError(message, found=list(mask.shape), where=name)
    if mask.device != query.device:
        raise AttentionError(f"expected it on {query.device} as the query", found=mask.device, where=name)
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, float("-inf")).float()
    if not mask.is_floating_point():
        message = "expected bool (True keeps the key) or floating (added to the scores)"
        raise AttentionError(message, found=mask.dtype, where=name)
    if torch.finfo(mask.dtype).min < LOWEST:
        mask = torch.where(mask.isneginf(), mask, mask.clamp(min=LOWEST))
    return mask.float()
