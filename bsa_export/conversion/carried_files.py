"""The files that a conversion carries over: tokenizer, modules of sentence-transformers, license, further heads.

`plan` decides about every file of the source's folder: carried, with its lengths set to the new model's, or left behind
for a reason. It only reads. `write` writes what was planned. Nothing of the source is executed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from hashlib import sha256
from pathlib import Path, PurePosixPath

from bsa_export.bert.config_file import OLD_CONFIG
from bsa_export.checkpoint.open import SHARD, WEIGHT_ENDINGS, open_checkpoint, other_file
from bsa_export.checkpoint.safetensors_file import read_safetensors
from bsa_export.checkpoint.table import Checkpoint, SkipReason, Tensor, file_stamp
from bsa_export.checkpoint.writer import FileRecord, write_safetensors
from bsa_export.conversion.left_behind import (
    CARD_FILES,
    LICENSES,
    PICKLES,
    RECORDS,
    SKIPPED_FOLDERS,
    UNREMARKABLE,
    LeftBehind,
    matches,
    reason_by_name,
)
from bsa_export.conversion.lengths import has_lengths, set_lengths
from bsa_export.conversion.source_folder import (
    WITHOUT_LINKS,
    SourceFolder,
    encoder_folder,
    module_paths,
    read_json_text,
    read_modules,
    refuse_other_files,
    sorted_entries,
    stamp_of,
)
from bsa_export.converted.names import (
    CARD,
    CONFIG,
    MODULE_PICKLE,
    MODULES,
    PICKLE_INDEX,
    SENTENCE_FILES,
    TOKENIZER_FILES,
)
from bsa_export.converted.records import LengthChange, Note, NoteKind
from bsa_export.errors import CheckpointError
from bsa_export.files import PIECE_BYTES, open_file, parse_json, plain_error, read_text
from bsa_export.text import some

OF_ALL_MODULES = (MODULES, "config_sentence_transformers.json")
OF_THE_ENCODER = (*TOKENIZER_FILES, *(name for name in SENTENCE_FILES if name not in OF_ALL_MODULES))
# Classes of sentence-transformers 0.x, which one class, Transformer, has replaced.
OLD_ENCODERS = tuple(
    f"sentence_transformers.models.{name}"
    for name in ("BERT", "RoBERTa", "DistilBERT", "CamemBERT", "XLMRoBERTa", "ALBERT", "XLNet")
)
SAFETENSORS = "model.safetensors"
MOST_FILES = 10_000  # in the folders of all modules
MOST_NAMES = 20  # in a note


class How(str, Enum):
    """How a file is carried over."""

    COPIED = "copied"  # every byte
    EDITED = "edited"  # JSON with other values, `CarriedFile.changes`; every other character stays
    AS_SAFETENSORS = "as safetensors"  # the tensors of a pickle
    PATH_EDITED = "path edited"  # modules.json whose encoder moves to the top folder

    __str__ = str.__str__


@dataclass(frozen=True)
class CarriedFile:
    """A file of the converted folder that comes from the source's folder.

    Attributes:
        name: its path in the converted folder, with `/`.
        how: what happens to it on the way.
        source: the file that it comes from, links resolved.
        changes: the lengths that change.
        text: its new content where it is edited, else None.
        tensors: its new content where it becomes a safetensors file, else None.
        stamps: file -> stamp at the time of planning, of each file that is read when this one is written.
    """

    name: str
    how: How
    source: Path
    changes: tuple[LengthChange, ...] = ()
    text: str | None = None
    tensors: Mapping[str, Tensor] | None = None
    stamps: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class CarriedFiles:
    """What `plan` decided: the files that are carried over, and the others with the reason; folders end with `/`."""

    carried: list[CarriedFile]
    left_behind: dict[str, LeftBehind]

    @property
    def changes(self) -> list[LengthChange]:
        """Every length that changes."""
        return [change for file in self.carried for change in file.changes]

    def notes(self) -> list[Note]:
        """Notes for the user: what is left behind, one note for each reason, without files that every folder has."""
        notes = []
        for reason in LeftBehind:
            names = [name for name, why in self.left_behind.items() if why is reason]
            if names and reason not in UNREMARKABLE:
                notes.append(Note(NoteKind.LEFT_BEHIND, f"left behind: {some(names, MOST_NAMES)} ({reason})"))
        return notes


def plan(
    source: Path,
    checkpoint: Checkpoint,
    source_length: int,
    max_length: int,
    *,
    keep_card: bool = False,
    restore: Sequence[LengthChange] | None = None,
) -> CarriedFiles:
    """Decides about every file next to the weights. Reads JSON files and the tables of weights; writes nothing.

    With `max_length == source_length` every length stays. Else every length of the tokenizer and of
    sentence-transformers becomes `max_length`, whatever it was (`lengths.set_lengths`).

    Args:
        source: what the user named: a folder, whose every file is decided about, or a file of weights, from whose
            folder only tokenizer and sentence-transformers files are carried.
        checkpoint: the opened weights. Its folder holds config.json and the tokenizer.
        source_length: tokens that the source reads (reserved position rows not counted).
        max_length: tokens that the new model reads.
        keep_card: carry README.md and its pictures over.
        restore: on the way back, the recorded changes to undo (`lengths.set_lengths`).

    Raises:
        CheckpointError: a file is damaged, is not what its name says, is stored outside the folder, or modules.json
            needs what cannot be carried.
    """
    source = Path(source)
    folder = source if source.is_dir() and encoder_folder(source) == checkpoint.folder else checkpoint.folder
    length = max_length if source_length != max_length else None
    try:
        return _Planner(
            SourceFolder(folder),
            checkpoint,
            length=length,
            restore=restore,
            everything=source.is_dir(),
            keep_card=keep_card,
        ).plan()
    except RecursionError:
        raise CheckpointError("a JSON file in it is nested too deeply", where=folder) from None
    except OSError as error:
        raise CheckpointError(
            f"it cannot be read ({error.strerror or error})", where=error.filename or folder
        ) from None


def write(planned: CarriedFiles, folder: Path) -> dict[str, FileRecord]:
    """Writes the planned files into `folder`. Returns name -> record. No file that is there is overwritten.

    Raises:
        CheckpointError: a file changed since it was planned or cannot be read, or the folder cannot be written.
    """
    records = {}
    for file in planned.carried:
        target = Path(folder) / file.name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.tensors is not None:
                records[file.name] = write_safetensors(target, file.tensors)
            elif file.text is not None:
                records[file.name] = _write_text(target, file.text)
            else:
                records[file.name] = _copy(file.source, target)
        except OSError as error:
            raise plain_error(error, target) from None
        for path, stamp in file.stamps.items():
            if stamp_of(path) != stamp:
                raise CheckpointError(
                    "it was changed while it was being read", where=path, hint="run again when nothing writes to it"
                )
    return records


def _write_text(target: Path, text: str) -> FileRecord:
    data = text.encode("utf-8")
    with open(target, "xb") as file:
        file.write(data)
    return FileRecord(len(data), sha256=sha256(data).hexdigest())


def _copy(source: Path, target: Path) -> FileRecord:
    """Copies a regular file piece by piece, as many bytes as it had at the start."""
    digest, count = sha256(), 0
    with open_file(source) as file, open(target, "xb") as out:
        most = os.fstat(file.fileno()).st_size
        while count < most:
            try:
                piece = file.read(min(PIECE_BYTES, most - count))
            except OSError as error:
                raise CheckpointError(f"it cannot be read ({error.strerror})", where=source) from None
            if not piece:
                break
            out.write(piece)
            digest.update(piece)
            count += len(piece)
    return FileRecord(count, sha256=digest.hexdigest())


class _Planner:
    """`plan`, one part of the folder after the other."""

    def __init__(
        self,
        root: SourceFolder,
        checkpoint: Checkpoint,
        *,
        length: int | None,
        restore: Sequence[LengthChange] | None,
        everything: bool,
        keep_card: bool,
    ):
        self.root = root
        self.checkpoint = checkpoint
        self.length = length
        self.restore = restore
        self.encoder = PurePosixPath(checkpoint.folder.relative_to(root.folder))  # its folder, seen from the top
        self.everything = everything
        self.keep_card = keep_card
        self.carried: dict[str, CarriedFile] = {}
        self.left_behind: dict[str, LeftBehind] = {}
        self.weights = {Path(os.path.realpath(path)) for path in checkpoint.files}
        self.files_of_modules = 0
        self.modules = dict.fromkeys(self.module_folders())  # in their order
        self.above_modules = {parent for module in self.modules for parent in module.parents}

    def plan(self) -> CarriedFiles:
        """The folder at the top, that of the encoder if it has one of its own, then those of the modules."""
        top = PurePosixPath()
        if self.encoder != top:
            self.top_folder(self.encoder, OF_THE_ENCODER)
            self.top_folder(top, OF_ALL_MODULES)
        else:
            self.top_folder(top, (*OF_THE_ENCODER, *OF_ALL_MODULES))
        for module in self.modules:
            if module != self.encoder:
                self.module(module)
        self.refuse_collisions()
        self.refuse_custom_code()
        return CarriedFiles(list(self.carried.values()), dict(sorted(self.left_behind.items())))

    # The top folder.

    def module_folders(self) -> list[PurePosixPath]:
        """The folders that modules.json names, each once, without the one at the top."""
        if not os.path.lexists(self.root.folder / MODULES):
            return []
        folders = []
        for path in dict.fromkeys(module_paths(read_modules(self.root), self.root.folder / MODULES)):
            if not path.parts:
                continue
            if self.root.own(self.root.folder / path) == self.root.real:
                raise CheckpointError(
                    "expected a folder inside it", found=f"a link back to it, {path}", where=self.root.folder
                )
            folders.append(path)
        return folders

    def top_folder(self, folder: PurePosixPath, patterns: Collection[str]) -> None:
        """The files of a folder: those of `patterns` are carried, also licenses and heads if every file counts."""
        for entry in sorted_entries(self.root.folder / folder):
            name, path = entry.name, Path(entry.path)
            shown = _text(str(folder / name))
            if os.path.isdir(entry.path):
                if self.everything:
                    self.folder(folder / name)
            elif matches(name, patterns):
                self.carry(name, path)
            elif not self.everything or Path(os.path.realpath(path)) in self.weights:
                continue
            elif matches(name.lower(), LICENSES) or (self.keep_card and matches(name, CARD_FILES)):
                self.carry(name, path)
            elif (reason := self.reason(path)) is None:
                self.head(path, shown)
            else:
                self.left_behind[shown] = reason

    def folder(self, path: PurePosixPath) -> None:
        """A folder that is not a module's: left behind as a whole, or what is next to the modules in it."""
        if path in self.modules:
            return
        if path not in self.above_modules:
            self.left_behind[f"{_text(str(path))}/"] = reason_by_name(path.name) or LeftBehind.NOT_OF_THE_MODEL
            return
        for entry in sorted_entries(self.root.folder / path):
            if os.path.isdir(entry.path):
                self.folder(path / entry.name)
            else:
                reason = reason_by_name(entry.name) or LeftBehind.NOT_OF_THE_MODEL
                self.left_behind[_text(str(path / entry.name))] = reason

    def reason(self, path: Path) -> LeftBehind | None:
        """Why a file at the top is left behind; None for tensors that may belong to the model."""
        name = path.name
        if name == CARD:
            return LeftBehind.CARD
        if name in (CONFIG, OLD_CONFIG):
            return LeftBehind.REPLACED
        if name in RECORDS:
            return LeftBehind.RECORD
        if reason := reason_by_name(name):
            return reason
        if name.endswith(".index.json"):
            of_the_weights = Path(name.removesuffix(".index.json")).suffix in {
                file.suffix for file in self.checkpoint.files
            }
            return LeftBehind.REPLACED if of_the_weights else LeftBehind.SAME_WEIGHTS
        if SHARD.search(name) and name.endswith(WEIGHT_ENDINGS):
            return LeftBehind.SAME_WEIGHTS
        if not name.endswith(WEIGHT_ENDINGS):
            return LeftBehind.UNREADABLE if matches(name, PICKLES) else LeftBehind.NOT_OF_THE_MODEL
        return None if self.root.holds(path) else LeftBehind.LINK

    def head(self, path: Path, name: str) -> None:
        """Tensors next to the weights: a head of its own is carried under its own name, as safetensors."""
        found = other_file(path, self.checkpoint).reason
        if found is not SkipReason.OTHER_WEIGHTS:
            same = found is SkipReason.SAME_WEIGHTS
            self.left_behind[name] = LeftBehind.SAME_WEIGHTS if same else LeftBehind.UNREADABLE
            return
        opened, target = open_checkpoint(path), f"{path.stem}.safetensors"
        larger = _nbytes(opened.tensors) >= _nbytes(self.checkpoint.tensors)
        if larger or re.match(r"(pytorch_)?model[.-]", target):
            self.left_behind[name] = LeftBehind.OTHER_WEIGHTS
        elif target in self.carried or (target != path.name and path.with_name(target).exists()):
            self.left_behind[name] = LeftBehind.OTHER_FORMAT
        else:
            how = How.COPIED if path.name == target else How.AS_SAFETENSORS
            self.put(_weights_file(target, how, opened))

    def carry(self, name: str, path: Path) -> None:
        """A file that is copied, or edited where its name says that it holds lengths, or the paths of modules."""
        real = self.root.own(path)
        if not name.endswith(".json"):
            refuse_other_files(path, only_size=name not in TOKENIZER_FILES)
            self.put(CarriedFile(name, How.COPIED, real, stamps={real: stamp_of(real)}))
            return
        text, stamp = read_json_text(path)
        planned = CarriedFile(name, How.COPIED, real, stamps={real: stamp})
        if name == MODULES and self.encoder.parts:
            planned = replace(planned, how=How.PATH_EDITED, text=self.modules_with_encoder_at_the_top())
        elif self.length is not None and has_lengths(name):
            edited, changes = set_lengths(name, text, self.length, self.restore)
            if edited != text:
                planned = replace(planned, how=How.EDITED, text=edited, changes=tuple(changes))
        self.put(planned)

    def modules_with_encoder_at_the_top(self) -> str:
        """modules.json for an encoder that moves to the top, with a class that sentence-transformers still has."""
        entries = read_modules(self.root)
        for entry in entries:
            if PurePosixPath(entry["path"]) == self.encoder:
                entry["path"] = ""
                if entry.get("type") in OLD_ENCODERS:
                    entry["type"] = "sentence_transformers.models.Transformer"
        return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"

    def put(self, file: CarriedFile) -> None:
        try:
            file.name.encode("utf-8")
        except UnicodeEncodeError:
            raise CheckpointError(
                "expected file names in UTF-8", found=ascii(file.name), where=self.root.folder
            ) from None
        self.carried.setdefault(file.name, file)

    # The folders of modules.

    def module(self, path: PurePosixPath) -> None:
        """Every file of a module's folder, at any depth. A module without settings has no folder."""
        if not os.path.lexists(self.root.folder / path):
            return
        folders = [path]
        while folders:
            folder = folders.pop()
            names = []
            for entry in sorted_entries(self.root.folder / folder):
                self.count_file()
                if not os.path.isdir(entry.path):
                    names.append(entry.name)
                elif entry.name.startswith(".") or entry.name in SKIPPED_FOLDERS:
                    reason = SKIPPED_FOLDERS.get(entry.name, LeftBehind.HIDDEN)
                    self.left_behind[f"{_text(str(folder / entry.name))}/"] = reason
                elif entry.is_symlink():
                    raise CheckpointError(
                        "expected the folder of a module",
                        found="a link to a folder",
                        where=entry.path,
                        hint=WITHOUT_LINKS,
                    )
                else:
                    folders.append(folder / entry.name)
            self.module_files(folder, names)

    def count_file(self) -> None:
        self.files_of_modules += 1
        if self.files_of_modules > MOST_FILES:
            raise CheckpointError(
                f"expected at most {MOST_FILES:,} files in the folders of its modules", where=self.root.folder / MODULES
            )

    def module_files(self, folder: PurePosixPath, names: list[str]) -> None:
        """The files of one folder of a module. Its pickled weights become safetensors unless it has those too."""
        here = self.root.folder / folder
        safe = SAFETENSORS in names or f"{SAFETENSORS}.index.json" in names
        pickled = next((name for name in (PICKLE_INDEX, MODULE_PICKLE) if name in names), None)
        used: set[str] = set()
        if pickled and not safe:
            self.root.own(here / pickled)
            opened = open_checkpoint(here / pickled)
            for file in opened.files:
                self.root.own(file)
            used = {pickled, *(file.name for file in opened.files)}
            self.put(_weights_file(str(folder / SAFETENSORS), How.AS_SAFETENSORS, opened))
        for name in names:
            path = str(folder / name)
            if name in used:
                continue
            if name in (MODULE_PICKLE, PICKLE_INDEX) or (SHARD.search(name) and name.endswith(".bin")):
                self.left_behind[_text(path)] = LeftBehind.SAME_WEIGHTS
            elif (reason := reason_by_name(name)) and reason is not LeftBehind.ADAPTER:
                self.left_behind[_text(path)] = reason
            elif name.endswith(".safetensors"):
                self.root.own(here / name)
                self.put(_weights_file(path, How.COPIED, _table_of(here / name)))
            elif matches(name, PICKLES):
                raise CheckpointError(
                    f"expected the weights of a module as {SAFETENSORS} or {MODULE_PICKLE}",
                    found=name,
                    where=here,
                    hint="save the model again with SentenceTransformer(FOLDER).save_pretrained(COPY)",
                )
            else:
                self.carry(path, here / name)

    # What may not be.

    def refuse_collisions(self) -> None:
        """Refuses a module's folder that has the name of a file that the conversion writes."""
        files = {*self.carried, CONFIG, CARD, SAFETENSORS, *RECORDS}
        for name in self.carried:
            if taken := next((str(folder) for folder in PurePosixPath(name).parents if str(folder) in files), None):
                raise CheckpointError(
                    "expected another name for the folder of a module", found=taken, where=self.root.folder / MODULES
                )

    def refuse_custom_code(self) -> None:
        """Refuses modules whose class is defined in the folder: sentence-transformers cannot load them without code."""
        if MODULES not in self.carried:
            return
        code = {entry.name[:-3]: entry.name for entry in sorted_entries(self.root.folder) if entry.name.endswith(".py")}
        code |= {PurePosixPath(path).stem: path for path in self.left_behind if path.endswith(".py")}
        settings = [file.source for name, file in self.carried.items() if "/" in name and name.endswith("config.json")]
        for path in (self.carried[MODULES].source, *settings) if code else ():
            for name in _class_names(parse_json(read_text(path))):
                if file := code.get(name.split(".")[0]):
                    raise CheckpointError(
                        f"its module {name} is defined in {file}, and code is not carried over",
                        where=self.root.folder / MODULES,
                        hint=f"to convert the encoder alone, copy the folder without {MODULES}",
                    )


def _class_names(content: object) -> Iterator[str]:
    """Texts under the keys with which sentence-transformers names classes, at any depth of what a file holds."""
    stack = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            for key in ("type", "tokenizer_class"):
                if isinstance(value.get(key), str):
                    yield value[key]
            if isinstance(value.get("types"), dict):
                yield from (name for name in value["types"].values() if isinstance(name, str))
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


def _weights_file(name: str, how: How, opened: Checkpoint) -> CarriedFile:
    """A file of tensors: copied byte by byte if it is a safetensors file already."""
    tensors = None if how is How.COPIED else opened.tensors
    return CarriedFile(name, how, opened.files[0], tensors=tensors, stamps=dict(opened.stamps))


def _table_of(path: Path) -> Checkpoint:
    """The table of a safetensors file, which may be one shard of several."""
    stamp = file_stamp(path)
    tensors, metadata = read_safetensors(path)
    return Checkpoint(tensors, path.parent, [path], metadata=metadata, stamps={path: stamp})


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(row.nbytes for row in tensors.values())


def _text(name: str) -> str:
    """A file's name as text, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", "replace")
