"""`deepspeed.ops.sparse_attention.softmax.Softmax` in plain PyTorch: any device, any float dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from bsa_export.deepspeed_compat.blocks import BlockLayout, tiles
from bsa_export.errors import AttentionError


class Softmax:
    """Softmax over the kept blocks of each row of a block-sparse tensor, with the signature of deepspeed 0.19.6.

    Args:
        layout: `[heads, rows, columns]` of 0 and 1, or `[rows, columns]` for one head.
        block: the width of a block.
        bench: taken for old calls, without effect.
    """

    def __init__(self, layout: Tensor, block: int, bench: bool = False):
        self.layout = layout
        self.block = block
        self.num_blocks = int(torch.as_tensor(layout).ne(0).sum())
        self._blocks = BlockLayout(layout, block)

    def __call__(
        self,
        x: Tensor,
        scale: float = 1.0,
        rpe: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask_mode: str = "add",
        attn_mask_mode: str = "add",
    ) -> Tensor:
        """Normalises. Unlike DeepSpeed's not in place, and a row whose keys are all masked with -inf gives zeros, not NaN.

        Args:
            x: block-sparse, `[batch, kept blocks, block, block]` or `[kept blocks, block, block]`.
            scale: multiplies x first.
            rpe: relative position bias, broadcasts to `[batch, heads, seq, seq]`; added.
            key_padding_mask: `[batch, seq]`.
            attn_mask: `[seq, seq]`.
            key_padding_mask_mode, attn_mask_mode: `add`, or `mul`: 0 takes the key out.

        Returns:
            The probabilities, shape and dtype of x.

        Raises:
            AttentionError: (a ValueError) for a mask of another dtype or mode, or another number of blocks.
        """
        for name, mask in (("rpe", rpe), ("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != x.dtype:
                raise AttentionError(f"{name}: expected {x.dtype}, as x", found=mask.dtype)
        heads = self.layout.shape[0] if self.layout.ndim == 3 else 1
        head, row, column = self._blocks.kept(heads, x.device)
        if x.shape[-3:] != (len(head), self.block, self.block):
            raise AttentionError(f"expected x of [..., {len(head)}, {self.block}, {self.block}]", found=tuple(x.shape))

        dtype = torch.promote_types(x.dtype, torch.float32)
        scores = x.to(dtype) * scale
        if rpe is not None:
            bias = tiles(rpe[(None,) * (4 - rpe.ndim)].expand(-1, heads, -1, -1), self.block)[:, head, row, column]
            scores = scores + (bias if x.ndim == 4 else bias[0]).to(dtype)
        if key_padding_mask is not None:
            added = _additive(key_padding_mask, key_padding_mask_mode, dtype).unflatten(-1, (-1, self.block))
            added = added[:, column, None]  # [batch, kept, 1, block]
            scores = scores + (added if x.ndim == 4 else added[0])
        if attn_mask is not None:
            scores = scores + tiles(_additive(attn_mask, attn_mask_mode, dtype), self.block)[row, column]

        rows = self.layout.shape[-2]
        places = head * rows + row  # [kept]
        peak = scores.detach().amax(-1)  # [..., kept, block]
        at = places[:, None].expand_as(peak)
        top = peak.new_full((*peak.shape[:-2], heads * rows, self.block), float("-inf")).scatter_reduce(
            -2, at, peak, "amax"
        )
        top = top.masked_fill(top == float("-inf"), 0.0)
        exps = torch.exp(scores - top.index_select(-2, places)[..., None])
        total = torch.zeros_like(top).index_add(-2, places, exps.sum(-1))
        total = torch.where(total == 0, 1.0, total)
        return (exps / total.index_select(-2, places)[..., None]).to(x.dtype)


def _additive(mask: Tensor, mode: str, dtype: torch.dtype) -> Tensor:
    if mode not in ("add", "mul"):
        raise AttentionError("mask mode: expected add or mul", found=mode)
    if mode == "add":
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask == 0, float("-inf"))
