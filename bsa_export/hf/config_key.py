"""`"attn_implementation": "block_sparse"` in a config.json, read also by transformers 5.0 to 5.3.

transformers reads the key by itself since 5.4. Earlier releases overwrite it with the argument of `from_pretrained`,
or None, and would run a converted model dense.
"""

from __future__ import annotations

from typing import Any

NAME = "block_sparse"

_original: Any = None  # transformers' `from_dict` while it is replaced


def register() -> None:
    """Makes transformers read the key, where it does not by itself."""
    global _original
    from transformers.configuration_utils import PreTrainedConfig

    if _original or PreTrainedConfig.from_dict({"attn_implementation": NAME})._attn_implementation == NAME:
        return
    _original = vars(PreTrainedConfig)["from_dict"]

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if config_dict.get("attn_implementation") == NAME and kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = NAME
        return _original.__func__(cls, config_dict, **kwargs)

    PreTrainedConfig.from_dict = classmethod(from_dict)  # type: ignore[assignment,method-assign]


def unregister() -> None:
    """Undoes `register`."""
    global _original
    from transformers.configuration_utils import PreTrainedConfig

    if _original:
        PreTrainedConfig.from_dict = _original  # type: ignore[method-assign]
        _original = None
