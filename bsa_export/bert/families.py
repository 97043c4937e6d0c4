"""The BERT families: their names for the same tensors, their config.json, reserved position rows and tied weights.

Names and fields are those of Hugging Face transformers (5.23, and the older spellings that public checkpoints still
have). What is written has today's names of the family, DistilBERT's has BERT's: the tables point one way, found ->
written. Names that no table knows pass through as they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from bsa_export.bert.structure import (
    ALBERT,
    BERT,
    ELECTRA,
    ESM,
    EUROBERT,
    GTE,
    GTE_STORED,
    JINA,
    JINA_STORED,
    LAST_NORM,
    MODERNBERT,
    MODERNBERT_LOCAL,
    NOMIC_BERT,
    NOMIC_BERT_STORED,
    POSITIONS,
    ROBERTA_PRE_NORM,
    WORDS,
    XLM_ROBERTA_XL,
    LocalLayers,
    Structure,
)
from bsa_export.errors import FamilyError

FREQUENCIES = r"encoder\.layer\.\d+\.attention\.self\.rotary_emb\.inv_freq"  # of rotary positions, in GENA-LM
_POST_NORM = r"encoder\.layer\.\d+\.attention\.output\.LayerNorm\..*"
ABSOLUTE, ROTARY, STATED = "absolute", "rotary", "stated"  # kinds of positions; config.json states the last one


Renames = tuple[tuple[str, str], ...]  # (pattern of the found name, what is written), the first that matches counts


@dataclass(frozen=True)
class Family:
    """What sets one BERT family apart from the others. All that is peculiar to a family is in its row.

    Attributes:
        name: `model_type` in config.json.
        classes: how the names of its classes in transformers begin.
        prefix: the attribute that holds the encoder in a model with a head, `bert` in `bert.embeddings...`.
        reserves: whether position rows up to that of the padding token are not positions (RoBERTa's fairseq heritage).
        tied: names of a head -> the name that they share their bytes with; one that starts with a dot is the encoder's.
        marks: patterns of a name behind the prefix that only this family has -> of a name without which the mark does
            not count, empty for none. They decide where neither config.json nor the prefix does.
        stated_as: `model_type`s that the config.json of such checkpoints states; `marks` decide then.
        chooses_norms: whether config.json says where the layer norms are (`pre_layer_norm`, `last_layer_norm`) and
            whether positions are absolute or rotary (`position_embedding_type`, `rotary_dim`, `rotary_base`).
        written_as: the family whose names, config.json and classes are written; empty for the family itself.
        encoder_names: renames of names behind the encoder's prefix, to those of `written_as`.
        head_names: renames of the other names.
        fields: fields of config.json -> those of `written_as`.
        constants: fields of `written_as` that this family has no field for.
        own_fields: fields that `written_as` has no field for.
        head_classes: classes -> those of `written_as` that compute the same; a class that is absent runs as an encoder
            alone.
        lacks_token_types: whether it has no token types, so that rows of zeros are added.
        projects_embeddings: whether embeddings have a size of their own, `embedding_size`, and are projected.
        own_tensors: names behind the prefix that only this family has -> their shape in fields of config.json.
        own_tensors_if: the field of config.json that says whether the model has `own_tensors`.
        structures: where its tensors are. The first one has the names of its class; a further one those under which
            transformers stores them.
        positions: ABSOLUTE for a table, ROTARY, or STATED for what `position_embedding_type` of config.json says.
        defaults: fields of its config class that a config.json may leave out, where the tensors depend on them.
        requires: fields of config.json -> the only value that is computed.
        unread: fields of the models' own code, which transformers' class does not read -> the value that it computes.
        local: which layers attend to a band of tokens only; None for a family without such layers.
    """

    name: str
    classes: str
    prefix: str
    reserves: bool
    tied: Mapping[str, str]
    marks: Mapping[str, str] = field(default_factory=dict)
    stated_as: tuple[str, ...] = ()
    chooses_norms: bool = False
    written_as: str = ""
    encoder_names: Renames = ()
    head_names: Renames = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    own_fields: tuple[str, ...] = ()
    head_classes: Mapping[str, str] | None = None
    lacks_token_types: bool = False
    projects_embeddings: bool = False
    own_tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own_tensors_if: str = ""
    structures: tuple[Structure, ...] = (BERT,)
    positions: str = ABSOLUTE
    defaults: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    unread: Mapping[str, Any] = field(default_factory=dict)
    local: LocalLayers | None = None

    def config(self, config: Mapping[str, object]) -> dict[str, object]:
        """The config.json for the written names."""
        written = {self.fields.get(key, key): value for key, value in config.items() if key not in self.own_fields}
        written |= {"model_type": written.get("model_type") or self.name, **self.constants}
        if self.head_classes is not None and (names := class_names(config)):
            written["architectures"] = [self.head_classes.get(name, self.encoder_class) for name in names]
        return written

    @property
    def encoder_class(self) -> str:
        """The transformers class of the encoder that is written."""
        return f"{FAMILIES[self.written_as or self.name].classes}Model"

    def has_class(self, name: str) -> bool:
        """Whether a class of transformers is one of this family's."""
        return (
            re.fullmatch(rf"(TF|Flax)?{self.classes}(Model|PreTrainedModel|LMHeadModel|For[A-Z]\w*)", name) is not None
        )

    def is_marked(self, inner: Collection[str]) -> bool:
        """Whether names behind the prefix are such that only this family has them."""

        def has(pattern: str) -> bool:
            return any(re.fullmatch(pattern, name) for name in inner)

        return any(has(mark) and not (unless and has(unless)) for mark, unless in self.marks.items())

    @property
    def written_prefix(self) -> str:
        """The attribute that holds the encoder in what is written."""
        return FAMILIES[self.written_as or self.name].prefix

    def windows(self, config: Mapping[str, Any], layers: int) -> list[int | None]:
        """How many tokens to each side each layer attends to at most; None for a layer without such a bound."""
        return self.local.windows(config, layers) if self.local else [None] * layers

    def structure_of(self, inner: Collection[str]) -> Structure:
        """The structure that names behind the prefix are of; the class's own where they are of none."""
        return max(self.structures, key=lambda one: one.count_in(inner))

    def class_without_equal(self, config: Mapping[str, object]) -> str | None:
        """The class of config.json whose head `written_as` does not compute, None if there is none."""
        if self.head_classes is None:
            return None
        return next((name for name in class_names(config) if name not in self.head_classes), None)


# Found -> written, in every family: BERT's TensorFlow heritage, and NVIDIA's fused module of a product and its
# activation.
_EVERY_FAMILY: Renames = (
    (r"(.*LayerNorm)\.gamma", r"\1.weight"),
    (r"(.*LayerNorm)\.beta", r"\1.bias"),
    (r"(.*\b(?:intermediate|pooler|transform))\.dense_act\.(.*)", r"\1.dense.\2"),
)
_BERT_HEAD = {"cls.predictions.decoder.weight": f".{WORDS}", "cls.predictions.decoder.bias": "cls.predictions.bias"}
_ROBERTA_HEAD = {"lm_head.decoder.weight": f".{WORDS}", "lm_head.decoder.bias": "lm_head.bias"}
FAMILIES = {
    family.name: family
    for family in (
        Family("bert", "Bert", "bert", False, _BERT_HEAD),
        Family("roberta", "Roberta", "roberta", True, _ROBERTA_HEAD),
        Family("xlm-roberta", "XLMRoberta", "roberta", True, _ROBERTA_HEAD),
        Family("camembert", "Camembert", "roberta", True, _ROBERTA_HEAD),
        Family(
            "electra",
            "Electra",
            "electra",
            False,
            {"generator_lm_head.weight": f".{WORDS}"},
            marks={r"embeddings_project\..*": ""},
            structures=(ELECTRA,),
            projects_embeddings=True,
        ),
        Family(
            "ernie",
            "Ernie",
            "ernie",
            False,
            _BERT_HEAD,
            marks={r"embeddings\.task_type_embeddings\..*": ""},
            own_tensors={"embeddings.task_type_embeddings.weight": ("task_type_vocab_size", "hidden_size")},
            own_tensors_if="use_task_id",
        ),
        Family("data2vec-text", "Data2VecText", "data2vec_text", True, _ROBERTA_HEAD),
        Family(
            "distilbert",
            "DistilBert",
            "distilbert",
            False,
            _BERT_HEAD,
            marks={r"transformer\.layer\..*": ""},
            written_as="bert",
            encoder_names=(
                (r"embeddings\..*", r"\g<0>"),
                (r"transformer\.layer\.(\d+)\.attention\.q_lin\.(.*)", r"encoder.layer.\1.attention.self.query.\2"),
                (r"transformer\.layer\.(\d+)\.attention\.k_lin\.(.*)", r"encoder.layer.\1.attention.self.key.\2"),
                (r"transformer\.layer\.(\d+)\.attention\.v_lin\.(.*)", r"encoder.layer.\1.attention.self.value.\2"),
                (r"transformer\.layer\.(\d+)\.attention\.out_lin\.(.*)", r"encoder.layer.\1.attention.output.dense.\2"),
                (r"transformer\.layer\.(\d+)\.sa_layer_norm\.(.*)", r"encoder.layer.\1.attention.output.LayerNorm.\2"),
                (r"transformer\.layer\.(\d+)\.ffn\.lin1\.(.*)", r"encoder.layer.\1.intermediate.dense.\2"),
                (r"transformer\.layer\.(\d+)\.ffn\.lin2\.(.*)", r"encoder.layer.\1.output.dense.\2"),
                (r"transformer\.layer\.(\d+)\.output_layer_norm\.(.*)", r"encoder.layer.\1.output.LayerNorm.\2"),
            ),
            head_names=(
                (r"vocab_transform\.(.*)", r"cls.predictions.transform.dense.\1"),
                (r"vocab_layer_norm\.(.*)", r"cls.predictions.transform.LayerNorm.\1"),
                (r"vocab_projector\.weight", r"cls.predictions.decoder.weight"),
                (r"vocab_projector\.bias", r"cls.predictions.bias"),
            ),
            fields={
                "dim": "hidden_size",
                "n_layers": "num_hidden_layers",
                "n_heads": "num_attention_heads",
                "hidden_dim": "intermediate_size",
                "dropout": "hidden_dropout_prob",
                "attention_dropout": "attention_probs_dropout_prob",
                "activation": "hidden_act",
            },
            constants={"model_type": "bert", "layer_norm_eps": 1e-12, "type_vocab_size": 2},
            own_fields=("sinusoidal_pos_embds", "seq_classif_dropout", "qa_dropout", "tie_weights_", "output_past"),
            head_classes={
                "DistilBertModel": "BertModel",
                "DistilBertForMaskedLM": "BertForMaskedLM",
                "DistilBertForTokenClassification": "BertForTokenClassification",
                "DistilBertForQuestionAnswering": "BertForQuestionAnswering",
            },
            lacks_token_types=True,
        ),
        Family(
            "esm",
            "Esm",
            "esm",
            True,
            {"lm_head.decoder.weight": f".{WORDS}"},
            marks={r"encoder\.emb_layer_norm_after\..*": ""},
            structures=(ESM,),
            positions=STATED,
            defaults={"max_position_embeddings": 1026},
            requires={"is_folding_model": False},
        ),
        Family(
            "albert",
            "Albert",
            "albert",
            False,
            {"predictions.decoder.weight": f".{WORDS}", "predictions.decoder.bias": "predictions.bias"},
            marks={r"encoder\.albert_layer_groups\..*": ""},
            projects_embeddings=True,
            structures=(ALBERT,),
            defaults={"embedding_size": 128, "num_hidden_groups": 1},
            requires={"inner_group_num": 1},
        ),
        Family(
            "roberta-prelayernorm",
            "RobertaPreLayerNorm",
            "roberta_prelayernorm",
            True,
            _ROBERTA_HEAD,
            marks={r"encoder\.layer\.\d+\.intermediate\.LayerNorm\..*": ""},
            structures=(ROBERTA_PRE_NORM,),
        ),
        Family(
            "xlm-roberta-xl",
            "XLMRobertaXL",
            "roberta",
            True,
            _ROBERTA_HEAD,
            marks={r"encoder\.layer\.\d+\.attention\.self_attn_layer_norm\..*": ""},
            structures=(XLM_ROBERTA_XL,),
            defaults={"type_vocab_size": 1},
        ),
        Family(
            "gte",
            "Gte",
            "gte",
            False,
            {"lm_head.decoder.weight": f".{WORDS}"},
            marks={r"encoder\.layer\.\d+\.attention\.qkv_proj\..*": ""},
            structures=(GTE, GTE_STORED),
            positions=ROTARY,
            defaults={"type_vocab_size": 1},
            unread={"layer_norm_type": "layer_norm", "logn_attention_scale": False},
        ),
        Family(
            "nomic_bert",
            "NomicBert",
            "nomic_bert",
            False,
            _BERT_HEAD,
            marks={r"encoder\.layers\.\d+\.mlp\.fc11\..*": ""},
            structures=(NOMIC_BERT, NOMIC_BERT_STORED),
            positions=ROTARY,
            # Its config.json on the Hub names sizes as GPT-2 does; transformers reads none of them.
            defaults={
                "hidden_size": 768,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "intermediate_size": 3072,
                "max_position_embeddings": 2048,
                "vocab_size": 30528,
            },
            unread={
                "activation_function": "swiglu",
                "causal": False,
                "layer_norm_epsilon": 1e-12,
                "parallel_block": False,
                "prenorm": False,
                "rotary_emb_base": 1000,
                "rotary_emb_fraction": 1,
                "rotary_emb_interleaved": False,
                "rotary_emb_scale_base": None,
                "rotary_scaling_factor": None,
                "use_rms_norm": False,
            },
        ),
        Family(
            "jina_embeddings_v3",
            "JinaEmbeddingsV3",
            "roberta",
            True,
            _ROBERTA_HEAD,
            marks={r"encoder\.layers\.\d+\.mixer\.Wqkv\..*": ""},
            structures=(JINA, JINA_STORED),
            positions=ROTARY,
            defaults={"type_vocab_size": 1},
        ),
        Family(
            "modernbert",
            "ModernBert",
            "model",
            False,
            {"decoder.weight": ".embeddings.tok_embeddings.weight"},
            marks={r"layers\.\d+\.attn\.Wqkv\..*": ""},
            structures=(MODERNBERT,),
            positions=ROTARY,
            local=MODERNBERT_LOCAL,
        ),
        # Its names are those of decoders too, so only its model_type tells it.
        Family(
            "eurobert",
            "EuroBert",
            "model",
            False,
            {"lm_head.weight": ".embed_tokens.weight"},
            structures=(EUROBERT,),
            positions=ROTARY,
            defaults={"tie_word_embeddings": False},
            unread={"clf_pooling": "late"},  # transformers' field is classifier_pooling
        ),
        # DeepSpeed's own recipe (DeepSpeedExamples' bing_bert) and GENA-LM, as the class of `hf.prenorm_bert`.
        Family(
            "bsa_bert",
            "BsaBert",
            "bert",
            False,
            _BERT_HEAD,
            marks={
                r"encoder\.layer\.\d+\.(PreAttentionLayerNorm|pre_attention_ln)\..*": _POST_NORM,
                FREQUENCIES: re.escape(POSITIONS),
            },
            stated_as=("bert",),
            chooses_norms=True,
            positions=STATED,
            encoder_names=(
                (r"encoder\.layer\.(\d+)\.pre_attention_ln\.(.*)", r"encoder.layer.\1.PreAttentionLayerNorm.\2"),
                (r"encoder\.layer\.(\d+)\.post_attention_ln\.(.*)", r"encoder.layer.\1.PostAttentionLayerNorm.\2"),
                (r"encoder\.last_layer_ln\.(.*)", rf"{LAST_NORM}.\1"),
            ),
            constants={"model_type": "bsa_bert"},
            head_classes={
                f"{start}{head}": f"BsaBert{head}"
                for start in ("Bert", "BsaBert")
                for head in (
                    "Model",
                    "ForMaskedLM",
                    "ForPreTraining",
                    "ForQuestionAnswering",
                    "ForSequenceClassification",
                    "ForTokenClassification",
                )
            },
        ),
    )
}

# Buffers that a model makes for itself, after the encoder's prefix: they are left out.
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def family_list() -> str:
    """The names of the families, for messages."""
    return ", ".join(FAMILIES)


def class_names(config: Mapping[str, object]) -> list[str]:
    """`architectures` of a config.json. Raises FamilyError when it is not a list of names."""
    names = config.get("architectures")
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FamilyError("architectures: expected a list of names", found=repr(names), where="config.json")
    return names


def written_name(family: Family, prefix: str, name: str) -> str:
    """The name under which a source's tensor is written; `prefix` is the encoder's.

    What a wrapper put before the family's own prefix, such as Lightning's `model.` in `model.bert.`, is removed.
    """
    for found, written in _EVERY_FAMILY:
        name = re.sub(f"^{found}$", written, name)
    own, written_prefix = f"{family.prefix}.", f"{family.written_prefix}." if prefix else ""
    inner: str | None = name
    if prefix and name.startswith(prefix):
        inner = name.removeprefix(prefix)
    elif prefix:
        inner = None
        name = name.removeprefix(prefix.removesuffix(own) if prefix.endswith(f".{own}") else "")
    if inner is not None and (renamed := _renamed(inner, family.encoder_names)):
        return written_prefix + renamed
    if renamed := _renamed(name, family.head_names):
        return renamed
    return written_prefix + inner if prefix and inner is not None else name


def _renamed(name: str, table: Renames) -> str | None:
    return next((match.expand(written) for found, written in table if (match := re.fullmatch(found, name))), None)


def reserved_rows(family: Family, config: Mapping) -> int:
    """How many rows at the start of the position embeddings are not positions: `pad_token_id + 1`, or none."""
    if not family.reserves:
        return 0
    padding = config.get("pad_token_id", 1)
    if not isinstance(padding, int) or padding < 0:
        raise FamilyError(
            "expected pad_token_id, which says where positions start", found=repr(padding), where="config.json"
        )
    return padding + 1
