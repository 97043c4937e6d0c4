"""Sparsity configs and the layouts that they make: which blocks of the score matrix are computed. numpy alone."""

from bsa_export.sparsity.configs import (
    MODES,
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    CustomSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
    VariableSparsityConfig,
    WindowedSparsityConfig,
    windowed_for,
)
from bsa_export.sparsity.layouts import make_layouts
from bsa_export.sparsity.sections import sparsity_config

__all__ = [
    "MODES",
    "BSLongformerSparsityConfig",
    "BigBirdSparsityConfig",
    "CustomSparsityConfig",
    "DenseSparsityConfig",
    "FixedSparsityConfig",
    "LocalSlidingWindowSparsityConfig",
    "SparsityConfig",
    "VariableSparsityConfig",
    "WindowedSparsityConfig",
    "make_layouts",
    "sparsity_config",
    "windowed_for",
]
