"""`deepspeed.ops.sparse_attention.softmax.Softmax` in plain PyTorch: any device, any float dtype, differentiable."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from bsa_export.attention import without_ones
from bsa_export.deepspeed_compat.blocks import BlockLayout, tiles
from bsa_export.errors import AttentionError


class Softmax:
    """Softmax over the kept blocks of each row of a block-sparse tensor, with the signature of deepspeed 0.19.6.

    Args:
        layout: `[heads, rows, columns]` of 0 and 1, or `[rows, columns]` for every head.
        block: the width of a block.
        bench: accepted for old calls, without effect.
    """

    def __init__(self, layout: Tensor, block: int, bench: bool = False):
        self.layout = layout
        self.block = block
        self._blocks = BlockLayout(layout, block)
        self.num_blocks = len(self._blocks)

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
        """Writes the probabilities into x and returns x, like DeepSpeed's class.

        Autograd does not allow that for a leaf that requires grad, an expanded tensor or one of several views
        (`unbind`, `split`): there the probabilities are a new tensor and x stays as it was, where DeepSpeed raises. A
        row whose keys are all masked with -inf gets zeros, where DeepSpeed returns NaN. rpe gets a gradient, where
        DeepSpeed returns none.

        After `x.retain_grad()`, `x.grad` is the gradient of the scores, as DeepSpeed's unit tests read it. PyTorch
        alone would put the gradient of the probabilities there.

        Args:
            x: block-sparse, `[batch, kept blocks, block, block]` or `[kept blocks, block, block]`.
            scale: multiplies x first.
            rpe: relative position bias, broadcasts to `[batch, heads, seq, seq]`; added.
            key_padding_mask: `[batch, seq]`, or with dimensions of 1 between.
            attn_mask: `[seq, seq]`, or what broadcasts to `[batch, heads, seq, seq]`.
            key_padding_mask_mode, attn_mask_mode: `add`, or `mul`: 0 removes the key.

        Returns:
            x, or a new tensor of its shape and dtype.

        Raises:
            AttentionError: (a ValueError) for a mask of another dtype, shape or mode, or another number of blocks.
        """
        for name, mask in (("rpe", rpe), ("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != x.dtype:
                raise AttentionError(f"{name}: expected {x.dtype}, as x", found=mask.dtype)
        layout = self._blocks.layout
        # A layout of 2 dimensions applies to each head; the shape of x says how many heads there are.
        heads = len(layout) if layout.ndim == 3 else max(1, x.shape[-3] // max(1, self.num_blocks))
        head, row, column = self._blocks.kept(heads, x.device)
        if x.ndim not in (3, 4) or x.shape[-3:] != (len(head), self.block, self.block):
            raise AttentionError(f"expected x of [..., {len(head)}, {self.block}, {self.block}]", found=tuple(x.shape))

        dtype = torch.promote_types(x.dtype, torch.float32)
        scores = (x if x.ndim == 4 else x[None]).to(dtype) * scale  # [batch, kept, block, block]
        batch, rows, columns = len(scores), *(size * self.block for size in layout.shape[-2:])
        if rpe is not None:
            pairs = _expanded("rpe", rpe, batch, heads, rows, columns)
            scores = scores + tiles(pairs, self.block)[:, head, row, column].to(dtype)
        if key_padding_mask is not None:
            keys = _expanded("key_padding_mask", without_ones(key_padding_mask), batch, columns)
            keys = _additive(keys, key_padding_mask_mode, dtype)
            scores = scores + keys.unflatten(-1, (-1, self.block))[:, column, None]  # [batch, kept, 1, block]
        if attn_mask is not None:
            pairs = _expanded("attn_mask", attn_mask, batch, heads, rows, columns)
            pairs = tiles(pairs, self.block)[:, head, row, column]
            scores = scores + _additive(pairs, attn_mask_mode, dtype)

        places = head * layout.shape[-2] + row  # [kept]
        peak = scores.detach().amax(-1)  # [batch, kept, block]
        at = places[:, None].expand_as(peak)
        top = peak.new_full((batch, heads * layout.shape[-2], self.block), float("-inf")).scatter_reduce(
            -2, at, peak, "amax"
        )
        top = top.masked_fill(top == float("-inf"), 0.0)
        exps = torch.exp(scores - top.index_select(-2, places)[..., None])
        total = torch.zeros_like(top).index_add(-2, places, exps.sum(-1))
        total = torch.where(total == 0, 1.0, total)
        return _in_place(x, (exps / total.index_select(-2, places)[..., None]).to(x.dtype).view_as(x))


def _in_place(x: Tensor, result: Tensor) -> Tensor:
    """x with the values and the history of `result`, or `result` where autograd does not allow to write into x."""
    scores = x.grad_fn if x.retains_grad else None
    place = x.output_nr
    try:
        x.copy_(result)
    except RuntimeError:
        return result
    if scores is not None:
        # The hook of `retain_grad` went on to the probabilities. This one runs after it.
        kept = weakref.ref(x)

        def keep(gradients: tuple[Tensor, ...]) -> None:
            if (tensor := kept()) is not None and gradients[place] is not None:
                tensor.grad = gradients[place].clone()

        scores.register_prehook(keep)
    return x


def _expanded(name: str, mask: Tensor, batch: int, *sizes: int) -> Tensor:
    """A mask as `[batch or 1, *sizes]`.

    Raises:
        AttentionError: its shape does not broadcast to that.
    """
    shape = (1,) * (1 + len(sizes) - mask.ndim) + tuple(mask.shape)
    if len(shape) != 1 + len(sizes) or any(
        size not in (1, full) for size, full in zip(shape, (batch, *sizes), strict=True)
    ):
        raise AttentionError(
            f"expected {[batch, *sizes]} or a shape that broadcasts to it", found=list(mask.shape), where=name
        )
    return mask.expand(shape[0], *sizes)


def _additive(mask: Tensor, mode: str, dtype: torch.dtype) -> Tensor:
    if mode not in ("add", "mul"):
        raise AttentionError("mask mode: expected add or mul", found=mode)
    if mode == "add":
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask == 0, float("-inf"))
