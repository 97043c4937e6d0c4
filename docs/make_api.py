"""Writes docs/api.md from signatures and docstrings: `python docs/make_api.py`. A test holds the page to it."""

from __future__ import annotations

import inspect
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import bsa_export

DOCS = Path(__file__).resolve().parent
HEAD = """# Python API

Written by `python docs/make_api.py` from signatures and docstrings.

```python
import bsa_export as bsa

bsa.convert("input.bin", "out/", max_length=4096)  # also a repository of the Hub; returns what was done
bsa.verify("out/", source="input.bin").raise_if_failed()
model = bsa.load("out/")
bsa.push("out/", "org/name")
bsa.pull("org/name", "folder/")
bsa.to_dense("out/", "dense/")
```

Keywords have the names of the commands' options. An error that a user can act on is a `BsaError` from
`bsa_export.errors`, with one sentence. Sparsity configs are in `bsa_export.sparsity`.

`import bsa_export` imports neither torch nor transformers: each name is loaded when it is first used.
"""
FUNCTIONS = (
    "convert",
    "verify",
    "load",
    "push",
    "pull",
    "to_dense",
    "block_sparse_attention",
    "register",
    "unregister",
    "clear_caches",
)
CLASSES = ("SparseSelfAttention", "BertSparseSelfAttention")
RESULTS = (  # what the functions return
    "bsa_export.conversion.convert.Converted",
    "bsa_export.conversion.to_dense.WrittenDense",
    "bsa_export.verify.Verification",
    "bsa_export.hub.PushResult",
    "bsa_export.hub.PullResult",
)


def literal(value: Any) -> str:
    """A default as ruff formats it."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def signature(name: str, value: Any) -> str:
    """The definition of a function, or of a class with its `__init__`, one parameter a line."""
    of_class = inspect.isclass(value)
    shown = inspect.signature(value.__init__ if of_class else value)
    lines, starred = [], False
    for parameter in shown.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("*,")
            starred = True
        annotation = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        default = "" if parameter.default is parameter.empty else f" = {literal(parameter.default)}"
        lines.append(f"{parameter.name}{annotation}{default},")  # annotations are text in this package
    inner = "\n" + textwrap.indent("\n".join(lines), "    ") + "\n" if lines else ""
    code = f"def {'__init__' if of_class else name}({inner}) -> {'None' if of_class else shown.return_annotation}: ..."
    return f"class {name}:\n{textwrap.indent(code, '    ')}" if of_class else code


def section(name: str, code: str, text: str) -> str:
    return f"## {name}\n\n```python\n{code}\n```\n\n```text\n{text}\n```\n"


def page() -> str:
    parts = [HEAD]
    for name in (*FUNCTIONS, *CLASSES):
        value = getattr(bsa_export, name)
        documented = value.verify if name == "verify" else value  # a package that can be called
        parts.append(section(name, signature(name, value), inspect.getdoc(documented) or ""))
    for path in RESULTS:
        module, _, name = path.rpartition(".")
        value = getattr(import_module(module), name)
        fields = "\n".join(
            f"{field}: {getattr(kind, '__forward_arg__', kind)}"
            for field, kind in inspect.get_annotations(value).items()
        )
        parts.append(section(name, fields, inspect.getdoc(value) or ""))
    return "\n".join(parts)


if __name__ == "__main__":
    (DOCS / "api.md").write_text(page())
