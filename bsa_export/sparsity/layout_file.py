"""Custom layouts from a `.npy` or `.safetensors` file. numpy alone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from bsa_export.checkpoint.dtypes import read
from bsa_export.checkpoint.safetensors_file import read_safetensors
from bsa_export.errors import SparsityError
from bsa_export.sparsity.facts import check_layout


def load_layouts(path: Path | str, num_layers: int, num_heads: int, blocks: int) -> list[np.ndarray]:
    """Reads custom layouts, integer or bool, from `.npy` or `.safetensors`.

    An array is `[heads, n, n]`, or `[1, n, n]` for every head. A `.npy` holds one for all layers or `[layers, heads, n, n]`.
    A `.safetensors` holds one tensor of any name, in either form, or one a layer, each with the layer's number as the only
    number in its name; if names end in `master_layout`, as in a converted checkpoint, only those count.

    Args:
        path: the file.
        num_layers: layers of the model.
        num_heads: heads of a layer.
        blocks: n, the longest length / block.

    Returns:
        uint8 `[num_heads, blocks, blocks]` for each layer, one object for all when the file holds one.

    Raises:
        SparsityError: not such a file, or a layout that does not fit or has an empty row.
        CheckpointError: a damaged `.safetensors`.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    if len(arrays) == 1:
        ((name, array),) = arrays.items()
        if array.ndim == 4:
            arrays = {f"{name}[{layer}]": array[layer] for layer in range(len(array))}
        else:
            return [_fitted(array, num_heads, blocks, f"{path}: {name}")] * num_layers
    else:
        arrays = _by_layer(arrays, path)
    if len(arrays) != num_layers:
        raise SparsityError(
            f"expected one layout, or one for each of {num_layers} layers", found=len(arrays), where=path
        )
    return [_fitted(array, num_heads, blocks, f"{path}: {name}") for name, array in arrays.items()]


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise SparsityError("no such file", where=path)
    if path.suffix == ".npy":
        try:
            return {"layout": np.load(path, mmap_mode="r", allow_pickle=False)}
        except (ValueError, OSError, EOFError) as error:
            raise SparsityError("cannot be read as an .npy array", found=str(error), where=path) from error
    if path.suffix == ".safetensors":
        rows, _ = read_safetensors(path)
        rows = {name: row for name, row in rows.items() if name.endswith("master_layout")} or rows
        for name, row in rows.items():
            if row.dtype[0] not in "BUI" or row.dtype == "BF16":
                raise SparsityError("expected integers or booleans", found=row.dtype, where=f"{path}: {name}")
        return {name: read(row) for name, row in rows.items()}
    raise SparsityError("expected a layout in .npy or .safetensors", found=path.suffix or "no suffix", where=path)


def _by_layer(arrays: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    layers = {}
    for name in arrays:
        numbers = re.findall(r"\d+", name)
        if len(numbers) != 1 or int(numbers[0]) in layers:
            raise SparsityError("expected the layer as the only number in each tensor's name", found=name, where=path)
        layers[int(numbers[0])] = name
    if sorted(layers) != list(range(len(layers))):
        raise SparsityError(f"expected layers 0 to {len(layers) - 1}", found=sorted(layers), where=path)
    return {layers[layer]: arrays[layers[layer]] for layer in sorted(layers)}


def _fitted(layout: np.ndarray, num_heads: int, blocks: int, where: str) -> np.ndarray:
    if layout.shape not in ((num_heads, blocks, blocks), (1, blocks, blocks)):
        raise SparsityError(
            f"expected a layout [{num_heads}, {blocks}, {blocks}] or [1, {blocks}, {blocks}]",
            found=list(layout.shape),
            where=where,
            hint="n is the longest length divided by the block",
        )
    check_layout(layout, where)
    return np.ascontiguousarray(np.broadcast_to(layout.astype(np.uint8), (num_heads, blocks, blocks)))
