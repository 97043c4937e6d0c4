"""The integrity of a converted folder: the file check and the layout check, which bsa-pull runs too.

The weight files are opened by the safetensors library as well: the format's own parser judges our reader. Torch is not
imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bsa_export.bert.expected_tensors import compare, has_position_table
from bsa_export.bert.families import FAMILIES, reserved_rows
from bsa_export.checkpoint.checksum import file_checksum
from bsa_export.checkpoint.dtypes import DTYPES, TORCH_NAMES, read
from bsa_export.checkpoint.open import WEIGHT_ENDINGS
from bsa_export.checkpoint.table import FileRange, SkipReason
from bsa_export.checkpoint.writer import INDEX_NAME
from bsa_export.converted.checks import Check, Kind, result
from bsa_export.converted.folder import ConvertedFolder, open_folder, recorded_sparsity
from bsa_export.converted.names import (
    CARD,
    CONVERSION_RECORD,
    PULL_RECORD,
    VERIFICATION_RECORD,
    files_in,
    of_conversion,
    of_model,
    of_people,
)
from bsa_export.converted.records import ConversionRecord
from bsa_export.converted.statements import statement_faults
from bsa_export.errors import BsaError, FamilyError, SparsityError
from bsa_export.files import MAX_JSON_BYTES, read_json, sha256
from bsa_export.sparsity.configs import DEEPSPEED_LENGTH
from bsa_export.sparsity.facts import check_layout as check_array
from bsa_export.sparsity.layouts import make_layouts, with_local_layers
from bsa_export.sparsity.sections import config_class_path
from bsa_export.text import some

# The figure that names files which conversion.json does not list.
NOT_RECORDED = f"not in {CONVERSION_RECORD}:"


def check_file(folder: Path) -> Check:
    """Checks weight files, their index, config.json and conversion.json against each other, and every recorded digest.

    The digests of weights are computed at the speed of the disk. Files that conversion.json does not list are named in
    the figures: the conversion did not write them.
    """
    try:
        opened = open_folder(folder)
    except BsaError as error:
        return result(Kind.FILE, [str(error)])
    faults = [*_parser_faults(opened), *_table_faults(opened), *_weight_file_faults(opened)]
    figures: dict[str, Any] = {
        "tensors": len(opened.tensors),
        "bytes": sum(row.nbytes for row in opened.tensors.values()),
        "files": len(opened.checkpoint.files),
    }
    if opened.record is None:
        figures["digests"] = "none: there is no conversion.json"
    else:
        faults += [*_config_faults(opened, opened.record), *_record_faults(opened, opened.record)]
        faults += statement_faults(opened, opened.record)
        changed, compared = digest_faults(opened, opened.record)
        faults += changed.values()
        figures["digests"] = f"{compared} of {len(opened.record.files)} files"
        if unexpected := unexpected_files(opened.path, opened.record):
            figures[NOT_RECORDED] = some(unexpected, 5)
    return result(Kind.FILE, faults, figures)


def unexpected_files(folder: Path, record: ConversionRecord) -> list[str]:
    """The files of a converted folder that conversion.json does not list.

    The card, licenses, pictures and hidden files are left out.
    """
    return [
        name
        for name in files_in(folder)
        if not (of_conversion(name, record.files) or of_people(name) or name == PULL_RECORD)
        and not any(part.startswith(".") for part in name.split("/"))
    ]


def _parser_faults(opened: ConvertedFolder) -> list[str]:
    """What the safetensors library refuses or reads differently: names, dtypes and shapes of every weight file."""
    from safetensors import SafetensorError, safe_open

    ours: dict[Path, dict[str, tuple[str, tuple[int, ...]]]] = {file: {} for file in opened.checkpoint.files}
    for name, row in opened.tensors.items():
        assert isinstance(row.data, FileRange)  # what a safetensors file consists of
        ours[row.data.path][name] = (row.dtype, tuple(row.shape))
    faults = []
    for file, expected in ours.items():
        try:
            with safe_open(file, framework="np") as reader:
                names = reader.keys()
                slices = {name: reader.get_slice(name) for name in names}
                found = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
        except (SafetensorError, OSError) as error:
            faults.append(f"{file.name}: the safetensors library refuses it ({error})")
            continue
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                faults.append(
                    f"{file.name}: {name}: expected {expected.get(name)} from the safetensors library,"
                    f" found {found.get(name)}"
                )
    return faults


def _table_faults(opened: ConvertedFolder) -> list[str]:
    """Names, shapes and dtypes that config.json implies, and the metadata that transformers asks for."""
    faults = []
    try:
        misfits = compare(opened.tensors, opened.encoder.sparse_spec())
    except FamilyError as error:
        return [str(error)]
    faults += [f"{name}: missing" for name in misfits.missing]
    faults += [
        f"{name}: expected {expected} from config.json, found {found}"
        for name, (expected, found) in misfits.mismatched.items()
    ]
    if opened.checkpoint.metadata.get("format") != "pt":
        faults.append("the safetensors metadata lack format: pt, without which transformers does not load them")
    return faults


def _weight_file_faults(opened: ConvertedFolder) -> list[str]:
    """Weight files that are not read, and an index whose total size is wrong."""
    recorded = opened.record.files if opened.record else {}
    faults = [
        f"{skipped.name}: {skipped.why}"
        for skipped in opened.checkpoint.skipped
        if skipped.reason is not SkipReason.OTHER_WEIGHTS
        or skipped.name not in recorded  # a head that was carried over
    ]
    read = {file.name for file in opened.checkpoint.files}
    there = [entry.name for entry in sorted(opened.path.iterdir()) if entry.name.endswith(WEIGHT_ENDINGS)]
    skipped = {skipped.name for skipped in opened.checkpoint.skipped}
    faults += [f"{name}: a file of weights that nothing reads" for name in there if name not in read | skipped]
    index = opened.path / INDEX_NAME
    if len(read) > 1 and index.is_file():
        content = read_json(index, MAX_JSON_BYTES)
        metadata = content.get("metadata") if isinstance(content, dict) else None
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        total = sum(row.nbytes for row in opened.tensors.values())
        if stated != total:
            faults.append(f"{INDEX_NAME}: expected a total_size of {total}, found {stated}")
    return faults


def _config_faults(opened: ConvertedFolder, record: ConversionRecord) -> list[str]:
    """config.json against the source's, which conversion.json holds, and against what it says was done."""
    source = {name: value for name, value in record.source.config.items() if name not in record.removed_fields}
    family = FAMILIES[record.family]
    expected = family.config(source) | record.implied_config
    if record.attn_implementation is not None:
        expected["attn_implementation"] = record.attn_implementation
    if (dtype := record.options.dtype) in DTYPES:
        expected["dtype" if "dtype" in expected else "torch_dtype"] = TORCH_NAMES[dtype]
    try:
        sparsity = recorded_sparsity(record, opened.heads)
    except BsaError as error:
        return [str(error)]
    expected["sparse_config_cls"] = config_class_path(sparsity)
    expected["sparse_attention"] = sparsity.to_parameters()
    if record.positions is not None:
        expected["max_position_embeddings"] = record.positions.rows
    elif not has_position_table(family, expected):
        expected["max_position_embeddings"] = reserved_rows(family, expected) + record.max_length
    names = [*expected, *(name for name in opened.config if name not in expected)]
    absent = object()
    faults = [
        f"config.json: {name}: expected {expected.get(name, 'none')!r} from conversion.json,"
        f" found {opened.config.get(name, 'none')!r}"
        for name in names
        if expected.get(name, absent) != opened.config.get(name, absent)
    ]
    if record.max_length != opened.longest:
        faults.append(
            f"conversion.json: max_length: expected {opened.longest} from config.json, found {record.max_length}"
        )
    return faults


def _record_faults(opened: ConvertedFolder, record: ConversionRecord) -> list[str]:
    """Names of conversion.json that should be in the weights, or should not."""
    tensors = opened.tensors
    there = {**dict.fromkeys(record.renamed.values(), "renamed"), **dict.fromkeys(record.changed, "changed")}
    there |= dict.fromkeys(record.added, "added") | dict.fromkeys(record.tied.values(), "tied")
    absent = dict.fromkeys(record.dropped, "dropped") | dict.fromkeys(record.tied, "tied")
    absent |= dict.fromkeys([old for old in record.renamed if old not in there], "renamed")
    faults = [
        f"{name}: missing, though conversion.json has it as {how}" for name, how in there.items() if name not in tensors
    ]
    return faults + [
        f"{name}: it is there, though conversion.json has it as {how}"
        for name, how in absent.items()
        if name in tensors
    ]


def digest_faults(opened: ConvertedFolder, record: ConversionRecord) -> tuple[dict[str, str], int]:
    """The recorded files that have another size or digest: name -> a sentence. And how many had a digest."""
    faults, compared = {}, 0
    for name, expected in record.files.items():
        path = opened.path / name
        kind, digest = next(((kind, found) for kind in DIGESTS if (found := getattr(expected, kind))), (None, None))
        compared += kind is not None
        if not os.path.isfile(path):  # False also for a name that is too long for a file
            faults[name] = f"{name}: missing, though conversion.json records it"
        elif path.stat().st_size != expected.bytes:
            found = path.stat().st_size
            faults[name] = f"{name}: expected {expected.bytes} bytes from conversion.json, found {found}"
        elif kind and DIGESTS[kind](path) != digest:
            faults[name] = f"{name}: its {kind} is not the one in conversion.json: it was changed since"
    if record.files:
        unrecorded = {file.name for file in opened.checkpoint.files} - set(record.files)
        faults |= {name: f"{name}: conversion.json does not record it" for name in sorted(unrecorded)}
    return faults, compared


# By name in conversion.json; the first that is there counts.
DIGESTS = {"checksum": file_checksum, "sha256": sha256}


def check_layout(folder: Path) -> Check:
    """Checks each layer's stored layout. One layer is in memory at a time.

    It must hold 0 and 1 only, have no empty row, have heads and blocks as configured, and equal the layout recomputed
    from the sparsity config and seed, where a rule made it.
    """
    try:
        opened = open_folder(folder)
    except BsaError as error:
        return result(Kind.LAYOUT, [str(error)])
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
        return result(Kind.LAYOUT, faults, figures)
    try:
        recomputed, how = expected_layouts(opened)
    except SparsityError as error:
        return result(Kind.LAYOUT, [str(error)], figures)
    kept, patterns = [], set()
    for layer, name in names.items():
        layout = read(opened.tensors[name])
        try:
            check_array(layout, f"layer {layer}")
        except SparsityError as error:
            faults.append(str(error))
        faults += differences(layer, layout, recomputed)
        kept.append(np.count_nonzero(layout) / layout.size)
        patterns |= {np.packbits(head != 0).tobytes() for head in layout}
    density = float(np.mean(kept))
    if opened.record is not None and not abs(density - opened.record.density) <= 1e-9:  # NaN too
        faults.append(f"expected a density of {opened.record.density:.6f} from conversion.json, found {density:.6f}")
    return result(Kind.LAYOUT, faults, figures | {"density": density, "distinct": len(patterns), "recomputed": how})


def differences(layer: int, layout: np.ndarray, expected: list[np.ndarray] | None) -> Iterator[str]:
    """Where a layer's layout `[heads, n, n]` differs from `expected`, a sentence for each head."""
    if expected is None or expected[layer].shape != layout.shape:
        return
    for head in np.flatnonzero((layout != expected[layer]).any(axis=(1, 2))):
        where = np.argwhere(layout[head] != expected[layer][head])
        row, column = where[0]
        more = f" and {len(where) - 1} more blocks" if len(where) > 1 else ""
        yield (
            f"layer {layer}, head {head}, row {row}, column {column}: expected {expected[layer][head, row, column]}"
            f" from the sparsity config, found {layout[head, row, column]}{more}"
        )


def expected_layouts(opened: ConvertedFolder) -> tuple[list[np.ndarray] | None, str]:
    """Recomputes the layouts from the folder's sparsity config and seed.

    Returns:
        One layout `[heads, n, n]` a layer, and how they were made; None where no rule made the stored ones, and why.
    """
    sparsity, record, longest = opened.sparsity, opened.record, opened.longest
    if record is not None:
        record = record.origin  # what was trained keeps the layouts of its conversion
        sparsity = recorded_sparsity(record, opened.heads)
        if any(change.layout for change in record.changed.values()):
            return None, "no: they come from the source"
    if sparsity.mode == "custom":
        return None, "no: custom, no rule made them"
    random = getattr(sparsity, "num_random_blocks", 0)
    if record is not None:
        differ = record.options.different_layout_per_layer
        layouts = make_layouts(sparsity, longest, opened.layers, record.seed, differ)
        layouts = with_local_layers(layouts, opened.windows, opened.block)
        return layouts, f"yes: {sparsity.mode}" + (f", seed {record.seed}" if random else "")
    if random:
        return None, "no: random blocks, and no conversion.json has the seed"
    layouts = with_local_layers(make_layouts(sparsity, longest, opened.layers), opened.windows, opened.block)
    first = next((layer for layer, window in enumerate(opened.windows) if window is None), 0)
    if (
        longest < DEEPSPEED_LENGTH
        and DEEPSPEED_LENGTH % sparsity.block == 0
        and opened.layout_name(first) in opened.tensors
    ):
        # DeepSpeed's own class slices one layout of this length, which need not be the layout made for the shorter one.
        n = longest // sparsity.block
        sliced = make_layouts(sparsity, DEEPSPEED_LENGTH, 1)[0][:, :n, :n]
        if np.array_equal(read(opened.tensors[opened.layout_name(first)]), sliced):
            layouts = with_local_layers([sliced] * opened.layers, opened.windows, opened.block)
            return layouts, f"yes: {sparsity.mode} at {DEEPSPEED_LENGTH} tokens, sliced"
    return layouts, f"yes: {sparsity.mode}"


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the files of the converted model, by name.

    With a conversion.json they are those that it lists, and the record itself: what bsa-push publishes as the model.
    Without one they are those that look like files of a model.
    """
    folder = Path(folder)
    names = {name for name in files_in(folder) if of_model(name)}
    with suppress(BsaError):
        opened = open_folder(folder)
        if opened.record is not None:
            names = {name for name in files_in(folder) if of_conversion(name, opened.record.files)}
        names |= {file.name for file in opened.checkpoint.files}
    return {name: sha256(folder / name) for name in sorted(names - {VERIFICATION_RECORD, CARD})}
