"""The spec of a state dict: which names a config.json implies, in which shapes; and what does not fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from bsa_export.bert.families import LAYER, LAYOUT, POSITIONS, TOKEN_TYPES, WORDS, Family, family_list, reserved_rows
from bsa_export.checkpoint.table import Tensor
from bsa_export.errors import FamilyError

FLOATS = ("F64", "F32", "F16", "BF16")
OTHER_MODEL = "is this config.json from the same model?"


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

    def raise_if_any(self, where: object) -> None:
        """Raises FamilyError that tells the first missing or mismatched name and counts the others."""
        hint = OTHER_MODEL
        if self.mismatched:
            (name, (expected, found)), *others = self.mismatched.items()
            more = f", and {len(others)} more do not fit" if others else ""
            if name.endswith(POSITIONS) and not others:
                hint = "if its length was changed before, state its rows as max_position_embeddings"
            raise FamilyError(
                f"{name}: expected {expected} from config.json", found=f"{found}{more}", where=where, hint=hint
            )
        if self.missing:
            some = ", ".join(self.missing[:3]) + (f" and {len(self.missing) - 3} more" if len(self.missing) > 3 else "")
            raise FamilyError(
                f"expected all tensors of a BERT family ({family_list()})", found=f"no {some}", where=where, hint=hint
            )


def read_sizes(config: Mapping[str, Any], where: object = "config.json") -> Sizes:
    """The sizes in a config.json (of BERT's field names), checked.

    Raises:
        FamilyError: one is missing or not a positive integer, the heads do not divide the hidden size, or config.json
            describes what block-sparse attention does not compute.
    """
    defaults = {
        "type_vocab_size": 2,
        "embedding_size": config.get("hidden_size"),
        "task_type_vocab_size": 3,
    }
    found = {field.name: config.get(field.name, defaults.get(field.name)) for field in fields(Sizes)}
    for name, value in found.items():
        least = 0 if name == "type_vocab_size" else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**40:
            raise FamilyError(
                f"{name}: expected a positive integer", found="none" if value is None else repr(value), where=where
            )
    sizes = Sizes(**found)
    if sizes.hidden_size % sizes.num_attention_heads:
        raise FamilyError(
            f"expected num_attention_heads that divides hidden_size {sizes.hidden_size}",
            found=sizes.num_attention_heads,
            where=where,
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise FamilyError(
            "expected absolute position embeddings",
            found=f"position_embedding_type {config['position_embedding_type']!r}",
            where=where,
        )
    if config.get("pre_layer_norm"):
        raise FamilyError("expected a layer norm after each sublayer, as in BERT", found="pre_layer_norm", where=where)
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise FamilyError("expected an encoder", found="is_decoder or add_cross_attention", where=where)
    return sizes


def dense_spec(family: Family, config: Mapping, prefix: str, where: object = "config.json") -> Spec:
    """The names and shapes of a dense encoder, as they are written, and of the masked-LM heads.

    Args:
        family: decides the heads.
        config: content of config.json in BERT's field names (`Family.config`).
        prefix: what stands before the encoder's names, such as `bert.`.
    """
    sizes = read_sizes(config, where)

    def shape(names):
        return tuple(getattr(sizes, name) for name in names)

    embedding, hidden = ("embedding_size",), ("hidden_size",)
    encoder = {
        WORDS: Entry(shape(("vocab_size", *embedding))),
        POSITIONS: Entry(shape(("max_position_embeddings", *embedding))),
        TOKEN_TYPES: Entry(shape(("type_vocab_size", *embedding)), required=sizes.type_vocab_size > 0),
        "embeddings.LayerNorm.weight": Entry(shape(embedding)),
        "embeddings.LayerNorm.bias": Entry(shape(embedding)),
        "embeddings.task_type_embeddings.weight": Entry(shape(("task_type_vocab_size", *hidden)), required=False),
        "pooler.dense.weight": Entry(shape(hidden * 2), required=False),
        "pooler.dense.bias": Entry(shape(hidden), required=False),
    }
    if sizes.embedding_size != sizes.hidden_size:
        encoder["embeddings_project.weight"] = Entry(shape(hidden + embedding))
        encoder["embeddings_project.bias"] = Entry(shape(hidden))
    for layer in range(sizes.num_hidden_layers):
        encoder |= {f"encoder.layer.{layer}.{name}": Entry(shape(sizes)) for name, sizes in LAYER.items()}
    head = {
        **{name: shape(("vocab_size", *embedding)) for name in family.tied if name.endswith(".weight")},
        **{name: shape(("vocab_size",)) for pair in family.tied.items() for name in pair if name.endswith(".bias")},
    }
    return {prefix + name: entry for name, entry in encoder.items()} | {
        name: Entry(size, required=False) for name, size in head.items()
    }


def sparse_spec(family: Family, config: Mapping, prefix: str, where: object = "config.json") -> Spec:
    """The names, shapes and dtypes that a converted folder's config.json implies: `dense_spec`, and a layout a layer."""
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


def longest_input(family: Family, config: Mapping) -> int:
    """The tokens that a model reads: its position rows without the reserved ones."""
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
