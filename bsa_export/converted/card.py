"""README.md of a converted model: the Hub's metadata, and what was done, from conversion.json and verification.json."""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bsa_export.bert.families import read_config
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.converted.check_lines import figures
from bsa_export.converted.names import CONFIG, CONVERSION_RECORD
from bsa_export.converted.records import (
    ConversionRecord,
    VerificationRecord,
    read_conversion,
    read_verification,
    to_json,
)
from bsa_export.errors import CheckpointError
from bsa_export.sparsity.facts import LayoutFacts, distinct_heads, layout_facts, layout_hash

FILE_NAME = "README.md"
# The pipeline that the Hub offers for a head of transformers, and the class that loads it.
HEADS = {
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "ForMultipleChoice": ("multiple-choice", "AutoModelForMultipleChoice"),
    "Model": ("feature-extraction", "AutoModel"),
}
PICTURES = ("layout.png", "layout.svg")
PANELS, PANEL_PIXELS, GAP_PIXELS = 4, 384, 16
FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
MARK = re.compile(r"<!-- bsa_export wrote this card \(sha256 ([0-9a-f]{64})\); an edited one is kept -->\n\Z")


def write(folder: Path, repo: str | None = None, unverified: str | None = None) -> bool:
    """Writes the card of a converted folder, as `complete` says, and its picture of the layouts if there is none.

    Returns:
        False if its user has edited the card: it is kept.
    """
    folder = Path(folder)
    if not is_edited(folder) and not any((folder / name).is_file() for name in PICTURES):
        (folder / PICTURES[0]).write_bytes(picture(_stored_layouts(folder)))
    text = complete(folder, repo, unverified)
    if text is not None:
        (folder / FILE_NAME).write_text(text, encoding="utf-8")
    return text is not None


def complete(folder: Path, repo: str | None = None, unverified: str | None = None) -> str | None:
    """Renders the card of a converted folder from its conversion.json, verification.json and stored layouts.

    A verification of other weight files than conversion.json lists counts as none.

    Args:
        folder: the converted folder.
        repo: `org/name` that the card tells how to load; the folder's name by default.
        unverified: why it counts as not verified though it is published; verification.json is then left out.

    Returns:
        the text, or None if there is a card that its user has edited.
    """
    folder = Path(folder)
    if is_edited(folder):
        return None
    record, config = read_conversion(folder), read_config(folder / CONFIG)
    if record is None:
        raise CheckpointError("expected a converted folder", found=f"no {CONVERSION_RECORD}", where=folder)
    conversion = to_json(record)
    verification = read_verification(folder) if unverified is None else None
    if verification and not _same_files(record, verification):
        verification = None
    return render(
        conversion,
        verification,
        config,
        facts=layout_facts(
            _stored_layouts(folder),
            config["sparse_attention"]["block"],
            record.source_length,
            record.positions is not None and record.positions.interpolated,
        ),
        repo=repo or folder.resolve().name,
        picture=next((name for name in PICTURES if (folder / name).is_file()), None),
        unverified=unverified,
    )


def is_edited(folder: Path) -> bool:
    """Whether the folder has a card that `write` did not write, or that was changed since."""
    try:
        return is_edited_text((Path(folder) / FILE_NAME).read_bytes().decode("utf-8", "replace"))
    except FileNotFoundError:
        return False


def is_edited_text(text: str) -> bool:
    """Whether a card is not as `render` made it."""
    mark = MARK.search(text)
    return mark is None or _sha256(text[: mark.start()]) != mark[1]


def picture(layouts: Sequence[np.ndarray]) -> bytes:
    """A PNG of which blocks are kept, `[heads, n, n]` for each layer: the first distinct layouts of heads, side by side."""
    heads = [head.pattern != 0 for head in distinct_heads(layouts)[:PANELS]]
    scale = max(1, PANEL_PIXELS // len(heads[0]))
    panels = [kept.repeat(scale, axis=0).repeat(scale, axis=1).astype(np.uint8) for kept in heads]
    gap = np.full((len(panels[0]), GAP_PIXELS), 2, np.uint8)
    pixels = np.hstack(
        [part for panel in panels for part in (gap, panel)][1:]
    )  # [height, width] of places in the palette
    lines = np.hstack([np.zeros((len(pixels), 1), np.uint8), pixels])  # each behind its filter, 0: none
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), 8, 3, 0, 0, 0),
        b"PLTE": bytes.fromhex("eef1f5" + "1f4e79" + "ffffff"),  # dropped, kept, between
        b"IDAT": zlib.compress(lines.tobytes(), 9),
        b"IEND": b"",
    }
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def metadata(card: Path) -> dict:
    """The metadata at the top of a card, empty if there is none. Raises CheckpointError when it is not YAML with a mapping."""
    import yaml

    match = FRONT_MATTER.match(card.read_text(encoding="utf-8-sig", errors="replace"))
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        line = f" at line {error.problem_mark.line + 2}" if getattr(error, "problem_mark", None) else ""
        raise CheckpointError(f"expected YAML metadata between the two --- lines{line}", where=card) from None
    if not isinstance(data or {}, dict):
        raise CheckpointError("expected a mapping as metadata", found=type(data).__name__, where=card)
    return data or {}


def source_license(folder: Path) -> str | None:
    """The license id that the README.md of a source folder states in its metadata, if it is one and can be read."""
    card = Path(folder) / FILE_NAME
    try:
        stated = metadata(card).get("license") if card.is_file() else None
    except (CheckpointError, OSError):
        return None
    if isinstance(stated, list) and len(stated) == 1:
        stated = stated[0]
    return stated if isinstance(stated, str) and re.fullmatch(r"[\w.+-]+", stated) else None


def render(
    conversion: dict,
    verification: VerificationRecord | None,
    config: dict,
    *,
    facts: LayoutFacts | None = None,
    repo: str = "org/name",
    picture: str | None = None,
    unverified: str | None = None,
) -> str:
    """The text of the card, with a mark at its end by which `is_edited` knows it.

    Args:
        conversion: content of conversion.json.
        verification: content of verification.json, or None if the folder is not verified.
        config: content of config.json.
        facts: of the stored layouts, for the section on limits.
        repo: what is loaded in the examples.
        picture: name of a picture of the layout in the folder.
        unverified: why it counts as not verified though it is published.
    """
    parts = [
        f"---\n{_metadata(conversion, config)}---\n",
        f"# {_cell(repo.rpartition('/')[2])}\n",
        _summary(conversion),
        _table([("", ""), *_facts_table(conversion)]),
        f"![Dark: the blocks of the score matrix that are computed]({picture})\n" if picture else "",
        _loading(conversion, config, repo),
        _verification(verification, unverified),
        _limits(conversion, facts),
        _versions(conversion, verification),
    ]
    text = "\n".join(part for part in parts if part)
    return f"{text}\n<!-- bsa_export wrote this card (sha256 {_sha256(text + chr(10))}); an edited one is kept -->\n"


def _metadata(conversion: dict, config: dict) -> str:
    """The YAML at the top. The Hub knows four relations (adapter, merge, quantized, finetune); the last is the one for new weights."""
    import yaml

    source = conversion["source"]
    sentences = "modules.json" in conversion["files"]
    tags = ["bsa_export", "block-sparse-attention", "long-context", conversion["family"]]
    stated = {
        "base_model": source["repo"],
        "base_model_relation": "finetune" if source["repo"] else None,
        "library_name": "transformers",
        "license": source["license"],
        "pipeline_tag": "sentence-similarity" if sentences else _head(config)[0],
        "tags": [*tags, "sentence-transformers"] if sentences else tags,
    }
    known = {name: value for name, value in stated.items() if value is not None}
    return yaml.safe_dump(known, sort_keys=False, allow_unicode=True)


def _head(config: dict) -> tuple[str | None, str]:
    name = next(iter(config.get("architectures") or ()), "")
    return next((head for ending, head in HEADS.items() if name.endswith(ending)), (None, "AutoModel"))


def _summary(conversion: dict) -> str:
    source, revision = conversion["source"], conversion["source"]["revision"]
    if source["repo"]:
        at = f" at revision [`{revision}`](https://huggingface.co/{source['repo']}/tree/{revision})" if revision else ""
        origin = f"[{source['repo']}](https://huggingface.co/{source['repo']}){at}"
    else:
        origin = f"`{_cell(source['path'])}`"
    reads = f"It reads {conversion['max_length']:,} tokens"
    if conversion["max_length"] != conversion["source_length"]:
        reads += f"; its source read {conversion['source_length']:,}"
    return f"{origin} with block-sparse attention in the place of dense attention. {reads}.\n"


def _facts_table(conversion: dict) -> list[tuple[str, str]]:
    sparsity = conversion["sparsity"]
    parameters = ", ".join(f"{key} {_plain(value)}" for key, value in sparsity.items() if key not in ("mode", "block"))
    rows = [
        (
            "sparsity",
            f"`{sparsity.get('mode')}`, block {sparsity.get('block')}" + (f" ({parameters})" if parameters else ""),
        ),
        ("density", f"{conversion['density']:.1%} of the blocks are computed"),
        ("longest input", f"{conversion['max_length']:,} tokens (source: {conversion['source_length']:,})"),
    ]
    if positions := conversion["positions"]:
        reserved = f", {positions['reserved']} reserved rows kept" if positions["reserved"] else ""
        rows.append(
            (
                "positions",
                f"{positions['source_rows']:,} rows to {positions['rows']:,}, method `{positions['method']}`{reserved}",
            )
        )
    for kind in ("added", "changed", "dropped"):
        if names := conversion[kind]:
            rows.append((f"tensors {kind}", f"{len(names)}" + (f": {_some(names)}" if kind != "added" else "")))
    rows.append(("all other tensors", "bit-identical to the source's"))
    for name, record in conversion["source"]["files"].items():
        rows.append(("source file", f"`{name}`" + (f", sha256 `{record['sha256']}`" if record.get("sha256") else "")))
    return rows


def _loading(conversion: dict, config: dict, repo: str) -> str:
    auto_class = _head(config)[1]
    text = f"""## Load

```python
import bsa_export

model = bsa_export.load("{repo}")
```

or, with the class of your choice (transformers 5.0 or newer; the import registers the attention):

```python
import bsa_export
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo}", attn_implementation="block_sparse")
```

Without `bsa_export`, transformers loads it as a dense model of {conversion["max_length"]:,} tokens and reports the stored layouts as unexpected weights.
"""
    if "modules.json" in conversion["files"]:
        text += f"""
With sentence-transformers:

```python
import bsa_export
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repo}", model_kwargs={{"attn_implementation": "block_sparse"}})
```
"""
    return text


def _verification(verification: VerificationRecord | None, unverified: str | None) -> str:
    if verification is None:
        reason = f" Published with `--unverified`: {_cell(unverified)}." if unverified else ""
        return f"## Verification\n\n**Not verified.**{reason}\n"
    rows = []
    for check in verification.checks:
        rows.append((check.name, check.status, "; ".join(filter(None, (figures(check), check.reason)))))
    device = f" on {_cell(verification.device)}" if verification.device else ""
    head = f"## Verification\n\n`bsa-verify`{device}: **{verification.verdict}**.\n"
    return f"{head}\n{_table([('check', 'result', 'figures'), *rows])}"


def _limits(conversion: dict, facts: LayoutFacts | None) -> str:
    source_length, max_length = conversion["source_length"], conversion["max_length"]
    lines = [
        "The conversion trained nothing, and no task was measured on this model: measure your own before you rely on it."
    ]
    lines += [f"{_cell(note['text'])}." for note in conversion.get("notes", ())]
    for name, what in conversion.get("not_finite", {}).items():
        lines.append(f"`{_cell(name)}` holds {what} values, as in the source.")
    if conversion.get("sparse_source"):
        lines.append("Its source was sparse already: the layouts are those that it was trained with.")
    elif facts:
        if facts.interpolated:
            lines.append("Its positions are interpolated, so short inputs too give other outputs than the source does.")
        elif facts.short_inputs_differ:
            lines.append(
                f"Within the first {source_length:,} tokens {facts.kept_share:.1%} of the blocks are kept, so short inputs give other outputs than the source does."
            )
        else:
            lines.append(
                f"Up to {source_length:,} tokens every block is kept, so outputs are those of the source, up to rounding."
            )
        if facts.seq_len > source_length and facts.repeats_positions:
            lines.append(
                f"A token sees others {facts.reach:,} tokens away, where positions repeat: it cannot tell them from near ones until it is trained on."
            )
        if facts.needs_training:
            lines.append("Train it on with this pattern before use; until then expect it to be worse than its source.")
        if not facts.short_inputs_differ and not facts.needs_training and facts.seq_len > source_length:
            lines.append(
                f"In longer inputs a token sees others up to {facts.reach:,} tokens away in one layer, and none beyond."
            )
    if (positions := conversion["positions"]) and max_length > source_length:
        rows = (
            "repeat those of the source"
            if positions["method"] == "tile"
            else "are interpolated between those of the source"
        )
        lines.append(f"Position embeddings beyond {source_length:,} tokens {rows}; they were not trained there.")
    lines.append("Attention probabilities (`output_attentions`) do not exist in block-sparse attention.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def _versions(conversion: dict, verification: VerificationRecord | None) -> str:
    versions = {
        "bsa_export": conversion["bsa_export"],
        **conversion["versions"],
        **(verification.versions if verification else {}),
    }
    return "## Versions\n\n" + ", ".join(f"{_cell(name)} {_cell(version)}" for name, version in versions.items()) + "\n"


def _stored_layouts(folder: Path) -> list[np.ndarray]:
    """The layouts of all layers as they lie in the folder's weights."""
    layouts, seen = [], {}
    for name, row in open_checkpoint(folder).tensors.items():
        if name.endswith("master_layout"):
            layout = np.fromfile(row.data.path, np.uint8, row.nbytes, offset=row.data.offset).reshape(row.shape)
            layouts.append(seen.setdefault(layout_hash(layout), layout))  # equal layers share one array
    if not layouts:
        raise CheckpointError("expected stored layouts in its weights", found="none", where=folder)
    return layouts


def _same_files(conversion: ConversionRecord, verification: VerificationRecord) -> bool:
    """Whether both records mean the same weight files; a conversion may leave out their sha256."""
    weights = {name: entry.sha256 for name, entry in conversion.files.items() if name.endswith(".safetensors")}
    verified = {name: digest for name, digest in verification.files.items() if name.endswith(".safetensors")}
    return weights.keys() == verified.keys() and all(
        digest in (None, verified[name]) for name, digest in weights.items()
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    """`value` in one line that cannot leave its table cell."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|").replace("<", "&lt;")


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _some(names: dict | list, most: int = 5) -> str:
    names = [f"`{name}`" for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
