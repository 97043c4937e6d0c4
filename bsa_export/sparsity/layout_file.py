"""Custom layouts from a `.npy` or `.safetensors` file. numpy alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bsa_export.checkpoint.dtypes import read
from bsa_export.checkpoint.safetensors_file import read_safetensors
from bsa_export.errors import SparsityError
from bsa_export.sparsity.facts import check_layout


@dataclass(frozen=True)
class _Stored:
    """An array in a file that is read when it is asked for, after its shape was checked."""

    where: str
    shape: tuple[int, ...]
    dtype: str
    is_integer: bool
    read: Callable[[], np.ndarray]


def load_layouts(path: Path | str, num_layers: int, num_heads: int, blocks: int | None) -> list[np.ndarray]:
    """Reads custom layouts, integer or bool, from `.npy` or `.safetensors`.

    An array is `[heads, n, n]`, or `[1, n, n]` for every head. A `.npy` holds one for all layers or `[layers, heads, n,
    n]`. A `.safetensors` holds one tensor of any name, in either form, or one a layer, each with the layer's number as
    the only number in its name; if names end in `master_layout`, as in a converted checkpoint, only those count.

    Args:
        path: the file.
        num_layers: layers of the model.
        num_heads: heads of a layer.
        blocks: n, the longest length / block; None accepts what the file holds.

    Returns:
        uint8 `[num_heads, blocks, blocks]` for each layer, one object for all when the file holds one; read-only where
        all heads share memory.

    Raises:
        SparsityError: the file is not of this kind, or a layout does not fit or has an empty row.
        CheckpointError: a damaged `.safetensors`.
    """
    path = Path(path)
    if not path.is_file():
        raise SparsityError("expected a file" if path.exists() else "no such file", where=path)
    if path.suffix == ".npy":
        stored = {"layout": _npy(path)}
    elif path.suffix == ".safetensors":
        stored = _safetensors(path)
    else:
        raise SparsityError("expected a layout in .npy or .safetensors", found=path.suffix or "no suffix", where=path)
    if blocks is None:
        blocks = next((array.shape[-1] for array in stored.values() if array.shape), 0)
    of_all_layers = next(iter(stored.values())) if len(stored) == 1 else None
    if of_all_layers is not None and len(of_all_layers.shape) != 4:
        _check_form(of_all_layers, of_all_layers.shape, num_heads, blocks)
        return [_checked(of_all_layers.read(), num_heads, of_all_layers.where)] * num_layers
    count = of_all_layers.shape[0] if of_all_layers is not None else len(stored)
    if count != num_layers:
        raise SparsityError(f"expected one layout, or one for each of {num_layers} layers", found=count, where=path)
    if of_all_layers is not None:
        _check_form(of_all_layers, of_all_layers.shape[1:], num_heads, blocks)
        layers = of_all_layers.read()
        return [_checked(layer, num_heads, f"{of_all_layers.where}[{i}]") for i, layer in enumerate(layers)]
    in_order = _by_layer(stored, path)
    for array in in_order:
        _check_form(array, array.shape, num_heads, blocks)
    return [_checked(array.read(), num_heads, array.where) for array in in_order]


def _npy(path: Path) -> _Stored:
    try:
        with np.errstate(over="ignore"):
            array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy's parser raises more kinds than it documents
        raise SparsityError("cannot be read as an .npy array", found=str(error)[:300], where=path) from None
    return _Stored(f"{path}: layout", array.shape, str(array.dtype), array.dtype.kind in "bui", lambda: array)


def _safetensors(path: Path) -> dict[str, _Stored]:
    rows, _ = read_safetensors(path)
    rows = {name: row for name, row in rows.items() if name.endswith("master_layout")} or rows
    return {
        name: _Stored(
            f"{path}: {name}",
            tuple(row.shape),
            row.dtype,
            row.dtype[0] in "BUI" and row.dtype != "BF16",
            partial(read, row),
        )
        for name, row in rows.items()
    }


def _by_layer(stored: dict[str, _Stored], path: Path) -> list[_Stored]:
    layers: dict[int, _Stored] = {}
    for name, array in stored.items():
        numbers = re.findall("[0-9]+", name)
        if len(numbers) != 1 or len(numbers[0]) > 9 or int(numbers[0]) in layers:
            raise SparsityError("expected the layer as the only number in each tensor's name", found=name, where=path)
        layers[int(numbers[0])] = array
    if sorted(layers) != list(range(len(layers))):
        raise SparsityError(f"expected layers 0 to {len(layers) - 1}", found=sorted(layers), where=path)
    return [layers[layer] for layer in sorted(layers)]


def _check_form(array: _Stored, shape: tuple[int, ...], num_heads: int, blocks: int) -> None:
    """Refuses an array by its dtype and `shape`, before it is read."""
    if not array.is_integer:
        raise SparsityError("expected integers or booleans", found=array.dtype, where=array.where)
    if shape not in ((num_heads, blocks, blocks), (1, blocks, blocks)):
        raise SparsityError(
            f"expected a layout [{num_heads}, {blocks}, {blocks}] or [1, {blocks}, {blocks}]",
            found=list(array.shape),
            where=array.where,
            hint="n is the longest length divided by the block",
        )


def _checked(layout: np.ndarray, num_heads: int, where: str) -> np.ndarray:
    check_layout(layout, where)
    layout = np.ascontiguousarray(layout, np.uint8)
    return layout if len(layout) == num_heads else np.broadcast_to(layout, (num_heads, *layout.shape[1:]))
