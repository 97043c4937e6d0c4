"""Block-sparse attention: one function, several ways to compute it."""

from bsa_export.ops.dispatch import backends, block_sparse_attention, block_sparse_attention_varlen, clear_caches

__all__ = ["backends", "block_sparse_attention", "block_sparse_attention_varlen", "clear_caches"]
