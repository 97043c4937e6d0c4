"""When a result of attention counts as right: one rule, for the tests and for `bsa-verify`.

The tolerance is derived, not chosen: plain PyTorch (`reference`) computes the same attention in the same dtype, and
both are compared with float64. The result may have at most twice plain PyTorch's error, in the largest element, and in
the root mean square, which finds errors that are small but everywhere. Plain PyTorch's error depends on the order in
which it sums, and is sometimes small by luck. So where the bound is exceeded, its error is the largest of several
orders of head_dim. After the tests of flash-attention (Dao-AILab/flash-attention 2, `tests/test_flash_attn.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bsa_export.ops.dispatch import block_sparse_attention

FACTOR = 2.0
ORDERS = 4  # further orders of summation that plain PyTorch is given where a bound seems to be exceeded


@dataclass(frozen=True)
class Errors:
    """How far a result and plain PyTorch in the same dtype are from the exact one: largest element and root mean
    square."""

    largest: float
    rms: float
    plain_largest: float
    plain_rms: float

    @property
    def ratio(self) -> float:
        """The larger of both errors in units of plain PyTorch's; NaN where the result holds one."""
        pairs = ((self.largest, self.plain_largest), (self.rms, self.plain_rms))
        ratios = [mine / plain if plain else mine and float("inf") for mine, plain in pairs]
        return max(ratios) if ratios[1] == ratios[1] else ratios[1]

    @property
    def passed(self) -> bool:
        """Whether the rule holds. A NaN never passes."""
        return self.ratio <= FACTOR


def errors(actual: Tensor, plain: Tensor, exact: Tensor) -> Errors:
    """Measures a result against the exact one, compared with plain PyTorch in the result's dtype.

    Args:
        actual: the result to judge.
        plain: the same computed by plain PyTorch, in the same shape and dtype.
        exact: the same in float64.

    Raises:
        ValueError: shapes or dtypes are not as they should be.
    """
    if not actual.shape == plain.shape == exact.shape or actual.dtype != plain.dtype or exact.dtype != torch.float64:
        kinds = ", ".join(
            f"{name} {list(x.shape)} {x.dtype}"
            for name, x in zip(("actual", "plain", "exact"), (actual, plain, exact), strict=True)
        )
        raise ValueError(f"expected one shape, and float64 as exact: {kinds}")
    figures = []
    for result in (actual, plain):
        difference = result.detach().double() - exact
        figures += [difference.abs().max().item(), difference.square().mean().sqrt().item()]
    return Errors(*figures)


def results(attention: Callable[..., Tensor], inputs: dict, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Calls an attention function and computes its gradients.

    Args:
        attention: such as `block_sparse_attention`, or that with its backend filled in.
        inputs: the arguments of `block_sparse_attention` by name; with `grad_output`, the gradient of the result, the
            gradients are taken too.
        dtype: what query, key, value and `grad_output` are cast to; None leaves them.

    Returns:
        `output` and, with `grad_output`, the gradients of `query`, `key` and `value`.
    """
    inputs = dict(inputs)
    grad_output = inputs.pop("grad_output", None)
    leaves = {name: inputs[name].detach().to(dtype or inputs[name].dtype) for name in ("query", "key", "value")}
    for leaf in leaves.values():
        leaf.requires_grad_(grad_output is not None)
    output = attention(**inputs | leaves)
    if grad_output is None:
        return {"output": output}
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output.to(output.dtype))
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def in_half(
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
) -> Tensor:
    """Masked dense attention in plain PyTorch, its probabilities in the inputs' dtype for the backward pass too, as
    DeepSpeed's kernels keep them; `reference` keeps them in float32 for that. Arguments as in
    `block_sparse_attention`."""
    seq, head_dim = query.shape[2:]
    kept = layout.ne(0).repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :seq, :seq]
    scores = (query @ key.mT) * (head_dim**-0.5 if scale is None else scale)
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None, :]
    for mask in (key_padding_mask, attn_mask, rpe):
        if mask is not None:
            mask = torch.where(mask, 0.0, float("-inf")) if mask.dtype == torch.bool else mask
            scores = scores + mask.to(scores.dtype)
    if window is not None:
        places = torch.arange(seq, device=query.device)
        ahead = places - places[:, None]
        kept = kept & (ahead >= -window[0]) & (ahead <= window[1])
    scores = scores.masked_fill(~kept, float("-inf"))
    empty = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ value


reference = partial(block_sparse_attention, backend="reference")


def plain_beside(backend: str | None) -> Callable[..., Tensor]:
    """The plain PyTorch that a backend is compared with: it keeps probabilities in the backend's dtype."""
    return in_half if backend == "deepspeed" else reference


def judge(
    attention: Callable[..., Tensor], inputs: dict, plain: Callable[..., Tensor] = reference
) -> dict[str, Errors]:
    """Judges an attention function by plain PyTorch in the same dtype and by `reference` in float64.

    Args:
        attention, inputs: see `results`, also for the names of what is judged.
        plain: plain PyTorch, see `plain_beside`.
    """
    actual, beside = results(attention, inputs), results(plain, inputs)
    exact = results(reference, inputs, torch.float64)
    found = {name: errors(actual[name], beside[name], exact[name]) for name in actual}
    for seed in range(ORDERS):
        if all(error.passed for error in found.values()):
            break
        again = _in_another_order(plain, inputs, seed)
        found = {name: larger(error, errors(actual[name], again[name], exact[name])) for name, error in found.items()}
    return found


def larger(one: Errors, other: Errors) -> Errors:
    """The errors of a result, compared with the larger of two errors of plain PyTorch."""
    return replace(
        one,
        plain_largest=max(one.plain_largest, other.plain_largest),
        plain_rms=max(one.plain_rms, other.plain_rms),
    )


def _in_another_order(plain: Callable[..., Tensor], inputs: dict, seed: int) -> dict[str, Tensor]:
    """`results` of plain PyTorch that sums over head_dim in another order."""
    order = torch.randperm(inputs["query"].shape[-1], generator=torch.Generator().manual_seed(seed))
    order = order.to(inputs["query"].device)
    names = ("query", "key", "value", "grad_output")
    changed = {name: x[..., order] if name in names else x for name, x in inputs.items()}
    return {name: x[..., order.argsort()] for name, x in results(plain, changed).items()}
