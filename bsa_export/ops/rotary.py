"""Rotary positions in one pass over memory: a Triton kernel, and plain PyTorch where that cannot run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bsa_export.ops.launch import start
from bsa_export.ops.triton_version import unusable

if (NO_TRITON := unusable(descriptors=False)) is None:
    from bsa_export.ops.triton_rotary import rotary_kernel

ROWS = 64  # vectors of a head that one program turns
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first elements of each head, halves as in GPT-NeoX; the other elements pass. Differentiable in `x`.

    Args:
        x: `[batch, heads, seq, head_dim]`; the kernel needs the memory order of a projection, `[batch, seq, heads,
            head_dim]`, and plain PyTorch computes any other one.
        cos, sin: `[batch or 1, 1, seq, rotary_dim / 2]` in the dtype of `x`, without a gradient.

    Returns:
        A new tensor of the shape and dtype of `x`.
    """
    if torch.compiler.is_compiling() or not _can_launch(x, cos, sin):
        return plain_rotated(x, cos, sin)
    return _Rotated.apply(x, cos, sin)


def plain_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotated` in plain PyTorch."""
    half = cos.shape[-1]
    first, second, other = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat([*turned, other], dim=-1)


def _can_launch(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        NO_TRITON is None
        and x.is_cuda  # Triton's interpreter computes on a CPU too, but slower than PyTorch
        and x.dtype in DTYPES
        and x.numel() > 0
        and x.transpose(1, 2).is_contiguous()
        and all(y.dtype == x.dtype and y.device == x.device and y.is_contiguous() for y in (cos, sin))
        and not (cos.requires_grad or sin.requires_grad)
    )


class _Rotated(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        cos, sin = ctx.saved_tensors
        gradient = gradient.transpose(1, 2).contiguous().transpose(1, 2)
        return _turned(gradient, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    batch, heads, seq, head_dim = x.shape
    turned = torch.empty_like(x)  # keeps the memory order
    with torch.cuda.device_of(x):
        start(
            rotary_kernel,
            -(-batch * seq * heads // ROWS),
            x=x,
            cos=cos,
            sin=sin,
            turned=turned,
            vectors=batch * seq * heads,
            heads=heads,
            positions=len(cos) * seq,
            HALF=cos.shape[-1],
            HEAD_DIM=head_dim,
            WIDTH=1 << (cos.shape[-1] - 1).bit_length(),
            REST=1 << max(0, head_dim - 2 * cos.shape[-1] - 1).bit_length(),
            ROWS=ROWS,
            DIRECTION=direction,
        )
    return turned
