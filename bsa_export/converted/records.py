"""The three JSON records of a converted folder, each with one reader and one writer; docs/records.md shows them.

conversion.json: what bsa-convert did. verification.json: what bsa-verify found. pulled.json: where bsa-pull got it.
Readers check every type, and read what earlier releases wrote: there some kinds and reasons were English sentences.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import msgspec

from bsa_export.bert.families import FAMILIES
from bsa_export.converted.checks import Check, Kind, Status
from bsa_export.converted.names import CONVERSION_RECORD, PULL_RECORD, VERIFICATION_RECORD
from bsa_export.errors import CheckpointError
from bsa_export.files import MAX_JSON_BYTES, json_text, parse_json, read_json, replace_file

Record = TypeVar("Record")


class DropReason(str, Enum):
    """Why a tensor of the source is not in the converted folder."""

    BUFFER = "buffer"  # the model computes it, with these values
    CHANGED_BUFFER = "buffer with other values"  # the model computes it, with other values
    IGNORED = "ignored"  # --ignore-tensors names it
    OTHER_ENCODER = "other encoder"  # it belongs to another encoder than --prefix chooses

    __str__ = str.__str__


class NoteKind(str, Enum):
    """What a note to the user is about."""

    OTHER = "other"  # of a record from before notes had kinds
    HEAD_WITHOUT_CLASS = "head without class"
    LAYOUTS_REDRAWN = "layouts redrawn"
    LENGTHS_DIFFER = "lengths differ"
    IGNORED_TENSORS = "ignored tensors"
    NO_ANCESTOR = "no ancestor"
    UNLIKE_ANCESTOR = "unlike ancestor"
    OTHER_ENCODER = "other encoder"
    CONFIG_FIELD = "config field"
    FREQUENCIES = "rotary frequencies"
    LEFT_BEHIND = "left behind"

    __str__ = str.__str__


class Verdict(str, Enum):
    """What a verification found as a whole."""

    PASSED = "passed"
    FAILED = "failed"
    INCOMPLETE = "incomplete"

    __str__ = str.__str__


@dataclass(frozen=True)
class Note:
    """What a user should know about a conversion, one sentence. Programs read `kind` only."""

    kind: NoteKind
    text: str


@dataclass(frozen=True)
class Change:
    """What a conversion does to the values of a tensor; several at once are possible.

    Attributes:
        rows: position rows before and after.
        method: `tile` or `interpolate`, where rows change.
        dtype: dtypes before and after, names of the safetensors format.
        layout: whether it is a layout that the source stored, written as U8.
    """

    rows: tuple[int, int] | None = None
    method: str | None = None
    dtype: tuple[str, str] | None = None
    layout: bool = False


@dataclass(frozen=True)
class Positions:
    """How the position embeddings were extended: `method` is `tile` or `interpolate`; `reserved` rows in front stay."""

    method: str
    reserved: int
    source_rows: int
    rows: int

    def __post_init__(self) -> None:
        if self.method not in ("tile", "interpolate"):
            raise ValueError("expected tile or interpolate")
        if not 0 <= self.reserved < min(self.source_rows, self.rows):
            raise ValueError("expected more rows than reserved ones")

    @property
    def interpolated(self) -> bool:
        """Whether no row is a position of the source."""
        return self.method == "interpolate"


@dataclass(frozen=True)
class FileEntry:
    """A file: its size, and its sha256 or, for weights, its checksum (`checkpoint.checksum`)."""

    bytes: int
    sha256: str | None = None
    checksum: str | None = None


@dataclass(frozen=True)
class SourceEntry:
    """What was converted: a path's last part or a repository at a commit, its license, weight files and config.json."""

    path: str
    config: dict[str, Any]
    files: dict[str, FileEntry] = field(default_factory=dict)
    repo: str | None = None
    revision: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class ChosenOptions:
    """The options of a conversion, with defaults filled in (`conversion.options.Options`)."""

    max_length: int | None = None
    mode: str | None = None
    window: int | None = None
    block: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    section: dict[str, Any] | None = None
    layout: str | None = None
    seed: int = 0
    different_layout_per_layer: bool = False
    positions: str = "tile"
    dtype: str = "keep"
    prefix: str | None = None
    ignore_tensors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LengthChange:
    """A length that a conversion changed in a JSON file of the tokenizer or of sentence-transformers.

    Attributes:
        file: its name in the converted folder.
        key: the keys that lead to the value.
        before: the JSON text of the value in the source, None where it had none.
        after: the JSON text of the value in the converted folder.
    """

    file: str
    key: tuple[str, ...]
    before: str | None
    after: str

    def __post_init__(self) -> None:
        for text in (self.before, self.after):
            if text is not None:
                parse_json(text)


@dataclass(frozen=True)
class StoredBuffer:
    """A small vector of the source that the model computes itself. Its values are kept for `--to-dense`.

    Attributes:
        dtype: a floating dtype of the safetensors format.
        values: its elements, exactly.
    """

    dtype: str
    values: list[float]

    def __post_init__(self) -> None:
        if self.dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError("expected a floating dtype")


@dataclass(frozen=True)
class Training:
    """The conversion that a model was trained from, and what the training changed.

    Attributes:
        path: the name of the conversion's folder.
        record: its conversion.json.
        changed: written names of tensors with other values, or of another shape or dtype.
        cast: those of `changed` that have the conversion's values, rounded to another dtype.
        added: written names that the conversion does not have.
        removed: the conversion's names that the trained model does not have.
        first_row: the first row of the position embeddings whose values changed; None where none did, there are none,
            or the table has another shape.
        files: names of the conversion's files that the trained folder lacks: its tokenizer, its license.
        repo: its repository on the Hub, None if it did not come from there.
        revision: the commit in that repository.
        license: the one that its card states, else that of its own source.
    """

    path: str
    record: ConversionRecord
    changed: list[str]
    added: list[str]
    removed: list[str]
    first_row: int | None = None
    files: list[str] = field(default_factory=list)
    repo: str | None = None
    revision: str | None = None
    license: str | None = None
    cast: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if any("/" in name or "\0" in name or name in ("", ".", "..") for name in self.files):
            raise ValueError("files: expected names of files in the folder")
        if self.first_row is not None and self.first_row < 0:
            raise ValueError("first_row: expected a row")
        for names in (self.changed, self.cast, self.added, self.removed, self.files):
            if len(set(names)) != len(names):
                raise ValueError("expected each name once")

    @property
    def changed_nothing(self) -> bool:
        """Whether every tensor is the conversion's, as where a conversion is converted once more."""
        return not (self.changed or self.added or self.removed)

    @property
    def only_new_rows(self) -> bool:
        """Whether nothing changed but position rows beyond those that the dense model has."""
        positions = self.record.origin.positions
        if self.added or self.removed or len(self.changed) > 1:
            return False
        if not self.changed:
            return True
        return positions is not None and self.first_row is not None and self.first_row >= positions.source_rows


@dataclass(frozen=True)
class ConversionRecord:
    """conversion.json. Names are those of tensors; `docs/records.md` shows an example.

    Attributes:
        family: the source's, one of `bert.families.FAMILIES`.
        renamed: source's name -> written name.
        changed: written name -> what is done to its values.
        added: written names of tensors that the source does not have.
        dropped: source's name -> why it is left out.
        buffers: source's name, one of `dropped` -> its values, where the way back could not compute the same bits.
        tied: source's name that is not written -> written name with the same bytes.
        implied_config: fields of the new config.json that the source's tensors decided.
        positions: None where the position embeddings stay.
        sparse_source: whether the source was sparse already, so that its own layouts are kept.
        skipped: what is stored next to the source's tensors -> why it is not read.
        not_finite: tensor -> `NaN` or `infinite`, for those that hold such a value.
        removed_fields: fields of the source's config.json that are not in the new one.
        attn_implementation: what config.json names as the attention; None in records from before it did.
        files: what was written, except the record, the card and its picture.
        lengths: what changed in the files of the tokenizer and of sentence-transformers; None in records before 0.2.
        trained_from: the earlier conversion, where the source is a model that was trained from one.
    """

    family: str
    source: SourceEntry
    options: ChosenOptions
    seed: int
    source_length: int
    max_length: int
    sparsity: dict[str, Any]
    density: float
    renamed: dict[str, str]
    changed: dict[str, Change]
    added: list[str]
    dropped: dict[str, DropReason]
    tied: dict[str, str]
    positions: Positions | None
    files: dict[str, FileEntry]
    sparse_source: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    lengths: list[LengthChange] | None = None
    not_finite: dict[str, str] = field(default_factory=dict)
    removed_fields: list[str] = field(default_factory=list)
    implied_config: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, StoredBuffer] = field(default_factory=dict)
    attn_implementation: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    bsa_export: str = ""
    trained_from: Training | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family: expected one of {', '.join(FAMILIES)}")
        if min(self.source_length, self.max_length) < 1:
            raise ValueError("expected lengths of at least 1")
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
                raise ValueError("files: expected paths inside the folder")

    @property
    def origin(self) -> ConversionRecord:
        """The record of the first conversion, which came before any training."""
        record = self
        while record.trained_from is not None:
            record = record.trained_from.record
        return record

    @property
    def base_model(self) -> str | None:
        """The nearest repository that the model comes from: that of a conversion it was trained from, or the source."""
        record = self
        while record.trained_from is not None:
            if record.trained_from.repo is not None:
                return record.trained_from.repo
            record = record.trained_from.record
        return record.source.repo

    @property
    def lost_conversion(self) -> bool:
        """Whether it comes from a conversion that was not found, so that nobody knows what was trained since."""
        return any(note.kind is NoteKind.NO_ANCESTOR for note in self.origin.notes)

    @property
    def trainings(self) -> list[Training]:
        """The trainings that changed something, the last one first."""
        found, record = [], self
        while record.trained_from is not None:
            found.append(record.trained_from)
            record = record.trained_from.record
        return [training for training in found if not training.changed_nothing]

    @property
    def training(self) -> Training | None:
        """The last training that changed something."""
        return next(iter(self.trainings), None)


@dataclass(frozen=True)
class LaterRun:
    """A later verification of the same files that compared less, so that the record keeps the earlier result."""

    verdict: Verdict
    sentence: str = ""
    device: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    finished: str = ""


@dataclass(frozen=True)
class VerificationRecord:
    """verification.json. `files` are the sha256 of the files that were verified; `sentence` is for people.

    `later` is the last run on the same files that compared less; None where the record is that of the last run.
    """

    verdict: Verdict
    checks: list[Check]
    files: dict[str, str]
    sentence: str = ""
    device: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    finished: str = ""
    later: LaterRun | None = None


@dataclass(frozen=True)
class PullRecord:
    """pulled.json: the repository, the revision that was asked for, its commit, and the sha256 of each file."""

    repo: str
    revision: str
    commit: str
    files: dict[str, str]


def read_conversion(folder: Path) -> ConversionRecord | None:
    """conversion.json of a folder, None where there is none. Raises CheckpointError where it is not such a record."""
    hint = "convert again with bsa-convert"
    return _read(Path(folder) / CONVERSION_RECORD, ConversionRecord, _today_conversion, hint)


def read_verification(folder: Path) -> VerificationRecord | None:
    """verification.json of a folder, None where there is none. Raises CheckpointError where it is not such a record."""
    hint = "verify again with bsa-verify"
    return _read(Path(folder) / VERIFICATION_RECORD, VerificationRecord, _today_verification, hint)


def read_pull(folder: Path) -> PullRecord | None:
    """pulled.json of a folder, None where there is none. Raises CheckpointError where it is not such a record."""
    return _read(Path(folder) / PULL_RECORD, PullRecord, lambda content: content, "pull again with bsa-pull")


def write_verification(folder: Path, record: VerificationRecord) -> str | None:
    """Writes verification.json, whole or not at all; only into a folder that was converted, or passed the file check.

    Returns:
        Why it cannot be written; None where it was, or where the folder is not a converted one.
    """
    folder = Path(folder)
    converted = any((folder / name).is_file() for name in (CONVERSION_RECORD, VERIFICATION_RECORD))
    if not converted and not any(check.kind is Kind.FILE and check.passed for check in record.checks):
        return None
    content = to_json(record)
    if record.later is None:
        content.pop("later", None)
    for check, kept in zip(content["checks"], record.checks, strict=True):
        check["name"] = kept.name  # for people, and for earlier releases
        for name in ("details", "numerical", "seconds"):
            check.pop(name, None)  # a field that was read as its default is absent
    try:
        replace_file(folder / VERIFICATION_RECORD, json_text(content).encode())
    except OSError as error:
        return error.strerror or str(error)
    return None


def to_json(record: object) -> Any:
    """A record, or any value of one, as JSON holds it: enums by value; what JSON has no number for as text."""
    return _finite(msgspec.to_builtins(record))


def _read(path: Path, kind: type[Record], today: Callable[[Mapping[str, Any]], Any], hint: str) -> Record | None:
    try:
        content = read_json(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        return None
    try:
        return msgspec.convert(today(content) if isinstance(content, Mapping) else content, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"it is damaged ({error})", where=path, hint=hint) from None
    except RecursionError:
        raise CheckpointError("it is damaged (nested too deeply)", where=path, hint=hint) from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# What releases before 0.2 wrote as sentences.
_OLD_ROWS = re.compile(r"(\d+) rows to (\d+), (tile|interpolate)")
_OLD_DTYPE = re.compile(r"(\w+) to (F32|F16|BF16)$")


def _today_conversion(content: Mapping[str, Any]) -> dict[str, Any]:
    today = dict(content)
    if isinstance(changed := today.get("changed"), dict):
        today["changed"] = {
            name: _old_change(rule) if isinstance(rule, str) else rule for name, rule in changed.items()
        }
    if isinstance(dropped := today.get("dropped"), dict):
        today["dropped"] = {name: _old_reason(why) if isinstance(why, str) else why for name, why in dropped.items()}
    if isinstance(notes := today.get("notes"), list):
        today["notes"] = [{"kind": "other", "text": note} if isinstance(note, str) else note for note in notes]
    if isinstance(training := today.get("trained_from"), Mapping) and isinstance(training.get("record"), Mapping):
        today["trained_from"] = {**training, "record": _today_conversion(training["record"])}
    return today


def _old_change(rule: str) -> dict[str, Any]:
    change: dict[str, Any] = {"layout": rule.startswith("the stored layout")}
    if match := _OLD_ROWS.match(rule):
        change |= {"rows": [int(match[1]), int(match[2])], "method": match[3]}
    if match := _OLD_DTYPE.search(rule):
        change["dtype"] = [match[1], match[2]]
    return change


def _old_reason(why: str) -> str:
    if why.startswith("a buffer that the model makes itself"):
        return DropReason.CHANGED_BUFFER if why.endswith("with other values") else DropReason.BUFFER
    return why


_OLD_STATUS = {"told": Status.INFO}


def _today_verification(content: Mapping[str, Any]) -> dict[str, Any]:
    today = dict(content)
    if isinstance(checks := today.get("checks"), list):
        today["checks"] = [_today_check(check) if isinstance(check, Mapping) else check for check in checks]
    return today


def _today_check(check: Mapping[str, Any]) -> dict[str, Any]:
    today = dict(check)
    if isinstance(status := today.get("status"), str):
        today["status"] = _OLD_STATUS.get(status, status)
    if "kind" not in today and isinstance(name := today.get("name"), str):
        kind = next((kind for kind in Kind if name.startswith(kind)), name)
        today |= {"kind": kind, "part": name.removeprefix(str(kind)).lstrip(":, ")}
    return today
