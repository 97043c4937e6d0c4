"""The spec of a state dict: which names a config.json implies, in which shapes; and what does not fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from bsa_export.bert.families import (
    LAST_NORM,
    LAYER,
    LAYOUT,
    POSITIONS,
    PRE_NORM_LAYER,
    TOKEN_TYPES,
    WORDS,
    Family,
    family_list,
    reserved_rows,
)
from bsa_export.bert.other_models import NORM_FIELDS, other_computation
from bsa_export.checkpoint.table import Tensor
from bsa_export.errors import FamilyError
from bsa_export.text import some

FLOATS = ("F64", "F32", "F16", "BF16")
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class Sizes:
    """The sizes in a config.json, with transformers' defaults for those that may be absent."""

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    embedding_size: int
    task_type_vocab_size: int


@dataclass(frozen=True)
class Entry:
    """What is expected under a name: a shape, one of some dtypes, and whether the name may be absent."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS
    required: bool = True


Spec = dict[str, Entry]


@dataclass(frozen=True)
class Misfits:
    """What `compare` found.

    Attributes:
        missing: required names that are not there.
        mismatched: name -> (expected, found), in words.
        unexpected: names that the spec does not have: heads, and what passes through.
    """

    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[str, str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    def raise_if_any(self, where: object, hint: str | None = None) -> None:
        """Raises FamilyError with the first mismatched or missing name and the number of the others."""
        if self.mismatched:
            (name, (expected, found)), *others = self.mismatched.items()
            more = f", and {len(others)} more do not fit" if others else ""
            raise FamilyError(
                f"{name}: expected {expected} from config.json", found=f"{found}{more}", where=where, hint=hint
            )
        if self.missing:
            raise FamilyError(
                f"expected all tensors of a BERT family ({family_list()})",
                found=f"no {some(self.missing)}",
                where=where,
                hint=hint,
            )


def read_sizes(family: Family, config: Mapping[str, Any], where: object = "config.json") -> Sizes:
    """The sizes in a config.json (of BERT's field names), checked.

    Args:
        family: decides what else may be computed.
        config: content of config.json in BERT's field names (`Family.config`).
        where: that file, for messages.

    Raises:
        FamilyError: one is missing or not a positive integer, the heads do not divide the hidden size, or config.json
            describes what block-sparse attention does not compute.
    """
    defaults = {
        "type_vocab_size": 2,
        "embedding_size": config.get("hidden_size"),
        "task_type_vocab_size": 3,
    }
    stated = {name: value for name, value in config.items() if value is not None}
    found: dict[str, int] = {}
    for name in (entry.name for entry in fields(Sizes)):
        value = stated.get(name, defaults.get(name))
        least = 0 if name == "type_vocab_size" else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**40:
            raise FamilyError(
                f"{name}: expected a positive integer", found="none" if value is None else repr(value), where=where
            )
        found[name] = value
    sizes = Sizes(**found)
    if sizes.hidden_size % sizes.num_attention_heads:
        raise FamilyError(
            f"expected num_attention_heads that divides hidden_size {sizes.hidden_size}",
            found=sizes.num_attention_heads,
            where=where,
        )
    if sizes.num_hidden_layers > MAX_LAYERS:
        raise FamilyError(
            f"num_hidden_layers: expected at most {MAX_LAYERS:,}", found=f"{sizes.num_hidden_layers:,}", where=where
        )
    if other := other_computation(config, family.chooses_norms):
        name, what = other
        expected = "the computation of BERT: an encoder with absolute positions and a layer norm after each sublayer"
        if family.chooses_norms:
            expected = "an encoder with absolute or rotary positions"
        elif name in NORM_FIELDS:
            expected = "a config.json of this model, whose tensors have a layer norm after each sublayer"
        raise FamilyError(
            f"expected {expected}",
            found=f"{name}: {what}",
            where=where,
        )
    if config.get("quantization_config"):
        raise FamilyError(
            "expected weights that are not quantized",
            found="quantization_config",
            where=where,
            hint="convert the weights from before the quantization",
        )
    return sizes


def dense_spec(family: Family, config: Mapping, prefix: str, where: object = "config.json") -> Spec:
    """The names and shapes of a dense encoder, as they are written, and of the masked-LM heads.

    Args:
        family: decides the heads.
        config: content of config.json in BERT's field names (`Family.config`).
        prefix: what stands before the encoder's names, such as `bert.`.
    """
    sizes = read_sizes(family, config, where)

    def shape(names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(getattr(sizes, name) for name in names)

    embedding, hidden = ("embedding_size" if family.projects_embeddings else "hidden_size",), ("hidden_size",)
    encoder = {
        WORDS: Entry(shape(("vocab_size", *embedding))),
        POSITIONS: Entry(shape(("max_position_embeddings", *embedding))),
        TOKEN_TYPES: Entry(shape(("type_vocab_size", *embedding)), required=sizes.type_vocab_size > 0),
        "embeddings.LayerNorm.weight": Entry(shape(embedding)),
        "embeddings.LayerNorm.bias": Entry(shape(embedding)),
    }
    if not family.lacks_pooler:
        encoder["pooler.dense.weight"] = Entry(shape(hidden * 2), required=False)
        encoder["pooler.dense.bias"] = Entry(shape(hidden), required=False)
    if config.get(family.own_tensors_if):
        encoder |= {name: Entry(shape(fields)) for name, fields in family.own_tensors.items()}
    if family.projects_embeddings and sizes.embedding_size != sizes.hidden_size:
        encoder["embeddings_project.weight"] = Entry(shape(hidden + embedding))
        encoder["embeddings_project.bias"] = Entry(shape(hidden))
    modules = PRE_NORM_LAYER if config.get("pre_layer_norm") else LAYER
    for layer in range(sizes.num_hidden_layers):
        encoder |= {f"encoder.layer.{layer}.{name}": Entry(shape(fields)) for name, fields in modules.items()}
    if config.get("last_layer_norm"):
        encoder |= {f"{LAST_NORM}.{kind}": Entry(shape(hidden)) for kind in ("weight", "bias")}
    if not has_position_table(config):
        del encoder[POSITIONS]
    head = {
        **{name: shape(("vocab_size", *embedding)) for name in family.tied if name.endswith(".weight")},
        **{name: shape(("vocab_size",)) for pair in family.tied.items() for name in pair if name.endswith(".bias")},
    }
    return {prefix + name: entry for name, entry in encoder.items()} | {
        name: Entry(size, required=False) for name, size in head.items()
    }


def sparse_spec(family: Family, config: Mapping, prefix: str, where: object = "config.json") -> Spec:
    """The names, shapes and dtypes that a converted folder's config.json implies: `dense_spec` and the layouts."""
    section = config.get("sparse_attention")
    block = section.get("block") if isinstance(section, dict) else None
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise FamilyError("expected a sparse_attention section with a block", found=repr(section)[:80], where=where)
    spec = dense_spec(family, config, prefix, where)
    heads, longest = config["num_attention_heads"], longest_input(family, config)
    if longest % block:
        raise FamilyError(f"expected a longest input of whole blocks of {block} tokens", found=longest, where=where)
    layout = Entry((heads, longest // block, longest // block), ("U8",))
    return spec | {prefix + LAYOUT.format(layer): layout for layer in range(config["num_hidden_layers"])}


def has_position_table(config: Mapping[str, Any]) -> bool:
    """Whether positions are embeddings, and not rotary."""
    return config.get("position_embedding_type") != "rotary"


def longest_input(family: Family, config: Mapping) -> int:
    """The tokens that a model reads: its position rows without the reserved ones. Rotary positions have no rows."""
    return config["max_position_embeddings"] - reserved_rows(family, config)


def compare(tensors: Mapping[str, Tensor], spec: Spec) -> Misfits:
    """What of a table does not fit a spec, all of it at once."""
    mismatched = {}
    for name, row in tensors.items():
        entry = spec.get(name)
        if entry is None:
            continue
        if row.shape != entry.shape:
            mismatched[name] = (str(list(entry.shape)), str(list(row.shape)))
        elif row.dtype not in entry.dtypes:
            mismatched[name] = (" or ".join(entry.dtypes), row.dtype)
    return Misfits(
        missing=[name for name, entry in spec.items() if entry.required and name not in tensors],
        mismatched=mismatched,
        unexpected=[name for name in tensors if name not in spec],
    )
