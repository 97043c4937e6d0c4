"""Block-sparse attention for BERT checkpoints: convert, verify, publish, run.

Importing this package imports neither torch nor triton nor deepspeed nor transformers; the names below are loaded when they
are first used.
"""

from importlib import import_module

from bsa_export.registration import register_with_transformers

__version__ = "0.1.0"

_HOMES = {
    "block_sparse_attention": "bsa_export.ops",
    "SparseSelfAttention": "bsa_export.attention",
    "BertSparseSelfAttention": "bsa_export.attention",
    "load": "bsa_export.model",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'bsa_export' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


register_with_transformers()
