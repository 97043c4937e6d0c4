"""Sparsity configs -> master layout: which blocks of the score matrix are computed. numpy alone.

The six classes of DeepSpeed keep its names, parameters, defaults and attributes, and their layouts equal those of
deepspeed 0.19.6 bit for bit (`deepspeed/ops/sparse_attention/sparsity_config.py`), random ones for equal draws. What is
meant to differ: `LocalSlidingWindowSparsityConfig` is bidirectional unless asked, and parameters that DeepSpeed lets
pass without meaning (zero heads, empty windows, an unknown `attention`) are refused.

A layout depends on the length it is made for: the master layout sliced to a shorter length is in general not the layout
made for that length. The stored master layout and its slices count, here as in DeepSpeed.

Parameters count blocks; `attention` is `bidirectional` or `unidirectional`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np

from bsa_export.errors import SparsityError
from bsa_export.sparsity.facts import check_layout
from bsa_export.sparsity.parameters import MAX_INTEGER, checked, count, parameter_types, shown
from bsa_export.sparsity.patterns import add_global, add_random, aligned_windows, causal, sliding_window
from bsa_export.text import size

Attention = Literal["bidirectional", "unidirectional"]

DEEPSPEED_LENGTH = 2048  # tokens of the master layout in DeepSpeed's BertSparseSelfAttention
MAX_BLOCKS = 16384  # of a sequence: a head's layout takes the square of that in bytes
MAX_LAYOUT_BYTES = 16 << 30  # of the heads of a layer that differ
MAX_HEADS = 4096


@dataclass
class SparsityConfig:
    """What every pattern has in common. Subclasses say which blocks a head keeps.

    Args:
        num_heads: attention heads of a layer.
        block: side of a square block, in tokens.
        different_layout_per_head: whether heads may differ; otherwise all have the first head's layout.

    Raises:
        SparsityError: a parameter has the wrong type or value; also a ValueError, as in DeepSpeed.
    """

    mode: ClassVar[str] = "sparsity"
    # Counts of blocks that DeepSpeed refuses when a row has fewer.
    _at_most_a_row: ClassVar[tuple[str, ...]] = ()

    num_heads: int = field(metadata={"minimum": 1, "maximum": MAX_HEADS})
    block: int = count(16, minimum=1)
    different_layout_per_head: bool = False

    def __post_init__(self) -> None:
        types = parameter_types(type(self))
        for parameter in fields(self):
            value, bounds = getattr(self, parameter.name), parameter.metadata
            minimum, maximum = bounds.get("minimum", -MAX_INTEGER), bounds.get("maximum", MAX_INTEGER)
            try:
                setattr(self, parameter.name, checked(types[parameter.name], value, minimum, maximum))
            except TypeError as error:
                self._refuse(parameter.name, str(error))
        if getattr(self, "horizontal_global_attention", False) and getattr(self, "attention", "") == "unidirectional":
            self._refuse("horizontal_global_attention", "expected false when unidirectional")
        self._validate()

    def _validate(self) -> None:
        """Refuses what a pattern cannot be made of."""

    def _refuse(self, parameter: str, message: str) -> NoReturn:
        raise SparsityError(message, found=shown(getattr(self, parameter)), where=f"{self.mode}: {parameter}")

    @property
    def num_layout_heads(self) -> int:
        """How many heads have a layout of their own; the others copy the first."""
        return self.num_heads if self.different_layout_per_head else 1

    def make_layout(self, seq_len: int, rng: random.Random | None = None) -> np.ndarray:
        """Makes the layout for sequences of `seq_len` tokens.

        Args:
            seq_len: a multiple of the block.
            rng: where random blocks are drawn from, in DeepSpeed's order (head by head, row by row); the module
                `random` itself is DeepSpeed's own behaviour. None is `random.Random(0)`.

        Returns:
            uint8 `[num_heads, seq_len / block, seq_len / block]` of 0 and 1, an array of its own.

        Raises:
            SparsityError: the length is not a multiple of the block, or too short for the pattern.
        """
        return np.array(self.shared_layout(seq_len, rng), order="C")

    def shared_layout(self, seq_len: int, rng: random.Random | None = None) -> np.ndarray:
        """`make_layout`, read-only and in the memory of one head where all heads have the same layout."""
        n = self._num_blocks(seq_len)
        for name in self._at_most_a_row:
            if getattr(self, name) > n:
                self._refuse(name, f"expected at most the {n} blocks of {seq_len} tokens")
        if self.num_layout_heads * n * n > MAX_LAYOUT_BYTES:
            raise SparsityError(
                f"expected layouts of at most {size(MAX_LAYOUT_BYTES)} a layer",
                found=f"{self.num_layout_heads} heads that differ, of {n:,} x {n:,} blocks",
                where=self.mode,
                hint="choose larger blocks",
            )
        rng = rng or random.Random(0)
        patterns = self._patterns(n)
        heads = np.empty((self.num_layout_heads, n, n), np.uint8)
        for head, pattern in enumerate(heads):
            pattern[:] = patterns[head % len(patterns)]
            add_random(pattern, getattr(self, "num_random_blocks", 0), self._random_columns(n), rng)
        return read_only(heads, self.num_heads)

    @classmethod
    def parameter_names(cls) -> list[str]:
        """The names of the arguments that JSON can hold."""
        return [parameter.name for parameter in fields(cls) if parameter.init and parameter.name != "layout"]

    def to_parameters(self) -> dict[str, Any]:
        """The arguments of the class, as GENA-LM's config.json holds them next to the class path."""
        return {name: getattr(self, name) for name in self.parameter_names()}

    def to_dict(self) -> dict[str, Any]:
        """The `sparse_attention` section of a DeepSpeed config: mode and parameters, without the number of heads."""
        return {"mode": self.mode} | {
            name: value for name, value in self.to_parameters().items() if name != "num_heads"
        }

    def _num_blocks(self, seq_len: int) -> int:
        if not isinstance(seq_len, Integral) or seq_len < 1 or seq_len % self.block:
            message = f"expected a length that is a multiple of block {self.block}"
            raise SparsityError(message, found=shown(seq_len), where=self.mode)
        if seq_len > MAX_BLOCKS * self.block:
            message = f"expected at most {MAX_BLOCKS * self.block:,} tokens in blocks of {self.block}"
            raise SparsityError(message, found=shown(seq_len), where=self.mode, hint="choose larger blocks")
        return seq_len // self.block

    def _patterns(self, n: int) -> list[np.ndarray]:
        """The distinct layouts without random blocks, bool `[n, n]`; head h has number h modulo their count."""
        raise NotImplementedError(f"{type(self).__name__} has no pattern")

    def _random_columns(self, n: int) -> list[range]:
        """The columns that each row's random blocks are drawn from."""
        return [range(n)] * n


def read_only(heads: np.ndarray, num_heads: int) -> np.ndarray:
    """`[num_heads, n, n]` that cannot be written to: `heads`, or its one head for all."""
    return np.broadcast_to(heads, (num_heads, *heads.shape[1:]))


@dataclass
class DenseSparsityConfig(SparsityConfig):
    """Every block is kept."""

    mode = "dense"

    def _patterns(self, n: int) -> list[np.ndarray]:
        return [np.ones((n, n), bool)]


@dataclass
class FixedSparsityConfig(SparsityConfig):
    """Aligned local windows, and of each window some blocks that all attend to (after Sparse Transformers, arXiv
    1904.10509).

    Args:
        num_local_blocks: blocks of a local window.
        num_global_blocks: consecutive blocks of each window that are global, the last ones in the first pattern.
        horizontal_global_attention: whether global blocks also attend to all; bidirectional only.
        num_different_global_patterns: heads take the last, the last but one, ... group of a window as global, in turn.
    """

    mode = "fixed"

    num_local_blocks: int = count(4, minimum=1)
    num_global_blocks: int = count(1, minimum=1)
    attention: Attention = "bidirectional"
    horizontal_global_attention: bool = False
    num_different_global_patterns: int = count(1, minimum=1)

    def _validate(self) -> None:
        groups, rest = divmod(self.num_local_blocks, self.num_global_blocks)
        if rest:
            self._refuse("num_global_blocks", f"expected a divisor of num_local_blocks {self.num_local_blocks}")
        if self.num_different_global_patterns > 1 and not self.different_layout_per_head:
            self._refuse("num_different_global_patterns", "expected 1 without different_layout_per_head")
        if self.num_different_global_patterns > groups:
            self._refuse("num_different_global_patterns", f"expected at most {groups}, local by global blocks")

    def _patterns(self, n: int) -> list[np.ndarray]:
        local = causal(aligned_windows([self.num_local_blocks], n), self.attention)
        patterns = [local.copy() for _ in range(min(self.num_different_global_patterns, self.num_heads))]
        for number, pattern in enumerate(patterns):
            windows = self._global_windows(n, number)
            add_global(pattern, windows, self.attention, self.horizontal_global_attention)
        return patterns

    def _global_windows(self, n: int, number: int) -> list[tuple[int, int]]:
        width = self.num_global_blocks
        first = self.num_local_blocks - (1 + number) * width
        whole = n - n % self.num_local_blocks
        starts = list(range(first, whole, self.num_local_blocks))
        if whole < n:
            # A short last window has its global blocks where the others do, or last; n - width may be negative, and
            # then counts from the end, in DeepSpeed as here.
            starts.append(min(whole + first, n - width))
        return [(start, start + width) for start in starts]


def _check_global_windows(config: VariableSparsityConfig | BSLongformerSparsityConfig) -> None:
    """Refuses `global_block_end_indices` that do not end windows."""
    starts, ends = config.global_block_indices, config.global_block_end_indices
    if ends is None:
        return
    if len(starts) != len(ends):
        config._refuse("global_block_end_indices", f"expected {len(starts)} as there are global_block_indices")
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            config._refuse("global_block_end_indices", f"expected an end after start {start}")


def _global_windows(config: VariableSparsityConfig | BSLongformerSparsityConfig, n: int) -> Iterable[tuple[int, int]]:
    """Global blocks by index: `[index]`, or `[index, end)` with `global_block_end_indices`. Those beyond a sequence do
    not count; negative ones count from its end."""
    starts, ends = config.global_block_indices, config.global_block_end_indices
    if ends is not None:
        return list(zip(starts, ends, strict=True))
    if starts and min(starts) < -n:
        config._refuse("global_block_indices", f"expected at least {-n} for {n} blocks")
    return [(start % n, start % n + 1) for start in starts if start < n]


@dataclass
class VariableSparsityConfig(SparsityConfig):
    """Local windows of given sizes, random blocks, and global blocks by index (extends `fixed`).

    Random blocks may be ahead of their row in unidirectional attention too, as in DeepSpeed.

    Args:
        num_random_blocks: random blocks of each row.
        local_window_blocks: blocks of the first, the second, ... window; the last size repeats.
        global_block_indices: blocks that all attend to, or where their windows start.
        global_block_end_indices: where those windows end, exclusive.
        horizontal_global_attention: whether global blocks also attend to all; bidirectional only.
    """

    mode = "variable"
    _at_most_a_row = ("num_random_blocks",)

    num_random_blocks: int = count(0)
    local_window_blocks: list[int] = field(default_factory=lambda: [4])
    global_block_indices: list[int] = field(default_factory=lambda: [0])
    global_block_end_indices: list[int] | None = None
    attention: Attention = "bidirectional"
    horizontal_global_attention: bool = False

    def _validate(self) -> None:
        _check_global_windows(self)
        sizes = self.local_window_blocks
        if not sizes or min(sizes) < 1:
            self._refuse("local_window_blocks", "expected one or more sizes of at least 1")

    def _patterns(self, n: int) -> list[np.ndarray]:
        pattern = causal(aligned_windows(self.local_window_blocks, n), self.attention)
        add_global(pattern, _global_windows(self, n), self.attention, self.horizontal_global_attention)
        return [pattern]


@dataclass
class BigBirdSparsityConfig(SparsityConfig):
    """A sliding window, random blocks, and global blocks at the start (BigBird, arXiv 2007.14062).

    Args:
        num_random_blocks: random blocks of each row.
        num_sliding_window_blocks: width of the sliding window.
        num_global_blocks: the first blocks, which attend to all and to which all attend.
    """

    mode = "bigbird"
    _at_most_a_row = ("num_random_blocks", "num_sliding_window_blocks", "num_global_blocks")

    num_random_blocks: int = count(1)
    num_sliding_window_blocks: int = count(3)
    num_global_blocks: int = count(1)
    attention: Attention = "bidirectional"

    def _validate(self) -> None:
        if self.attention == "unidirectional" and self.num_random_blocks > 1:
            self._refuse("num_random_blocks", "expected at most 1 when unidirectional: the first row has one to draw")

    def _random_columns(self, n: int) -> list[range]:
        return [range(n if self.attention == "bidirectional" else row + 1) for row in range(n)]

    def _patterns(self, n: int) -> list[np.ndarray]:
        pattern = sliding_window(self.num_sliding_window_blocks, n)
        add_global(pattern, [(0, self.num_global_blocks)], "bidirectional", horizontal=True)
        return [causal(pattern, self.attention)]


@dataclass
class BSLongformerSparsityConfig(SparsityConfig):
    """A sliding window and global blocks by index (Longformer in blocks, arXiv 2004.05150).

    Args:
        num_sliding_window_blocks: width of the sliding window.
        global_block_indices: blocks that attend to all and to which all attend, or where their windows start.
        global_block_end_indices: where those windows end, exclusive.
    """

    mode = "bslongformer"
    _at_most_a_row = ("num_sliding_window_blocks",)

    num_sliding_window_blocks: int = count(3)
    global_block_indices: list[int] = field(default_factory=lambda: [0])
    global_block_end_indices: list[int] | None = None
    attention: Attention = "bidirectional"

    def _validate(self) -> None:
        _check_global_windows(self)

    def _patterns(self, n: int) -> list[np.ndarray]:
        pattern = sliding_window(self.num_sliding_window_blocks, n)
        add_global(pattern, _global_windows(self, n), "bidirectional", horizontal=True)
        return [causal(pattern, self.attention)]


@dataclass
class LocalSlidingWindowSparsityConfig(SparsityConfig):
    """A sliding window alone. All heads are alike.

    Bidirectional unless asked, because BERT is; DeepSpeed's class defaults to unidirectional.

    Args:
        num_sliding_window_blocks: width of the sliding window.
    """

    mode = "local"
    _at_most_a_row = ("num_sliding_window_blocks",)

    different_layout_per_head: bool = field(default=False, init=False)
    num_sliding_window_blocks: int = count(3)
    attention: Attention = "bidirectional"

    def _patterns(self, n: int) -> list[np.ndarray]:
        return [causal(sliding_window(self.num_sliding_window_blocks, n), self.attention)]


@dataclass
class WindowedSparsityConfig(SparsityConfig):
    """Aligned windows joined with a sliding window; the default of this project. All heads are alike.

    With windows as long as the dense model's inputs and a sliding window of about that length, inputs up to that length
    keep every block, and longer ones pass information across the windows' borders. Windows longer than a sequence are
    cut.

    Args:
        num_local_blocks: blocks of an aligned window.
        num_sliding_window_blocks: width of the sliding window.
    """

    mode = "windowed"

    block: int = count(64, minimum=1)
    num_local_blocks: int = count(8, minimum=1)
    num_sliding_window_blocks: int = count(9)
    attention: Attention = "bidirectional"

    def _patterns(self, n: int) -> list[np.ndarray]:
        pattern = aligned_windows([self.num_local_blocks], n) | sliding_window(self.num_sliding_window_blocks, n)
        return [causal(pattern, self.attention)]


@dataclass
class CustomSparsityConfig(SparsityConfig):
    """A layout that no rule made: an array, or, without one, what the checkpoint stores.

    Args:
        layout: 0 and 1 in `[num_heads, n, n]`, or `[1, n, n]` for every head. `to_dict()` leaves it out.
    """

    mode = "custom"

    block: int = count(64, minimum=1)
    different_layout_per_head: bool = True
    layout: np.ndarray | None = field(default=None, compare=False, repr=False)

    def shared_layout(self, seq_len: int, rng: random.Random | None = None) -> np.ndarray:
        """The top-left slice of the layout for `seq_len` tokens; nothing is drawn.

        Raises:
            SparsityError: the layout is missing, too short, for other heads, or cannot be attended with.
        """
        n = self._num_blocks(seq_len)
        if self.layout is None:
            raise SparsityError("a custom layout comes from a file or a checkpoint, it cannot be made", where="custom")
        check_layout(self.layout, "custom: layout")
        heads, blocks, _ = self.layout.shape
        if heads not in (1, self.num_heads) or blocks < n:
            message = f"expected [{self.num_heads}, {n}, {n}] or more blocks"
            raise SparsityError(message, found=list(self.layout.shape), where="custom: layout")
        return read_only(self.layout[:, :n, :n].astype(np.uint8), self.num_heads)


MODES: dict[str, type[SparsityConfig]] = {
    cls.mode: cls
    for cls in (
        WindowedSparsityConfig,
        DenseSparsityConfig,
        FixedSparsityConfig,
        VariableSparsityConfig,
        BigBirdSparsityConfig,
        BSLongformerSparsityConfig,
        LocalSlidingWindowSparsityConfig,
        CustomSparsityConfig,
    )
}


def windowed_for(source_length: int, num_heads: int, block: int = 64) -> WindowedSparsityConfig:
    """The default config for a dense model that reads `source_length` tokens: aligned windows of that length, in whole
    blocks rounded up, so that its inputs keep every block, and a sliding window of one block more. A source of one
    block gets no sliding window: it would reach beyond the source's positions.
    """
    local = -(-source_length // block)
    sliding = local + 1 if local > 1 else 1
    return WindowedSparsityConfig(num_heads, block, num_local_blocks=local, num_sliding_window_blocks=sliding)
