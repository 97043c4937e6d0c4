"""What a user chooses about a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bsa_export.converted.records import ChosenOptions


@dataclass(frozen=True)
class Options:
    """What a user chooses about a conversion; the defaults are those of the bare command.

    Attributes:
        max_length: tokens that the new model reads, a multiple of the block; None keeps the source's.
        mode: one of `sparsity.MODES`; None is `windowed`, or `custom` with a layout.
        block: side of a block in tokens; None is 64, or 32 or 16 where 64 does not divide the length.
        parameters: those of the mode's class, by name.
        section: the `sparse_attention` section of a DeepSpeed config instead of mode, block and parameters.
        layout: a file of custom layouts (`sparsity.layout_file.load_layouts`).
        seed: for random blocks.
        different_layout_per_layer: whether each layer draws its own random blocks.
        positions: one of `bert.positions.METHODS`.
        dtype: `keep`, or what floating tensors are rounded to: `fp32`, `fp16` or `bf16`.
    """

    max_length: int | None = None
    mode: str | None = None
    block: int | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    section: Mapping[str, object] | None = None
    layout: Path | None = None
    seed: int = 0
    different_layout_per_layer: bool = False
    positions: str = "tile"
    dtype: str = "keep"

    @property
    def chooses_sparsity(self) -> bool:
        """Whether anything that decides layouts was given."""
        given = (self.mode, self.block, self.section, self.layout)
        return any(value is not None for value in given) or bool(self.parameters) or self.different_layout_per_layer

    def recorded(self) -> ChosenOptions:
        """What conversion.json keeps of them: of a layout file its name."""
        return ChosenOptions(**asdict(self) | {"layout": self.layout and self.layout.name})


BARE = Options()
