"""The folder of a source: which files are its own, where its encoder is stored, bounded and checked reads."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from bsa_export.checkpoint.open import KNOWN_NAMES
from bsa_export.checkpoint.table import file_stamp
from bsa_export.converted.names import CONFIG, MODULES
from bsa_export.errors import CheckpointError
from bsa_export.files import MAX_JSON_BYTES, open_file, parse_json, read_text

MOST_BYTES = 100_000_000  # of a file that is copied and holds no weights: the largest vocabularies have some 20 MB
MOST_MODULES = 1000
LONGEST_PATH = 1000  # characters of the path of a module
MOST_FOLDERS = 8  # in it
WITHOUT_LINKS = "make a copy without links: cp -rL FOLDER COPY"


class SourceFolder:
    """The folder of the source: which files are its own, and not behind a link out of it.

    A snapshot in the Hub's cache consists of links to `blobs/` of the same repository: those are its own files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.real = Path(os.path.realpath(folder))
        snapshots = next((path for path in self.real.parents if path.name == "snapshots"), None)
        cached = snapshots is not None and snapshots.parent.name.startswith("models--")
        self.blobs = snapshots.parent / "blobs" if cached and snapshots else None

    def holds(self, path: Path) -> Path | None:
        """The file that `path` leads to, if it is one of the source's own."""
        real = Path(os.path.realpath(path))
        if real.is_relative_to(self.real):
            return real
        own_blob = real.parent == self.blobs and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", real.name)
        return real if own_blob else None

    def own(self, path: Path) -> Path:
        """The file that `path` leads to. Raises CheckpointError if it is not one of the source's own."""
        if (real := self.holds(path)) is None:
            raise CheckpointError(
                "expected a file of this folder",
                found="a link out of it",
                where=path,
                hint=WITHOUT_LINKS,
            )
        return real


def encoder_folder(source: Path) -> Path:
    """Where a source stores its encoder: early sentence-transformers saved it in a module\'s folder (`0_BERT`).

    Returns:
        That folder, if `source` is a folder that has no weights at its top, and whose modules.json names it first;
        else `source`.

    Raises:
        CheckpointError: modules.json is damaged, or leads out of the folder.
    """
    source = Path(source)
    if not source.is_dir() or not (source / MODULES).is_file() or _has_weights(source):
        return source
    root = SourceFolder(source)
    paths = module_paths(read_modules(root), source / MODULES)
    first = source / paths[0] if paths else source
    if not (first / CONFIG).is_file() or not _has_weights(first):
        return source
    root.own(first)
    return first


def read_modules(root: SourceFolder) -> list[dict]:
    """modules.json as sentence-transformers reads it: a list of objects with a path."""
    path = root.folder / MODULES
    root.own(path)
    content = parse_json(read_json_text(path)[0])
    if not isinstance(content, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in content
    ):
        raise CheckpointError("expected a list of modules, each with a path", where=path)
    if len(content) > MOST_MODULES:
        raise CheckpointError(f"expected at most {MOST_MODULES:,} modules", found=f"{len(content):,}", where=path)
    return content


def module_paths(entries: list[dict], where: Path) -> list[PurePosixPath]:
    """The folders that modules.json names; the top folder is the empty path. Raises CheckpointError for one outside."""
    paths = []
    for entry in entries:
        text = entry["path"]
        path = PurePosixPath(text if len(text) < LONGEST_PATH else "..")
        outside = path.is_absolute() or ".." in path.parts
        if outside or not text.isprintable() or "\\" in text or len(path.parts) > MOST_FOLDERS:
            raise CheckpointError("expected the paths of its modules inside the folder", found=text, where=where)
        paths.append(path)
    return paths


def sorted_entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def read_json_text(path: Path) -> tuple[str, tuple[int, ...]]:
    """The text of a JSON file, which is checked to be one, and the file's stamp before it was read."""
    refuse_other_files(path)
    stamp = stamp_of(path)
    text = read_text(path, MAX_JSON_BYTES)
    try:
        parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"expected JSON ({str(error)[:200]})", where=path, hint="download it again") from None
    return text, stamp


def refuse_other_files(path: Path, *, only_size: bool = False) -> None:
    """Raises CheckpointError unless it is a regular file of a sane size, and not what a failed download leaves.

    Args:
        path: the file.
        only_size: accept an empty file, and a web page: a license may be one.
    """
    try:
        opened = open_file(path)
    except FileNotFoundError:
        raise CheckpointError("expected a file", found="a link to nothing", where=path) from None
    with opened as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise CheckpointError(f"expected at most {MOST_BYTES:,} bytes", found=f"{size:,}", where=path)
        head = file.read(64)
    found = hint = None
    if head.startswith(b"version https://git-lfs"):
        found, hint = "a Git LFS pointer", "fetch the file with git lfs pull"
    elif not head and not only_size:
        found, hint = "an empty file", "download it again"
    # A vocabulary may begin with a token such as <s>.
    elif re.match(rb"<(!doctype|html|\?xml)", head, re.IGNORECASE) and not only_size:
        found, hint = "an HTML or XML page", "download the file itself, not the page that shows it"
    if found:
        raise CheckpointError(f"expected {path.name} itself", found=found, where=path, hint=hint)


def stamp_of(path: Path) -> tuple[int, ...]:
    """`file_stamp`. Raises CheckpointError if the file is gone."""
    try:
        return file_stamp(path)
    except OSError as error:
        raise CheckpointError(f"it was removed while it was being read ({error.strerror})", where=path) from None


def _has_weights(folder: Path) -> bool:
    """Whether a folder has weights under a name of the Hub; a head of its own may have any other."""
    return any((folder / name).is_file() for name in KNOWN_NAMES)
