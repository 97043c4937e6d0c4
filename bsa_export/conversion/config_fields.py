"""config.json of the converted model: which fields of the source's are taken out, and which are added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ATTENTION = "attn_implementation"
BLOCK_SPARSE = "block_sparse"
# How transformers has spelled which attention runs.
_ATTENTION_FIELDS = (
    ATTENTION,
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
)
# Fields that a dense class allows and block-sparse attention does not -> why they are taken out, if they are set.
_NOT_ALLOWED = {
    "output_attentions": "block-sparse attention never holds the attention probabilities",
    "_output_attentions": "block-sparse attention never holds the attention probabilities",
    "chunk_size_feed_forward": "padding is removed before the layers, so that inputs have any number of tokens",
    "torchscript": "block-sparse attention cannot be traced",
    "auto_map": "the code that it names is not carried along, and transformers' own class computes the model",
}


def from_a_conversion(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that this package wrote the model, which may have been trained since."""
    path = config.get("sparse_config_cls")
    return config.get(ATTENTION) == BLOCK_SPARSE or (isinstance(path, str) and path.startswith("bsa_export."))


def taken_out(config: Mapping[str, Any]) -> dict[str, str | None]:
    """The fields that are taken out of the source's config.json -> why; None where a user need not know."""
    removed: dict[str, str | None] = {name: why for name, why in _NOT_ALLOWED.items() if config.get(name)}
    for name in _ATTENTION_FIELDS:
        if name in config:
            chosen = isinstance(config[name], str) and config[name] not in (BLOCK_SPARSE, "eager", "sdpa")
            removed[name] = f"the attention is {BLOCK_SPARSE} now" if chosen else None
    return removed
