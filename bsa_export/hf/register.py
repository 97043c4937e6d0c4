"""What importing this package registers with transformers, by name; and the hook that gives each self-attention its layout.

Needs transformers 5.0 or newer, the first release whose BERT family calls a registered attention function.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from bsa_export.errors import AttentionError
from bsa_export.hf.attention import attention, key_padding_mask
from bsa_export.hf.stored_layout import IN_MEMORY, NAME, StoredLayout, blocks_of
from bsa_export.hf.unpadding import pad_input, unpad_input

MIN_TRANSFORMERS = (5, 0)

_registered = False


def register() -> bool:
    """Registers `block_sparse` with transformers, once; False, and nothing done, where that is older than 5.0."""
    global _registered
    import transformers

    if version_of(transformers) < MIN_TRANSFORMERS:
        return False
    # The first import of these registers by itself (`hf.import_hook`): whether it is done is asked after it.
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    if not _registered:
        for name in (NAME, IN_MEMORY):
            AttentionInterface.register(name, attention)
            AttentionMaskInterface.register(name, key_padding_mask)
        register_module_module_registration_hook(give_layout)
        _registered = True
    return True


def version_of(transformers) -> tuple[int, ...]:
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def give_layout(parent: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Gives each self-attention of a model that is being built for `block_sparse` its (still empty) `StoredLayout`.

    A buffer has to exist before `from_pretrained` fills it and `save_pretrained` writes it. torch calls this hook for
    every submodule that any module takes in; all but the self-attention, embeddings and encoder of such a model pass
    untouched, and so do these when they are put into another module, or wrapped and put back.
    """
    if submodule is None or name not in ("self", "embeddings", "encoder"):
        return
    # What the module itself holds: a wrapper's or a stranger's `config` may be a property that raises.
    own = vars(submodule)
    config = vars(parent).get("config") if name == "embeddings" else own.get("config")
    if getattr(config, "_attn_implementation", None) != NAME:
        return
    if name == "self" and hasattr(submodule, "query") and not hasattr(submodule, "sparse_self_attention"):
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            raise AttentionError(
                "block-sparse attention runs encoders only", found="is_decoder or add_cross_attention in the config"
            )
        submodule.sparse_self_attention = StoredLayout(config.num_attention_heads, *blocks_of(config))
    elif name == "embeddings" and hasattr(submodule, "position_embeddings") and "longest" not in own:
        num_blocks, block = blocks_of(config)
        submodule.longest = num_blocks * block
        submodule.register_forward_pre_hook(_refuse_longer, with_kwargs=True)
        parent.register_forward_pre_hook(partial(_refuse_longer_in_row, submodule.longest), with_kwargs=True)
    elif name == "encoder" and hasattr(submodule, "layer") and "drops_padding" not in own:
        submodule.drops_padding = True
        submodule.register_forward_pre_hook(unpad_input, with_kwargs=True)
        submodule.register_forward_hook(pad_input, with_kwargs=True)


def _refuse_longer(embeddings: nn.Module, args: tuple, kwargs: dict) -> None:
    """Says so before the position table's index error would. Positions of the caller's own may be a packed row's."""
    if kwargs.get("position_ids") is not None:
        return
    inputs = args[0] if args else kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if inputs is not None:
        _refuse_more_than(embeddings.longest, inputs.shape[1])


def _refuse_longer_in_row(longest: int, model: nn.Module, args: tuple, kwargs: dict) -> None:
    """The same for each text of a packed row, where that is known without waiting for a device."""
    tokens, ends = kwargs.get("max_length_q"), kwargs.get("cu_seq_lens_q")
    if tokens is None and ends is not None and ends.device.type == "cpu" and not torch.compiler.is_compiling():
        tokens = int(ends.diff().max())
    if tokens is not None:
        _refuse_more_than(longest, tokens)


def _refuse_more_than(longest: int, tokens: int) -> None:
    if tokens > longest:
        raise AttentionError(
            f"this model reads up to {longest} tokens",
            found=f"{tokens}",
            hint="truncate, or convert the source again with a larger --max-length",
        )
