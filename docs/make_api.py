"""Writes docs/api.md from signatures and docstrings: `python docs/make_api.py`. A test holds the page to it."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import bsa_export

DOCS = Path(__file__).resolve().parent
HEAD = """# Python API

Made from signatures and docstrings by `python docs/make_api.py`.

```python
import bsa_export as bsa

bsa.convert("input.bin", "out/", max_length=4096)              # also a repository of the Hub; returns what was done
bsa.verify("out/", source="input.bin").raise_if_failed()
model = bsa.load("out/")
bsa.push("out/", "org/name")
bsa.pull("org/name", "folder/")
bsa.to_dense("out/", "dense/")
```

`import bsa_export` imports neither torch nor transformers: each name is loaded when it is first used. Keywords have
the names of the commands' options. Every error that is meant to be shown is a `bsa_export.errors.BsaError` with one
sentence. Sparsity configs are in `bsa_export.sparsity`.
"""
FUNCTIONS = (
    "convert",
    "verify",
    "load",
    "push",
    "pull",
    "to_dense",
    "block_sparse_attention",
    "unregister",
    "clear_caches",
)
CLASSES = ("SparseSelfAttention", "BertSparseSelfAttention")


def signature(name: str, value: Any) -> str:
    """The signature as a person writes it, one parameter a line."""
    target = value.__init__ if inspect.isclass(value) else value
    parameters = [p for p in inspect.signature(target).parameters.values() if p.name != "self"]
    lines, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("*,")
            starred = True
        lines.append(re.sub(r"'([^']*)'(?=( =|$))", r"\1", str(parameter)) + ",")
    returns = inspect.signature(target).return_annotation
    shown = "" if inspect.isclass(value) or returns is inspect.Signature.empty else f" -> {str(returns).strip(chr(39))}"
    return f"{name}(\n" + textwrap.indent("\n".join(lines), "    ") + f"\n){shown}" if lines else f"{name}(){shown}"


def page() -> str:
    parts = [HEAD]
    for name in (*FUNCTIONS, *CLASSES):
        value = getattr(bsa_export, name)
        documented = getattr(value, "__wrapped__", value)
        text = inspect.getdoc(documented if name != "verify" else value.verify) or ""
        parts.append(f"## {name}\n\n```python\n{signature(name, value)}\n```\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (DOCS / "api.md").write_text(page())
