"""Whether a conversion fits into memory and onto the disk, checked before it begins."""

from __future__ import annotations

import resource
import shutil
from contextlib import suppress
from pathlib import Path

from bsa_export.errors import CheckpointError, SparsityError
from bsa_export.text import size

MOST_BLOCKS = 8192  # of a row of a layout: 67 MB a head
BYTES_A_BLOCK = 6  # of memory, for a layout and what is computed from it
_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def refuse_large_layouts(blocks: int, block: int, patterns: int) -> None:
    """Raises SparsityError for layouts that are too large, or do not fit into memory.

    Args:
        blocks: of a row.
        block: side of a block in tokens.
        patterns: layouts `[blocks, blocks]` that differ, in all layers.
    """
    if blocks > MOST_BLOCKS:
        raise SparsityError(
            f"expected at most {MOST_BLOCKS * block:,} tokens in blocks of {block}",
            found=f"{blocks * block:,}",
            where="--max-length",
            hint=f"a layout of {blocks:,} x {blocks:,} blocks has {size(blocks**2)} for each head of each layer; "
            "choose a larger --block",
        )
    needed, free = BYTES_A_BLOCK * patterns * blocks**2, available_memory()
    if free is not None and needed > free:
        raise SparsityError(
            f"layouts of {blocks:,} x {blocks:,} blocks need about {size(needed)} of memory",
            found=f"{size(free)} available",
            where="--max-length",
            hint="choose a larger --block or a smaller length",
        )


def refuse_full_disk(target: Path, nbytes: int) -> None:
    """Raises CheckpointError where the disk of the folder `target` has fewer than `nbytes` bytes free."""
    folder = next((parent for parent in target.absolute().parents if parent.is_dir()), None)
    if folder is None:
        return
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise CheckpointError(
                f"expected {size(nbytes)} of free space on its disk",
                found=size(free),
                where=target,
                hint="choose another folder or a smaller --max-length",
            )


def available_memory() -> int | None:
    """Bytes of memory that this process can still get; None where the system does not say."""
    known = []
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        known.append(int(line.split()[1]) * 1024)
    for limit, used in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # "max" stands for no limit
            known.append(int(limit.read_text()) - int(used.read_text()))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        known.append(soft)
    return max(min(known), 0) if known else None
