"""The BERT families: their names for the same tensors, their config.json, reserved position rows and tied weights.

Names and fields are those of Hugging Face transformers (5.23, and the older spellings that public checkpoints still
have). What is written has today's names of the family, DistilBERT's has BERT's: the tables point one way, found ->
written. Names that no table knows pass through as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from bsa_export.errors import FamilyError

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
# After `encoder.layer.N.`: what each layer of every family holds, and its shape in fields of config.json.
LAYER = {
    f"{part}.{kind}": shape if kind == "weight" else shape[:1]
    for part, shape in {
        "attention.self.query": ("hidden_size", "hidden_size"),
        "attention.self.key": ("hidden_size", "hidden_size"),
        "attention.self.value": ("hidden_size", "hidden_size"),
        "attention.output.dense": ("hidden_size", "hidden_size"),
        "attention.output.LayerNorm": ("hidden_size",),
        "intermediate.dense": ("intermediate_size", "hidden_size"),
        "output.dense": ("hidden_size", "intermediate_size"),
        "output.LayerNorm": ("hidden_size",),
    }.items()
    for kind in ("weight", "bias")
}
LAYOUT = "encoder.layer.{}.attention.self.sparse_self_attention.master_layout"


@dataclass(frozen=True)
class Family:
    """What sets one BERT family apart from the others.

    Attributes:
        name: `model_type` in config.json.
        classes: how the names of its classes in transformers begin.
        prefix: the attribute that holds the encoder in a model with a head, `bert` in `bert.embeddings...`.
        reserves: whether position rows up to that of the padding token are no positions (RoBERTa's fairseq heritage).
        tied: names of a head -> the name that they share their bytes with; one that starts with a dot is the encoder's.
    """

    name: str
    classes: str
    prefix: str
    reserves: bool
    tied: Mapping[str, str]


_BERT_HEAD = {"cls.predictions.decoder.weight": f".{WORDS}", "cls.predictions.decoder.bias": "cls.predictions.bias"}
_ROBERTA_HEAD = {"lm_head.decoder.weight": f".{WORDS}", "lm_head.decoder.bias": "lm_head.bias"}
FAMILIES = {
    family.name: family
    for family in (
        Family("bert", "Bert", "bert", False, _BERT_HEAD),
        Family("roberta", "Roberta", "roberta", True, _ROBERTA_HEAD),
        Family("xlm-roberta", "XLMRoberta", "roberta", True, _ROBERTA_HEAD),
        Family("camembert", "Camembert", "roberta", True, _ROBERTA_HEAD),
        Family("electra", "Electra", "electra", False, {"generator_lm_head.weight": f".{WORDS}"}),
        Family("ernie", "Ernie", "ernie", False, _BERT_HEAD),
        Family("data2vec-text", "Data2VecText", "data2vec_text", True, _ROBERTA_HEAD),
        Family("distilbert", "DistilBert", "distilbert", False, _BERT_HEAD),
    )
}

# Found -> written. The first table is BERT's TensorFlow heritage; the second is for names after the encoder's prefix.
_EVERY_FAMILY = (
    (r"(.*LayerNorm)\.gamma", r"\1.weight"),
    (r"(.*LayerNorm)\.beta", r"\1.bias"),
)
_DISTILBERT_ENCODER = (
    (r"embeddings\..*", r"\g<0>"),
    (r"transformer\.layer\.(\d+)\.attention\.q_lin\.(.*)", r"encoder.layer.\1.attention.self.query.\2"),
    (r"transformer\.layer\.(\d+)\.attention\.k_lin\.(.*)", r"encoder.layer.\1.attention.self.key.\2"),
    (r"transformer\.layer\.(\d+)\.attention\.v_lin\.(.*)", r"encoder.layer.\1.attention.self.value.\2"),
    (r"transformer\.layer\.(\d+)\.attention\.out_lin\.(.*)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"transformer\.layer\.(\d+)\.sa_layer_norm\.(.*)", r"encoder.layer.\1.attention.output.LayerNorm.\2"),
    (r"transformer\.layer\.(\d+)\.ffn\.lin1\.(.*)", r"encoder.layer.\1.intermediate.dense.\2"),
    (r"transformer\.layer\.(\d+)\.ffn\.lin2\.(.*)", r"encoder.layer.\1.output.dense.\2"),
    (r"transformer\.layer\.(\d+)\.output_layer_norm\.(.*)", r"encoder.layer.\1.output.LayerNorm.\2"),
)
_DISTILBERT_HEAD = (
    (r"vocab_transform\.(.*)", r"cls.predictions.transform.dense.\1"),
    (r"vocab_layer_norm\.(.*)", r"cls.predictions.transform.LayerNorm.\1"),
    (r"vocab_projector\.weight", r"cls.predictions.decoder.weight"),
    (r"vocab_projector\.bias", r"cls.predictions.bias"),
)

# Buffers that a model makes for itself, after the encoder's prefix: they are left out.
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
BUFFER = "a buffer that the model makes itself"
OTHER_BUFFER = f"{BUFFER}, with other values"

# DistilBERT's fields -> BERT's, and those of BERT that it has no field for.
_DISTILBERT_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "activation": "hidden_act",
}
_DISTILBERT_CONSTANTS = {"model_type": "bert", "layer_norm_eps": 1e-12, "type_vocab_size": 2}
_DISTILBERT_ONLY = ("sinusoidal_pos_embds", "seq_classif_dropout", "qa_dropout", "tie_weights_", "output_past")
# Heads whose computation BERT's class of that name repeats; the others run as an encoder alone.
_DISTILBERT_CLASSES = {
    "DistilBertModel": "BertModel",
    "DistilBertForMaskedLM": "BertForMaskedLM",
    "DistilBertForTokenClassification": "BertForTokenClassification",
    "DistilBertForQuestionAnswering": "BertForQuestionAnswering",
}


def family_list() -> str:
    """The names of the families, for messages."""
    return ", ".join(FAMILIES)


def read_config(path: Path) -> dict:
    """The content of a config.json. Raises FamilyError when it is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FamilyError(
            "expected the model's config.json (the number of attention heads cannot be read from weights)",
            found="none",
            where=path,
            hint="--config names it",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise FamilyError(f"expected JSON ({error})", where=path) from None
    if not isinstance(config, dict):
        raise FamilyError("expected a JSON object", found=type(config).__name__, where=path)
    return config


def encoder_prefix(names: Collection[str]) -> str:
    """What stands before `embeddings.word_embeddings.weight`, such as `bert.`; empty for a model without a head.

    Raises:
        FamilyError: no name or more than one ends so.
    """
    found = sorted(name.removesuffix(WORDS) for name in names if name == WORDS or name.endswith(f".{WORDS}"))
    if len(found) == 1:
        return found[0]
    if found:
        what = ", ".join(repr(prefix) for prefix in found)
        raise FamilyError("expected one encoder", found=f"{len(found)}, with the prefixes {what}")
    some = ", ".join(sorted(names)[:4])
    raise FamilyError(
        f"expected a checkpoint of a BERT family ({family_list()}), with a tensor ...{WORDS}",
        found=f"tensors such as {some}",
    )


def find_family(config: Mapping, names: Collection[str], position_rows: int | None = None) -> Family:
    """The family of a checkpoint: by `model_type`; without one by the class in `architectures`, or the names of its tensors.

    Args:
        config: content of config.json.
        names: those of the tensors.
        position_rows: of the position embeddings; without a prefix they tell RoBERTa (two more than a round number).

    Raises:
        FamilyError: it is of none of the families.
    """
    kind = config.get("model_type")
    if kind is not None:
        if isinstance(kind, str) and kind in FAMILIES:
            return FAMILIES[kind]
        raise FamilyError(
            f"expected a model_type of a BERT family ({family_list()})", found=repr(kind), where="config.json"
        )
    prefix = encoder_prefix(names)
    inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    by_prefix = next(
        (family for family in FAMILIES.values() if family.prefix == prefix.rstrip(".").rpartition(".")[2]), None
    )
    classes = str(next(iter(config.get("architectures") or ()), ""))
    by_class = next((family for family in FAMILIES.values() if classes.startswith(family.classes)), None)
    if by_prefix or by_class:
        family = by_prefix or by_class
    elif any(name.startswith("transformer.layer.") for name in inner):
        family = FAMILIES["distilbert"]
    elif any(name.startswith("embeddings_project.") for name in inner):
        family = FAMILIES["electra"]
    elif "embeddings.task_type_embeddings.weight" in inner:
        family = FAMILIES["ernie"]
    else:
        roberta = position_rows is not None and position_rows % 16 == 2 and config.get("pad_token_id") == 1
        family = FAMILIES["roberta" if roberta else "bert"]
    _refuse_other_encoders(inner, family)
    return family


def _refuse_other_encoders(inner: Collection[str], family: Family) -> None:
    """Raises FamilyError when layers hold what no BERT has: without a model_type the names alone must tell."""
    for name in inner:
        written = written_name(family, "", name)
        parts = written.split(".", 3)
        if parts[:2] != ["encoder", "layer"] or written.endswith(".master_layout") or parts[-1] in LAYER:
            continue
        raise FamilyError(
            f"expected the tensors of a BERT family ({family_list()})",
            found=name,
            hint="if it is one of them with more tensors, state its model_type in config.json",
        )


def written_prefix(family: Family, prefix: str) -> str:
    """The encoder's prefix in what is written: the family's own, whatever a wrapper made of it; DistilBERT's becomes BERT's."""
    if not prefix:
        return ""
    return "bert." if family.name == "distilbert" else f"{family.prefix}."


def written_name(family: Family, prefix: str, name: str) -> str:
    """The name under which a source's tensor is written; `prefix` is the encoder's.

    What a wrapper put before the family's own prefix, such as Lightning's `model.` in `model.bert.`, goes from every name.
    """
    for found, written in _EVERY_FAMILY:
        name = re.sub(f"^{found}$", written, name)
    own = f"{family.prefix}."
    if prefix and name.startswith(prefix):
        inner = name.removeprefix(prefix)
    else:
        inner = None if prefix else name
        name = name.removeprefix(prefix.removesuffix(own) if prefix.endswith(f".{own}") else "")
    for found, written in _DISTILBERT_ENCODER if family.name == "distilbert" and inner else ():
        if match := re.fullmatch(found, inner):
            return written_prefix(family, prefix) + match.expand(written)
    for found, written in _DISTILBERT_HEAD if family.name == "distilbert" else ():
        if match := re.fullmatch(found, name):
            return match.expand(written)
    return written_prefix(family, prefix) + inner if prefix and inner is not None else name


def reserved_rows(family: Family, config: Mapping) -> int:
    """How many rows at the start of the position embeddings are no positions: `pad_token_id + 1`, or none."""
    if not family.reserves:
        return 0
    padding = config.get("pad_token_id", 1)
    if not isinstance(padding, int) or padding < 0:
        raise FamilyError(
            "expected pad_token_id, which says where positions start", found=repr(padding), where="config.json"
        )
    return padding + 1


def bert_config(family: Family, config: Mapping) -> dict:
    """The config.json that goes with the written names: the source's own, DistilBERT's as BERT's."""
    if family.name != "distilbert":
        return {"model_type": family.name} | dict(config)
    written = {_DISTILBERT_FIELDS.get(key, key): value for key, value in config.items() if key not in _DISTILBERT_ONLY}
    written |= _DISTILBERT_CONSTANTS
    if names := config.get("architectures"):
        written["architectures"] = [_DISTILBERT_CLASSES.get(name, "BertModel") for name in names]
    return written


def lost_head(family: Family, config: Mapping) -> str | None:
    """The class of a source whose head has no equal among BERT's, so that only its encoder runs in transformers."""
    names = config.get("architectures") or ()
    if family.name != "distilbert":
        return None
    return next((name for name in names if name not in _DISTILBERT_CLASSES), None)
