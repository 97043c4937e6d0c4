"""The spec of a state dict: which names a config.json implies, in which shapes; and what does not fit it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from bsa_export.bert.families import (
    ABSOLUTE,
    ROTARY,
    STATED,
    Family,
    family_list,
    reserved_rows,
)
from bsa_export.bert.other_models import NORM_FIELDS, other_computation
from bsa_export.bert.structure import BERT, Shape, Structure
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
    num_hidden_groups: int
    num_key_value_heads: int
    head_dim: int

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def half_head_dim(self) -> int:
        return self.head_dim // 2

    def shape(self, fields: Shape) -> tuple[int, ...]:
        """A shape in fields of config.json, each a sum of products of names and numbers, in numbers."""

        def factor(name: str) -> int:
            return int(name) if name.isdigit() else getattr(self, name)

        def total(text: str) -> int:
            return sum(math.prod(map(factor, product.split(" * "))) for product in text.split(" + "))

        return tuple(map(total, fields))


@dataclass(frozen=True)
class Entry:
    """What is expected under a name: a shape (None for any), one of some dtypes, and whether the name may be absent."""

    shape: tuple[int, ...] | None
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
    stated = dict(family.defaults) | {name: value for name, value in config.items() if value is not None}
    hidden, heads = stated.get("hidden_size"), stated.get("num_attention_heads")
    whole = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
    defaults = {
        "type_vocab_size": 2,
        "embedding_size": hidden,
        "task_type_vocab_size": 3,
        "num_hidden_groups": 1,
        "num_key_value_heads": heads,
        "head_dim": max(hidden // heads, 1) if whole else None,  # type: ignore[operator]
    }
    if not family.projects_embeddings:
        stated["embedding_size"] = hidden
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
    if other := other_computation(config, _POSITIONS[family.positions], family.chooses_norms):
        name, what = other
        expected = "the computation of BERT: an encoder with absolute positions and a layer norm after each sublayer"
        if family.structures != (BERT,) or family.chooses_norms:
            expected = f"an encoder with {' or '.join(_POSITIONS[family.positions] or (ROTARY,))} positions"
        elif name in NORM_FIELDS:
            expected = "a config.json of this model, whose tensors have a layer norm after each sublayer"
        raise FamilyError(
            f"expected {expected}",
            found=f"{name}: {what}",
            where=where,
        )
    for name, only in family.requires.items():
        if stated.get(name, only) != only:
            raise FamilyError(f"{name}: expected {only}", found=repr(stated[name])[:80], where=where)
    for name, only in family.unread.items():
        if stated.get(name, only) != only:
            raise FamilyError(
                f"{name}: expected {'none' if only is None else only}, because {family.classes}Model does not read it",
                found=repr(stated[name])[:80],
                where=where,
                hint="take it out of config.json if that class computes the model nevertheless",
            )
    if sizes.num_attention_heads % sizes.num_key_value_heads:
        raise FamilyError(
            f"expected num_key_value_heads that divides num_attention_heads {sizes.num_attention_heads}",
            found=sizes.num_key_value_heads,
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


# Positions of a family -> what `position_embedding_type` of config.json may be. A rotary family's class never reads it,
# and ModernBERT's config.json says `absolute`.
_POSITIONS = {ABSOLUTE: ("absolute",), ROTARY: (), STATED: ("absolute", "rotary")}


def dense_spec(
    family: Family, config: Mapping, prefix: str, structure: Structure | None = None, where: object = "config.json"
) -> Spec:
    """The names and shapes of a dense encoder, as they are written, and of the masked-LM heads.

    Args:
        family: decides the structure and the heads.
        config: content of config.json in BERT's field names (`Family.config`).
        prefix: what stands before the encoder's names, such as `bert.`.
        structure: one of the family's; the first unless given.
    """
    structure = structure or family.structures[0]
    sizes = read_sizes(family, config, where)
    stated = {name: value for name, value in config.items() if value is not None}
    facts = (
        dict(family.defaults)
        | stated
        | {
            "position_table": has_position_table(family, config),
            "projected_embeddings": sizes.embedding_size != sizes.hidden_size,
        }
    )
    encoder: Spec = {}

    def add(name: str, shape: Shape, required: bool = True) -> None:
        numbers = sizes.shape(shape) if shape else None
        encoder[name] = Entry(numbers, required=required and 0 not in (numbers or ()))

    for module, part in structure.outside.items():
        for name, shape in part.tensors(module, facts):
            add(name, shape, part.required)
    if config.get(family.own_tensors_if):
        for name, shape in family.own_tensors.items():
            add(name, shape)
    for layer in range(layer_count(family, sizes, structure)):
        for module, part in structure.inside.items():
            if layer >= part.first:
                for name, shape in part.tensors(f"{structure.layer.format(layer)}.{module}", facts):
                    add(name, shape, part.required)
    words = sizes.shape(("vocab_size", "embedding_size"))
    head = {
        **{name: words for name in family.tied if name.endswith(".weight")},
        **{name: words[:1] for pair in family.tied.items() for name in pair if name.endswith(".bias")},
    }
    return {prefix + name: entry for name, entry in encoder.items()} | {
        name: Entry(size, required=False) for name, size in head.items()
    }


def layer_count(family: Family, sizes: Sizes, structure: Structure | None = None) -> int:
    """How many layers have weights of their own, and so a layout."""
    return int(getattr(sizes, (structure or family.structures[0]).layers))


def sparse_spec(
    family: Family, config: Mapping, prefix: str, structure: Structure | None = None, where: object = "config.json"
) -> Spec:
    """The names, shapes and dtypes that a converted folder's config.json implies: `dense_spec` and the layouts."""
    structure = structure or family.structures[0]
    section = config.get("sparse_attention")
    block = section.get("block") if isinstance(section, dict) else None
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise FamilyError("expected a sparse_attention section with a block", found=repr(section)[:80], where=where)
    spec = dense_spec(family, config, prefix, structure, where)
    heads, longest = config["num_attention_heads"], longest_input(family, config)
    if longest % block:
        raise FamilyError(f"expected a longest input of whole blocks of {block} tokens", found=longest, where=where)
    layout = Entry((heads, longest // block, longest // block), ("U8",))
    layers = layer_count(family, read_sizes(family, config, where), structure)
    return spec | {prefix + structure.layout_name(layer): layout for layer in range(layers)}


def default_sizes(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that config.json leaves out and the family's config class has a default for."""
    names = [entry.name for entry in fields(Sizes)]
    return {name: value for name, value in family.defaults.items() if name in names and config.get(name) is None}


def has_position_table(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether positions are embeddings, and not rotary."""
    if family.positions == STATED:
        return config.get("position_embedding_type") != "rotary"
    return family.positions == ABSOLUTE


def longest_input(family: Family, config: Mapping) -> int:
    """The tokens that a model reads: its position rows without the reserved ones.

    A rotary model has no rows; the field counts them nevertheless where the family reserves some.
    """
    longest = config.get("max_position_embeddings", family.defaults.get("max_position_embeddings"))
    return int(longest) - reserved_rows(family, config)


def compare(tensors: Mapping[str, Tensor], spec: Spec) -> Misfits:
    """What of a table does not fit a spec, all of it at once."""
    mismatched = {}
    for name, row in tensors.items():
        entry = spec.get(name)
        if entry is None:
            continue
        if entry.shape is not None and row.shape != entry.shape:
            mismatched[name] = (str(list(entry.shape)), str(list(row.shape)))
        elif row.dtype not in entry.dtypes:
            mismatched[name] = (" or ".join(entry.dtypes), row.dtype)
    return Misfits(
        missing=[name for name, entry in spec.items() if entry.required and name not in tensors],
        mismatched=mismatched,
        unexpected=[name for name in tensors if name not in spec],
    )
