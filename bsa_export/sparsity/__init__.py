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
    make_layouts,
    sparsity_config,
    windowed_for,
)

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
