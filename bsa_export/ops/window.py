"""A window of tokens around each query, `(left, right)` as FlashAttention has it: the keys and the blocks in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsa_export.errors import AttentionError

# A side without a limit, in tokens: longer than any sequence.
UNLIMITED = 1 << 30


def checked(window: Any, seq: int) -> tuple[int, int] | None:
    """`window` with UNLIMITED instead of -1, or None where it removes no key of a sequence of `seq` tokens.

    Raises:
        AttentionError: it is neither None nor two integers of at least -1.
    """
    if window is None:
        return None
    if (
        not isinstance(window, (tuple, list))
        or len(window) != 2
        or any(not isinstance(side, int) or isinstance(side, bool) or side < -1 for side in window)
    ):
        message = "expected two integers of at least -1, the tokens to the left and to the right"
        raise AttentionError(message, found=repr(window), where="window")
    left, right = (UNLIMITED if side < 0 else min(side, UNLIMITED) for side in window)
    return None if min(left, right) >= seq - 1 else (left, right)


def mask(queries: Tensor, keys: Tensor, window: tuple[int, int]) -> Tensor:
    """What is added to the scores, float32 `[..., queries, keys]`: 0 in the window, else -inf.

    Args:
        queries, keys: positions of tokens, `[..., queries]` and `[..., keys]`.
        window: as `checked` returns it.
    """
    left, right = window
    queries, keys = queries[..., :, None], keys[..., None, :]
    outside = (keys < queries - left) | (keys > queries + right)
    return torch.zeros(outside.shape, device=outside.device).masked_fill_(outside, float("-inf"))


def kept_within(kept: np.ndarray, block: int, window: tuple[int, int]) -> np.ndarray:
    """`kept`, bool `[..., n, n]` of blocks of a size, without those that have no pair of tokens in the window."""
    # Two tokens of one pair of blocks are up to `block - 1` tokens closer than the blocks begin.
    left, right = ((side + block - 1) // block for side in window)
    return np.tril(np.triu(kept, -left), right)
