"""A converted folder, opened: its table, config.json and conversion.json, and what model they describe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsa_export.bert.config_file import read_config
from bsa_export.bert.encoder import Encoder
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import Checkpoint, Tensor
from bsa_export.converted.names import CONFIG
from bsa_export.converted.records import ConversionRecord, read_conversion
from bsa_export.errors import CheckpointError, FamilyError, SparsityError
from bsa_export.sparsity.configs import MODES, SparsityConfig
from bsa_export.sparsity.sections import sparsity_config, sparsity_config_from_class_path


@dataclass(frozen=True)
class ConvertedFolder:
    """A converted folder whose header, config.json and conversion.json can be read.

    Attributes:
        path: the folder.
        checkpoint: its weights as a table.
        config: content of config.json.
        record: conversion.json, None where there is none (a model that was trained on and saved).
        encoder: what the model is, by config.json; the source's family is `record.family`.
        sparsity: the sparsity config that config.json describes.
    """

    path: Path
    checkpoint: Checkpoint
    config: dict[str, Any]
    record: ConversionRecord | None
    encoder: Encoder
    sparsity: SparsityConfig

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.checkpoint.tensors

    @property
    def prefix(self) -> str:
        """The prefix of the encoder's names."""
        return self.encoder.prefix

    @property
    def layers(self) -> int:
        return self.encoder.layers

    @property
    def heads(self) -> int:
        return self.encoder.heads

    @property
    def block(self) -> int:
        return self.sparsity.block

    @property
    def windows(self) -> list[int | None]:
        """How many tokens to each side each layer attends to at most; None for a layer without such a bound."""
        return self.encoder.windows

    @property
    def longest(self) -> int:
        """Tokens that the model reads."""
        return self.encoder.longest

    @property
    def source_length(self) -> int:
        """Tokens that the dense model read, as far as is known."""
        return min(self.record.origin.source_length, self.longest) if self.record else self.longest

    @property
    def not_finite(self) -> dict[str, str]:
        """The tensors that the conversion found to hold such values: name -> `NaN` or `infinite`."""
        return self.record.not_finite if self.record else {}

    def layout_name(self, layer: int) -> str:
        """The name of a layer's stored layout."""
        return self.encoder.layout_name(layer)


def open_folder(path: Path) -> ConvertedFolder:
    """Opens a converted folder. No tensor is read.

    Raises:
        BsaError: it is not a converted folder, or a file that says what is in it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            "expected a converted folder", found="a file" if path.exists() else "nothing of that name", where=path
        )
    config = read_config(path / CONFIG)
    if not isinstance(config.get("sparse_attention"), dict):
        raise CheckpointError(
            "expected a converted folder, whose config.json has a sparse_attention section",
            found="none",
            where=path / CONFIG,
            hint="bsa-convert makes one",
        )
    checkpoint = open_checkpoint(path)
    if other := [file.name for file in checkpoint.files if file.suffix != ".safetensors"]:
        raise CheckpointError("expected safetensors", found=", ".join(other[:3]), where=path)
    encoder = Encoder.find(checkpoint.tensors, config, path / CONFIG)
    if encoder.layers > len(checkpoint.tensors):
        raise FamilyError(
            "num_hidden_layers: expected fewer than there are tensors", found=encoder.layers, where=path / CONFIG
        )
    section = config["sparse_attention"]
    if config.get("sparse_config_cls"):
        sparsity = sparsity_config_from_class_path(config["sparse_config_cls"], section, encoder.heads)
    else:
        sparsity = sparsity_config(section, encoder.heads)
    return ConvertedFolder(path, checkpoint, config, read_conversion(path), encoder, sparsity)


def recorded_sparsity(record: ConversionRecord, heads: int) -> SparsityConfig:
    """The sparsity config that conversion.json describes.

    Raises:
        SparsityError: it describes none.
    """
    section = record.sparsity
    if section.get("mode") not in list(MODES):
        raise SparsityError(
            f"expected one of {', '.join(MODES)}", found=section.get("mode"), where="conversion.json: sparsity"
        )
    return MODES[section["mode"]](num_heads=heads, **_parameters(section))


def _parameters(section: dict[str, Any]) -> dict[str, Any]:
    names = MODES[section["mode"]].parameter_names()
    if unknown := [name for name in section if name not in names and name != "mode"]:
        raise SparsityError("expected parameters of its mode", found=unknown[0], where="conversion.json: sparsity")
    return {name: value for name, value in section.items() if name not in ("mode", "num_heads")}
