"""What a checkpoint of a BERT family is, found once: family, names, sizes, reserved rows, longest input."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bsa_export.bert.expected_tensors import (
    Sizes,
    Spec,
    default_sizes,
    dense_spec,
    has_position_table,
    layer_count,
    longest_input,
    read_sizes,
    sparse_spec,
)
from bsa_export.bert.families import BUFFERS, FREQUENCIES, ROTARY, Family, reserved_rows, written_name
from bsa_export.bert.implied import implied_norms_and_positions, implied_vocabulary
from bsa_export.bert.other_models import in_encoder
from bsa_export.bert.positions import rotary_scalings
from bsa_export.bert.recognition import encoder_prefix, encoder_prefixes, find_family, refuse_other_type
from bsa_export.bert.structure import POSITIONS, STORED_LAYOUT, Structure
from bsa_export.checkpoint.foreign import recognise
from bsa_export.checkpoint.table import Tensor
from bsa_export.errors import FamilyError


@dataclass(frozen=True)
class Encoder:
    """The encoder of a checkpoint.

    Attributes:
        family: what the checkpoint is; what is written may have the names of another (`Family.written_as`).
        prefix: what stands before the encoder's names in the checkpoint, such as `bert.`; empty for a model without a
            head.
        config: content of config.json in the field names that are written.
        sizes: the checked sizes of config.json.
        reserved: position rows in front that are not positions.
        structure: where its tensors are, by their written names.
        implied: fields of `config` that the tensors or the config class decide: those that config.json leaves out, and
            a padded vocabulary.
        other_prefixes: those of further encoders in the checkpoint, which are not meant.
    """

    family: Family
    prefix: str
    config: Mapping[str, Any]
    sizes: Sizes
    reserved: int
    structure: Structure
    implied: Mapping[str, Any] = field(default_factory=dict)
    other_prefixes: tuple[str, ...] = ()

    @classmethod
    def find(
        cls,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        where: object = "config.json",
        prefix: str | None = None,
    ) -> Encoder:
        """Finds out what a checkpoint is. Of its tensors, rotary frequencies are read.

        Args:
            tensors: the table of the checkpoint.
            config: content of its config.json.
            where: that file, for messages.
            prefix: which encoder is meant, where there are several.

        Raises:
            FamilyError: it is not of a BERT family, or config.json lacks what has to be known.
        """
        refuse_other_type(config)  # before the tensors: what they look like says less
        prefixes = encoder_prefixes(tensors)
        if not prefixes and (foreign := recognise(tensors)):
            raise FamilyError("expected the plain weights of a BERT family", found=foreign.what, hint=foreign.hint)
        prefix = encoder_prefix(tensors, prefix)
        positions = tensors.get(f"{prefix}{POSITIONS}")
        rows = positions.shape[0] if positions is not None and positions.shape else None
        family = find_family(config, tensors, rows, prefix)
        written = family.config(config)
        inner = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        structure = family.structure_of(inner)
        implied = implied_vocabulary(tensors, prefix + structure.words, written)
        implied = default_sizes(family, written) | implied
        sizes = read_sizes(family, written | implied, where)
        if family.chooses_norms:
            implied |= implied_norms_and_positions(family, tensors, prefix, written, sizes)
        implied = {name: value for name, value in implied.items() if written.get(name) != value}
        written |= implied
        others = tuple(other for other in prefixes if other != prefix)
        reserved = reserved_rows(family, written)
        encoder = cls(family, prefix, written, sizes, reserved, structure, implied, others)
        encoder.family.windows(written, encoder.layers)  # refuses fields that cannot be
        if family.positions == ROTARY:
            rotary_scalings(written)  # the same
        if encoder.longest < 1:
            rows = encoder.sizes.max_position_embeddings
            raise FamilyError(
                f"max_position_embeddings: expected more than the {encoder.reserved} reserved rows",
                found=rows,
                where=where,
            )
        return encoder

    @property
    def layers(self) -> int:
        """How many layers have weights of their own, and so a layout."""
        return layer_count(self.family, self.sizes, self.structure)

    @property
    def heads(self) -> int:
        return self.sizes.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.sizes.head_dim

    @property
    def longest(self) -> int:
        """Tokens that the model reads: its position rows without the reserved ones."""
        return longest_input(self.family, self.config)

    @property
    def written_prefix(self) -> str:
        """The encoder's prefix in what is written: the family's own, whatever a wrapper made of it."""
        return f"{self.family.written_prefix}." if self.prefix else ""

    @property
    def windows(self) -> list[int | None]:
        """How many tokens to each side each layer attends to at most; None for a layer without such a bound."""
        return self.family.windows(self.config, self.layers)

    @property
    def position_name(self) -> str | None:
        """The written name of the position embeddings; None with rotary positions."""
        return f"{self.written_prefix}{POSITIONS}" if has_position_table(self.family, self.config) else None

    def written_name(self, name: str) -> str:
        """The name under which a tensor of the checkpoint is written."""
        return written_name(self.family, self.prefix, name)

    def layout_name(self, layer: int) -> str:
        """The written name of a layer's layout."""
        return self.written_prefix + self.structure.layout_name(layer)

    def projection_names(self, layer: int) -> list[str]:
        """The written names of a layer's modules that make query, key and value; one, where they are fused."""
        path = f"{self.written_prefix}{self.structure.layer.format(layer)}"
        return [f"{path}.{module}" for module in self.structure.projections]

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is a buffer that the model makes itself."""
        return name.removeprefix(self.prefix) in BUFFERS or self.is_frequencies(name)

    def is_frequencies(self, name: str) -> bool:
        """Whether a tensor of the checkpoint holds the rotary frequencies of a layer."""
        inner = name.removeprefix(self.prefix)
        return self.family.chooses_norms and self.position_name is None and re.fullmatch(FREQUENCIES, inner) is not None

    def is_of_other(self, name: str) -> bool:
        """Whether a tensor of the checkpoint belongs to another encoder than the one that is meant."""
        matching = [
            prefix
            for prefix in (self.prefix, *self.other_prefixes)
            if (name.startswith(prefix) if prefix else self.is_inside(name))
        ]
        return bool(matching) and max(matching, key=len) != self.prefix

    def unused_names(self, written: Iterable[str]) -> list[str]:
        """The written names of the encoder that its class does not compute with: all but those of `dense_spec`."""
        spec, prefix = self.dense_spec(), self.written_prefix
        own = (name for name in written if (name.startswith(prefix) if prefix else self.is_inside(name)))
        return [name for name in own if name not in spec and not STORED_LAYOUT.fullmatch(name)]

    def is_inside(self, inner: str) -> bool:
        """Whether a name of a checkpoint without prefix is the encoder's."""
        return in_encoder(inner) or inner.partition(".")[0] in self.structure.tops()

    def dense_spec(self) -> Spec:
        """The written names and shapes of the dense encoder and of the masked-LM heads."""
        return dense_spec(self.family, self.config, self.written_prefix, self.structure)

    def sparse_spec(self) -> Spec:
        """`dense_spec` and a layout for each layer, as a converted folder's config.json implies them."""
        return sparse_spec(self.family, self.config, self.written_prefix, self.structure)
