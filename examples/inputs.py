"""What the other examples read: converted folders, texts and JSON lines. What is wrong with one ends the program."""

import json
import shlex
import sys
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bsa_export.converted.folder import ConvertedFolder, open_folder
from bsa_export.errors import BsaError
from bsa_export.hub.source import find_source


def converted_folder(model: str, recorded: bool = False) -> ConvertedFolder:
    """A converted model, here or on the Hub (`org/name`), or one that was trained from it and saved.

    Args:
        model: its folder or repository.
        recorded: whether conversion.json is needed, which says what the source read. A training does not save it.
    """
    try:
        folder = open_folder(find_source(model).path)
    except BsaError as error:
        sys.exit(str(error))
    if recorded and folder.record is None:
        command = f"bsa-convert {shlex.quote(model)} made/ --trained-from CONVERSION"
        sys.exit(f"{model}: no conversion.json; {command} writes one")
    return folder


def masking_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a masked LM."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.mask_token_id is None:
        sys.exit(f"{model}: expected a tokenizer with a mask token")
    return tokenizer


def document(file: str) -> str:
    """A text file that is not blank."""
    try:
        content = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{file}: {error}")
    return content if content.strip() else sys.exit(f"{file}: expected a text, found none")


def documents(file: str, least: int = 1) -> list[str]:
    """The `text` in each JSON line, once each, so that none is both held out and trained on."""
    found = list(dict.fromkeys(row["text"] for row in json_lines(file, text=str)))
    if len(found) < least:
        sys.exit(f"{file}: expected at least {least} different texts, found {len(found)}")
    return found


def json_lines(file: str, **fields: type) -> list[dict]:
    """The objects in a file with one in each line, at least one of them. Blank lines do not count.

    Args:
        file: its path.
        fields: the names that each object must have, and the types of their values.
    """
    rows = []
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    sys.exit(f"{file}, line {number}: expected JSON ({error})")
                for name, kind in fields.items():
                    if not isinstance(rows[-1], dict) or not isinstance(rows[-1].get(name), kind):
                        sys.exit(f'{file}, line {number}: expected an object with "{name}", of type {kind.__name__}')
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{file}: {error}")
    if not rows:
        sys.exit(f"{file}: expected JSON lines, found none")
    return rows
