"""Rotary positions: the kernel against plain PyTorch in float64, forward and backward."""

import pytest
import torch

from bsa_export.ops import rotary

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "seq", "head_dim", "rotary_dim", "angles"),
    [(2, 3, 37, 64, 32, 1), (1, 2, 130, 32, 32, 1), (2, 1, 5, 48, 12, 2), (1, 12, 3, 16, 2, 1)],
)
def test_the_kernel_turns_as_plain_pytorch_does(batch, heads, seq, head_dim, rotary_dim, angles, dtype, device):
    if rotary.NO_TRITON:
        pytest.skip(rotary.NO_TRITON)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, seq, heads, head_dim, generator=generator).to(device, dtype).transpose(1, 2)
    angle = torch.rand(angles, 1, seq, rotary_dim // 2, generator=generator) * 6.3
    cos, sin = (part.to(device, dtype) for part in (angle.cos(), angle.sin()))
    grad = torch.randn(x.shape, generator=generator).to(device, dtype)
    x.requires_grad_()
    found = rotary._Rotated.apply(x, cos, sin)
    (back,) = torch.autograd.grad(found, x, grad)
    exact_x = x.detach().double().requires_grad_()
    exact = rotary.plain_rotated(exact_x, cos.double(), sin.double())
    (exact_back,) = torch.autograd.grad(exact, exact_x, grad.double())
    rounding = 2 * torch.finfo(dtype).eps
    for mine, theirs in ((found, exact), (back, exact_back)):
        assert mine.dtype == dtype and mine.shape == x.shape
        assert ((mine.double() - theirs).abs() <= rounding * (theirs.abs() + 1)).all()
    assert torch.equal(found[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("device", DEVICES)
def test_any_memory_order_is_computed(device):
    x = torch.randn(2, 3, 8, 16, device=device)  # not that of a projection
    angle = torch.rand(1, 1, 8, 4, device=device)
    found = rotary.rotated(x, angle.cos(), angle.sin())
    assert torch.equal(found, rotary.plain_rotated(x, angle.cos(), angle.sin()))
