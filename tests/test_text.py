"""Text from files is shown in one safe line, and in Markdown as nothing but text; markdown-it judges the latter."""

import shlex
import sys

import pytest

from bsa_export.errors import CheckpointError
from bsa_export.text import LONGEST, argument, markdown, markdown_code, printable

UNSAFE = [
    "a\nError: b", "\x1b[31mred", "a\0b", "\u202egpj.exe", "a\u200bb", "\ud800", "\x9b31m", "a\u2028b",
    "\U000e0041", "\r",
]  # fmt: skip
MARKUP = [
    "**bold**", "_a_", "`code`", "``", "<script>alert(1)</script>",
    "[a](https://b.c)", "![a](b)", "# a", "- a",
    "+ a", "1. a", "2) a", "=", "---", "> a", "| a | b |", "~~a~~",
    "&lt;b&gt;", "https://a.b/c", "www.a.b", "me@a.b", "\\", "a\\", "$$x$$",
    "    a", "\ta", "<!-- a -->", "a\n\n# b", "***", "```\na", "[a]: b", "a  ",
]  # fmt: skip


@pytest.mark.parametrize("text", UNSAFE, ids=ascii)
def test_what_is_not_seen_is_escaped(text):
    shown = printable(text)
    assert shown.isprintable()
    assert str(CheckpointError("x", found=text, where=text)).isprintable()
    shown.encode()


@pytest.mark.parametrize("text", ["", "é 漢字 𝒳", "bert.encoder.layer.0", "a" * LONGEST])
def test_other_text_stays(text):
    assert printable(text) == text


def test_long_text_is_cut():
    for value in ("x" * 10**7, "\x1b" * 10**6, ["a" * 10**6] * 100, 10**5000, {n: "a" * 999 for n in range(999)}):
        assert len(printable(value)) < LONGEST + 100
    assert (
        len(str(CheckpointError("a" * 10**6, found="b" * 10**6, where="c" * 10**6, hint="d" * 10**6))) < LONGEST + 100
    )


def test_a_list_that_holds_one_list_many_times_is_shown_in_part():
    nested: list = []
    for _ in range(200):
        nested = [nested, nested]
    assert len(printable(nested)) < LONGEST
    nested.append(nested)
    assert len(printable(nested)) < LONGEST


def test_a_number_that_python_does_not_convert_is_shown(monkeypatch):
    if hasattr(sys, "get_int_max_str_digits"):
        assert "int" in printable(10**5000)


def tokens(text: str) -> list:
    parser = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False, "html": True})
    return parser.parse(text)


@pytest.mark.parametrize("text", MARKUP, ids=ascii)
def test_markdown_is_nothing_but_text(text):
    found = tokens(markdown(text))
    assert [token.type for token in found] in (["paragraph_open", "inline", "paragraph_close"], [])
    inside = found[1].children if found else []
    assert {token.type for token in inside} <= {"text", "text_special"}
    assert "".join(token.content for token in inside) == printable(text).strip()


@pytest.mark.parametrize("text", MARKUP, ids=ascii)
def test_markdown_keeps_its_cell(text):
    found = tokens(f"| a | b |\n|---|---|\n| {markdown(text)} | {markdown_code(text)} |\n\nend")
    cells = [token for token in found if token.type == "inline"]
    assert len(cells) == 5
    assert cells[-1].content == "end"
    assert [token.type for token in cells[3].children] == ["code_inline"]


def test_a_path_is_one_argument_of_a_suggested_command():
    path = "models/a b; $(touch c)'"
    assert shlex.split(f"bsa-verify {argument(path)}") == ["bsa-verify", path]
