"""The layouts of all layers of a model."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from bsa_export.sparsity.configs import SparsityConfig, read_only
from bsa_export.sparsity.patterns import sliding_window


def make_layouts(
    config: SparsityConfig, seq_len: int, num_layers: int, seed: int = 0, different_layout_per_layer: bool = False
) -> list[np.ndarray]:
    """Makes the master layout of each layer, uint8 `[num_heads, seq_len / block, seq_len / block]`, read-only.

    Heads with the same layout share memory, see `SparsityConfig.shared_layout`. Layers share one array, unless they are
    to differ and the pattern is random: then each takes its own draw in sequence from one `random.Random(seed)`, as a
    DeepSpeed model does that is built layer by layer after `random.seed(seed)`.
    """
    rng = random.Random(seed)
    if different_layout_per_layer and getattr(config, "num_random_blocks", None):
        return [config.shared_layout(seq_len, rng) for _ in range(num_layers)]
    return [config.shared_layout(seq_len, rng)] * num_layers


def with_local_layers(layouts: Sequence[np.ndarray], windows: Sequence[int | None], block: int) -> list[np.ndarray]:
    """The layouts `[heads, n, n]` of all layers, those of local layers replaced by the blocks that their band touches.

    Args:
        layouts: one for each layer.
        windows: how many tokens to each side a layer attends to; None for a layer that keeps its layout.
        block: side of a block in tokens.
    """
    bands: dict[int, np.ndarray] = {}
    heads, n, _ = layouts[0].shape
    for window in {window for window in windows if window is not None}:
        to_each_side = (window + block - 1) // block  # of two blocks, the nearest tokens decide
        band = sliding_window(2 * to_each_side + 1, n).astype(np.uint8)
        bands[window] = read_only(band[None], heads)
    pairs = zip(layouts, windows, strict=True)
    return [layout if window is None else bands[window] for layout, window in pairs]
