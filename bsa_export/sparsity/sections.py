"""Sparsity configs as JSON files describe them: DeepSpeed's `sparse_attention` section, and GENA-LM's class paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bsa_export.errors import SparsityError
from bsa_export.sparsity.configs import MODES, SparsityConfig
from bsa_export.sparsity.parameters import shown

# Where DeepSpeed's reader of JSON (deepspeed/runtime/constants.py) and its classes have different defaults.
_JSON_DEFAULTS = {"bigbird": {"num_random_blocks": 0}}
_DEEPSPEED_CLASS_DEFAULTS = {"local": {"attention": "unidirectional"}}


def sparsity_config(section: Mapping[str, Any], num_heads: int) -> SparsityConfig:
    """Builds the config that a `sparse_attention` section of a DeepSpeed JSON config describes.

    Absent keys have DeepSpeed's JSON defaults. They are those of the classes, except that mode is `fixed` and that
    `bigbird` has no random block (its class has one). A `num_heads` in the section must be the model's.

    Raises:
        SparsityError: an unknown mode or key, or a bad value.
    """
    mode = section.get("mode", "fixed") if isinstance(section, Mapping) else "fixed"
    if not isinstance(mode, str) or mode not in MODES:
        raise SparsityError(f"expected one of {', '.join(MODES)}", found=shown(mode), where="sparse_attention: mode")
    return _build(MODES[mode], _JSON_DEFAULTS.get(mode, {}), section, num_heads)


def config_class_path(config: SparsityConfig) -> str:
    """`module:class` as GENA-LM's config.json names it: DeepSpeed's for its patterns, ours for our own."""
    module = "bsa_export.sparsity" if config.mode in ("windowed", "custom") else "deepspeed.ops.sparse_attention"
    return f"{module}:{type(config).__name__}"


def sparsity_config_from_class_path(path: str, section: Mapping[str, Any], num_heads: int) -> SparsityConfig:
    """Builds the config that `sparse_config_cls` and `sparse_attention` of a config.json describe, as GENA-LM writes
    them.

    Absent keys take the class' defaults: for DeepSpeed's `LocalSlidingWindowSparsityConfig` that is unidirectional.

    Raises:
        SparsityError: another class, an unknown key, or a bad value.
    """
    module, _, name = path.rpartition(":") if isinstance(path, str) else ("", "", "")
    known = {cls.__name__: cls for cls in MODES.values()}
    package = module.split(".")[0]
    if name not in known or package not in ("deepspeed", "bsa_export"):
        paths = ", ".join(config_class_path(cls(1)) for cls in MODES.values())
        raise SparsityError(f"expected one of {paths}", found=shown(path), where="sparse_config_cls")
    cls = known[name]
    defaults = _DEEPSPEED_CLASS_DEFAULTS.get(cls.mode, {}) if package == "deepspeed" else {}
    return _build(cls, defaults, section, num_heads)


def _build(
    cls: type[SparsityConfig], defaults: dict[str, Any], section: Mapping[str, Any], num_heads: int
) -> SparsityConfig:
    if not isinstance(section, Mapping):
        raise SparsityError("expected an object", found=type(section).__name__, where="sparse_attention")
    fixed = {"mode": cls.mode, "num_heads": num_heads}
    for name, value in fixed.items():
        if section.get(name, value) != value:
            raise SparsityError(f"expected {value}", found=shown(section[name]), where=f"sparse_attention: {name}")
    names = cls.parameter_names()
    for name in section:
        if name not in names and name != "mode":
            raise SparsityError(f"expected parameters among {', '.join(names)}", found=shown(name), where=cls.mode)
    return cls(**{name: value for name, value in {**defaults, **section, **fixed}.items() if name != "mode"})
