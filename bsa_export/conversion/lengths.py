"""Lengths in the JSON files of tokenizers and of sentence-transformers: set to a new length, and set back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

from bsa_export.conversion import json_text
from bsa_export.converted.records import LengthChange
from bsa_export.errors import CheckpointError

# Lengths in tokens, as tokenizer_config.json and sentence_bert_config.json name them.
LENGTH_KEYS = frozenset({"model_max_length", "max_length", "max_len", "max_seq_length"})
ADDED_KEY = "model_max_length"  # where a tokenizer_config.json has none of them
# null means "no limit" under these names; for max_seq_length it means "the model's own limit", which is right already.
LENGTH_KEYS_OF_THE_TOKENIZER = ("model_max_length", "max_len")
MOST_LENGTHS = 100  # in a file; real ones have at most four
FILES_WITH_LENGTHS = ("tokenizer.json", "tokenizer_config.json", "sentence_*_config.json")


def has_lengths(name: str) -> bool:
    """Whether a file at the top of a model's folder may hold lengths."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in FILES_WITH_LENGTHS)


def set_lengths(
    name: str, text: str, length: int, restore: Sequence[LengthChange] | None = None
) -> tuple[str, list[LengthChange]]:
    """Sets every length of a file, whatever it was. All other characters stay.

    `tokenizer.json` has a truncation and a padding of its own: padding to a fixed length becomes padding to the longest
    text of the batch. A tokenizer_config.json without a length gets a model_max_length.

    Args:
        name: the file's name.
        text: its content, which is JSON.
        length: in tokens.
        restore: on the way back, the recorded changes, which are undone instead, each where the value is still the
            recorded one. Lengths without a recorded change are the source's own and stay.

    Returns:
        The new text, and what was set; what was undone is not in it.

    Raises:
        CheckpointError: it has more lengths than any real file.
    """
    back = restore is not None
    recorded = {change.key: change for change in restore or () if change.file == name}
    changes, edits, added = [], [], False
    for key, span in _places(name, text):
        value, change = text[span.start : span.end], recorded.get(key)
        if back and change is None:
            continue
        if change is not None and value == change.after and change.before is not None:
            edits.append((span, change.before))
        elif change is not None and value == change.after and key == (ADDED_KEY,):
            added = True
        elif (new := _new_value(key[-1], value, length)) is not None:
            edits.append((span, new))
            changes.append(LengthChange(name, key, value, new))
            if len(changes) > MOST_LENGTHS:
                raise CheckpointError(f"expected at most {MOST_LENGTHS} lengths in it", where=name)
    text = json_text.replaced(text, edits)
    if added:
        text = json_text.without_member(text, ADDED_KEY)
    elif name == "tokenizer_config.json" and not back and _has_none(text):
        text = json_text.with_member(text, ADDED_KEY, str(length))
        changes.append(LengthChange(name, (ADDED_KEY,), None, str(length)))
    return text, changes


def change_words(change: LengthChange) -> str:
    """A changed length for people: `model_max_length 512 -> 4096`."""
    before = change.before
    if before is None:
        before = "absent"
    elif before.isdecimal() and len(before) > 9:
        before = "unlimited"
    return f"{'.'.join(change.key)} {before} -> {change.after}"


def _places(name: str, text: str) -> Iterator[tuple[tuple[str, ...], json_text.Span]]:
    """Every place in a file that may hold a length: its keys, and its characters."""
    top = json_text.members(text)
    if name == "tokenizer.json":
        for part, key in (("truncation", "max_length"), ("padding", "strategy")):
            if part in top and (span := json_text.members(text, top[part].start).get(key)):
                yield (part, key), span
        return
    for key, span in top.items():
        if key in LENGTH_KEYS:
            yield (key,), span
        else:
            nested = json_text.members(text, span.start)
            yield from (((key, part), nested[part]) for part in nested if part in LENGTH_KEYS)


def _has_none(text: str) -> bool:
    return json_text.is_object(text) and not LENGTH_KEYS & json_text.members(text).keys()


def _new_value(key: str, text: str, length: int) -> str | None:
    """The JSON text that a value becomes, None where it stays."""
    if text[0] == "{":
        return '"BatchLongest"' if key == "strategy" else None  # {"Fixed": 128}
    if text == "null":
        return str(length) if key in LENGTH_KEYS_OF_THE_TOKENIZER else None
    number = text[0] in "-0123456789" and text != str(length)
    return str(length) if number else None
