"""The card of a trained model that a person or another library wrote: kept, and completed from the records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bsa_export.converted.card import MAX_CARD_BYTES, metadata_of, tags_of
from bsa_export.converted.names import CARD
from bsa_export.converted.records import ConversionRecord, read_conversion
from bsa_export.errors import CheckpointError
from bsa_export.files import read_bytes
from bsa_export.text import markdown_code, printable
from bsa_export.version import PROJECT_URL, install_command

EMPTY_METADATA = re.compile(r"\A\s*---\n---\n")


def add_lineage(folder: Path) -> None:
    """Completes the kept card of a trained model: metadata that it lacks, and a section that names this package.

    Every word of the card and every value of its metadata stay. A base model that is a path, or the name of the
    conversion's folder, was written by Trainer, and is replaced. A card that is not UTF-8, or whose metadata cannot be
    read, stays as it is.

    Args:
        folder: the converted folder, with conversion.json and README.md.
    """
    folder = Path(folder)
    record = read_conversion(folder)
    assert record is not None
    try:
        text = read_bytes(folder / CARD, MAX_CARD_BYTES).decode("utf-8-sig").replace("\r\n", "\n")
        stated = metadata_of(text, folder / CARD)
    except (CheckpointError, UnicodeDecodeError):
        return
    from huggingface_hub import repocard

    rest = EMPTY_METADATA.sub("", repocard.REGEX_YAML_BLOCK.sub("", text, count=1))
    section = "" if "bsa_export" in rest else f"\n\n{_lineage_section(record)}"
    block = _completed(stated.to_dict(), record)
    (folder / CARD).write_text(f"---\n{block}\n---\n{rest.rstrip()}{section}\n", encoding="utf-8")


def _completed(stated: dict[str, Any], record: ConversionRecord) -> str:
    """The metadata of a kept card with what it lacks, as YAML."""
    from huggingface_hub import CardData

    training, named = record.trained_from, stated.get("base_model")
    base_model = record.base_model and printable(record.base_model, 300)
    if isinstance(named, str) and (
        named.count("/") > 1 or named.startswith(("/", ".", "~")) or (training and named == training.path)
    ):
        stated.pop("base_model")
    if base_model and stated.setdefault("base_model", base_model) in (base_model, [base_model]):
        stated.setdefault("base_model_relation", "finetune")
    if record.source.license:
        stated.setdefault("license", printable(record.source.license, 300))
    tags = stated.setdefault("tags", [])
    if isinstance(tags, list):
        stated["tags"] = [*tags, *(tag for tag in tags_of(record) if tag not in tags)]
    return CardData(**stated).to_yaml()


def _lineage_section(record: ConversionRecord) -> str:
    """What a card of another library does not say."""
    training, origin = record.training, record.origin.source
    lines = [
        "## Block-sparse attention",
        f"The model needs the Python package [bsa_export]({PROJECT_URL}): `{install_command('run')}`. "
        "Write `import bsa_export` before the model is loaded.",
    ]
    if training is not None:
        lines.append(
            f"It was trained from {markdown_code(training.repo or training.path)}, a conversion of "
            f"{markdown_code(origin.repo or origin.path)} to block-sparse attention."
        )
    return "\n\n".join(lines)
