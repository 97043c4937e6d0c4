"""The layout that each self-attention of a model stores, at the name that DeepSpeed gives it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bsa_export.bert.expected_tensors import longest_input
from bsa_export.bert.families import FAMILIES
from bsa_export.errors import AttentionError
from bsa_export.hf.config_key import NAME as NAME

# For models that `SparseAttentionUtils` made sparse: masks as for NAME, but no stored layouts and no unpadding.
IN_MEMORY = "block_sparse_in_memory"


class StoredLayout(nn.Module):
    """A layer's master layout, at the name that DeepSpeed's `BertSparseSelfAttention` gives it.

    Buffers: `master_layout`, uint8 `[num_heads, n, n]`: zeros in a new model. `from_pretrained` leaves uninitialised
    memory in it where the checkpoint has no layout; `load` refuses such a checkpoint by its names.
    """

    master_layout: torch.Tensor

    def __init__(self, num_heads: int, num_blocks: int, block: int):
        super().__init__()
        self.block = block
        self.checked: tuple[torch.Tensor, int | None] | None = None
        self.register_buffer("master_layout", torch.zeros(num_heads, num_blocks, num_blocks, dtype=torch.uint8))

    def check(self) -> None:
        """Raises AttentionError unless the layout holds only 0 and 1 and no empty row, as every converted one does.

        Each layout is read once; in compiled code it is read at compile time, and again when a state dict is loaded.
        """
        layout = self.master_layout
        if layout.is_meta:
            return
        if torch.compiler.is_compiling():
            if torch.compiler.is_dynamo_compiling():  # nothing else has values then
                _refuse_no_layout(layout)
            return
        # The tensor itself: another one may get its address. Inference tensors have no version.
        now = layout, None if layout.is_inference() else layout._version
        if self.checked and self.checked[0] is now[0] and self.checked[1] == now[1]:
            return
        _refuse_no_layout(layout)
        self.checked = now

    def _replicate_for_data_parallel(self) -> StoredLayout:
        """A replica of `nn.DataParallel`. It uses the original's layout: a copied one would be read at each call."""
        replica = super()._replicate_for_data_parallel()
        vars(replica)["replica_of"] = self
        return replica

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if f"{prefix}master_layout" in state_dict:
            try:
                self.check()
            except AttentionError as error:
                errors.append(f"{prefix}master_layout: {error}")

    def extra_repr(self) -> str:
        return f"{tuple(self.master_layout.shape)}, block={self.block}"


@torch.compiler.assume_constant_result  # Dynamo calls it once, with the real tensor
def _refuse_no_layout(layout: torch.Tensor) -> None:
    if not ((layout <= 1).all() & layout.any(dim=-1).all()):
        raise AttentionError(
            "this layer has no stored layout: its checkpoint holds no sparse_self_attention.master_layout",
            hint="load a folder that bsa-convert wrote, a new model too",
        )


def has_section(config: Any) -> bool:
    """Whether a model's config has the `sparse_attention` section of a converted model."""
    section = getattr(config, "sparse_attention", None)
    return isinstance(section, dict) and "block" in section


def blocks_of(config: Any) -> tuple[int, int]:
    """The number of blocks in a row of the master layout, and the width of a block in tokens.

    Raises:
        AttentionError: the config has no `sparse_attention` section, or the section has no usable block.
    """
    if not has_section(config):
        raise AttentionError(
            f'attn_implementation="{NAME}" needs the sparse_attention section of a converted model',
            found="a config without one",
            hint="bsa-convert makes such a model from a dense checkpoint",
        )
    block = config.sparse_attention["block"]
    family = FAMILIES.get(config.model_type)
    longest = longest_input(family, config.to_dict()) if family else config.max_position_embeddings
    if not isinstance(block, int) or isinstance(block, bool) or not 1 <= block <= longest:
        raise AttentionError(f"sparse_attention.block: expected 1 to {longest} tokens", found=repr(block))
    return longest // block, block
