"""Stock transformers classes on block-sparse attention: what is registered by name, and `load()`.

Needs transformers 5.0 or newer, the first release whose BERT family calls a registered attention function.
"""

from __future__ import annotations

import inspect
import logging
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from bsa_export.checkpoint.source import open_checkpoint
from bsa_export.convert import find_source
from bsa_export.errors import AttentionError, CheckpointError
from bsa_export.families import FAMILIES, find_family, read_config
from bsa_export.ops import block_sparse_attention, block_sparse_attention_varlen
from bsa_export.state_dict import longest_input

log = logging.getLogger(__name__)

NAME = "block_sparse"
# For models that `SparseAttentionUtils` made sparse: masks as for NAME, but no stored layouts and no padding dropped.
IN_MEMORY = "block_sparse_in_memory"
MIN_TRANSFORMERS = (5, 0)


class StoredLayout(nn.Module):
    """A layer's master layout, at the name that DeepSpeed's `BertSparseSelfAttention` gives it.

    Buffers: `master_layout`, uint8 `[num_heads, n, n]`: zeros in a new model. `from_pretrained` leaves uninitialised
    memory in it where the checkpoint has no layout; `load` refuses such a checkpoint by its names.
    """

    def __init__(self, num_heads: int, num_blocks: int, block: int):
        super().__init__()
        self.block = block
        self.checked = None
        self.register_buffer("master_layout", torch.zeros(num_heads, num_blocks, num_blocks, dtype=torch.uint8))

    def check(self) -> None:
        """Raises AttentionError unless the layout holds only 0 and 1 and no empty row, as every converted one does.

        Looks once at each layout; compiled code while it is compiled, and again only when a state dict is loaded.
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
        """For each call, `nn.DataParallel` copies a layout to each device, where it would be read anew: replicas attend by this one."""
        replica = super()._replicate_for_data_parallel()
        vars(replica)["replica_of"] = self
        return replica

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
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


def _give_layout(parent: nn.Module, name: str, submodule: nn.Module | None) -> None:
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
        submodule.sparse_self_attention = StoredLayout(config.num_attention_heads, *_blocks(config))
    elif name == "embeddings" and hasattr(submodule, "position_embeddings") and "longest" not in own:
        num_blocks, block = _blocks(config)
        submodule.longest = num_blocks * block
        submodule.register_forward_pre_hook(_refuse_longer, with_kwargs=True)
        parent.register_forward_pre_hook(partial(_refuse_longer_in_row, submodule.longest), with_kwargs=True)
    elif name == "encoder" and hasattr(submodule, "layer") and "drops_padding" not in own:
        submodule.drops_padding = True
        submodule.register_forward_pre_hook(_drop_padding, with_kwargs=True)
        submodule.register_forward_hook(_restore_padding, with_kwargs=True)


class Unpadded(NamedTuple):
    """What puts the tokens of a row back: `batch`, `seq`, and int64 `places [tokens]` in the flattened batch."""

    batch: int
    seq: int
    places: torch.Tensor


class Texts(NamedTuple):
    """Where texts lie in a row, one after another: int32 `cu_seqlens [texts + 1]`, and the tokens of the longest."""

    cu_seqlens: torch.Tensor
    max_seqlen: int


def _drop_padding(encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Lays the real tokens of a right-padded batch `[batch, seq, hidden]` into one row: no layer works on padding.

    Any other padding is left to the mask: a text has to start where the layout does. Stays out of `torch.compile` and
    `torch.jit.trace` (the shapes depend on the data), of calls that ask for every layer's hidden states, and of feed-forward
    in chunks, which divide the batch's length. A row that the caller packed, in transformers' own form (`cu_seq_lens_q`), is
    taken as it is.
    """
    if encoder.config._attn_implementation != NAME:
        return None
    hidden = args[0] if args else kwargs.pop("hidden_states")
    args = (hidden, *args[1:])
    mask, ends = kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_q")
    if ends is not None:
        longest = kwargs.get("max_length_q")
        texts = Texts(ends.to(torch.int32), int(ends.diff().max() if longest is None else longest))
        return args, kwargs | {"texts": texts}
    if mask is None or mask.ndim != 2:
        return args, kwargs
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return args, kwargs
    if kwargs.get("output_hidden_states") or encoder.config.output_hidden_states:
        return args, kwargs
    if any(getattr(layer, "chunk_size_feed_forward", 0) for layer in encoder.layer):
        return args, kwargs
    if mask.shape != hidden.shape[:2]:
        raise AttentionError(f"expected an attention_mask of {tuple(hidden.shape[:2])}", found=tuple(mask.shape))
    sizes = mask.sum(1)
    in_front = torch.arange(mask.shape[1], device=mask.device) < sizes[:, None]
    *lengths, right_padded = torch.cat([sizes, (mask == in_front).all()[None]]).tolist()  # the one synchronisation
    if not right_padded or not any(lengths):
        return args, kwargs
    kwargs = kwargs | {"attention_mask": None}
    if (tokens := sum(lengths)) < mask.numel():
        sizes = sizes.to(hidden.device)
        ends = nn.functional.pad(sizes.cumsum(0), (1, 0))
        padding_before = torch.arange(len(lengths), device=hidden.device) * mask.shape[1] - ends[:-1]
        padding_before = padding_before.repeat_interleave(sizes, output_size=tokens)
        places = torch.arange(tokens, device=hidden.device) + padding_before
        kwargs |= {"unpadded": Unpadded(*mask.shape, places), "texts": Texts(ends.to(torch.int32), max(lengths))}
        args = (hidden.flatten(0, 1).index_select(0, places)[None], *args[1:])
    return args, kwargs


def _restore_padding(encoder: nn.Module, args: tuple, kwargs: dict, output):
    """Puts the tokens back where they came from; padding gets zeros."""
    unpadded = kwargs.get("unpadded")
    if unpadded is None:
        return output
    hidden = output.last_hidden_state[0]
    places = unpadded.places.to(hidden.device)  # the last layer may be on another one than the first
    padded = hidden.new_zeros(unpadded.batch * unpadded.seq, hidden.shape[-1]).index_copy(0, places, hidden)
    output.last_hidden_state = padded.unflatten(0, (unpadded.batch, unpadded.seq))
    return output


def _blocks(config) -> tuple[int, int]:
    """The number of blocks in a master layout's row, and the block's width in tokens."""
    section = getattr(config, "sparse_attention", None)
    if not isinstance(section, dict) or "block" not in section:
        raise AttentionError(
            f'attn_implementation="{NAME}" needs the sparse_attention section of a converted model',
            found="a config without one",
            hint="bsa-convert makes such a model from a dense checkpoint",
        )
    family = FAMILIES.get(config.model_type)
    longest = longest_input(family, config.to_dict()) if family else config.max_position_embeddings
    return longest // section["block"], section["block"]


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


def key_padding_mask(*, attention_mask: torch.Tensor | None, mask_function, config, **_) -> torch.Tensor | None:
    """The mask function: hands the tokenizer's mask `[batch, seq]` on, as bool.

    Dense attention builds `[batch, 1, seq, seq]` of it.
    Registered with `transformers.masking_utils.AttentionMaskInterface`; a 4-D mask does not come by here.
    """
    from transformers.masking_utils import bidirectional_mask_function

    if mask_function is not bidirectional_mask_function:
        raise AttentionError("block-sparse attention runs encoders only", found="a causal or custom mask function")
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise AttentionError(
            "expected an attention_mask of [batch, seq] or [batch, heads or 1, seq, seq]",
            found=tuple(attention_mask.shape),
        )
    return attention_mask.bool()


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    texts: Texts | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function: block-sparse self-attention over the layout that `module`, one layer's, stores.

    Registered with `transformers.modeling_utils.AttentionInterface` (transformers 5.0 to 5.x).

    Args:
        query, key, value: `[batch, heads, seq, head_dim]`.
        attention_mask: None; bool `[batch, seq]` from `key_padding_mask`; or the caller's own 4-D mask, which broadcasts
            to `[batch, heads, seq, seq]`: bool (True takes part) or added to the scores.
        texts: in a row, from `_drop_padding`; then batch is 1, and there is no mask.

    Returns:
        `[batch, seq, heads, head_dim]` in the query's dtype, and None in the place of the attention probabilities.

    Raises:
        AttentionError: for what a stored layout cannot do: probabilities, cross-attention, a cache, more tokens.
    """
    stored = getattr(module, "sparse_self_attention", None)
    if not isinstance(stored, StoredLayout):
        raise AttentionError(
            f"{type(module).__name__} has no stored layout",
            hint=f'load the converted folder with attn_implementation="{NAME}" (it cannot be switched to later, and there is '
            "no cross-attention)",
        )
    if kwargs.get("output_attentions") or module.config.output_attentions:
        raise AttentionError(
            "output_attentions=True: block-sparse attention never holds the probabilities",
            hint='for a short text load the model with attn_implementation="eager"',
        )
    if dropout and not torch.compiler.is_compiling():
        _say_no_dropout(dropout)
    if key.shape[2] != query.shape[2]:
        raise AttentionError(
            "block-sparse attention is self-attention without a cache",
            found=f"{query.shape[2]} queries and {key.shape[2]} keys",
        )
    stored = vars(stored).get("replica_of", stored)
    stored.check()

    if texts is not None:
        context = block_sparse_attention_varlen(
            query, key, value, stored.master_layout, stored.block, texts.cu_seqlens, texts.max_seqlen, scale=scaling
        )
        return context.transpose(1, 2), None
    padding = pairs = None
    if attention_mask is not None:
        if attention_mask.ndim == 2:
            padding = attention_mask
        elif attention_mask.shape[1:3] == (1, 1):
            padding = attention_mask[:, 0, 0].expand(query.shape[0], -1)
        else:
            pairs = attention_mask
    context = block_sparse_attention(
        query,
        key,
        value,
        stored.master_layout,
        stored.block,
        key_padding_mask=padding,
        attn_mask=pairs,
        scale=scaling,
    )
    return context.transpose(1, 2), None


@cache
def _say_no_dropout(dropout: float) -> None:
    log.warning(
        "attention_probs_dropout_prob=%s has no effect: block-sparse attention has no dropout on the probabilities",
        dropout,
    )


_registered = False


def register() -> bool:
    """Registers `block_sparse` with transformers, once; False, and nothing done, where that is older than 5.0."""
    global _registered
    import transformers

    if _version(transformers) < MIN_TRANSFORMERS:
        return False
    # The first import of these registers by itself (`bsa_export.registration`): whether it is done is asked after it.
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    if not _registered:
        for name in (NAME, IN_MEMORY):
            AttentionInterface.register(name, attention)
            AttentionMaskInterface.register(name, key_padding_mask)
        register_module_module_registration_hook(_give_layout)
        _registered = True
    return True


def _version(transformers) -> tuple[int, ...]:
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def load(path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None):
    """Loads a converted model into the transformers class that its config.json names, on block-sparse attention.

    Stricter than `from_pretrained`: every weight of that class must be there, nothing of the encoder may be left over,
    and every layer's layout is checked. A class that transformers does not have gives way to the one whose head the tensors
    hold, and a pooler without weights is left out.

    Args:
        path: the folder that bsa-convert or bsa-pull wrote, or a repository of the Hub, `org/name` or
            `org/name@revision` (a str that names no folder here), which goes into huggingface_hub's cache.
        device: where the model goes; the CPU by default.
        dtype: of the weights; as stored by default.

    Returns:
        The model (`transformers.PreTrainedModel`) in evaluation mode.

    Raises:
        CheckpointError: it is no converted model, or its weights do not fit the class.
        HubError: the Hub does not give it.
        AttentionError: a stored layout is damaged.
    """
    import transformers

    if _version(transformers) < MIN_TRANSFORMERS:
        raise CheckpointError(
            "bsa_export.load needs transformers 5.0 or newer, whose BERT calls a registered attention function",
            found=transformers.__version__,
        )
    register()
    folder = path if isinstance(path, Path) else find_source(path, progress=True).path
    names = _names(folder)
    model_class = _model_class(folder, names)
    options = {} if dtype is None else {"dtype": dtype}
    has_pooler = any(name.endswith("pooler.dense.weight") for name in names)
    if not has_pooler and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    config = model_class.config_class.from_pretrained(folder)
    if not hasattr(config, "tie_word_embeddings"):  # CamemBERT's before transformers 5.4, which left its head random
        config.tie_word_embeddings = True
    model, loaded = model_class.from_pretrained(
        folder,
        config=config,
        attn_implementation=NAME,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    _refuse_misfits(folder, model, **loaded)
    for module in model.modules():
        if isinstance(module, StoredLayout):
            module.check()
    return model if device is None else model.to(device)


def _names(folder: Path) -> list[str]:
    """The names of a converted model's tensors."""
    if not (folder / "config.json").is_file():
        found = "no folder" if not folder.is_dir() else "none"
        raise CheckpointError("expected a converted model's folder with a config.json", where=folder, found=found)
    return list(open_checkpoint(folder).tensors)


# The head that tensors of these names are, and transformers' table of the classes that have it.
HEADS = {
    "cls.predictions.": "MODEL_FOR_MASKED_LM_MAPPING",
    "lm_head.": "MODEL_FOR_MASKED_LM_MAPPING",
    "generator_lm_head.": "MODEL_FOR_MASKED_LM_MAPPING",
    "discriminator_predictions.": "MODEL_FOR_PRETRAINING_MAPPING",
}


def _model_class(folder: Path, names: list[str]) -> type:
    """The class that config.json names, else that of the head that the tensors hold, else the encoder's."""
    import transformers

    config = read_config(folder / "config.json")
    named = next(iter(config.get("architectures") or ()), None)
    if hasattr(transformers, str(named)):
        return getattr(transformers, named)
    family = find_family(config, names).name
    tables = [table for head, table in HEADS.items() if any(name.startswith(head) for name in names)]
    table = getattr(transformers, tables[0] if tables else "MODEL_MAPPING")
    model_class = table[transformers.CONFIG_MAPPING[family]]
    log.warning(
        "%s: architectures names %s, which transformers does not have; loaded as %s, by its tensors",
        folder,
        named or "no class",
        model_class.__name__,
    )
    return model_class


def _refuse_misfits(folder: Path, model, missing_keys, unexpected_keys, mismatched_keys, **_) -> None:
    """Raises CheckpointError for weights that would be random or lost.

    A head that the class does not have only gets a line in the log.
    """
    encoder = f"{model.base_model_prefix}.encoder.", f"{model.base_model_prefix}.embeddings.", "encoder.", "embeddings."
    lost = [name for name in unexpected_keys if name.startswith(encoder)]
    misfits = {
        "missing": sorted(missing_keys),
        "unexpected": sorted(lost),
        "of another shape": sorted(
            f"{name} (expected {tuple(expected)}, found {tuple(found)})" for name, found, expected in mismatched_keys
        ),
    }
    if any(misfits.values()):
        told = "; ".join(f"{kind}: {_some(names)}" for kind, names in misfits.items() if names)
        hint = "is this config.json from the same model?"
        if not lost and not mismatched_keys and not any(name.startswith(encoder) for name in missing_keys):
            hint = (
                f"for a new head use {type(model).__name__}.from_pretrained, and for the encoder alone "
                f'AutoModel.from_pretrained, with attn_implementation="{NAME}"'
            )
        raise CheckpointError(
            f"its weights do not fit {type(model).__name__} as its config.json describes it ({told})",
            where=folder,
            hint=hint,
        )
    if unexpected_keys:
        log.warning("%s: %s has no place for %s", folder, type(model).__name__, _some(sorted(unexpected_keys)))


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
