"""Self-attention modules for hand-written models, with the names, calls and state dicts of DeepSpeed's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from bsa_export.errors import AttentionError
from bsa_export.ops import block_sparse_attention
from bsa_export.sparsity.configs import FixedSparsityConfig
from bsa_export.sparsity.facts import check_layout

MASK_MODES = ("add", "mul")


class SparseSelfAttention(nn.Module):
    """Attention over the kept blocks of a layout that is made once and stored, like the class of that name in
    deepspeed 0.19.6.

    Unlike DeepSpeed's class, it accepts fp32, bf16 and any length on any device, and each module computes with its
    own layout, also after another one was loaded. There is no dropout on the probabilities, as in DeepSpeed. Where
    `torch.distributed` is initialised, the first call broadcasts the layout of rank 0, because random blocks would
    differ between processes.

    Buffers: `master_layout`, int64 `[num_heads, max_seq_length / block, max_seq_length / block]`; shorter sequences
    use its top-left slice.

    Args:
        sparsity_config: one of `bsa_export.sparsity.configs` or of DeepSpeed: an object with `block`, and
            `make_layout(seq_len)` that returns an array or tensor.
        key_padding_mask_mode: `add` (added to the scores) or `mul` (0 removes the key, any other value keeps it).
        attn_mask_mode: the same for pairs of query and key.
        max_seq_length: tokens of the longest sequence.

    Raises:
        AttentionError: no sparsity config, or an unknown mode.
        SparsityError: a layout that cannot be made or attended with.
    """

    master_layout: Tensor

    def __init__(
        self,
        sparsity_config: Any = None,
        key_padding_mask_mode: str = "add",
        attn_mask_mode: str = "mul",
        max_seq_length: int = 2048,
    ):
        super().__init__()
        if sparsity_config is None:
            raise AttentionError("expected one, such as FixedSparsityConfig(num_heads=12)", where="sparsity_config")
        for name, mode in (("key_padding_mask_mode", key_padding_mask_mode), ("attn_mask_mode", attn_mask_mode)):
            if mode not in MASK_MODES:
                raise AttentionError("expected add or mul", found=repr(mode), where=name)
        self.sparsity_config = sparsity_config
        self.key_padding_mask_mode = key_padding_mask_mode
        self.attn_mask_mode = attn_mask_mode
        layout = sparsity_config.make_layout(max_seq_length)
        check_layout(np.asarray(layout), where="sparsity_config")
        self.register_buffer("master_layout", torch.as_tensor(layout).to(torch.int64, copy=True))
        self.register_load_state_dict_post_hook(_renew_layout)
        self._need_layout_synchronization = True  # DeepSpeed's name: its pickled modules have it

    def get_layout(self, seq_len: int) -> Tensor:
        """The layout for `seq_len` tokens, `[num_heads, ceil(seq_len / block), ceil(seq_len / block)]`: a slice of
        the buffer.

        The first call is one of every process of `torch.distributed`.

        Raises:
            AttentionError: more tokens than the master layout has.
        """
        if self._need_layout_synchronization and distributed.is_available() and distributed.is_initialized():
            _renew_layout(self)
            distributed.broadcast(self.master_layout, src=0)
            self._need_layout_synchronization = False
        block = self.sparsity_config.block
        longest = self.master_layout.shape[-1] * block
        if seq_len > longest:
            raise AttentionError(
                f"expected at most the {longest} tokens of the master layout",
                found=seq_len,
                where="sequence",
                hint="make the module with a larger max_seq_length",
            )
        n = -(-seq_len // block)
        return self.master_layout[:, :n, :n]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpe: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends, with the scores scaled by `head_dim ** -0.5`. A query that no key is left for gets zeros.

        A mask means what its mode says. A bool mask, True where a key takes part, is one for mode `mul`. In mode
        `add` it is refused, and so is an integer mask of 0 and 1, which is a tokenizer's: DeepSpeed would add 1.0,
        and padding would take part. To look at the values of an integer mask, the call waits for its device; floating
        masks are added as they are.

        Args:
            query, value: `[batch, heads, seq, head_dim]`.
            key: as the query, or transposed, `[batch, heads, head_dim, seq]`.
            rpe: relative position embedding, added to the scores; broadcasts to `[batch, heads, seq, seq]`.
            key_padding_mask: `[batch, seq]`, or with dimensions of 1 between, such as BERT's `[batch, 1, 1, seq]`.
            attn_mask: `[seq, seq]`, or what broadcasts to `[batch, heads, seq, seq]`.

        Returns:
            `[batch, heads, seq, head_dim]` in the query's dtype.

        Raises:
            AttentionError: arguments that do not fit each other or the layout.
        """
        seq = query.shape[2]
        if key.shape != query.shape and key.mT.shape == query.shape:
            key = key.mT
        return block_sparse_attention(
            query,
            key,
            value,
            self.get_layout(seq),
            self.sparsity_config.block,
            key_padding_mask=_in_mode(
                "key_padding_mask",
                None if key_padding_mask is None else without_ones(key_padding_mask),
                self.key_padding_mask_mode,
            ),
            attn_mask=_in_mode("attn_mask", attn_mask, self.attn_mask_mode),
            rpe=rpe,
        )

    def extra_repr(self) -> str:
        return f"master_layout={tuple(self.master_layout.shape)}, block={self.sparsity_config.block}"


def _renew_layout(module: SparseSelfAttention, *_: Any) -> None:
    """Copies a layout that was written into to a new tensor: kernels cache what they derive from the old one."""
    module.master_layout = module.master_layout.clone()


def without_ones(mask: Tensor) -> Tensor:
    """A key padding mask `[batch, seq]` from one with dimensions of 1 after the batch."""
    if mask.ndim < 3:
        return mask
    if sum(size != 1 for size in mask.shape[1:]) > 1:
        raise AttentionError(
            "expected [batch, seq] or [batch, 1, 1, seq]",
            found=list(mask.shape),
            where="key_padding_mask",
            hint="a mask of pairs is an attn_mask",
        )
    return mask.flatten(1)


def _in_mode(name: str, mask: Tensor | None, mode: str) -> Tensor | None:
    """A mask as `block_sparse_attention` accepts it: bool where it removes keys, floating where it is added."""
    if mask is None:
        return None
    if mode == "mul":
        return mask != 0
    if mask.is_floating_point():
        return mask
    if mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all() & mask.any()):
        raise AttentionError(
            "expected numbers that are added to the scores, in mode add",
            found="bool" if mask.dtype == torch.bool else "integers of 0 and 1, as a tokenizer makes them",
            where=name,
            hint=f'pass 0 for keys to keep and -inf for keys to mask, or make the module with {name}_mode="mul"',
        )
    return mask.float()


def added(mask: Tensor | None) -> Tensor | None:
    """A mask to add to the scores: a bool mask, True where a key takes part, becomes 0 and -inf."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, float("-inf"))


class BertSparseSelfAttention(nn.Module):
    """BERT's self-attention with a layout, like the class of that name in deepspeed 0.19.6; state dicts interchange
    strictly.

    `config.attention_probs_dropout_prob` has no effect, as in DeepSpeed.

    Args:
        config: a BERT config; `hidden_size` and `num_attention_heads` are read.
        sparsity_config: as in `SparseSelfAttention`; by default
            `FixedSparsityConfig(num_heads=config.num_attention_heads)`.
        max_seq_length: tokens of the longest sequence; DeepSpeed's class has 2048.

    Raises:
        AttentionError: (a ValueError) the head count does not divide the hidden size, or is not the sparsity config's.
        SparsityError: a layout that cannot be made or attended with.
    """

    def __init__(self, config: Any, sparsity_config: Any = None, max_seq_length: int = 2048):
        super().__init__()
        heads = config.num_attention_heads
        if config.hidden_size % heads:
            raise AttentionError(
                f"expected a multiple of num_attention_heads {heads}", found=config.hidden_size, where="hidden_size"
            )
        if sparsity_config is None:
            sparsity_config = FixedSparsityConfig(num_heads=heads)
        self.num_attention_heads = heads
        self.attention_head_size = config.hidden_size // heads
        self.all_head_size = config.hidden_size
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)
        self.sparse_self_attention = SparseSelfAttention(sparsity_config, max_seq_length=max_seq_length)
        found = len(self.sparse_self_attention.master_layout)
        if found != heads:
            raise AttentionError(
                f"expected a layout of {heads} heads, as num_attention_heads", found=found, where="sparsity_config"
            )

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        """`[batch, seq, hidden]` as `[batch, heads, seq, head_dim]`, a view."""
        return x.view(*x.shape[:-1], self.num_attention_heads, self.attention_head_size).permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Attends over `hidden_states`.

        Args:
            hidden_states: `[batch, seq, hidden]`, any length up to the master layout's.
            attention_mask: BERT's extended mask `[batch, 1, 1, seq]`, added to the scores; or bool, True where a key
                takes part, as transformers makes it today (DeepSpeed would add 1.0 there).

        Returns:
            The context layer, `[batch, seq, hidden]`.
        """
        return self.context_layer(hidden_states, key_padding_mask=added(attention_mask))

    def context_layer(self, hidden_states: Tensor, **masks: Tensor | None) -> Tensor:
        """Attends over `[batch, seq, hidden]` with the masks of `SparseSelfAttention.forward`; returns the same
        shape.
        """
        context = self.sparse_self_attention(
            self.transpose_for_scores(self.query(hidden_states)),
            self.transpose_for_scores(self.key(hidden_states)),
            self.transpose_for_scores(self.value(hidden_states)),
            **masks,
        )  # [batch, heads, seq, head_dim]
        return context.permute(0, 2, 1, 3).flatten(2)
