"""What the first call of a layout pays: building its work list, from a layout in memory.

    python tests/benchmarks/schedule.py [--length 65536] [--block 64] [--heads 12] [--rounds 9]

Not a test, and it needs no GPU. `alike` are layouts whose heads are the same, as most models have them; `different`
ones were made with `different_layout_per_head`. Milliseconds are medians with their range; the gradients of keys and
values take a second list, of the transposed layout.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from bsa_export.ops.schedule import ScheduleCache, Tile
from bsa_export.sparsity.configs import MODES

OPTIONS = {
    "windowed": {"num_local_blocks": 8, "num_sliding_window_blocks": 9},
    "fixed": {"num_local_blocks": 4, "num_global_blocks": 1},
    "bigbird": {"num_random_blocks": 3, "num_sliding_window_blocks": 3, "num_global_blocks": 2},
    "bslongformer": {"num_sliding_window_blocks": 7, "global_block_indices": [0]},
}
DIFFERENT = {
    "fixed": {"different_layout_per_head": True, "num_different_global_patterns": 4},
    "bigbird": {"different_layout_per_head": True},
}
GOAL = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"{options.length:,} tokens, block {options.block}, {options.heads} heads; the goal is {GOAL} ms")
    print("| pattern | heads | ms forward | ms transposed |\n|---|---|---|---|")
    tile = Tile(64, min(options.block, 64))
    for heads, more in (("alike", dict.fromkeys(OPTIONS, {})), ("different", DIFFERENT)):
        for name, extra in more.items():
            config = MODES[name](options.heads, block=options.block, **OPTIONS[name], **extra)
            layout = torch.from_numpy(config.make_layout(options.length, random.Random(0)))
            figures = [told(layout, tile, transposed, options) for transposed in (False, True)]
            print(f"| {name} | {heads} | {' | '.join(figures)} |", flush=True)


def told(layout: torch.Tensor, tile: Tile, transposed: bool, options: argparse.Namespace) -> str:
    """The median and range of what the first call pays."""
    times = []
    for _ in range(options.rounds + 1):
        cache, device = ScheduleCache(), torch.device("cpu")
        started = time.perf_counter()
        cache.get(layout, options.block, options.length, tile, device, transposed)
        times.append((time.perf_counter() - started) * 1e3)
    times = times[1:]
    return f"{statistics.median(times):.0f} ({min(times):.0f}-{max(times):.0f})"


if __name__ == "__main__":
    main()
