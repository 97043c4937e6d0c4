"""The block-sparse format of DeepSpeed's operators: the kept blocks of a layout, in the order of its rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bsa_export.errors import AttentionError


class Kept(NamedTuple):
    """Where each kept block is: head, block row, block column, int64 `[num_kept]` each, sorted in this order."""

    head: Tensor
    row: Tensor
    column: Tensor


class BlockLayout:
    """A layout `[heads, rows, columns]` (or `[rows, columns]`: the same for every head) and the width of its blocks."""

    def __init__(self, layout: Tensor, block: int):
        layout = torch.as_tensor(layout)
        if layout.ndim not in (2, 3):
            raise AttentionError("expected a layout of 2 or 3 dimensions, of 0s and 1s", found=tuple(layout.shape))
        self.layout = layout.ne(0)
        self.block = block
        self._kept: dict[tuple[int, torch.device], Kept] = {}

    def heads(self, dense_heads: int) -> int:
        """The number of heads; `dense_heads` of them where the layout names none."""
        if self.layout.ndim == 2:
            return dense_heads
        if dense_heads != self.layout.shape[0]:
            raise AttentionError(f"expected {self.layout.shape[0]} heads, as in the layout", found=dense_heads)
        return dense_heads

    def kept(self, heads: int, device: torch.device) -> Kept:
        if (heads, device) not in self._kept:
            layout = self.layout.expand(heads, *self.layout.shape[-2:])
            self._kept[heads, device] = Kept(*layout.nonzero().to(device).unbind(1))
        return self._kept[heads, device]

    def __len__(self) -> int:
        return int(self.layout.sum())


def tiles(dense: Tensor, block: int) -> Tensor:
    """`[..., rows * block, columns * block]` as `[..., rows, columns, block, block]`, a view where strides allow."""
    *lead, height, width = dense.shape
    return dense.reshape(*lead, height // block, block, width // block, block).transpose(-3, -2)
