"""The folder that is pushed: which of its files go up, whether bsa-verify passed them, and what its card says."""

from __future__ import annotations

import builtins
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from bsa_export.bert.config_file import read_config
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.converted import card as model_card
from bsa_export.converted.card import PASSED_MARK, UNVERIFIED_TAG
from bsa_export.converted.names import (
    CARD,
    CONFIG,
    CONVERSION_RECORD,
    SAFE_NAME,
    VERIFICATION_RECORD,
    files_in,
    is_runnable,
    of_conversion,
    of_model,
    of_people,
)
from bsa_export.converted.records import Verdict, read_conversion, read_pull, read_verification
from bsa_export.errors import BsaError, CheckpointError
from bsa_export.files import Hashes
from bsa_export.text import argument

# Metadata of a card that the Hub reads as text, as a list of texts, or as either.
CARD_TEXTS = {"license", "library_name", "pipeline_tag", "base_model", "base_model_relation", "language"}
CARD_LISTS = {"tags", "license", "base_model", "datasets", "metrics", "language"}


@dataclass(frozen=True)
class PlannedFile:
    """A file of the model. `content` is None where it is the folder's own file, else what is pushed instead of it."""

    name: str
    bytes: int
    sha256: str
    blob: str | None
    content: builtins.bytes | None = None


def folder_files(folder: Path) -> tuple[list[str], list[str]]:
    """The names that go up from a finished conversion, and the others.

    The files that conversion.json lists go up, the records, and what people add: card, license and pictures.

    Raises:
        CheckpointError: it is not a finished conversion.
    """
    record = read_conversion(folder)
    if record is None:
        raise _not_converted(folder)
    recorded = [name for name in record.files if name != CARD]
    for name in recorded:
        if not SAFE_NAME.fullmatch(name) or is_runnable(name):
            raise CheckpointError(
                f"{CONVERSION_RECORD} lists a file that is not published",
                found=name,
                where=folder,
                hint="convert again",
            )
        if not os.path.isfile(folder / name):
            raise CheckpointError(
                f"expected the files of its {CONVERSION_RECORD}", found=f"no {name}", where=folder, hint="convert again"
            )
    open_checkpoint(folder)  # refuses damaged weights
    there = list(files_in(folder))
    belong = [name for name in there if of_conversion(name, recorded) or of_people(name)]
    left_out = [name for name in there if name not in belong]
    return belong, sorted(left_out, key=lambda name: not of_model(name))  # first what people would miss


def _not_converted(folder: Path) -> CheckpointError:
    """The error for a folder without conversion.json: which command writes one."""
    if not folder.is_dir():
        return CheckpointError("no such folder", where=folder)
    command = f"bsa-convert {argument(folder)} OUT"
    hint = f"{command} converts a dense BERT; then push OUT"
    try:
        if "sparse_attention" in read_config(folder / CONFIG):
            hint = f"training leaves it out: {command} --trained-from CONVERSION makes it whole again; then push OUT"
    except BsaError:
        pass
    return CheckpointError("expected a finished conversion", found=f"no {CONVERSION_RECORD}", where=folder, hint=hint)


def unverified_because(folder: Path, hashes: Mapping[str, Hashes]) -> str | None:
    """Why a folder whose files have these hashes does not count as verified, or None."""
    if VERIFICATION_RECORD not in hashes:
        return "bsa-verify has not run on it"
    if repo := _pulled_from(folder, hashes[VERIFICATION_RECORD].sha256):
        return f"bsa-verify has not run on it here: its {VERIFICATION_RECORD} was pulled from {repo}"
    try:
        record = read_verification(folder)
    except CheckpointError as error:
        return f"its record of the verification cannot be read ({error})"
    if record is None:
        return "bsa-verify has not run on it"
    failed = [check.name for check in record.checks if check.failed]
    if failed or record.verdict is Verdict.FAILED:
        return f"it failed bsa-verify ({', '.join(failed) or 'no check is named'})"
    if record.verdict is not Verdict.PASSED:
        return f"bsa-verify could not decide whether it is right (verdict {record.verdict})"
    verified = {name: digest for name, digest in record.files.items() if name != CARD}  # a push completes the card
    for name, digest in verified.items():
        if name not in hashes or hashes[name].sha256 != digest:
            return f"{name} {'changed' if name in hashes else 'is gone'} since bsa-verify ran"
    unseen = [name for name in hashes if not of_people(name) and name not in (*verified, VERIFICATION_RECORD)]
    return f"bsa-verify did not see its {unseen[0]}" if unseen else None


def _pulled_from(folder: Path, digest: str) -> str | None:
    """The repository that a verification.json of this sha256 came from, None if it was made here."""
    try:
        record = read_pull(folder)
    except CheckpointError:
        return None
    return record.repo if record is not None and record.files.get(VERIFICATION_RECORD) == digest else None


def planned_files(
    folder: Path, repo_id: str, hashes: Mapping[str, Hashes], unverified: str | None
) -> list[PlannedFile]:
    """What goes up: the folder's files, with the card completed, or checked if it is the user's own."""
    card = CARD
    text = model_card.complete(folder, repo_id, unverified)
    if text is None:
        _check_card(folder / card)
        if unverified:
            refuse_claim(model_card.read_card(folder / card), folder / card)
    files = [
        PlannedFile(name, (folder / name).stat().st_size, *found)
        for name, found in hashes.items()
        if not (name == card and text is not None) and not (name == VERIFICATION_RECORD and unverified)
    ]
    if text is not None:
        from huggingface_hub.utils.sha import git_hash

        content = text.encode()
        files.append(PlannedFile(card, len(content), sha256(content).hexdigest(), git_hash(content), content))
    return sorted(files, key=lambda file: file.name)


def _check_card(card: Path) -> None:
    """Raises CheckpointError for metadata that the Hub would refuse, or could not find the model by."""
    for key, value in model_card.metadata(card).items():
        if key not in CARD_TEXTS | CARD_LISTS or (key in CARD_TEXTS and isinstance(value, str)):
            continue
        if key in CARD_LISTS and isinstance(value, list) and all(isinstance(item, str) for item in value):
            continue
        kind = "text" if key in CARD_TEXTS else "a list of texts"
        raise CheckpointError(f"expected {kind} as {key} in its metadata", found=_shown(value), where=card)


def _shown(value: object) -> str:
    """A value of YAML in short; a list or mapping by its kind: with aliases its text could be endless."""
    return type(value).__name__ if isinstance(value, (list, dict, set, tuple)) else repr(value)


def refuse_claim(card: str, where: object) -> None:
    """Checks a person's own card of an unverified model: it needs the tag `unverified`, and no table that says passed.

    Raises:
        CheckpointError: it claims that bsa-verify passed, or does not say that the model is not verified.
    """
    tags = model_card.metadata_of(card, where).get("tags")
    hint = f"add {UNVERIFIED_TAG} to its tags and remove the verification section, or delete the card to get a new one"
    if PASSED_MARK in card:
        raise CheckpointError("its verification section says that bsa-verify passed", where=where, hint=hint)
    if not isinstance(tags, list) or UNVERIFIED_TAG not in tags:
        raise CheckpointError(f"expected the tag {UNVERIFIED_TAG} in its metadata", where=where, hint=hint)
