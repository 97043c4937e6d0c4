"""A dense BERT checkpoint becomes a sparse-attention one, from path to folder: opens, plans, writes, records."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from bsa_export.bert.config_file import find_config, read_config
from bsa_export.bert.recognition import encoder_prefix
from bsa_export.checkpoint.atomic_folder import AtomicFolder
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import Checkpoint, Tensor
from bsa_export.checkpoint.writer import FileRecord, write_weights
from bsa_export.conversion import carried_files, lineage
from bsa_export.conversion.carried_files import CarriedFiles
from bsa_export.conversion.config_fields import BLOCK_SPARSE, from_a_conversion
from bsa_export.conversion.layouts import WINDOW_MODES, WINDOW_PARAMETERS
from bsa_export.conversion.lineage import Ancestor, find_ancestor, with_layouts
from bsa_export.conversion.options import BARE, Options, parse_dtype, parse_length
from bsa_export.conversion.plan import Plan, plan
from bsa_export.conversion.resources import refuse_full_disk
from bsa_export.conversion.source_folder import encoder_folder
from bsa_export.converted import card, kept_card
from bsa_export.converted.names import CARD, CONFIG, CONVERSION_RECORD
from bsa_export.converted.records import ConversionRecord, FileEntry, SourceEntry, Training, to_json
from bsa_export.errors import CheckpointError, SparsityError
from bsa_export.files import read_json, write_json
from bsa_export.hub.source import Source, find_source
from bsa_export.sparsity.configs import MODES
from bsa_export.version import __version__

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Converted:
    """A conversion that was done: the folder, its plan, the record (conversion.json), and how many seconds it took."""

    folder: Path
    plan: Plan
    record: ConversionRecord
    seconds: float


def convert(
    source: str | Path,
    target: str | Path,
    *,
    max_length: int | str | None = None,
    mode: str | None = None,
    window: int | str | None = None,
    block: int | None = None,
    sparsity: str | Path | Mapping[str, Any] | None = None,
    layout: str | Path | None = None,
    num_local_blocks: int | None = None,
    num_sliding_window_blocks: int | None = None,
    num_global_blocks: int | None = None,
    num_random_blocks: int | None = None,
    num_different_global_patterns: int | None = None,
    local_window_blocks: Sequence[int] | None = None,
    global_block_indices: Sequence[int] | None = None,
    global_block_end_indices: Sequence[int] | None = None,
    horizontal_global_attention: bool | None = None,
    different_layout_per_head: bool | None = None,
    attention: str | None = None,
    different_layout_per_layer: bool = False,
    seed: int = 0,
    positions: str = "tile",
    dtype: str = "keep",
    prefix: str | None = None,
    ignore_tensors: Sequence[str] = (),
    max_shard_size: int | None = None,
    config: str | Path | None = None,
    trained_from: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Converts a dense BERT checkpoint to block-sparse attention: the command bsa-convert.

    The folder `target` appears whole or not at all. The source is only read, and nothing in it is executed.

    Args:
        source: a file of weights, an index of shards, a folder, or a repository of the Hub: `org/name[@revision]`,
            `org/name/folder[@revision]`, or the address of its page.
        target: the folder to make.
        max_length: tokens that the new model reads, in whole blocks; unless given, 8 times the source's length, or
            that length itself from 4,096 tokens on. `"4k"` is 4096.
        mode: which blocks are kept, one of `bsa_export.sparsity.MODES`; `windowed` unless given.
        window: tokens of a window in the modes `windowed` and `local`, in whole blocks, for a source that reads more
            than a token has to attend to, or for speed; the source's length unless given. In `windowed`,
            inputs up to that length keep the source's outputs.
        block: side of a block in tokens; 64, or 32 or 16 where 64 does not divide the lengths.
        sparsity: mode and parameters as the `sparse_attention` section of a DeepSpeed config, or a JSON file with it.
        layout: for the mode `custom`, a .npy or .safetensors file with a layout for all layers or one a layer.
        num_local_blocks, num_sliding_window_blocks, num_global_blocks, num_random_blocks,
            num_different_global_patterns, local_window_blocks, global_block_indices, global_block_end_indices,
            horizontal_global_attention, different_layout_per_head, attention: parameters of the mode's class, with its
            defaults.
        different_layout_per_layer: whether each layer draws its own random blocks.
        seed: for random blocks.
        positions: how position embeddings are extended, `tile` or `interpolate`.
        dtype: `keep`, or what floating tensors are rounded to: `fp32`, `fp16` or `bf16`, in any usual spelling.
        prefix: the prefix of the encoder that is meant, where a checkpoint holds several.
        ignore_tensors: patterns of names, as in a shell; such tensors are left out.
        max_shard_size: bytes of a file of weights; one file unless given.
        config: the source's config.json, if it is not stored next to the weights.
        trained_from: the conversion that the source was trained from: a folder, or a repository of the Hub. Unless
            given, it is looked for in the source's folder and in the three folders around it.
        overwrite: whether an earlier conversion may be replaced.
        progress: called with (bytes written, bytes in all).

    Returns:
        What was done.

    Raises:
        BsaError: with what is wrong; nothing is left behind then.
    """
    given = {
        "num_local_blocks": num_local_blocks,
        "num_sliding_window_blocks": num_sliding_window_blocks,
        "num_global_blocks": num_global_blocks,
        "num_random_blocks": num_random_blocks,
        "num_different_global_patterns": num_different_global_patterns,
        "local_window_blocks": local_window_blocks,
        "global_block_indices": global_block_indices,
        "global_block_end_indices": global_block_end_indices,
        "horizontal_global_attention": horizontal_global_attention,
        "different_layout_per_head": different_layout_per_head,
        "attention": attention,
    }
    try:
        length = None if max_length is None else parse_length(max_length)
        window = None if window is None else parse_length(window)
        dtype = parse_dtype(dtype)
    except ValueError as error:
        raise SparsityError(str(error)) from None
    options = Options(
        max_length=length,
        mode=mode,
        window=window,
        block=block,
        parameters={name: value for name, value in given.items() if value is not None},
        section=sparsity_section(Path(sparsity)) if isinstance(sparsity, (str, Path)) else sparsity,
        layout=None if layout is None else Path(layout),
        seed=seed,
        different_layout_per_layer=different_layout_per_layer,
        positions=positions,
        dtype=dtype,
        prefix=prefix,
        ignore_tensors=[ignore_tensors] if isinstance(ignore_tensors, str) else ignore_tensors,
    )
    watched = progress is not None
    return convert_source(
        _found(source, watched),
        Path(target),
        options,
        config_path=None if config is None else Path(config),
        trained_from=None if trained_from is None else _found(trained_from, watched),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
    )


def _found(source: str | Path, progress: bool) -> Source:
    """What a caller names: a Path is one, and a str may be a repository of the Hub."""
    return Source(source) if isinstance(source, Path) else find_source(source, progress=progress)


def plan_source(
    source: Source, options: Options, config_path: Path | None = None, trained_from: Source | None = None
) -> tuple[Checkpoint, Plan, CarriedFiles]:
    """Opens a source and plans its conversion. Returns the checkpoint, the plan, and the files to carry over."""
    check_options(options)
    with source.named_errors():
        return _plan_source(source, options, config_path, trained_from)


def _plan_source(
    source: Source, options: Options, config_path: Path | None, trained_from: Source | None
) -> tuple[Checkpoint, Plan, CarriedFiles]:
    checkpoint = open_checkpoint(encoder_folder(source.path))
    config = read_config(config_path or find_config(checkpoint.folder))
    ancestor, missing = find_ancestor(trained_from, checkpoint, config, options.prefix)
    tensors = checkpoint.tensors if ancestor is None else with_layouts(ancestor, checkpoint.tensors, options.prefix)
    planned = plan(tensors, config, options, where=source.path)
    carried = carried_files.plan(
        source.path,
        checkpoint,
        planned.source_length,
        planned.max_length,
        keep_card=from_a_conversion(config) and card.is_own(_folder(source)),
    )
    if ancestor is not None:
        carried, kept = lineage.with_missing_files(ancestor, carried, config)
        planned = replace(planned, trained_from=replace(_training(ancestor, tensors, planned), files=kept))
        ancestor.folder.checkpoint.check_unchanged()
    notes = [*planned.notes, *missing, *carried.notes()]
    files = {*carried.left_behind, *(file.source.name for file in carried.carried)}
    skipped = {entry.name: entry.why for entry in checkpoint.skipped if entry.name not in files}
    return (
        checkpoint,
        replace(planned, skipped=skipped, notes=notes),
        carried,
    )


def _training(ancestor: Ancestor, tensors: Mapping[str, Tensor], planned: Plan) -> Training:
    """What the training changed, by the names that the plan writes; before the plan rounds anything."""
    left_out = planned.dropped.keys() | planned.tied.keys()
    trained = {planned.renamed.get(name, name): row for name, row in tensors.items() if name not in left_out}
    rounded = {name: change.dtype[1] for name, change in planned.changed.items() if change.dtype}
    return lineage.training(ancestor, trained, encoder_prefix(trained), rounded)


def check_options(options: Options) -> None:
    """Raises SparsityError for options that do not go together, or that no mode has."""
    if options.section is not None and (options.mode or options.window or options.block or options.parameters):
        raise SparsityError(
            "expected the sparsity in one place", found="a section and a mode, window, block or parameter of it"
        )
    mode = options.mode or ("custom" if options.layout else "windowed")
    if mode not in MODES:
        raise SparsityError(f"expected one of {', '.join(MODES)}", found=repr(mode), where="mode")
    if options.window is not None and mode not in WINDOW_MODES:
        raise SparsityError(f"the mode {mode} has no windows of tokens", hint=f"{' and '.join(WINDOW_MODES)} have")
    if options.window is not None and (
        both := next((name for name in WINDOW_PARAMETERS if name in options.parameters), None)
    ):
        raise SparsityError("expected the window in one place", found=f"a window of tokens and {both}")
    names = MODES[mode].parameter_names()
    if wrong := next((name for name in options.parameters if name not in names), None):
        raise SparsityError(f"the mode {mode} has no {wrong}", hint=f"it has {', '.join(names)}")


def sparsity_section(path: Path) -> dict[str, Any]:
    """The `sparse_attention` section of a DeepSpeed config, or the file itself where it is that section.

    Raises:
        SparsityError: the file is not such JSON.
    """
    content = read_json(path, error=SparsityError)
    section = None
    if isinstance(content, dict):
        section = content.get("sparse_attention", content if "mode" in content else None)
    if not isinstance(content, dict) or not isinstance(section, dict):
        raise SparsityError('expected a "sparse_attention" section with a mode', found="none", where=path)
    # A config.json in GENA-LM's form names the class instead of the mode.
    return {key: content[key] for key in ("sparse_config_cls",) if key in content} | section


def convert_source(
    source: Source,
    target: Path,
    options: Options = BARE,
    *,
    config_path: Path | None = None,
    trained_from: Source | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """`convert` of a source that was found, with its options in one value. See `convert` for arguments and errors."""
    started = time.perf_counter()
    folder = AtomicFolder(target, overwrite=overwrite)
    folder.refuse_target()
    checkpoint, planned, carried = plan_source(source, options, config_path, trained_from)
    ancestor = [trained_from.path] if trained_from else []
    read = [path.resolve() for path in (checkpoint.folder, *checkpoint.files, *ancestor)]
    if any(folder.target in (path, *path.parents) for path in read):
        raise CheckpointError("the target would replace the source", where=target, hint="choose another folder")
    refuse_full_disk(folder.target, planned.nbytes)
    with folder as staging:
        files = write_weights(staging, planned.tensors, max_shard_size=max_shard_size, progress=progress)
        checkpoint.check_unchanged()
        write_json(staging / CONFIG, planned.config)
        files[CONFIG] = _file_record(staging / CONFIG)
        files |= {name: file for name, file in carried_files.write(carried, staging).items() if name != CARD}
        record = replace(conversion_record(planned, source, checkpoint.files, options, files), lengths=carried.changes)
        write_json(staging / CONVERSION_RECORD, to_json(record))
        if not card.write(staging, repo=_text(target.resolve().name), layouts=planned.layouts):
            kept_card.add_lineage(staging)
    return Converted(target, planned, record, time.perf_counter() - started)


def conversion_record(
    planned: Plan, source: Source, source_files: list[Path], options: Options, files: Mapping[str, FileRecord]
) -> ConversionRecord:
    """The record of a conversion."""
    training = planned.trained_from
    return ConversionRecord(
        bsa_export=__version__,
        family=planned.family.name,
        source=SourceEntry(
            path=_text(source.path.resolve().name),
            repo=source.repo,
            revision=source.revision,
            license=card.source_license(_folder(source)) or (training.license if training else None),
            files={_text(path.name): FileEntry(path.stat().st_size) for path in source_files},
            config=planned.source_config,
        ),
        options=options.recorded(),
        seed=options.seed,
        source_length=planned.source_length,
        max_length=planned.max_length,
        sparsity=planned.sparsity.to_dict(),
        density=planned.facts.density,
        renamed=planned.renamed,
        changed=planned.changed,
        added=planned.added,
        dropped=planned.dropped,
        tied=planned.tied,
        positions=planned.positions,
        sparse_source=planned.sparse_source,
        skipped=planned.skipped,
        notes=planned.notes,
        removed_fields=planned.removed_fields,
        implied_config=planned.implied_config,
        buffers=planned.buffers,
        attn_implementation=BLOCK_SPARSE,
        not_finite={name: what for file in files.values() for name, what in file.not_finite.items()},
        files={name: FileEntry(file.bytes, file.sha256, file.checksum) for name, file in files.items()},
        versions={"python": platform.python_version(), "numpy": np.__version__},
        trained_from=training,
    )


def _folder(source: Source) -> Path:
    """The folder of a source, with its README.md."""
    return source.path if source.path.is_dir() else source.path.parent


def _text(name: str) -> str:
    """A file's name as text, whatever bytes it has."""
    return name.encode("utf-8", "replace").decode()


def _file_record(path: Path) -> FileRecord:
    data = path.read_bytes()
    return FileRecord(len(data), sha256=sha256(data).hexdigest())
