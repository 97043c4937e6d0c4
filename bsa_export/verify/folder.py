"""The folder to verify, opened: its table, config.json and conversion.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bsa_export.checkpoint.folder import CONVERSION_RECORD
from bsa_export.checkpoint.source import open_checkpoint
from bsa_export.checkpoint.table import Checkpoint, Tensor
from bsa_export.errors import CheckpointError, FamilyError, SparsityError
from bsa_export.families import FAMILIES, LAYOUT, Family, encoder_prefix, find_family, read_config
from bsa_export.sparsity import MODES, SparsityConfig, sparsity_config, sparsity_config_from_class_path
from bsa_export.state_dict import longest_input, model_fields

# What conversion.json holds and a check reads.
_RECORD = {
    "family": str, "source": dict, "options": dict, "seed": int, "source_length": int, "max_length": int, "sparsity": dict,
    "density": float | int, "renamed": dict, "changed": dict, "added": list, "dropped": dict, "tied": dict,
    "positions": dict | None, "files": dict,
}  # fmt: skip


@dataclass(frozen=True)
class ConvertedFolder:
    """A converted folder whose header, config.json and conversion.json can be read.

    Attributes:
        path: the folder.
        checkpoint: its weights as a table.
        config: content of config.json.
        record: content of conversion.json, None where there is none (a model that was trained on and saved).
        family: by config.json; that of the source is `record["family"]`.
        prefix: what stands before the encoder's names.
        sparsity: the sparsity config that config.json describes.
    """

    path: Path
    checkpoint: Checkpoint
    config: dict
    record: dict | None
    family: Family
    prefix: str
    sparsity: SparsityConfig

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.checkpoint.tensors

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def heads(self) -> int:
        return self.config["num_attention_heads"]

    @property
    def block(self) -> int:
        return self.sparsity.block

    @property
    def longest(self) -> int:
        """Tokens that the model reads."""
        return longest_input(self.family, self.config)

    @property
    def source_length(self) -> int:
        """Tokens that the source read, as far as is known."""
        return min(self.record["source_length"], self.longest) if self.record else self.longest

    @property
    def not_finite(self) -> dict[str, str]:
        """The tensors that the conversion found to hold no numbers: name -> `NaN` or `infinite`."""
        return (self.record or {}).get("not_finite") or {}

    def layout_name(self, layer: int) -> str:
        """The name of a layer's stored layout."""
        return self.prefix + LAYOUT.format(layer)


def open_folder(path: Path) -> ConvertedFolder:
    """Opens a converted folder. No tensor is read.

    Raises:
        BsaError: it is no converted folder, or a file that tells what is in it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            "expected a converted folder", found="a file" if path.exists() else "nothing of that name", where=path
        )
    config = read_config(path / "config.json")
    if not isinstance(config.get("sparse_attention"), dict):
        raise CheckpointError(
            "expected a converted folder, whose config.json has a sparse_attention section",
            found="none",
            where=path / "config.json",
            hint="bsa-convert makes one",
        )
    checkpoint = open_checkpoint(path)
    if other := [file.name for file in checkpoint.files if file.suffix != ".safetensors"]:
        raise CheckpointError("expected safetensors", found=", ".join(other[:3]), where=path)
    family = find_family(config, checkpoint.tensors)
    if model_fields(config, path / "config.json")["num_hidden_layers"] > len(checkpoint.tensors):
        raise FamilyError(
            "num_hidden_layers: expected fewer than there are tensors",
            found=config["num_hidden_layers"],
            where=path / "config.json",
        )
    longest_input(family, config)
    section, heads = config["sparse_attention"], config["num_attention_heads"]
    if config.get("sparse_config_cls"):
        sparsity = sparsity_config_from_class_path(config["sparse_config_cls"], section, heads)
    else:
        sparsity = sparsity_config(section, heads)
    record = read_record(path / CONVERSION_RECORD)
    return ConvertedFolder(path, checkpoint, config, record, family, encoder_prefix(checkpoint.tensors), sparsity)


def read_record(path: Path) -> dict | None:
    """The content of a conversion.json, None where there is no such file.

    Raises:
        CheckpointError: it is none that bsa-convert wrote.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("no object")
        for name, kind in _RECORD.items():
            if name not in record or not isinstance(record[name], kind):
                raise ValueError(f"{name} is not what it should be")
        if record["family"] not in FAMILIES or not isinstance(record["source"].get("config"), dict):
            raise ValueError("it tells no family or no config.json of the source")
        for name, file in record["files"].items():
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts or not isinstance(file, Mapping):
                raise ValueError(f"files: {name!r}")
            if not isinstance(file.get("bytes"), int) or any(
                not isinstance(file.get(digest), str | None) for digest in ("sha256", "checksum")
            ):
                raise ValueError(f"files: {name!r}")
        for name in ("renamed", "changed", "dropped", "tied"):
            if not all(isinstance(value, str) for value in record[name].values()):
                raise ValueError(f"{name} is not what it should be")
        for name in ("dtype", "positions"):
            if not isinstance(record["options"].get(name), str | None):
                raise ValueError(f"options: {name}")
        if not isinstance(record.get("not_finite", {}), dict):
            raise ValueError("not_finite is not what it should be")
        if record["positions"] is not None:
            for name in ("reserved", "source_rows", "rows"):
                if not isinstance(record["positions"].get(name), int):
                    raise ValueError(f"positions: {name}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"it cannot be read ({error})", where=path, hint="convert again with bsa-convert"
        ) from None
    return record


def recorded_sparsity(record: Mapping, heads: int) -> SparsityConfig:
    """The sparsity config that conversion.json describes.

    Raises:
        SparsityError: it describes none.
    """
    section = record["sparsity"]
    if section.get("mode") not in list(MODES):
        raise SparsityError(
            f"expected one of {', '.join(MODES)}", found=section.get("mode"), where="conversion.json: sparsity"
        )
    return MODES[section["mode"]](num_heads=heads, **_parameters(section))


def _parameters(section: Mapping) -> dict:
    names = MODES[section["mode"]].parameter_names()
    if unknown := [name for name in section if name not in names and name != "mode"]:
        raise SparsityError("expected parameters of its mode", found=unknown[0], where="conversion.json: sparsity")
    return {name: value for name, value in section.items() if name not in ("mode", "num_heads")}
