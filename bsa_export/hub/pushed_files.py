"""The folder that is pushed: which of its files go up, what they are, whether bsa-verify passed them, and what its card says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.writer import INDEX_NAME
from bsa_export.converted import card as model_card
from bsa_export.converted.names import (
    CARD,
    CONVERSION_RECORD,
    VERIFICATION_RECORD,
    is_weights,
    of_model,
    of_repository,
)
from bsa_export.converted.records import Verdict, read_pull, read_verification
from bsa_export.errors import CheckpointError
from bsa_export.files import Hashes
from bsa_export.hub.download import recorded_files

# Metadata of a card that the Hub reads as text, as a list of texts, or as either.
CARD_TEXTS = {"license", "library_name", "pipeline_tag", "base_model", "base_model_relation", "language"}
CARD_LISTS = {"tags", "license", "base_model", "datasets", "metrics", "language"}
SAYS_PASSED = re.compile(r"bsa-verify.*\*\*passed\*\*", re.IGNORECASE)
SAYS_NOT_VERIFIED = re.compile(r"not\s+verified", re.IGNORECASE)


@dataclass(frozen=True)
class PlannedFile:
    """A file of the model. `content` is None where it is the folder's own file, else what is pushed in its place."""

    name: str
    bytes: int
    sha256: str
    blob: str | None
    content: bytes | None = None


def folder_files(folder: Path) -> tuple[list[str], list[str]]:
    """The names that belong to the model in a finished conversion, and the others. Raises CheckpointError if it is none."""
    if not (folder / CONVERSION_RECORD).is_file():
        found = f"no {CONVERSION_RECORD}" if folder.is_dir() else "no such folder"
        raise CheckpointError("expected a finished conversion", found=found, where=folder, hint="bsa-convert makes one")
    for name in recorded_files(folder):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"expected the files of its {CONVERSION_RECORD}", found=f"no {name}", where=folder, hint="convert again"
            )
    weights = {file.name for file in open_checkpoint(folder).files}
    if len(weights) > 1:
        weights.add(INDEX_NAME)
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    belong = [name for name in there if of_repository(name)]
    # Shards beside a single file, or the other way round, would be read in its place.
    belong = [name for name in belong if name in weights or not is_weights(name)]
    return belong, [name for name in there if name not in belong]


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
        return f"bsa-verify could not tell whether it is right (verdict {record.verdict})"
    verified = {name: digest for name, digest in record.files.items() if name != CARD}  # a push completes the card
    for name, digest in verified.items():
        if name not in hashes or hashes[name].sha256 != digest:
            return f"{name} {'changed' if name in hashes else 'is gone'} since bsa-verify ran"
    unseen = [name for name in hashes if of_model(name) and name not in (*verified, VERIFICATION_RECORD)]
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
            refuse_claim((folder / card).read_bytes().decode("utf-8", "replace"), folder / card)
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
        raise CheckpointError(f"expected {kind} as {key} in its metadata", found=repr(value), where=card)


def refuse_claim(card: str, where: object) -> None:
    """Raises CheckpointError for a person's card of a model that is not verified, if the card says otherwise or nothing of it."""
    hint = "write Not verified into it, and delete what says otherwise, or delete the card and a new one is made"
    if SAYS_PASSED.search(card):
        raise CheckpointError("it says that bsa-verify passed, which is not so", where=where, hint=hint)
    if not SAYS_NOT_VERIFIED.search(card):
        raise CheckpointError("it does not say that the model is not verified", where=where, hint=hint)
