"""A checkpoint folder of DeepSpeed ZeRO 1, 2 or 3 as a table: the fp32 master weights, joined from all ranks.

The format is that of deepspeed 0.19.6 (runtime/engine.py, runtime/zero, utils/zero_to_fp32.py). With stages 1 and 2 the
parameters of a group are one flat vector, cut into one part for each rank. With stage 3 each parameter is cut into
parts of equal size for the ranks, the last one padded, and each rank stores its parts one after another. Nothing is
executed, and a parameter is read from the parts when it is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bsa_export.checkpoint.dtypes import Piece, pieces
from bsa_export.checkpoint.table import (
    ITEM_SIZE,
    MAX_TENSORS,
    Checkpoint,
    Computed,
    FileRange,
    Skipped,
    SkipReason,
    Stamp,
    Tensor,
    checked_shape,
    file_stamp,
)
from bsa_export.checkpoint.torch_file import read_torch
from bsa_export.errors import CheckpointError
from bsa_export.files import read_text
from bsa_export.text import some

OPTIMIZER = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_([0-9]{1,6})_mp_rank_([0-9]{2,6})_optim_states\.pt")
MODEL = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_([0-9]{1,6})_mp_rank_([0-9]{2,6})_model_states\.pt")
WHOLE_MODEL = "mp_rank_00_model_states.pt"
PARTS = "single_partition_of_fp32_groups"  # stages 1 and 2
FLAT = "fp32_flat_groups"  # stage 3


@dataclass(frozen=True)
class _Vector:
    """One flat vector that is stored in several places, one after the other."""

    dtype: str
    parts: tuple[FileRange, ...]

    @property
    def size(self) -> int:
        return sum(part.nbytes for part in self.parts) // ITEM_SIZE[self.dtype]

    def cut(self, start: int, count: int) -> Iterator[FileRange]:
        """Where `count` elements from `start` on are stored."""
        item = ITEM_SIZE[self.dtype]
        first, last = start * item, (start + count) * item
        for part in self.parts:
            if first < part.nbytes and last > 0:
                begin, end = max(first, 0), min(last, part.nbytes)
                yield FileRange(part.path, part.offset + begin, end - begin)
            first, last = first - part.nbytes, last - part.nbytes


def find_zero_folder(folder: Path) -> Path | None:
    """The folder with the parts: `folder` itself, or what its file `latest` or its only `global_step*` names."""
    if _is_zero(folder):
        return folder
    inside = [entry for entry in sorted(folder.glob("global_step*")) if entry.is_dir() and _is_zero(entry)]
    if not inside:
        return None
    try:
        latest = read_text(folder / "latest", 1000).strip()
    except FileNotFoundError:
        latest = ""
    named = next((entry for entry in inside if entry.name == latest), None)
    if named is None and len(inside) > 1:
        raise CheckpointError(
            "expected one DeepSpeed checkpoint",
            found=some(entry.name for entry in inside),
            where=folder,
            hint="name the folder that you want",
        )
    return named or inside[0]


def _is_zero(folder: Path) -> bool:
    return any(OPTIMIZER.fullmatch(entry.name) for entry in folder.iterdir())


def open_zero_folder(folder: Path) -> Checkpoint:
    """Read the table of a folder of DeepSpeed ZeRO. No tensor is read.

    Raises:
        UnsafePickleError: a pickle names a function. Nothing is ever executed.
        CheckpointError: a part is missing or damaged, or the parts do not add up.
    """
    optimizers = _ranks(folder, OPTIMIZER)
    stamps = {path: file_stamp(path) for path in optimizers}
    states = [_optimizer_state(path) for path in optimizers]
    _check_ranks(folder, optimizers, states[0])
    if all(FLAT in state for state in states):
        models = _ranks(folder, MODEL)
        if len(models) != len(optimizers):
            raise _missing(folder, "model states", len(optimizers), models)
    else:
        models = [folder / WHOLE_MODEL]
    if not models[0].is_file():
        raise CheckpointError(f"expected {models[0].name} next to the optimizer's states", where=folder)
    stamps |= {path: file_stamp(path) for path in models}
    saved = [_model_state(path) for path in models]
    if all(FLAT in state for state in states):
        tensors = _stage_3(folder, states, saved)
    else:
        tensors = _stage_2(folder, states, saved[0])
    return _checkpoint(folder, tensors, saved[0], stamps)


def _checkpoint(
    folder: Path, trained: dict[str, Tensor], saved: Mapping[object, object], stamps: dict[Path, Stamp]
) -> Checkpoint:
    """The trained tensors with the buffers, and the names that share a tensor with another one."""
    module, buffers = saved.get("module"), saved.get("buffer_names")
    tensors = {
        name: row
        for name, row in (module.items() if isinstance(module, dict) else ())
        if isinstance(buffers, list) and name in buffers and isinstance(row, Tensor)
    } | trained
    _check_size(folder, tensors, stamps)
    shared = saved.get("shared_params")
    for name, other in shared.items() if isinstance(shared, dict) else ():
        if isinstance(name, str) and isinstance(other, str) and other in tensors:
            tensors[name] = tensors[other]
    why = "DeepSpeed's own entry"
    skipped = [
        Skipped(name, SkipReason.IN_THE_FILE, why) for name in saved if isinstance(name, str) and name != "module"
    ]
    configs = ("config.json", "bert_config.json")
    places = (place for place in (folder, folder.parent) if any((place / name).is_file() for name in configs))
    home = next(places, folder)
    return Checkpoint(tensors, home, list(stamps), skipped[:100], stamps=stamps)


def _check_size(folder: Path, tensors: Mapping[str, Tensor], stamps: Mapping[Path, Stamp]) -> None:
    """No bytes are many tensors: what is written is in proportion to what is read."""
    size, files = sum(row.nbytes for row in set(tensors.values())), sum(stamp[1] for stamp in stamps.values())
    if len(tensors) > MAX_TENSORS or size > 4 * files:
        raise CheckpointError(
            f"{len(tensors):,} tensors of {size:,} bytes are described by {files:,} bytes", where=folder
        )


def _ranks(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of all ranks, in their order."""
    found = {}
    for entry in folder.iterdir():
        if match := pattern.fullmatch(entry.name):
            if int(match[2]):
                raise CheckpointError("a model cut by model parallelism cannot be joined", where=entry)
            found[int(match[1])] = entry
    return [path for _, path in sorted(found.items())]


def _check_ranks(folder: Path, optimizers: Sequence[Path], state: Mapping[object, object]) -> None:
    count = state.get("partition_count")
    if isinstance(count, list):
        count = max((number for number in count if isinstance(number, int)), default=None)
    if not isinstance(count, int) or not 0 < count < 1_000_000:
        raise CheckpointError("expected the number of ranks as partition_count", where=optimizers[0])
    if count != len(optimizers) or _number(optimizers[-1]) != count - 1:
        raise _missing(folder, "optimizer states", count, optimizers)


def _number(path: Path) -> int:
    match = re.search("zero_pp_rank_([0-9]+)", path.name)
    return int(match[1]) if match else -1


def _missing(folder: Path, what: str, count: int, found: Sequence[Path]) -> CheckpointError:
    there = {_number(path) for path in found}
    missing = [number for number in range(min(count, 100_000)) if number not in there]
    return CheckpointError(
        f"expected the {what} of {count:,} ranks",
        found=f"{len(found):,}; missing: rank {some(missing)}" if missing else f"{len(found):,}",
        where=folder,
        hint="copy the folders of all nodes into one" if missing else None,
    )


def _optimizer_state(path: Path) -> Mapping[object, object]:
    saved = read_torch(path)
    state = saved.get("optimizer_state_dict") if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not (PARTS in state or FLAT in state):
        raise CheckpointError(f"expected the optimizer's state of DeepSpeed ZeRO, with {PARTS} or {FLAT}", where=path)
    return state


def _model_state(path: Path) -> Mapping[object, object]:
    saved = read_torch(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("param_shapes"), list):
        raise CheckpointError("expected the model's state of DeepSpeed ZeRO, with param_shapes", where=path)
    return saved


def _flat(value: object, where: object) -> list[Tensor]:
    """A list of flat, contiguous tensors."""
    rows = [row for row in (value if isinstance(value, list) else [value]) if isinstance(row, Tensor)]
    if not rows or not all(len(row.shape) == 1 and isinstance(row.data, FileRange) for row in rows):
        raise CheckpointError("expected flat tensors as the parts of the parameters", where=where)
    return rows


def _vector(rows: Sequence[Tensor], where: object) -> _Vector:
    dtypes = {row.dtype for row in rows}
    if len(dtypes) != 1:
        raise CheckpointError(f"expected parts of one dtype, found {some(sorted(dtypes)) or 'no parts'}", where=where)
    return _Vector(dtypes.pop(), tuple(row.data for row in rows if isinstance(row.data, FileRange)))


def _shapes(value: object, where: object) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and checked shapes of `param_shapes`."""
    for name, shape in value.items() if isinstance(value, dict) else ():
        try:
            yield str(name), checked_shape(shape)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}", where=where) from None


def _stage_2(
    folder: Path, states: Sequence[Mapping[object, object]], saved: Mapping[object, object]
) -> dict[str, Tensor]:
    tensors = _frozen(folder, [saved])
    groups = [_flat(state.get(PARTS), folder) for state in states]
    shapes = saved.get("param_shapes")
    if not isinstance(shapes, list) or any(len(group) != len(shapes) for group in groups):
        raise CheckpointError("expected as many parts of each rank as groups of parameters", where=folder)
    for number, group in enumerate(shapes):
        vector = _vector([rank[number] for rank in groups], folder)
        position = 0
        for name, shape in _shapes(group, folder):
            count = math.prod(shape)
            tensors[name] = _row(vector.dtype, shape, list(vector.cut(position, count)), name, folder)
            position += count
        _check_end(position, vector.size, 2 * len(states), folder)
    return tensors


def _stage_3(
    folder: Path, states: Sequence[Mapping[object, object]], saved: Sequence[Mapping[object, object]]
) -> dict[str, Tensor]:
    tensors = _frozen(folder, saved)
    ranks = [_vector(_flat(state.get(FLAT), folder), folder) for state in states]
    shapes = saved[0].get("param_shapes")
    position = 0
    for group in shapes if isinstance(shapes, list) else ():
        for name, shape in _shapes(group, folder):
            count = math.prod(shape)
            each = -(-count // len(ranks))
            places = [place for rank in ranks for place in rank.cut(position, each)]
            tensors[name] = _row(ranks[0].dtype, shape, _first(places, count * ITEM_SIZE[ranks[0].dtype]), name, folder)
            position += each
    for rank in ranks:
        _check_end(position, rank.size, 0, folder)
    return tensors


def _frozen(folder: Path, saved: Sequence[Mapping[object, object]]) -> dict[str, Tensor]:
    """The parameters that were not trained; with stage 3 they are cut as the others, each for itself."""
    tensors = {}
    for name, shape in _shapes(saved[0].get("frozen_param_shapes"), folder):
        parts = []
        for state in saved:
            fragments = state.get("frozen_param_fragments")
            part = fragments.get(name) if isinstance(fragments, dict) else None
            if not isinstance(part, Tensor) or not isinstance(part.data, FileRange):
                raise CheckpointError(f"{name}: its part is missing", where=folder)
            parts.append(part)
        vector = _vector(parts, folder)
        places = _first(vector.parts, math.prod(shape) * ITEM_SIZE[vector.dtype])
        tensors[name] = _row(vector.dtype, shape, places, name, folder)
    return tensors


def _check_end(position: int, size: int, align: int, folder: Path) -> None:
    """The parameters fill the vector, up to a padding of `align`."""
    if not 0 <= size - position <= align:
        raise CheckpointError(f"the parameters have {position:,} elements and their parts {size:,}", where=folder)


def _first(places: Sequence[FileRange], nbytes: int) -> list[FileRange]:
    """The first `nbytes` of several places."""
    found = []
    for place in places:
        if nbytes > 0:
            found.append(FileRange(place.path, place.offset, min(nbytes, place.nbytes)))
        nbytes -= place.nbytes
    return found


def _row(dtype: str, shape: tuple[int, ...], places: Sequence[FileRange], name: str, folder: Path) -> Tensor:
    """A tensor that is stored in several places, one after the other."""
    nbytes = math.prod(shape) * ITEM_SIZE[dtype]
    if sum(place.nbytes for place in places) != nbytes:
        raise CheckpointError(f"{name}: its parts do not hold {list(shape)}", where=folder)
    if len(places) == 1:
        return Tensor(dtype, shape, places[0])

    def chunks() -> Iterator[Piece]:
        for place in places:
            yield from pieces(Tensor("U8", (place.nbytes,), place))

    return Tensor(dtype, shape, Computed(chunks))
