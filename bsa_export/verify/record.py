"""verification.json: which files a run covers, and how it is left in the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bsa_export.checkpoint.folder import CONVERSION_RECORD
from bsa_export.errors import BsaError
from bsa_export.hub.names import VERIFICATION_RECORD, of_model
from bsa_export.verify.checks import PASSED
from bsa_export.verify.file import sha256
from bsa_export.verify.folder import open_folder


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the files that make the converted model, by name: of all that bsa-push takes for a part of it."""
    folder = Path(folder)
    there = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = {name for name in there if of_model(name) and name != VERIFICATION_RECORD}
    with suppress(BsaError):
        opened = open_folder(folder)
        names |= {file.name for file in opened.checkpoint.files} | set(opened.record["files"] if opened.record else ())
    return {name: sha256(folder / name) for name in sorted(names) if (folder / name).is_file()}


def write_record(folder: Path, record: Mapping) -> str | None:
    """Writes verification.json, whole or not at all; into a converted folder only. Returns why it cannot be written, None if it is."""
    folder = Path(folder)
    opened = any(check["name"] == "file" and check["status"] == PASSED for check in record["checks"])
    if not opened and not any((folder / name).is_file() for name in (CONVERSION_RECORD, VERIFICATION_RECORD)):
        return None
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    try:
        replace_file(folder / VERIFICATION_RECORD, text.encode())
    except OSError as error:
        return error.strerror or str(error)
    return None


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file beside and renames it. Raises OSError; what was there is there still then."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
