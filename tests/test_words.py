"""Phrases that plain technical English does without are not in pages, templates, messages, docstrings or comments."""

import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLAINLY = {
    "in the place of": "instead of",
    "beside": "next to, compared with",
    "at hand": "(rewrite)",
    "until then": "(rewrite)",
    "thereby": "(rewrite)",
    "whereof": "(rewrite)",
    "heed": "(rewrite)",
    "met keys": "visible keys",
    "texts in a row": "packed sequences",
}
OUT = re.compile(rf"\b({'|'.join(PLAINLY)})\b", re.IGNORECASE)
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bsa_export/**/*.jinja")]
SPOKEN = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def prose(path: Path):
    """(line number, text) of what a person reads in a file: all of a page, comments and strings of a module."""
    if path.suffix != ".py":
        yield from enumerate(path.read_text().splitlines(), 1)
        return
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in SPOKEN:
                yield token.start[0], re.sub(r"\{[^{}]*\}", "", token.string)  # an f-string's expressions are code


@pytest.mark.parametrize("paths", [PAGES, [*ROOT.glob("bsa_export/**/*.py")]], ids=["pages", "package"])
def test_sentences_are_plain(paths):
    assert len(paths) > 10
    found = [
        f"{path.relative_to(ROOT)}:{line}: {word}: write {PLAINLY[word.lower()]}"
        for path in paths
        for line, text in prose(path)
        for word in OUT.findall(text)
    ]
    assert not found, "\n".join(found)


def test_the_scan_reads_comments_strings_and_docstrings(tmp_path):
    module = tmp_path / "module.py"
    module.write_text('beside = 1  # at hand\nx = f"{beside} thereby"\n\ndef f():\n    """Until\n    then: heed."""\n')
    assert [word.lower() for _, text in prose(module) for word in OUT.findall(text)] == ["at hand", "thereby", "heed"]
