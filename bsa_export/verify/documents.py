"""The text whose masked tokens are predicted. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from bsa_export.errors import BsaError


def documents(path: Path) -> list[str]:
    """The documents of a file: a `text` a line in `.jsonl`, else the file is one.

    Raises:
        BsaError: it is neither, or holds no text.
    """
    try:
        content = path.read_text(encoding="utf-8")
        found = [content]
        if path.suffix == ".jsonl":
            found = [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
        if not all(isinstance(text, str) for text in found):
            raise TypeError("a text that is not a string")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BsaError('expected text, or JSON lines with a "text" each', found=repr(error), where=path) from None
    if not any(text.strip() for text in found):
        raise BsaError("expected a text", found="an empty one", where=path)
    return found
