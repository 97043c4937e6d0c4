"""The layout check: what is stored for each layer can be attended with, and is what the sparsity config and seed give. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bsa_export.checkpoint.dtypes import read
from bsa_export.errors import BsaError, SparsityError
from bsa_export.layout import check_layout as check_array
from bsa_export.plan import DEEPSPEED_LENGTH
from bsa_export.sparsity import make_layouts
from bsa_export.verify.checks import Check, result
from bsa_export.verify.folder import ConvertedFolder, open_folder, recorded_sparsity

NAME = "layout"


def check_layout(folder: Path) -> Check:
    """Checks each layer's stored layout: 0 and 1, no empty row, heads and blocks as configured, and equal to one that is made
    again from the sparsity config and seed, wherever a rule made it. One layer is in memory at a time."""
    try:
        opened = open_folder(folder)
    except BsaError as error:
        return result(NAME, [str(error)])
    faults, n = [], opened.longest // opened.block
    names = {layer: opened.layout_name(layer) for layer in range(opened.layers)}
    for layer, name in names.items():
        row = opened.tensors.get(name)
        if row is None:
            faults.append(f"layer {layer}: it has no stored layout {name}")
        elif row.dtype != "U8" or row.shape != (opened.heads, n, n):
            expected = f"U8 {[opened.heads, n, n]} from config.json"
            faults.append(f"layer {layer}: expected {expected}, found {row.dtype} {list(row.shape)}")
    figures = {"layers": opened.layers, "heads": opened.heads, "blocks": n, "block": opened.block}
    if faults:
        return result(NAME, faults, figures)
    try:
        expected, how = expected_layouts(opened)
    except SparsityError as error:
        return result(NAME, [str(error)], figures)
    kept, patterns = [], set()
    for layer, name in names.items():
        layout = read(opened.tensors[name])
        try:
            check_array(layout, f"layer {layer}")
        except SparsityError as error:
            faults.append(str(error))
        faults += differences(layer, layout, expected)
        kept.append(np.count_nonzero(layout) / layout.size)
        patterns |= {np.packbits(head != 0).tobytes() for head in layout}
    density = float(np.mean(kept))
    if opened.record is not None and not abs(density - opened.record["density"]) <= 1e-9:  # NaN too
        faults.append(f"expected a density of {opened.record['density']:.6f} from conversion.json, found {density:.6f}")
    return result(NAME, faults, figures | {"density": density, "distinct": len(patterns), "made again": how})


def differences(layer: int, layout: np.ndarray, expected: list[np.ndarray] | None) -> Iterator[str]:
    """What of a layer's layout `[heads, n, n]` is not as in `expected`, in a sentence for each head."""
    if expected is None or expected[layer].shape != layout.shape:
        return
    for head in np.flatnonzero((layout != expected[layer]).any(axis=(1, 2))):
        where = np.argwhere(layout[head] != expected[layer][head])
        row, column = where[0]
        more = f" and {len(where) - 1} more blocks" if len(where) > 1 else ""
        yield (
            f"layer {layer}, head {head}, row {row}, column {column}: expected {expected[layer][head, row, column]} from the"
            f" sparsity config, found {layout[head, row, column]}{more}"
        )


def expected_layouts(opened: ConvertedFolder) -> tuple[list[np.ndarray] | None, str]:
    """The layouts that the folder's sparsity config and seed give, one a layer, and how they were made; None where no rule made
    those that are stored, and why."""
    sparsity, record, longest = opened.sparsity, opened.record, opened.longest
    if record is not None:
        sparsity = recorded_sparsity(record, opened.heads)
        if any(name in record["changed"] for name in map(opened.layout_name, range(opened.layers))):
            return None, "no: they come from the source"
    if sparsity.mode == "custom":
        return None, "no: custom, no rule made them"
    random = getattr(sparsity, "num_random_blocks", 0)
    if record is not None:
        differ = bool(record["options"].get("different_layout_per_layer"))
        layouts = make_layouts(sparsity, longest, opened.layers, record["seed"], differ)
        return layouts, f"yes: {sparsity.mode}" + (f", seed {record['seed']}" if random else "")
    if random:
        return None, "no: random blocks, and no conversion.json tells the seed"
    layouts = make_layouts(sparsity, longest, opened.layers)
    if (
        longest < DEEPSPEED_LENGTH
        and DEEPSPEED_LENGTH % sparsity.block == 0
        and opened.layout_name(0) in opened.tensors
    ):
        # DeepSpeed's own class slices one layout of this length, which need not be the layout made for the shorter one.
        n = longest // sparsity.block
        sliced = make_layouts(sparsity, DEEPSPEED_LENGTH, 1)[0][:, :n, :n]
        if np.array_equal(read(opened.tensors[opened.layout_name(0)]), sliced):
            return [sliced] * opened.layers, f"yes: {sparsity.mode} at {DEEPSPEED_LENGTH} tokens, sliced"
    return layouts, f"yes: {sparsity.mode}"
