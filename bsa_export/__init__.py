"""Block-sparse attention for BERT checkpoints: convert, verify, publish, run.

Importing this package does not import torch, triton, deepspeed or transformers; the names below are loaded when they
are first used. As soon as transformers is imported, the attention function `block_sparse` is registered with it.
docs/running.md says what this changes in a process, and `unregister()` undoes it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bsa_export.errors import MissingLibraryError
from bsa_export.hf.import_hook import register, unregister
from bsa_export.version import __version__, install_hint

if TYPE_CHECKING:
    from bsa_export.attention import BertSparseSelfAttention, SparseSelfAttention
    from bsa_export.conversion.convert import convert
    from bsa_export.conversion.to_dense import to_dense
    from bsa_export.hf.load import load
    from bsa_export.hub import pull, push
    from bsa_export.ops import block_sparse_attention, clear_caches
    from bsa_export.verify.run import verify

__all__ = [
    "BertSparseSelfAttention",
    "SparseSelfAttention",
    "__version__",
    "block_sparse_attention",
    "clear_caches",
    "convert",
    "load",
    "pull",
    "push",
    "register",
    "to_dense",
    "unregister",
    "verify",
]

# Where each name is; `verify` is a package that can be called.
_HOMES = {
    "BertSparseSelfAttention": "bsa_export.attention",
    "SparseSelfAttention": "bsa_export.attention",
    "block_sparse_attention": "bsa_export.ops",
    "clear_caches": "bsa_export.ops",
    "convert": "bsa_export.conversion.convert",
    "load": "bsa_export.hf.load",
    "pull": "bsa_export.hub",
    "push": "bsa_export.hub",
    "to_dense": "bsa_export.conversion.to_dense",
}


def __getattr__(name: str) -> Any:
    if name == "verify":
        return import_module("bsa_export.verify")
    if name not in _HOMES:
        raise AttributeError(f"module 'bsa_export' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise MissingLibraryError(
            f"bsa_export.{name} needs {error.name}, which is not installed", hint=install_hint("run")
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)


register()
