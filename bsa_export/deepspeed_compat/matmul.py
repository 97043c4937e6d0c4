"""`deepspeed.ops.sparse_attention.matmul.MatMul` in plain PyTorch: any device, any float dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from bsa_export.deepspeed_compat.blocks import BlockLayout
from bsa_export.errors import AttentionError


class MatMul:
    """A matrix product with one block-sparse operand or result; signature and result layout of deepspeed 0.19.6.

    A block-sparse tensor is `[batch, kept blocks, block, block]`, its blocks ordered by head, row and column of the
    layout. A dense one is `[batch, heads, rows, columns]`; leading dimensions may be left out.

    Args:
        layout: `[heads, rows, columns]` of 0 and 1, or `[rows, columns]` for every head.
        block: the width of a block.
        mode: `sdd` (sparse = dense x dense), `dsd` (dense = sparse x dense) or `dds` (dense = dense x sparse).
        trans_a, trans_b: multiply by the transpose of that operand; a sparse one has the layout before it is
            transposed.
        bench: accepted for old calls, without effect.

    Raises:
        NotImplementedError: for another mode.
    """

    def __init__(
        self, layout: Tensor, block: int, mode: str, trans_a: bool = False, trans_b: bool = False, bench: bool = False
    ):
        if mode not in ("sdd", "dsd", "dds"):
            raise NotImplementedError(f"mode: expected sdd, dsd or dds, found {mode!r}")
        self.layout = layout
        self.block = block
        self.mode = mode
        self.trans_a = trans_a
        self.trans_b = trans_b
        self._blocks = BlockLayout(layout, block)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiplies.

        Raises:
            AttentionError: (a ValueError) for operands whose dtypes, devices or shapes do not fit.
        """
        if torch.is_autocast_enabled(a.device.type):
            a, b = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (a, b))
        self._check(a, b)
        dims = max(a.ndim, b.ndim)
        dtype = a.dtype
        # Sums over blocks, and their gradients, in float32 at least: fp16 would round each block's part of them.
        a, b = (x[(None,) * (4 - x.ndim)].to(torch.promote_types(dtype, torch.float32)) for x in (a, b))
        a = a.transpose(-1, -2) if self.trans_a else a
        b = b.transpose(-1, -2) if self.trans_b else b
        product = {"sdd": self._sdd, "dsd": self._dsd, "dds": self._dds}[self.mode](a, b)
        while product.ndim > dims and product.shape[0] == 1:
            product = product[0]
        return product.to(dtype)

    def _check(self, a: Tensor, b: Tensor) -> None:
        if a.device != b.device:
            raise AttentionError("expected both operands on one device", found=f"{a.device} and {b.device}")
        if a.dtype != b.dtype:
            raise AttentionError("expected both operands of one dtype", found=f"{a.dtype} and {b.dtype}")
        if max(a.ndim, b.ndim) > 4:
            raise AttentionError("expected operands of at most 4 dimensions", found=max(a.ndim, b.ndim))
        block = self.block
        rows, columns = (size * block for size in self._blocks.layout.shape[-2:])
        if self.mode == "sdd":
            shapes = [
                (a.shape[-1 if self.trans_a else -2], rows, "rows of a"),
                (b.shape[-2 if self.trans_b else -1], columns, "columns of b"),
            ]
            shapes.append(
                (
                    b.shape[-1 if self.trans_b else -2],
                    a.shape[-2 if self.trans_a else -1],
                    "rows of b, as a has columns",
                )
            )
        elif self.mode == "dsd":
            shapes = [(b.shape[-1 if self.trans_b else -2], rows if self.trans_a else columns, "rows of b")]
        else:
            shapes = [(a.shape[-2 if self.trans_a else -1], columns if self.trans_b else rows, "columns of a")]
        for found, expected, what in shapes:
            if found != expected:
                raise AttentionError(f"expected {expected} {what}", found=found)
        sparse = {"sdd": None, "dsd": a, "dds": b}[self.mode]
        if sparse is not None and sparse.shape[-2:] != (block, block):
            raise AttentionError(
                f"expected a block-sparse operand of [..., {block}, {block}]", found=tuple(sparse.shape)
            )

    def _kept(self, dense: Tensor, sparse: Tensor | None, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The kept blocks for this operand's heads; rows and columns change places where the sparse one is
        transposed.
        """
        kept = self._blocks.kept(self._blocks.heads(dense.shape[1]), dense.device)
        if sparse is not None and sparse.shape[1] != len(kept.head):
            raise AttentionError(f"expected a block-sparse operand with {len(kept.head)} blocks", found=sparse.shape[1])
        return (kept.head, kept.column, kept.row) if transposed else kept

    def _sdd(self, a: Tensor, b: Tensor) -> Tensor:
        head, row, column = self._kept(a, None, False)
        left = a.unflatten(2, (-1, self.block))[:, head, row]  # [batch, kept, block, inner]
        right = b.unflatten(3, (-1, self.block)).transpose(2, 3)[:, head, column]  # [batch, kept, inner, block]
        return left @ right

    def _dsd(self, a: Tensor, b: Tensor) -> Tensor:
        head, row, column = self._kept(b, a, self.trans_a)
        right = b.unflatten(2, (-1, self.block))[:, head, column]  # [batch, kept, block, width]
        rows = self._blocks.layout.shape[-1 if self.trans_a else -2]
        return self._sum(a @ right, head * rows + row, b.shape[1], rows).flatten(2, 3)

    def _dds(self, a: Tensor, b: Tensor) -> Tensor:
        head, row, column = self._kept(a, b, self.trans_b)
        left = a.unflatten(3, (-1, self.block)).transpose(2, 3)[:, head, row]  # [batch, kept, height, block]
        columns = self._blocks.layout.shape[-2 if self.trans_b else -1]
        return self._sum(left @ b, head * columns + column, a.shape[1], columns).transpose(2, 3).flatten(3, 4)

    @staticmethod
    def _sum(products: Tensor, places: Tensor, heads: int, count: int) -> Tensor:
        """Adds the kept blocks' products up at their places: `[batch, heads, count, ...]`."""
        batch, _, *shape = products.shape
        total = products.new_zeros(batch, heads * count, *shape).index_add(1, places, products)
        return total.unflatten(1, (heads, count))
