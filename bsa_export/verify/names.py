"""The names that a conversion gives to tensors, stated once more for the judge. Nothing is imported from
`bert.families`.

Every family keeps its own names (those of transformers' classes), with the encoder under the family's own attribute.
DistilBERT becomes BERT, and GENA-LM's layer norms get the names of DeepSpeed's recipe. `gamma` and `beta` of a
LayerNorm, TensorFlow's names, become `weight` and `bias`.
"""

from __future__ import annotations

import re

# Family -> the attribute that holds the encoder in transformers' classes: in the source, and in what is written.
ATTRIBUTES = {
    "bert": ("bert", "bert"),
    "roberta": ("roberta", "roberta"),
    "xlm-roberta": ("roberta", "roberta"),
    "camembert": ("roberta", "roberta"),
    "electra": ("electra", "electra"),
    "ernie": ("ernie", "ernie"),
    "data2vec-text": ("data2vec_text", "data2vec_text"),
    "distilbert": ("distilbert", "bert"),
    "bsa_bert": ("bert", "bert"),
    "esm": ("esm", "esm"),
    "albert": ("albert", "albert"),
    "roberta-prelayernorm": ("roberta_prelayernorm", "roberta_prelayernorm"),
    "xlm-roberta-xl": ("roberta", "roberta"),
    "gte": ("gte", "gte"),
    "nomic_bert": ("nomic_bert", "nomic_bert"),
    "jina_embeddings_v3": ("roberta", "roberta"),
    "eurobert": ("model", "model"),
    "modernbert": ("model", "model"),
}
# GENA-LM's modules, after `encoder.` or `encoder.layer.N.`, and those of DeepSpeed's recipe.
PRE_NORM = {
    "pre_attention_ln": "PreAttentionLayerNorm",
    "post_attention_ln": "PostAttentionLayerNorm",
    "last_layer_ln": "FinalLayerNorm",
}
# The modules of a layer in DistilBERT (`TransformerBlock`) and in BERT (`BertLayer`).
DISTILBERT_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
DISTILBERT_HEAD = {
    "vocab_transform.weight": "cls.predictions.transform.dense.weight",
    "vocab_transform.bias": "cls.predictions.transform.dense.bias",
    "vocab_layer_norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "vocab_layer_norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "vocab_projector.weight": "cls.predictions.decoder.weight",
    "vocab_projector.bias": "cls.predictions.bias",
}
# A head's tensor -> the tensor that transformers' masked-LM classes read instead: the encoder's word
# embeddings, or a bias of the head.
TIED_WEIGHTS = (
    "cls.predictions.decoder.weight", "lm_head.decoder.weight", "predictions.decoder.weight",
    "generator_lm_head.weight", "decoder.weight", "lm_head.weight",
)  # fmt: skip
WORD_EMBEDDINGS = {
    "decoder.weight": "embeddings.tok_embeddings.weight",  # ModernBERT
    "lm_head.weight": "embed_tokens.weight",  # EuroBERT
}
TIED_BIASES = {
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.bias": "lm_head.bias",
    "predictions.decoder.bias": "predictions.bias",
}


# Families whose config class does not tie the head, unless config.json says so.
UNTIED_BY_DEFAULT = ("eurobert",)


def tied_to(name: str, prefix: str) -> str | None:
    """The tensor that transformers reads instead of a head's; None where it reads the head's own.

    Args:
        name: in the converted folder.
        prefix: what stands before the encoder's names there, with its dot.
    """
    if name in TIED_WEIGHTS:
        return prefix + WORD_EMBEDDINGS.get(name, "embeddings.word_embeddings.weight")
    return TIED_BIASES.get(name)


def expected_name(family: str, prefix: str, name: str) -> str:
    """The name that a tensor of the source has in the converted folder.

    Args:
        family: the source's, as conversion.json has it.
        prefix: what stands before the encoder's names in the source, with its dot; empty for an encoder alone.
        name: of the source's tensor.
    """
    name = re.sub(r"(LayerNorm)\.gamma$", r"\1.weight", name)
    name = re.sub(r"(LayerNorm)\.beta$", r"\1.bias", name)
    # DeepSpeed's recipe and NVIDIA's code: a product, its bias and its activation in one module.
    name = re.sub(r"\b(intermediate|pooler|transform)\.dense_act\.", r"\1.dense.", name)
    if family == "bsa_bert" and (match := re.fullmatch(r"(.*encoder\.(?:layer\.\d+\.)?)(\w+_ln)(\.\w+)", name)):
        name = f"{match[1]}{PRE_NORM.get(match[2], match[2])}{match[3]}"
    found, written = ATTRIBUTES[family]
    if name.startswith(prefix):
        inner = name[len(prefix) :]
        if family != "distilbert":
            return f"{written}.{inner}" if prefix else inner
        start = f"{written}." if prefix else ""
        match = re.fullmatch(r"transformer\.layer\.(\d+)\.(.+)\.(weight|bias)", inner)
        if match and (module := DISTILBERT_LAYER.get(match[2])):
            return f"{start}encoder.layer.{match[1]}.{module}.{match[3]}"
        if inner.startswith("embeddings.") or (prefix and inner not in DISTILBERT_HEAD):
            return start + inner
        return DISTILBERT_HEAD.get(inner, inner)
    # What a wrapper put in front of the encoder's attribute stands in front of a head's names too.
    wrapper = prefix[: -len(f"{found}.")] if prefix.endswith(f".{found}.") else ""
    name = name.removeprefix(wrapper)
    return DISTILBERT_HEAD.get(name, name) if family == "distilbert" else name
