"""DeepSpeed's sparsity configs as old code knows them: torch layouts, random blocks from Python's global `random`."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from bsa_export import sparsity
from bsa_export.errors import SparsityError


class SparsityConfig(sparsity.SparsityConfig):
    """The base class (deepspeed 0.19.6), to be extended with a `make_layout(seq_len)` of one's own."""

    def make_layout(self, seq_len: int) -> Tensor:  # type: ignore[override] # DeepSpeed's signature and result
        """Makes the layout, int64 `[num_heads, seq_len / block, seq_len / block]` of 0 and 1."""
        return torch.from_numpy(super().make_layout(seq_len, rng=random)).long()  # type: ignore[arg-type] # a module with Random's methods

    def setup_layout(self, seq_len: int) -> Tensor:
        """Makes the layout that keeps nothing yet, int64 `[num_heads, seq_len / block, seq_len / block]`."""
        if seq_len % self.block:
            raise SparsityError(f"expected a length that is a multiple of block {self.block}", found=seq_len)
        return torch.zeros(self.num_heads, seq_len // self.block, seq_len // self.block, dtype=torch.int64)

    def check_and_propagate_first_head_layout(self, layout: Tensor) -> Tensor:
        """Copies the first head's layout to all heads, in place, unless they may differ."""
        if not self.different_layout_per_head:
            layout[1:] = layout[0]
        return layout


class DenseSparsityConfig(SparsityConfig, sparsity.DenseSparsityConfig):
    """Every block."""


class FixedSparsityConfig(SparsityConfig, sparsity.FixedSparsityConfig):
    """Aligned local windows, and global blocks inside them."""


class VariableSparsityConfig(SparsityConfig, sparsity.VariableSparsityConfig):
    """Local windows of several sizes, random blocks, global blocks by index."""


class BigBirdSparsityConfig(SparsityConfig, sparsity.BigBirdSparsityConfig):
    """Random blocks, a sliding window, and the first blocks global."""


class BSLongformerSparsityConfig(SparsityConfig, sparsity.BSLongformerSparsityConfig):
    """A sliding window, and global blocks by index."""


class LocalSlidingWindowSparsityConfig(SparsityConfig, sparsity.LocalSlidingWindowSparsityConfig):
    """A sliding window; unidirectional unless asked, as DeepSpeed's is."""

    def __init__(
        self, num_heads: int, block: int = 16, num_sliding_window_blocks: int = 3, attention: Any = "unidirectional"
    ):
        super().__init__(
            num_heads, block=block, num_sliding_window_blocks=num_sliding_window_blocks, attention=attention
        )
