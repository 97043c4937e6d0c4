"""Text for people: sizes, lists cut short, aligned lines, and names from files made safe to show."""

from __future__ import annotations

import re
from collections.abc import Iterable

Lines = list[tuple[str, str]]

LONGEST = 2000  # characters of a message: a name in a file may have megabytes
# What a terminal would act on, or a reader could not see: controls, line breaks, invisible format and direction marks,
# halves of surrogate pairs.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~!])")


def printable(value: object, most: int = LONGEST) -> str:
    """`value` in one line that is safe on a terminal: unsafe is escaped, and the middle of long text is left out."""
    text = str(value)
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} [... {len(text) - most:,} characters ...] {text[-most // 3 :]}"
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def markdown(value: object, most: int = 300) -> str:
    """`value` as plain text of a Markdown paragraph or table cell: it cannot format anything or leave its place."""
    return _MARKDOWN.sub(r"\\\1", printable(value, most)).replace("&", "&amp;")


def markdown_code(value: object, most: int = 300) -> str:
    """`value` as a code span of Markdown, in a table too: in more backticks than it holds, without line breaks."""
    text = printable(value, most).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


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
