"""README.md of a converted model: `card.md.jinja`, filled in from the records and the stored layouts."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bsa_export.bert.config_file import read_config
from bsa_export.bert.families import FAMILIES
from bsa_export.checkpoint.dtypes import read
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import Tensor
from bsa_export.converted.check_lines import figures
from bsa_export.converted.checks import Check
from bsa_export.converted.names import CARD, CONFIG, CONVERSION_RECORD
from bsa_export.converted.records import (
    ConversionRecord,
    Verdict,
    VerificationRecord,
    read_conversion,
    read_verification,
)
from bsa_export.errors import CheckpointError
from bsa_export.files import read_bytes
from bsa_export.sparsity.facts import LayoutFacts, distinct_heads, layout_facts, layout_hash
from bsa_export.text import markdown, markdown_code, printable
from bsa_export.version import PROJECT_URL, install_command

if TYPE_CHECKING:
    from huggingface_hub import CardData

TEMPLATE = "card.md.jinja"
# The pipeline that the Hub offers for a head of transformers, and the class that loads it.
HEADS = {
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForPreTraining": (None, "AutoModelForPreTraining"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "ForMultipleChoice": ("multiple-choice", "AutoModelForMultipleChoice"),
    "Model": ("feature-extraction", "AutoModel"),
}
PICTURES = ("layout.png", "layout.svg")
PANELS, PANEL_PIXELS, GAP_PIXELS = 4, 384, 16
MARK = re.compile(r"<!-- bsa_export wrote this card \(sha256 ([0-9a-f]{64})\); an edited one is kept -->\n\Z")
# For programs: the tag of a model that bsa-verify did not pass, and the mark of a card that says that it did.
UNVERIFIED_TAG = "unverified"
PASSED_MARK = "<!-- bsa-verify: passed -->"
MAX_CARD_BYTES = 16 << 20
# Of the card that `transformers.utils.hub.create_and_tag_model_card` makes (transformers 5.24).
UNFILLED_TITLE = "# Model Card for Model ID"
UNFILLED_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
    "This model card has been automatically generated."
)
# PyYAML reads some 60 kB a second of the worst YAML. The metadata of cards with many results have 150 kB.
MAX_METADATA_CHARACTERS = 256 << 10
# Merge keys can double the metadata with each line, and tags name types: no card needs either.
UNUSUAL_YAML = re.compile(r"<<\s*:|(?:^|[\s,\[{])!\S+")


def write(
    folder: Path,
    repo: str | None = None,
    unverified: str | None = None,
    layouts: Sequence[np.ndarray] | None = None,
) -> bool:
    """Writes the card of a converted folder, as `complete` says, and its picture of the layouts if there is none.

    Args:
        folder, repo, unverified, layouts: as for `complete`.

    Returns:
        False if its user has edited the card: it is kept.
    """
    folder = Path(folder)
    if not is_edited(folder) and not any((folder / name).is_file() for name in PICTURES):
        layouts = _stored_layouts(folder) if layouts is None else layouts
        (folder / PICTURES[0]).write_bytes(picture(layouts))
    text = complete(folder, repo, unverified, layouts)
    if text is not None:
        (folder / CARD).write_text(text, encoding="utf-8")
    return text is not None


def complete(
    folder: Path,
    repo: str | None = None,
    unverified: str | None = None,
    layouts: Sequence[np.ndarray] | None = None,
) -> str | None:
    """Renders the card of a converted folder from its conversion.json, verification.json and stored layouts.

    A verification of other weight files than conversion.json lists counts as none.

    Args:
        folder: the converted folder.
        repo: `org/name` that the card shows how to load; the folder's name by default.
        unverified: why it counts as not verified though it is published; verification.json is then left out.
        layouts: those of all layers, `[heads, n, n]` each; read from the folder unless given.

    Returns:
        the text, or None if there is a card that its user has edited.

    Raises:
        CheckpointError: the folder is not a converted one, or one of its records is damaged.
    """
    folder = Path(folder)
    if is_edited(folder):
        return None
    record, config = read_conversion(folder), read_config(folder / CONFIG)
    if record is None:
        raise CheckpointError("expected a converted folder", found=f"no {CONVERSION_RECORD}", where=folder)
    verification = read_verification(folder) if unverified is None else None
    if verification and not _same_files(record, verification):
        verification = None
    layouts = _stored_layouts(folder) if layouts is None else layouts
    block = max(1, record.max_length // layouts[0].shape[-1])
    origin = record.origin
    interpolated = origin.positions is not None and origin.positions.interpolated
    windows = FAMILIES[record.family].windows(config, len(layouts))
    return render(
        record,
        verification,
        config,
        facts=layout_facts(layouts, block, origin.source_length, interpolated, windows),
        windows=windows,
        repo=repo or folder.resolve().name,
        picture=next((name for name in PICTURES if (folder / name).is_file()), None),
        unverified=unverified,
    )


def render(
    record: ConversionRecord,
    verification: VerificationRecord | None,
    config: dict[str, Any],
    *,
    facts: LayoutFacts | None = None,
    windows: Sequence[int | None] = (),
    repo: str = "org/name",
    picture: str | None = None,
    unverified: str | None = None,
) -> str:
    """The text of the card, with a mark at its end by which `is_edited` knows it.

    Args:
        record: conversion.json.
        verification: verification.json, or None if the folder is not verified.
        config: content of config.json.
        facts: of the stored layouts, for the section on limits.
        windows: how many tokens to each side each layer attends to at most; None for a layer without such a bound.
        repo: what is loaded in the examples.
        picture: name of a picture of the layout in the folder.
        unverified: why it counts as not verified though it is published.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Markdown, not HTML: each value passes a filter of `text` instead of autoescape.
    environment = Environment(
        loader=PackageLoader("bsa_export.converted", ""), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {
        "md": markdown,
        "code": markdown_code,
        "python": lambda value: json.dumps(printable(value, 300), ensure_ascii=False),
        "count": lambda number: f"{number:,}",
        "some_code": _some_code,
        "figures": _figures,
    }
    versions = {"bsa_export": record.bsa_export} | record.versions | (verification.versions if verification else {})
    text = environment.get_template(TEMPLATE).render(
        metadata=_metadata(record, verification, config),
        install=install_command("run"),
        project_url=PROJECT_URL,
        names_attention=config.get("attn_implementation") == "block_sparse",
        record=record,
        origin=record.origin,
        training=record.training,
        trainings=record.trainings,
        source=record.origin.source,
        repo=repo,
        parameters=[(name, _plain(value)) for name, value in record.sparsity.items() if name not in ("mode", "block")],
        tensors=_tensors(record),
        picture=picture,
        auto_class=_head(config)[1],
        sentences=_has_sentences(record),
        verification=verification,
        unverified=unverified,
        passed_mark=PASSED_MARK,
        facts=facts,
        longer=record.max_length > record.origin.source_length,
        local=[window for window in windows if window is not None],
        layers=len(windows),
        versions=versions,
    )
    text += "\n"
    return f"{text}<!-- bsa_export wrote this card (sha256 {_sha256(text)}); an edited one is kept -->\n"


def is_own(folder: Path) -> bool:
    """Whether the folder has a card with words of a person or of another library; metadata alone are not a card."""
    return is_edited(folder) and bool(body(read_card(Path(folder) / CARD)))


def is_edited(folder: Path) -> bool:
    """Whether the folder has a card that `write` did not write, or that was changed since."""
    try:
        return is_edited_text(read_card(Path(folder) / CARD))
    except FileNotFoundError:
        return False


def is_edited_text(text: str) -> bool:
    """Whether a card is neither as `render` made it nor the form that transformers' push_to_hub leaves unfilled."""
    mark = MARK.search(text[-200:])
    if mark is not None:
        return _sha256(text[: len(text) - len(mark[0])]) != mark[1]
    return not (UNFILLED_TITLE in text and body(text) == _unfilled_form())


def _unfilled_form() -> str:
    """The body of the card that transformers makes for a repository without one."""
    from huggingface_hub import ModelCard, ModelCardData

    return body(str(ModelCard.from_template(ModelCardData(), model_description=UNFILLED_DESCRIPTION)))


def metadata(card: Path) -> dict[str, Any]:
    """The metadata at the top of a card, empty if there is none.

    Raises:
        CheckpointError: it is not YAML with a mapping, or too long.
        FileNotFoundError: there is no such file.
    """
    return metadata_of(read_card(card), card).to_dict()


def metadata_of(text: str, where: object) -> CardData:
    """The metadata at the top of a card's text. Raises CheckpointError when it is not YAML with a mapping, or too long.

    Args:
        text: the whole card.
        where: what an error names.
    """
    from huggingface_hub import CardData

    text = text.lstrip("\ufeff")
    block, end, _ = text.partition("\n---") if text.lstrip()[:3] == "---" else ("", "", "")
    if not end:
        return CardData()
    if len(block) > MAX_METADATA_CHARACTERS:
        raise CheckpointError(
            f"expected at most {MAX_METADATA_CHARACTERS:,} characters of metadata",
            found=f"{len(block):,}",
            where=where,
        )
    if found := UNUSUAL_YAML.search(block):
        raise CheckpointError(
            "expected metadata without YAML's merge keys and tags", found=found[0].strip(), where=where
        )
    from huggingface_hub import RepoCard  # a quarter of a second more

    try:
        return RepoCard(f"{block}{end}\n").data
    except Exception as error:  # PyYAML raises ValueError and others for values that it cannot build
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 2}" if mark else ""
        reason = getattr(error, "problem", None) or (
            "nested too deeply" if isinstance(error, RecursionError) else error
        )
        raise CheckpointError(
            f"expected a mapping in YAML between the two --- lines{line} ({printable(reason, 200)})", where=where
        ) from None


def body(text: str) -> str:
    """A card without its metadata."""
    from huggingface_hub import repocard

    return repocard.REGEX_YAML_BLOCK.sub("", text.lstrip("\ufeff"), count=1).strip()


def source_license(folder: Path) -> str | None:
    """The license id that the README.md of a source folder states in its metadata, if it is one and can be read."""
    try:
        stated = metadata(Path(folder) / CARD).get("license")
    except (CheckpointError, OSError):
        return None
    if isinstance(stated, list) and len(stated) == 1:
        stated = stated[0]
    return stated if isinstance(stated, str) and re.fullmatch(r"[\w.+-]{1,100}", stated) else None


def picture(layouts: Sequence[np.ndarray]) -> bytes:
    """A PNG of which blocks are kept, `[heads, n, n]` for each layer: the first distinct heads, side by side.

    The core draws this one picture without matplotlib, which is an extra and takes a second to import.
    """
    heads = [head.pattern != 0 for head in distinct_heads(layouts)[:PANELS]]
    scale = max(1, PANEL_PIXELS // len(heads[0]))
    panels = [kept.repeat(scale, axis=0).repeat(scale, axis=1).astype(np.uint8) for kept in heads]
    gap = np.full((len(panels[0]), GAP_PIXELS), 2, np.uint8)
    pixels = np.hstack([part for panel in panels for part in (gap, panel)][1:])  # [height, width] of palette entries
    lines = np.hstack([np.zeros((len(pixels), 1), np.uint8), pixels])  # each after its filter, 0: none
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), 8, 3, 0, 0, 0),
        b"PLTE": bytes.fromhex("eef1f5" + "1f4e79" + "ffffff"),  # dropped, kept, between
        b"IDAT": zlib.compress(lines.tobytes(), 9),
        b"IEND": b"",
    }
    content = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(content)


def read_card(card: Path) -> str:
    """The text of a card of at most 16 MB. Raises CheckpointError, or FileNotFoundError where there is none."""
    return read_bytes(card, MAX_CARD_BYTES).decode("utf-8", "replace")


def _tensors(record: ConversionRecord) -> dict[str, list[str]]:
    """The names of tensors that are not copies of the source's or, after a training, of the conversion's."""
    training, origin = record.training, record.origin
    if training is None:
        return {"added": origin.added, "changed": list(origin.changed), "dropped": list(origin.dropped)}
    by = "training" if len(record.trainings) == 1 else "the last training"
    return {
        f"added by {by}": training.added,
        f"changed by {by}": [name for name in training.changed if name not in set(training.cast)],
        "only stored in another dtype": training.cast,
        f"dropped by {by}": training.removed,
    }


def _metadata(record: ConversionRecord, verification: VerificationRecord | None, config: dict[str, Any]) -> str:
    """The YAML at the top. Of the Hub's relations (adapter, merge, quantized, finetune) the last is for new weights."""
    from huggingface_hub import ModelCardData

    tags = tags_of(record)
    if verification is None or verification.verdict is not Verdict.PASSED:
        tags.append(UNVERIFIED_TAG)
    base_model = record.base_model
    data = ModelCardData(
        base_model=base_model and printable(base_model, 300),
        base_model_relation="finetune" if base_model else None,
        library_name="transformers",
        license=record.source.license and printable(record.source.license, 300),
        pipeline_tag="sentence-similarity" if _has_sentences(record) else _head(config)[0],
        tags=tags,
    )
    return data.to_yaml()


def tags_of(record: ConversionRecord) -> list[str]:
    """The tags by which the Hub finds the model."""
    tags = ["bsa_export", "block-sparse-attention", "long-context", record.family]
    return [*tags, "sentence-transformers"] if _has_sentences(record) else tags


def _has_sentences(record: ConversionRecord) -> bool:
    """Whether the model is one of sentence-transformers."""
    return "modules.json" in record.files


def _head(config: dict[str, Any]) -> tuple[str | None, str]:
    """The Hub's pipeline for the class that config.json names, if it has one, and the Auto class that loads it."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    return next((head for ending, head in HEADS.items() if str(name).endswith(ending)), (None, "AutoModel"))


def _stored_layouts(folder: Path) -> list[np.ndarray]:
    """The layouts of all layers, `[heads, n, n]` each, as the folder's weights store them.

    Raises:
        CheckpointError: there are none, or one is not of that shape.
    """
    layouts: list[np.ndarray] = []
    seen: dict[str, np.ndarray] = {}
    for layout in map(read, _layout_rows(folder)):
        layouts.append(seen.setdefault(layout_hash(layout), layout))  # equal layers share one array
    return layouts


def _layout_rows(folder: Path) -> Iterator[Tensor]:
    found = [(name, row) for name, row in open_checkpoint(folder).tensors.items() if name.endswith("master_layout")]
    if not found:
        raise CheckpointError("expected stored layouts in its weights", found="none", where=folder)
    for name, row in found:
        if row.dtype != "U8" or len(row.shape) != 3 or row.shape[1] != row.shape[2] or not row.nbytes:
            raise CheckpointError(
                f"{name}: expected U8 [heads, n, n]", found=f"{row.dtype} {list(row.shape)}", where=folder
            )
        if row.shape != found[0][1].shape:
            raise CheckpointError(f"{name}: expected the shape of the other layouts", found=row.shape, where=folder)
        yield row


def _same_files(record: ConversionRecord, verification: VerificationRecord) -> bool:
    """Whether both records mean the same weight files; a conversion may leave out their sha256."""
    weights = {name: entry.sha256 for name, entry in record.files.items() if name.endswith(".safetensors")}
    verified = {name: digest for name, digest in verification.files.items() if name.endswith(".safetensors")}
    return weights.keys() == verified.keys() and all(
        digest in (None, verified[name]) for name, digest in weights.items()
    )


def _figures(check: Check) -> str:
    return "; ".join(filter(None, (figures(check), check.reason)))


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _some_code(names: Iterable[str], most: int = 5) -> str:
    spans = [markdown_code(name) for name in names]
    return ", ".join(spans[:most]) + (f" and {len(spans) - most} more" if len(spans) > most else "")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
