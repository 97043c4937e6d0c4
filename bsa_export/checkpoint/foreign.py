"""Tensors that another library has wrapped, sharded or quantized: what they look like, and what undoes it.

The names are those that the libraries write: torch (nn.utils, ao, distributed.fsdp), peft, bitsandbytes, GPTQ, AWQ,
quanto, compressed-tensors, hqq, DeepSpeed, adapters, transformers (Flax, I-BERT), optimum, fairseq and Megatron-LM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bsa_export.checkpoint.table import Tensor


@dataclass(frozen=True)
class Foreign:
    """What the tensors of a checkpoint look like.

    Attributes:
        what: what was found, to follow "found" in a message; it names a tensor.
        hint: the command or step that makes a checkpoint that can be converted.
    """

    what: str
    hint: str


@dataclass(frozen=True)
class _Sign:
    """Tensors among which each of `patterns` finds a name."""

    patterns: tuple[str, ...]
    what: str
    hint: str


_MERGE = "merge the adapter into the model: model.merge_and_unload().save_pretrained(FOLDER), and convert FOLDER"
_LOAD_AND_MERGE = (
    "load the base model, then PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(FOLDER), "
    "and convert FOLDER"
)
_DEQUANTIZE = "convert the weights from before the quantization, or save model.dequantize()"
_UNQUANTIZED = "convert the weights from before the quantization"
_EACH = "to each of these modules and save again"
_ADAPTER = (
    r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|ia3_l|hada_w[12]_[ab]|lokr_w[12](_[ab])?|vera_lambda_[bd]"
    r"|oft_[rR])(\.|$)"
)

# In the order in which they are tried: the more special ones first.
_SIGNS = (
    _Sign(
        (_ADAPTER, r"\.base_layer\."),
        "a model with an unmerged PEFT adapter",
        _MERGE,
    ),
    _Sign(
        (_ADAPTER, r"embeddings\.word_embeddings\.weight$"),
        "a model with an unmerged PEFT adapter",
        _MERGE,
    ),
    _Sign(
        (_ADAPTER,),
        "a PEFT adapter without its model",
        _LOAD_AND_MERGE,
    ),
    _Sign(
        (r"(^|\.)(prompt_embeddings|prompt_encoder\..*)$",),
        "a PEFT prompt without its model",
        "a prompt cannot be merged; convert the base model",
    ),
    _Sign(
        (r"\.base_layer\.",),
        "layers that PEFT wrapped",
        _MERGE,
    ),
    _Sign(
        (r"\.modules_to_save\.", r"\.original_module\."),
        "layers that PEFT wrapped",
        _MERGE,
    ),
    _Sign(
        (r"^base_model\.model\.",),
        "a model that PEFT wrapped",
        _MERGE,
    ),
    _Sign(
        (r"\.adapters\.[^.]+\.adapter_(down|up)\.",),
        "bottleneck adapters",
        "they cannot be merged; convert the model without them",
    ),
    _Sign(
        (r"weight_orig$", r"weight_mask$"),
        "pruned weights whose masks are stored apart",
        'apply torch.nn.utils.prune.remove(module, "weight") ' + _EACH,
    ),
    _Sign(
        (r"weight_orig$", r"weight_u$"),
        "weights under spectral normalization",
        "apply torch.nn.utils.remove_spectral_norm(module) " + _EACH,
    ),
    _Sign(
        (r"weight_g$", r"weight_v$"),
        "weights under weight normalization",
        "apply torch.nn.utils.remove_weight_norm(module) " + _EACH,
    ),
    _Sign(
        (r"\bparametrizations\.\w+\.original\d*$",),
        "parametrized weights",
        'apply torch.nn.utils.parametrize.remove_parametrizations(module, "weight") ' + _EACH,
    ),
    _Sign(
        (r"\.mask_scores$",),
        "the scores of movement pruning, not applied to the weights",
        "apply the masks to the weights and save them without the scores",
    ),
    _Sign(
        (r"\.SCB$",),
        "8-bit weights of bitsandbytes",
        _DEQUANTIZE,
    ),
    _Sign(
        (r"\.quant_state\.bitsandbytes__|\.weight\.(absmax|quant_map|nested_absmax)$",),
        "4-bit weights of bitsandbytes",
        _DEQUANTIZE,
    ),
    _Sign(
        (r"\.qweight$", r"\.g_idx$"),
        "weights that GPTQ quantized",
        _UNQUANTIZED,
    ),
    _Sign(
        (r"\.qweight$",),
        "weights that AWQ or GPTQ quantized",
        _UNQUANTIZED,
    ),
    _Sign(
        (r"\.weight\._(data|scale|qdata)$|_weight_qdata$",),
        "weights that quanto or torchao quantized",
        _UNQUANTIZED,
    ),
    _Sign(
        (r"\.weight_packed$|\.weight_scale(_inv)?$|\.weight_zero_point$",),
        "quantized weights and their scales",
        _UNQUANTIZED,
    ),
    _Sign(
        (r"\.W_q$",),
        "weights that HQQ quantized",
        _UNQUANTIZED,
    ),
    _Sign(
        (r"\.weight_integer$|\.act_scaling_factor$|\.fc_scaling_factor$",),
        "the integer weights of I-BERT",
        _UNQUANTIZED,
    ),
    _Sign(
        (r"\._packed_params\b|\.weight_fake_quant\.|\bactivation_post_process",),
        "weights that torch quantized",
        _UNQUANTIZED,
    ),
    _Sign(
        (r"(^|\.)_?flat_param(_\d+)?$",),
        "the flat parameters of FSDP",
        "gather them: save the state dict with StateDictType.FULL_STATE_DICT",
    ),
    _Sign(
        (r"\bsentence_encoder\.layers\.\d+\.",),
        "a model with fairseq's names",
        "convert it first with transformers' convert_roberta_original_pytorch_checkpoint_to_pytorch.py",
    ),
    _Sign(
        (r"\.(query_key_value|linear_qkv)\.weight$",),
        "fused attention weights, as of Megatron-LM",
        "convert it first with transformers' convert_megatron_bert_checkpoint.py",
    ),
    _Sign(
        (r"\blayer\.\d+\.in_proj_weight$",),
        "the fused layers of BetterTransformer",
        "save BetterTransformer.reverse(model)",
    ),
    _Sign(
        (r"\bin_proj_weight$",),
        "fused attention weights, as of torch.nn.MultiheadAttention",
        "only models with BERT's separate query, key and value can be converted",
    ),
    _Sign(
        (r"[./]kernel$",),
        "a model of Flax or TensorFlow",
        "load it with transformers 4 and from_flax=True or from_tf=True, and save it from PyTorch",
    ),
)


def recognise(tensors: Mapping[str, Tensor]) -> Foreign | None:
    """What a table looks like that is not of a plain model, judged by names and shapes; None where nothing is known."""
    weights = [name for name in tensors if name.endswith("weight")]
    empty = [name for name in weights if 0 in tensors[name].shape]
    if empty and len(empty) * 2 >= len(weights):
        return Foreign(
            f"{empty[0]} and {len(empty) - 1} more weights without elements, as DeepSpeed ZeRO-3 leaves them",
            "gather them: python zero_to_fp32.py CHECKPOINT_FOLDER OUTPUT, and convert OUTPUT",
        )
    for sign in _SIGNS:
        found = [_first(pattern, tensors) for pattern in sign.patterns]
        if all(found):
            return Foreign(f"{sign.what} ({found[0]})", sign.hint)
    return None


def _first(pattern: str, names: Mapping[str, Tensor]) -> str | None:
    search = re.compile(pattern).search
    return next((name for name in names if search(name)), None)
