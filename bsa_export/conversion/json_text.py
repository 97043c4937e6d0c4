"""Edits of JSON text that keep every other character: places of values, replacements, members added and removed.

The text has been parsed before (`files.parse_json`): what is valid JSON is not checked again here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import NamedTuple

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


class Span(NamedTuple):
    """The characters `[start, end)` of a value in its text."""

    start: int
    end: int


def is_object(text: str) -> bool:
    """Whether JSON text is an object."""
    return text.startswith("{", _skip(text, 0))


def members(text: str, start: int = 0) -> dict[str, Span]:
    """The members of the JSON object that begins at `start`, after white space: key -> the place of its value.

    Returns:
        An empty dict where the value is not an object. One pass over the object, whatever its size.
    """
    position = _skip(text, start)
    if text[position] != "{":
        return {}
    found = {}
    position = _skip(text, position + 1)
    while text[position] != "}":
        key, position = _DECODER.raw_decode(text, position)
        value = _skip(text, _skip(text, position) + 1)
        _, position = _DECODER.raw_decode(text, value)
        found[key] = Span(value, position)
        position = _skip(text, position)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return found


def replaced(text: str, edits: Iterable[tuple[Span, str]]) -> str:
    """The text with other characters at some places. The places do not overlap."""
    pieces, position = [], 0
    for span, new in sorted(edits):
        pieces += [text[position : span.start], new]
        position = span.end
    return "".join([*pieces, text[position:]])


def with_member(text: str, key: str, value: str) -> str:
    """The JSON object with one more member at its end, set as the first one is. `without_member` takes it out again."""
    name = json.dumps(key)
    there = list(members(text).values())
    opening = _skip(text, 0) + 1
    if not there:
        return f"{text[:opening]}{name}: {value}{text[opening:]}"
    end = there[-1].end
    before = text[opening : _skip(text, opening)]
    colon = ": " if text[there[0].start - 1] in " \t\n\r" else ":"
    return f"{text[:end]},{before or (' ' if colon == ': ' else '')}{name}{colon}{value}{text[end:]}"


def without_member(text: str, key: str) -> str:
    """The JSON object without a member. What `with_member` added is gone, to the character."""
    there = members(text)
    if key not in there:
        return text
    names = list(there)
    at = names.index(key)
    opening = _skip(text, 0) + 1
    if at:
        return text[: there[names[at - 1]].end] + text[there[key].end :]
    rest = there[key].end
    if len(names) > 1:  # the comma behind it goes too
        rest = _skip(text, _skip(text, rest) + 1)
        opening = _skip(text, opening)
    return text[:opening] + text[rest:]


def _skip(text: str, position: int) -> int:
    """The first place at or after `position` that is not white space."""
    match = _SPACE.match(text, position)
    return match.end() if match else position
