"""The config.json of a checkpoint, or what older code wrote instead of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bsa_export.errors import FamilyError
from bsa_export.files import read_json

OLD_CONFIG = "bert_config.json"
_VOCABULARY = "vocab_size_or_config_json_file"  # the vocab_size of pytorch-pretrained-bert


def find_config(folder: Path) -> Path:
    """The config.json of a folder, or the bert_config.json that code before transformers wrote."""
    path, old = folder / "config.json", folder / OLD_CONFIG
    return old if old.is_file() and not path.exists() else path


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json. Raises FamilyError when it is not a JSON object.

    The training config of DeepSpeed's recipe has it as `bert_model_config`. The recipe overwrites the vocab_size there
    with that of its tokenizer, so it is left out: the tensors decide.
    """
    try:
        config = read_json(path, error=FamilyError)
    except FileNotFoundError:
        raise FamilyError(
            "expected the model's config.json (the number of attention heads cannot be read from weights)",
            found="none",
            where=path,
            hint="name it with --config",
        ) from None
    if not isinstance(config, dict):
        raise FamilyError("expected a JSON object", found=type(config).__name__, where=path)
    if isinstance(inner := config.get("bert_model_config"), dict):
        return {name: value for name, value in inner.items() if name not in ("vocab_size", _VOCABULARY)}
    if isinstance(config.get(_VOCABULARY), int) and "vocab_size" not in config:
        return {"vocab_size" if name == _VOCABULARY else name: value for name, value in config.items()}
    return config
