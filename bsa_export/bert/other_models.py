"""What gives away a model that is not of a BERT family, although its tensors are named as BERT's are.

Names and fields are those of transformers 5.24 and of the public sources of GENA-LM and DeepSpeed's BERT recipe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# How the names of their classes begin -> what they are.
_CLASSES = {
    "BigBird": "BigBird",
    "Bros": "BROS",
    "DPR": "DPR",
    "LayoutLM": "LayoutLM",
    "Lilt": "LiLT",
    "Longformer": "Longformer",
    "MarkupLM": "MarkupLM",
    "MegatronBert": "Megatron-BERT",
    "MobileBert": "MobileBERT",
    "RoCBert": "RoCBert",
    "Splinter": "Splinter",
    "Tapas": "TAPAS",
    "VisualBert": "VisualBERT",
    "Xmod": "X-MOD",
}
# A part of the encoder's prefix -> what it is.
_PREFIXES = {
    "bros": "BROS",
    "ctx_encoder": "DPR",
    "question_encoder": "DPR",
    "span_predictor": "DPR",
    "ibert": "I-BERT",
    "layoutlm": "LayoutLM",
    "lilt": "LiLT",
    "longformer": "Longformer",
    "luke": "LUKE",
    "markuplm": "MarkupLM",
    "mobilebert": "MobileBERT",
    "roc_bert": "RoCBert",
    "splinter": "Splinter",
    "tapas": "TAPAS",
    "visual_bert": "VisualBERT",
}
# A field of config.json that no BERT family has -> whose it is.
_FIELDS = {
    "attention_type": "BigBird",
    "rescale_embeddings": "BigBird",
    "attention_window": "Longformer",
    "max_2d_position_embeddings": "LayoutLM",
    "visual_embedding_dim": "VisualBERT",
    "xpath_unit_hidden_size": "MarkupLM",
    "max_xpath_tag_unit_embeddings": "MarkupLM",
    "dim_bbox": "BROS",
    "bbox_scale": "BROS",
    "projection_dim": "DPR",
    "question_token_id": "Splinter",
    "intra_bottleneck_size": "MobileBERT",
    "use_bottleneck": "MobileBERT",
    "enable_pronunciation": "RoCBert",
    "entity_vocab_size": "LUKE",
    "quant_mode": "I-BERT",
    "relative_attention_num_buckets": "MPNet",
    "relative_attention": "DeBERTa",
    "pos_att_type": "DeBERTa",
    "rotary_value": "RoFormer",
    "num_landmarks": "Nystromformer",
    "head_ratio": "ConvBERT",
    "channel_shrink_ratio": "LiLT",
    "adapter_reduction_factor": "X-MOD",
}
_PRE_LAYER_NORM = "layer norms before each sublayer (pre-layer-norm)"
# Fields that say, when they are set, that another computation than BERT's is meant; whatever model_type says.
_COMPUTE_OTHERWISE = {
    "pre_layer_norm": _PRE_LAYER_NORM,
    "last_layer_norm": "a layer norm after the last layer (pre-layer-norm)",
    "rescale_embeddings": "rescaled embeddings, as BigBird's",
    "relative_attention": "relative positions, as DeBERTa's",
    "alibi_starting_size": "ALiBi instead of position embeddings, as MosaicBERT's",
    "rotary_value": "rotary positions, as RoFormer's",
    "use_bottleneck": "bottlenecks, as MobileBERT's",
    "quant_mode": "quantized layers, as I-BERT's",
    "is_decoder": "a decoder",
    "is_causal": "causal attention, as a decoder's",
    "add_cross_attention": "a decoder with cross-attention",
    "is_encoder_decoder": "an encoder and a decoder",
    "pruned_heads": "layers with pruned heads",
}
NORM_FIELDS = ("pre_layer_norm", "last_layer_norm")
# A written name behind the encoder's prefix -> what a tensor of that name looks like. The first that matches counts.
_TENSORS = tuple(
    (re.compile(pattern, re.IGNORECASE), what)
    for pattern, what in {
        r"distance_embedding|rel(ative)?_(attention|pos|embed)": "relative positions",
        r"pos_(key|query)_proj|position_bias": "relative positions",
        r"rotary|inv_freq|\brope\b": "rotary positions",
        r"(x|y|h|w)_position_embeddings": "positions on a page, as LayoutLM's",
        r"bbox": "positions on a page, as BROS's",
        r"layout_|_layout\b": "positions on a page, as LiLT's",
        r"xpath": "positions in a tree, as MarkupLM's",
        r"visual": "embeddings of pictures, as VisualBERT's",
        r"(shape|pronunciation)_embed|map_inputs": "embeddings of shapes and sounds, as RoCBert's",
        r"entity": "embeddings of entities, as LUKE's",
        r"token_type_embeddings_\d": "embeddings of tables, as TAPAS's",
        r"task_type_embeddings": "embeddings of tasks, as ERNIE's",
        r"bottleneck|embedding_transformation|\bffn\.\d": "bottlenecks, as MobileBERT's",
        r"adapter|houlsby|pfeiffer": "adapters",
        r"crossattention": "cross-attention, as of a decoder",
        r"(query|key|value)_global": "global projections, as Longformer's",
        r"conv|highway|early_?exit": "layers that BERT lacks",
        r"(^|\.)layer\.\d+\..*(pre|post)_?attention_?(ln|layer_?norm)": _PRE_LAYER_NORM,
        r"(^|\.)layer\.\d+\.(attention\.)?(ln|layer_?norm|self_attn_layer_norm)\b": _PRE_LAYER_NORM,
        r"^(encoder\.)?\w*(layer_?norm|ln|norm)\w*(\.\w+)?$": "a layer norm after the last layer (pre-layer-norm)",
        r"^embeddings\.": "embeddings that BERT lacks",
        r"^pooler\.": "a pooler, which the class lacks",
    }.items()
)  # fmt: skip
_ENCODER_PARTS = ("embeddings", "encoder", "pooler", "embeddings_project", "transformer")
_LOOSE_NORM = re.compile(
    r"(final_?|last_?|layer_?|post_?|pre_?|encoder_?|emb_?)*(layer_?norm|ln|norm)(_?f|_?final)?\.", re.I
)


def appearance(config: Mapping[str, object], prefix: str) -> tuple[str, str] | None:
    """Which other model a checkpoint without a `model_type` is, and what gives it away; None where nothing does.

    Args:
        config: content of config.json.
        prefix: what stands before the encoder's names.
    """
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        for start, model in _CLASSES.items():
            if isinstance(name, str) and re.match(rf"{start}(v\d)?([A-Z]|$)", name):
                return model, f"the class {name} in config.json"
    for part in prefix.split("."):
        if part in _PREFIXES:
            return _PREFIXES[part], f"tensors {prefix}*"
    for name, model in _FIELDS.items():
        if name in config:
            return model, f"{name} in config.json"
    return None


def other_computation(
    config: Mapping[str, object], positions: Sequence[str] = ("absolute",), chooses_norms: bool = False
) -> tuple[str, str] | None:
    """A field of config.json that asks for another computation than BERT's, and which; None where there is none.

    Args:
        config: content of config.json.
        positions: the kinds of positions that are computed, by `position_embedding_type`; empty where the field says
            nothing.
        chooses_norms: whether norms before each sublayer are computed too.
    """
    kind = config.get("position_embedding_type")
    if kind and positions and kind not in positions:
        return f"position_embedding_type {kind!r}", f"{kind} positions instead of {positions[0]} ones"
    own = NORM_FIELDS if chooses_norms else ()
    return next(
        ((name, what) for name, what in _COMPUTE_OTHERWISE.items() if name not in own and config.get(name)), None
    )


def describe_tensor(inner: str) -> str | None:
    """What a tensor looks like that the class does not have, by its name behind the prefix; None if unknown."""
    return next((what for pattern, what in _TENSORS if pattern.search(inner)), None)


def in_encoder(inner: str) -> bool:
    """Whether a name of a checkpoint without prefix is the encoder's: one of its parts, or a layer norm on top."""
    return inner.partition(".")[0] in _ENCODER_PARTS or _LOOSE_NORM.match(inner) is not None
