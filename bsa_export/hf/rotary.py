"""The angles of rotary positions; `ops.rotary` turns by them."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, rotary_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, in `dtype`, computed in float32 or wider.

    Args:
        positions: integers `[batch or 1, seq]`.
        rotary_dim: elements of a head that are rotated; pair i turns by `position * base ** (-2 i / rotary_dim)`.

    Returns:
        Two tensors `[batch or 1, 1, seq, rotary_dim / 2]`.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=wide) / rotary_dim
    angles = positions[:, None, :, None].to(wide) * base**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)
