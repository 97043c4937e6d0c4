"""Why a checkpoint cannot be converted: the first tensor that does not fit, and the likeliest cause."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from bsa_export.bert.encoder import Encoder
from bsa_export.bert.expected_tensors import FLOATS, Misfits, Sizes, compare, dense_spec
from bsa_export.bert.families import family_list
from bsa_export.bert.other_models import describe_tensor
from bsa_export.bert.structure import POSITIONS, TOKEN_TYPES
from bsa_export.checkpoint.foreign import recognise
from bsa_export.checkpoint.table import Tensor
from bsa_export.errors import FamilyError
from bsa_export.text import some


def refuse_misfits(
    written: Mapping[str, Tensor],
    encoder: Encoder,
    source: Mapping[str, Tensor],
    ignored: Iterable[str] = (),
    where: object = None,
) -> None:
    """Raises FamilyError unless the encoder's tensors are exactly those that its class computes with.

    Args:
        written: the tensors by their written names.
        encoder: what the checkpoint is.
        source: the tensors by the names of the file.
        ignored: names of the file that the user leaves out.
        where: the source, for messages.
    """
    misfits = compare(written, encoder.dense_spec())
    unused = encoder.unused_names(written)
    more_layers = [name for name in unused if _is_of_more_layers(encoder, name)]
    if not (misfits.missing or misfits.mismatched or unused):
        return
    for name in ignored:
        if (new := encoder.written_name(name)) in misfits.missing:
            raise FamilyError(f"{name} cannot be left out: the model computes with {new}", where="--ignore-tensors")
    if foreign := recognise(source):
        raise FamilyError(
            f"expected the plain weights of a BERT family ({family_list()})",
            found=foreign.what,
            where=where,
            hint=foreign.hint,
        )
    others = [name for name in unused if name not in more_layers]
    known = next((name for name in others if _appearance(encoder, name)), None)
    fits = not (misfits.missing or misfits.mismatched)
    if known and not more_layers:
        _refuse_unused(encoder, others, known, where, _what_to_do(encoder, known) if fits else None)
    cause = _likely_cause(written, encoder, misfits)
    if cause is None and misfits.missing and others:
        cause = f"it holds {some(others, 2)} instead, which {encoder.family.encoder_class} lacks"
    misfits.raise_if_any(where, cause)
    if more_layers:
        raise FamilyError(
            f"expected tensors of {encoder.layers} layers, which is num_hidden_layers of config.json",
            found=some(more_layers, 1),
            where=where,
            hint=cause,
        )
    _refuse_unused(encoder, others, others[0], where, _what_to_do(encoder, others[0]))


def _refuse_unused(encoder: Encoder, names: list[str], first: str, where: object, hint: str | None) -> None:
    looks = _appearance(encoder, first)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise FamilyError(
        f"expected only tensors that a model of a BERT family ({family_list()}) computes with",
        found=first
        + more
        + (f", which look like {looks}" if looks else f", which {encoder.family.encoder_class} lacks"),
        where=where,
        hint=hint,
    )


def _appearance(encoder: Encoder, name: str) -> str | None:
    return describe_tensor(name.removeprefix(encoder.written_prefix))


def _what_to_do(encoder: Encoder, name: str) -> str:
    if name.removeprefix(encoder.written_prefix) in encoder.family.own_tensors:
        return f'set "{encoder.family.own_tensors_if}": true in config.json if the model was trained with them'
    return "--ignore-tensors PATTERN leaves tensors out, and outputs then differ from the source's"


def _is_of_more_layers(encoder: Encoder, name: str) -> bool:
    place = encoder.structure.layer_of(name.removeprefix(encoder.written_prefix))
    if place is None:
        return False
    layer, inner = place
    return layer >= encoder.layers and inner.rpartition(".")[0] in encoder.structure.inside


def _likely_cause(written: Mapping[str, Tensor], encoder: Encoder, misfits: Misfits) -> str | None:
    """What most likely explains the misfits: config.json only where other sizes in it would explain them all."""
    if any(written[name].dtype not in FLOATS for name in misfits.mismatched):
        return "these look like quantized weights: convert those from before the quantization"
    sizes = _sizes_of(written, encoder)
    differing = {name: size for name, size in sizes.items() if size != encoder.config.get(name, size)}
    if differing and _fits(written, encoder, {**encoder.config, **sizes}):
        if list(differing) == ["max_position_embeddings"]:
            return "if its length was changed before, state its rows as max_position_embeddings"
        default = {name: " by default" for name in encoder.implied}
        stated = ", ".join(
            f"{name} {encoder.config.get(name)}{default.get(name, '')} but the tensors {size}"
            for name, size in differing.items()
        )
        return f"config.json has {stated}: is this config.json from the same model?"
    shapes = {name: row.shape for name, row in written.items() if name in misfits.mismatched}
    expected = encoder.dense_spec()
    if shapes and all(shape == (expected[name].shape or ())[::-1] for name, shape in shapes.items()):
        return "the weights are transposed, as TensorFlow stores them"
    if shapes and all(".attention." in name for name in shapes):
        return "heads of some layers look pruned: block-sparse attention needs the same heads in every layer"
    if shapes and all(
        len(shape) == 1 and math.prod(expected[name].shape or ()) == shape[0] for name, shape in shapes.items()
    ):
        return "the weights are flattened, as FSDP stores them"
    if misfits.missing and not shapes and not encoder.unused_names(written):
        return "the file holds only a part of the model"
    return None


def _sizes_of(written: Mapping[str, Tensor], encoder: Encoder) -> dict[str, int]:
    """The sizes that the shapes of the tensors imply, by the names of config.json."""
    prefix = encoder.written_prefix
    found: dict[str, int] = {}

    def size(field: str, name: str, axis: int) -> None:
        row = written.get(f"{prefix}{name}")
        if row is not None and len(row.shape) == 2:
            found[field] = row.shape[axis]

    layer = encoder.structure.layer.format(0)
    size("vocab_size", encoder.structure.words, 0)
    size("max_position_embeddings", POSITIONS, 0)
    size("type_vocab_size", TOKEN_TYPES, 0)
    for module, part in encoder.structure.inside.items():
        if part.shape in (("hidden_size", "hidden_size"), ("intermediate_size", "hidden_size")):
            size(part.shape[0], f"{layer}.{module}.weight", 0)  # the last product to the hidden size counts
    size("embedding_size" if encoder.family.projects_embeddings else "hidden_size", encoder.structure.words, 1)
    places = (encoder.structure.layer_of(name.removeprefix(prefix)) for name in written if name.startswith(prefix))
    numbers = {place[0] for place in places if place}
    if numbers and numbers == set(range(len(numbers))):
        found[encoder.structure.layers] = len(numbers)
    return {name: size for name, size in found.items() if name in {field.name for field in fields(Sizes)}}


def _fits(written: Mapping[str, Tensor], encoder: Encoder, config: Mapping[str, Any]) -> bool:
    try:
        found = compare(written, dense_spec(encoder.family, config, encoder.written_prefix, encoder.structure))
    except FamilyError:
        config = {**config, "num_attention_heads": 1}
        try:
            found = compare(written, dense_spec(encoder.family, config, encoder.written_prefix, encoder.structure))
        except FamilyError:
            return False
    return not (found.missing or found.mismatched)
