"""The tokenizer and sentence-transformers files beside the weights, with their lengths brought up to the converted model's."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.writer import write_weights
from bsa_export.converted.names import MODULE_FILES, MODULE_PICKLE, SENTENCE_FILES, TOKENIZER_FILES
from bsa_export.errors import CheckpointError

LENGTH_KEYS = {"model_max_length", "max_length", "max_len", "max_seq_length"}
NOT_THE_FILE = {
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file with git lfs pull"),
    b"<": ("an HTML or XML page", "download the file itself, not the page that shows it"),
    b"": ("an empty file", "download it again"),
}


@dataclass(frozen=True)
class Sidecar:
    """A file of the converted folder that comes from the source's folder.

    Attributes:
        name: its path in the converted folder, with `/`.
        how: "copied", or what is changed.
        source: the file it comes from.
        text: its new content where it changes, else None.
    """

    name: str
    how: str
    source: Path
    text: str | None = None


def plan(source_folder: Path, source_length: int, max_length: int) -> list[Sidecar]:
    """Finds the files to take along, and edits the lengths in them. Everything else in the folder is left out.

    With `max_length == source_length` nothing is edited. Else every length becomes `max_length`, whatever it was, also in
    `tokenizer.json`, which has a truncation and a padding of its own: padding to a fixed length becomes padding to the longest
    of the batch. All other bytes stay as they are.

    Args:
        source_folder: where the weights lie.
        source_length: tokens that the dense model reads (reserved position rows not counted).
        max_length: tokens that the converted model reads.

    Raises:
        CheckpointError: a file is damaged, is not the file that its name says, or modules.json leads out of the folder.
    """
    source_folder = Path(source_folder)
    extends = source_length != max_length
    names = [name for name in sorted(_names(source_folder)) if _is_part(name)]
    sidecars = [_sidecar(source_folder / name, name, max_length if extends else None) for name in names]
    if "modules.json" in names:
        for module in _module_folders(source_folder / "modules.json"):
            sidecars += _module_sidecars(source_folder, module)
    return sidecars


def write(source_folder: Path, target_folder: Path, source_length: int, max_length: int) -> dict[str, str]:
    """Writes what `plan` finds into `target_folder`. Links are followed. Returns name -> "copied" or what was changed."""
    sidecars = plan(source_folder, source_length, max_length)
    for sidecar in sidecars:
        target = Path(target_folder) / sidecar.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if sidecar.text is not None:
            target.write_text(sidecar.text, encoding="utf-8", newline="")
        elif sidecar.source.name == MODULE_PICKLE:
            write_weights(target.parent, open_checkpoint(sidecar.source).tensors)
        else:
            shutil.copyfile(sidecar.source, target)
    return {sidecar.name: sidecar.how for sidecar in sidecars}


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if not entry.is_dir()] if folder.is_dir() else []


def _is_part(name: str) -> bool:
    return name in TOKENIZER_FILES or any(fnmatch(name, pattern) for pattern in SENTENCE_FILES)


def _module_folders(modules: Path) -> list[str]:
    """The folders that modules.json names, as sentence-transformers reads it: a list of objects with a `path`."""
    entries = _parsed(modules, _text(modules))
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in entries
    ):
        raise CheckpointError("expected a list of modules, each with a path", where=modules)
    folders = [entry["path"].rstrip("/") for entry in entries]
    for folder in folders:
        if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
            raise CheckpointError("expected the paths of its modules to lie beside it", found=folder, where=modules)
    return [folder for folder in folders if folder not in ("", ".")]


def _module_sidecars(source_folder: Path, module: str) -> list[Sidecar]:
    names = sorted(_names(source_folder / module))
    sidecars = [
        _sidecar(source_folder / module / name, f"{module}/{name}", None)
        for name in names
        if any(fnmatch(name, pattern) for pattern in MODULE_FILES)
    ]
    if MODULE_PICKLE in names and "model.safetensors" not in names:
        pickle = source_folder / module / MODULE_PICKLE
        open_checkpoint(pickle)
        sidecars.append(Sidecar(f"{module}/model.safetensors", f"{MODULE_PICKLE} as safetensors", pickle))
    return sidecars


def _sidecar(source: Path, name: str, length: int | None) -> Sidecar:
    """The file as it is, or with its lengths set to `length`."""
    if not name.endswith(".json"):
        _refuse_other_files(source)
        return Sidecar(name, "copied", source)
    text = _text(source)
    content = _parsed(source, text)
    if length is None or not _has_lengths(name) or not isinstance(content, dict):
        return Sidecar(name, "copied", source)
    edited, changes = _tokenizer(text, length) if name == "tokenizer.json" else _config(text, length)
    if name == "tokenizer_config.json" and not LENGTH_KEYS & content.keys():
        edited, changes = _with_member(edited, "model_max_length", length), [*changes, f"model_max_length {length}"]
    if not changes:
        return Sidecar(name, "copied", source)
    return Sidecar(name, ", ".join(changes), source, edited)


def _has_lengths(name: str) -> bool:
    return name in ("tokenizer.json", "tokenizer_config.json") or fnmatch(name, "sentence_*_config.json")


def _refuse_other_files(path: Path) -> None:
    """Raises CheckpointError when `path` is no file, or holds what a download left in place of the file."""
    try:
        if not path.is_file():
            raise CheckpointError("expected a file", found="a broken link" if path.is_symlink() else None, where=path)
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error.strerror})", where=path) from None
    for start, (found, hint) in NOT_THE_FILE.items():
        # A vocabulary may begin with a token such as <s>.
        page = start == b"<" and not re.match(rb"<(!doctype|html|\?xml)", head, re.IGNORECASE)
        if (head.startswith(start) if start else not head) and not page:
            raise CheckpointError(f"expected {path.name} itself", found=found, where=path, hint=hint)


def _text(path: Path) -> str:
    _refuse_other_files(path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"expected JSON in UTF-8 ({error.reason} at byte {error.start})", where=path) from None


def _parsed(path: Path, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"expected JSON ({error})", where=path, hint="download it again") from None


def _tokenizer(text: str, length: int) -> tuple[str, list[str]]:
    """The `tokenizer.json` of Hugging Face tokenizers, truncating at `length` and not padding to a fixed length."""
    changes = []

    def truncation(value: str) -> str:
        return _edit(value, {"max_length": lambda _: str(length)}) if value.startswith("{") else value

    def padding(value: str) -> str:
        return _edit(value, {"strategy": strategy}) if value.startswith("{") else value

    def strategy(value: str) -> str:
        return '"BatchLongest"' if value.startswith("{") else value

    edited = _edit(text, {"truncation": truncation, "padding": padding})
    before, after = json.loads(text), json.loads(edited)
    if before.get("truncation") != after.get("truncation"):
        changes.append(f"truncation {before['truncation'].get('max_length')} -> {length}")
    if before.get("padding") != after.get("padding"):
        changes.append(f"padding {next(iter(before['padding']['strategy'].values()))} -> longest of the batch")
    return edited, changes


def _config(text: str, length: int) -> tuple[str, list[str]]:
    """A flat config with every integer under LENGTH_KEYS set to `length`, one level of nested objects included."""
    changes = []

    def number(key: str) -> Callable[[str], str]:
        def edit(value: str) -> str:
            if not re.fullmatch(r"\d+", value) or int(value) == length:
                return value
            changes.append(f"{key} {value if len(value) < 10 else 'unlimited'} -> {length}")
            return str(length)

        return edit

    keys = {key: number(key) for key in LENGTH_KEYS}
    nested = {
        key: lambda value: _edit(value, keys) for key, value in json.loads(text).items() if isinstance(value, dict)
    }
    return _edit(text, nested | keys), changes


def _edit(text: str, edits: dict[str, Callable[[str], str]]) -> str:
    """The JSON object `text` with the text of some members' values replaced; every other character stays."""
    pieces, position = [], 0
    for key, start, end in _members(text):
        if key in edits:
            pieces += [text[position:start], edits[key](text[start:end])]
            position = end
    return "".join([*pieces, text[position:]])


def _members(text: str) -> list[tuple[str, int, int]]:
    """Where the values of a JSON object lie in its text: (key, start, end)."""
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"[ \t\n\r]*")
    members = []
    position = space.match(text, space.match(text).end() + 1).end()
    while text[position] != "}":
        key, position = decode(text, position)
        start = space.match(text, space.match(text, position).end() + 1).end()
        _, end = decode(text, start)
        members.append((key, start, end))
        position = space.match(text, end).end()
        if text[position] == ",":
            position = space.match(text, position + 1).end()
    return members


def _with_member(text: str, key: str, value: int) -> str:
    """The JSON object `text` with one more member at its end, set as the first one is."""
    members = _members(text)
    if not members:
        return f'{{"{key}": {value}}}'
    first, last = text.index("{") + 1, members[-1][2]
    before = text[first : text.index('"', first)]
    colon = ": " if text[members[0][1] - 1] == " " else ":"
    return f'{text[:last]},{before or (" " if colon == ": " else "")}"{key}"{colon}{value}{text[last:]}'
