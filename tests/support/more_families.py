"""Small random models of the encoders that are not built as BERT is: other names, positions and norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from support.tiny import SIZES, SPECIAL, filled

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        family: `model_type`.
        classes: what its classes in transformers start with.
        reserved: position rows that are not positions.
        heads: how the names of its classes end, the first the usual one.
        fields: of its config, beyond `SIZES`.
        layouts: the names of the stored layouts behind the encoder's prefix, with `{}` for the layer.
        prefix: what stands before the names of the encoder, in a model with a head.
        count: layers that have weights of their own.
        projection: how the name of a projection's weight ends in the source.
    """

    family: str
    classes: str
    prefix: str
    layouts: str
    reserved: int = 0
    heads: tuple[str, ...] = ("ForMaskedLM", "Model", "ForSequenceClassification", "ForTokenClassification")
    fields: dict[str, Any] = field(default_factory=dict)
    count: int = 2
    projection: str = "query.weight"

    @property
    def is_rotary(self) -> bool:
        """Whether there are no position embeddings."""
        return "self_attn" in self.layouts or self.is_local or "rotary" in self.fields.values()

    @property
    def is_local(self) -> bool:
        """Whether some layers attend to the tokens near by only."""
        return "local_attention" in self.fields


_BERT = "encoder.layer.{}.attention.self"
KINDS = {
    "esm-absolute": Kind("esm", "Esm", "esm.", _BERT, 2, fields={"mask_token_id": 4, "emb_layer_norm_before": True}),
    "esm-rotary": Kind(
        "esm", "Esm", "esm.", _BERT, 2,
        fields={"mask_token_id": 4, "position_embedding_type": "rotary", "token_dropout": True},
    ),
    "albert": Kind(
        "albert", "Albert", "albert.", "encoder.albert_layer_groups.{}.albert_layers.0.attention",
        heads=("ForMaskedLM", "Model", "ForPreTraining", "ForSequenceClassification"),
        fields={"embedding_size": 16, "num_hidden_layers": 3},
        count=1,
    ),
    "albert-groups": Kind(
        "albert", "Albert", "albert.", "encoder.albert_layer_groups.{}.albert_layers.0.attention",
        fields={"embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2},
    ),
    "roberta-prelayernorm": Kind("roberta-prelayernorm", "RobertaPreLayerNorm", "roberta_prelayernorm.", _BERT, 2),
    "xlm-roberta-xl": Kind("xlm-roberta-xl", "XLMRobertaXL", "roberta.", _BERT, 2),
    "gte": Kind("gte", "Gte", "gte.", "encoder.layer.{}.self_attn", projection="qkv_proj.weight"),
    "gte-no-types": Kind(
        "gte", "Gte", "gte.", "encoder.layer.{}.self_attn", fields={"type_vocab_size": 0}, projection="qkv_proj.bias"
    ),
    "nomic_bert": Kind(
        "nomic_bert", "NomicBert", "nomic_bert.", "encoder.layers.{}.self_attn", projection="Wqkv.weight"
    ),
    "jina_embeddings_v3": Kind(
        "jina_embeddings_v3", "JinaEmbeddingsV3", "roberta.", "encoder.layers.{}.self_attn", 2,
        projection="Wqkv.weight",
    ),
    "modernbert": Kind(
        "modernbert", "ModernBert", "model.", "layers.{}.attn", projection="Wqkv.weight", count=4,
        fields={"num_hidden_layers": 4, "local_attention": 24, "cls_token_id": 2, "sep_token_id": 3},
    ),
    "modernbert-biased": Kind(
        "modernbert", "ModernBert", "model.", "layers.{}.attn", projection="Wqkv.bias",
        fields={
            "global_attn_every_n_layers": 2, "local_attention": 20, "norm_bias": True,
            "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "cls_token_id": 2, "sep_token_id": 3,
        },
    ),
    "eurobert": Kind("eurobert", "EuroBert", "model.", "layers.{}.self_attn", projection="k_proj.weight"),
    "eurobert-grouped": Kind(
        "eurobert", "EuroBert", "model.", "layers.{}.self_attn",
        fields={"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        projection="v_proj.bias",
    ),
}  # fmt: skip


def random_model(
    kind: str,
    head: str = "ForMaskedLM",
    *,
    length: int = 64,
    seed: int = 0,
    fill: Callable[[torch.nn.Parameter, torch.Generator], Any] | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """Returns a model of a kind in evaluation mode, every parameter random and large enough to matter.

    Args:
        kind: a key of `KINDS`.
        head: what the class name ends with.
        length: tokens that the model reads.
        seed: seed of the parameters.
        fill: fills a parameter in place; by default from a normal distribution of standard deviation 0.3.
        fields: of the config.
    """
    import transformers

    row = KINDS[kind]
    settings = SIZES | SPECIAL | {"max_position_embeddings": length + row.reserved} | row.fields | fields
    return filled(getattr(transformers, row.classes + head), settings, seed, fill)
