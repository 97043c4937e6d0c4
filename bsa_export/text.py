"""Text for people: sizes, lists cut short, aligned lines, and names from files made safe to show."""

from __future__ import annotations

import re
import reprlib
import shlex
from collections.abc import Iterable

Lines = list[tuple[str, str]]

LONGEST = 2000  # characters of a message: a name in a file may have megabytes
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|#~!@$]|(?<=:)//|(?<=www)\.|^[-+=]|(?<=\d)[.)](?=\s|$)", re.IGNORECASE)
# What holds others is shown in part, so that what it holds many times is not shown many times.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 4, 300, 300
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = _SHORT.maxfrozenset = 12


def printable(value: object, most: int = LONGEST) -> str:
    """`value` in one line that is safe on a terminal, of about `most` characters.

    What a terminal would act on or a reader could not see (controls, line breaks, invisible and direction marks, halves
    of surrogate pairs) is escaped; the middle of long text is left out.
    """
    text = _shortened(_text(value), most)
    if not text.isprintable():
        text = _shortened("".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text), most)
    return text


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return _SHORT.repr(value) if isinstance(value, (list, tuple, dict, set, frozenset)) else str(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python converts
        return f"a {type(value).__name__} that is too long to show"


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]} [... {len(text) - most:,} characters ...] {text[-most // 3 :]}"


def markdown(value: object, most: int = 300) -> str:
    """`value` as plain text of a Markdown paragraph or table cell: it cannot format, link or leave its place."""
    text = printable(value, most).strip()
    return _MARKDOWN.sub(lambda match: "".join(f"\\{mark}" for mark in match[0]), text).replace("&", "&amp;")


def markdown_code(value: object, most: int = 300) -> str:
    """`value` as a code span of Markdown, in a table too: in more backticks than it holds, without line breaks."""
    text = printable(value, most).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def argument(value: object) -> str:
    """`value` as one argument of a command that a message tells people to type in a shell."""
    return shlex.quote(str(value))


def size(nbytes: float) -> str:
    """Bytes in powers of 1000, as file managers and the Hub show them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes} B"
        nbytes /= 1000
    return f"{nbytes:,.3g} TB"


def some(names: Iterable[object], most: int = 3) -> str:
    """The first of `names`, and how many more there are: `a, b, c and 4 more`."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def aligned(lines: Lines) -> str:
    """One fact a line: label, value, the values aligned below each other; an empty label continues the line above."""
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {printable(value)}".rstrip() for label, value in lines)
