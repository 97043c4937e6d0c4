"""What a user chooses about a conversion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bsa_export.converted.records import ChosenOptions


@dataclass(frozen=True)
class Options:
    """What a user chooses about a conversion; the defaults are those of the bare command.

    Attributes:
        max_length: tokens that the new model reads, a multiple of the block; None is 8 times the source's length, or
            that length itself from 4,096 tokens on, rounded up to whole blocks.
        mode: one of `sparsity.MODES`; None is `windowed`, or `custom` with a layout.
        window: tokens of a window of the modes `windowed` and `local`; None is the source's length in `windowed`, and
            what `parameters` say in `local`.
        block: side of a block in tokens; None is 64, or 32 or 16 where 64 does not divide the length.
        parameters: those of the mode's class, by name.
        section: the `sparse_attention` section of a DeepSpeed config instead of mode, block and parameters.
        layout: a file of custom layouts (`sparsity.layout_file.load_layouts`).
        seed: for random blocks.
        different_layout_per_layer: whether each layer draws its own random blocks.
        positions: one of `bert.positions.METHODS`.
        dtype: `keep`, or what floating tensors are rounded to: `fp32`, `fp16` or `bf16`.
        prefix: the prefix of the encoder that is meant, where a checkpoint holds several.
        ignore_tensors: patterns of the source's names, as in a shell; the tensors are left out.
    """

    max_length: int | None = None
    mode: str | None = None
    window: int | None = None
    block: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    section: Mapping[str, Any] | None = None
    layout: Path | None = None
    seed: int = 0
    different_layout_per_layer: bool = False
    positions: str = "tile"
    dtype: str = "keep"
    prefix: str | None = None
    ignore_tensors: Sequence[str] = ()

    @property
    def chooses_sparsity(self) -> bool:
        """Whether anything that decides layouts was given."""
        given = (self.mode, self.window, self.block, self.section, self.layout)
        return any(value is not None for value in given) or bool(self.parameters) or self.different_layout_per_layer

    def recorded(self) -> ChosenOptions:
        """The options as conversion.json records them; a layout file by its name."""
        own = {"layout": self.layout and self.layout.name, "ignore_tensors": list(self.ignore_tensors)}
        return ChosenOptions(**asdict(self) | own)


BARE = Options()

_DTYPES = {
    "keep": ("keep",),
    "fp32": ("fp32", "float32", "f32", "float", "single"),
    "fp16": ("fp16", "float16", "f16", "half"),
    "bf16": ("bf16", "bfloat16"),
}


def parse_length(text: str | int) -> int:
    """A number of tokens as people write it: `4096`, `4,096`, `4k` (1024 tokens each). Raises ValueError."""
    match = re.fullmatch(r"(\d+|\d{1,3}(?:[,_]\d{3})+)\s*(k?)", str(text).strip(), re.IGNORECASE | re.ASCII)
    length = int(re.sub("[,_]", "", match[1])) * (1024 if match[2] else 1) if match and len(match[1]) < 20 else 0
    if length < 1:
        raise ValueError(f"expected a number of tokens such as 4096, 4,096 or 4k, found {str(text)[:80]!r}")
    return length


def parse_dtype(text: object) -> str:
    """`keep`, `fp32`, `fp16` or `bf16` for any usual spelling of it, such as `float16`. Raises ValueError."""
    wanted = str(text).strip().lower().removeprefix("torch.")
    for name, spellings in _DTYPES.items():
        if wanted in spellings:
            return name
    raise ValueError(f"expected one of {', '.join(_DTYPES)}, found {str(text)[:80]!r}")
