"""What this package registers with transformers and torch, and the hook that adds layouts to a model.

Needs transformers 5.0 or newer, the first release whose BERT family calls a registered attention function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from bsa_export.bert.families import FAMILIES
from bsa_export.bert.structure import BERT, Structure
from bsa_export.errors import AttentionError
from bsa_export.hf.attention import attention, key_padding_mask
from bsa_export.hf.stored_layout import IN_MEMORY, NAME, StoredLayout, blocks_of, has_section
from bsa_export.hf.unpadding import pad_input, pad_layer, unpad_input, unpad_layer

MIN_TRANSFORMERS = (5, 0)

_undo: list[Callable[[], object]] = []  # what `unregister` calls; empty while nothing is registered


def register() -> bool:
    """Registers `block_sparse` with transformers, once. Returns False where transformers is older than 5.0."""
    import transformers

    if version_of(transformers) < MIN_TRANSFORMERS:
        return False
    # The first import of these may register by itself (`hf.import_hook`): whether it did is asked afterwards.
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    if not _undo:
        for name in (NAME, IN_MEMORY):
            for interface, function in ((AttentionInterface, attention), (AttentionMaskInterface, key_padding_mask)):
                interface.register(name, function)
                _undo.append(partial(interface._global_mapping.pop, name, None))
        _undo.append(register_module_module_registration_hook(give_layout).remove)
    return True


def unregister() -> None:
    """Removes what `register` registered. Models that were built before say so when they are called."""
    while _undo:
        _undo.pop()()


def version_of(transformers: ModuleType) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def give_layout(parent: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Adds an empty `StoredLayout` to each self-attention of a model that is being built for `block_sparse`.

    A buffer has to exist before `from_pretrained` fills it and `save_pretrained` writes it. torch calls this hook for
    every submodule that any module registers. Only the self-attention, embeddings and encoder of such a model are
    changed, and only the first time: they may be put into another module, or wrapped and put back.

    A model with a `sparse_attention` section that is built for dense attention gets a warning instead.
    """
    if submodule is None or name not in _NAMES:
        return
    # What the module itself holds: the `config` of a wrapper or of an unrelated class may be a property that raises.
    own = vars(submodule)
    config: Any = vars(parent).get("config") if name in _OF_MODEL else own.get("config")
    implementation = getattr(config, "_attn_implementation", None)
    if implementation != NAME:
        if name in _WORDS and implementation in DENSE and has_section(config):
            _warn_dense(parent, implementation)
        return
    structure = structure_of(config)
    if is_attention(structure, name, submodule) and not hasattr(submodule, "sparse_self_attention"):
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            raise AttentionError(
                "block-sparse attention runs encoders only", found="is_decoder or add_cross_attention in the config"
            )
        submodule.sparse_self_attention = StoredLayout(config.num_attention_heads, *blocks_of(config))
    elif has_words(structure, name, submodule) and "longest" not in own:
        config.attn_implementation = NAME  # a plain attribute, which save_pretrained writes into config.json
        num_blocks, block = blocks_of(config)
        longest = own["longest"] = num_blocks * block
        # Where the model loops over the layers itself, it passes position_ids on even if its caller gave none.
        reader = submodule if structure.layer.startswith("encoder.") else parent
        reader.register_forward_pre_hook(partial(_refuse_longer, longest), with_kwargs=True)
        parent.register_forward_pre_hook(partial(_refuse_longer_in_row, longest), with_kwargs=True)
    elif name == "encoder" and hasattr(submodule, structure.layer.split(".")[1]) and "drops_padding" not in own:
        own["drops_padding"] = True
        submodule.register_forward_pre_hook(unpad_input, with_kwargs=True)
        submodule.register_forward_hook(pad_input, with_kwargs=True)
    elif f"{name}.{{}}" == structure.layer and isinstance(submodule, nn.ModuleList) and "drops_padding" not in own:
        own["drops_padding"] = True
        for layer in submodule:
            hook = partial(unpad_layer, config, layer is submodule[0])
            layer.register_forward_pre_hook(hook, with_kwargs=True)
        submodule[-1].register_forward_hook(pad_layer, with_kwargs=True)


_STRUCTURES = {family.structures[0] for family in FAMILIES.values()}  # those of transformers' classes
_WORDS = {one.words.partition(".")[0] for one in _STRUCTURES}
_LAYERS = {one.layer.removesuffix(".{}") for one in _STRUCTURES}  # a list of layers that is the model's own
_OF_MODEL = _WORDS | {name for name in _LAYERS if "." not in name}  # modules that hold no config
_NAMES = _OF_MODEL | {one.attention.rpartition(".")[2] for one in _STRUCTURES} | {"encoder"}


def structure_of(config: Any) -> Structure:
    """The structure of a class of transformers, by its config; BERT's for a model type that is not known."""
    family = FAMILIES.get(getattr(config, "model_type", ""))
    return family.structures[0] if family else BERT


def is_attention(structure: Structure, name: str, module: nn.Module) -> bool:
    """Whether a submodule of that name calls the attention function of its layer."""
    own = structure.attention.rpartition(".")[2]
    return name == own and hasattr(module, structure.projections[0].rpartition(".")[2])


def has_words(structure: Structure, name: str, module: nn.Module) -> bool:
    """Whether a submodule of that name is, or holds, the word embeddings."""
    own, _, table = structure.words.removesuffix(".weight").partition(".")
    return name == own and (not table or hasattr(module, table))


# The dense attention functions of transformers. Others may be sparse too.
DENSE = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def _warn_dense(model: nn.Module, implementation: str) -> None:
    warnings.warn(
        f'{type(model).__name__} is built with dense attention ("{implementation}"), but its config has a '
        f"sparse_attention section: its outputs differ from those of the sparse model, above all for long inputs. "
        f'Load it with bsa_export.load, or with attn_implementation="{NAME}".',
        stacklevel=3,
    )


def _refuse_longer(longest: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses an input that is too long, before the position table's index error.

    With `position_ids` the input may be a packed row.
    """
    if not _undo:
        raise AttentionError(
            f'attn_implementation="{NAME}" is not registered with transformers', hint="call bsa_export.register() again"
        )
    if kwargs.get("position_ids") is not None:
        return
    inputs = args[0] if args else kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if inputs is not None:
        _refuse_more_than(longest, inputs.shape[1])


def _refuse_longer_in_row(longest: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The same for each sequence of a packed row, where its length is known without a synchronisation with the GPU."""
    tokens, cu_seqlens = kwargs.get("max_length_q"), kwargs.get("cu_seq_lens_q")
    if (
        tokens is None
        and cu_seqlens is not None
        and cu_seqlens.device.type == "cpu"
        and not torch.compiler.is_compiling()
    ):
        tokens = int(cu_seqlens.diff().max())
    if tokens is not None:
        _refuse_more_than(longest, int(tokens))


def _refuse_more_than(longest: int, tokens: int) -> None:
    if tokens > longest:
        raise AttentionError(
            f"this model reads up to {longest} tokens",
            found=tokens,
            hint="truncate, or convert the source again with a larger --max-length",
        )
