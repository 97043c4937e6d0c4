"""A dense BERT checkpoint becomes a sparse-attention one, from path to folder: opens, plans, writes, records."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from bsa_export import __version__, model_card, sidecars
from bsa_export.checkpoint.folder import CONVERSION_RECORD, AtomicFolder
from bsa_export.checkpoint.source import WEIGHT_ENDINGS, open_checkpoint
from bsa_export.checkpoint.writer import FileRecord, write_weights
from bsa_export.errors import CheckpointError, HubError
from bsa_export.families import read_config
from bsa_export.plan import BARE, Options, Plan, plan


@dataclass(frozen=True)
class Source:
    """Where a conversion starts: a path, and the repository that it was fetched from, if any."""

    path: Path
    repo: str | None = None
    revision: str | None = None


def find_source(text: str, progress: bool = False) -> Source:
    """A path that exists, else a repository of the Hub, `org/name` or `org/name@revision`, fetched into its cache.

    Raises:
        CheckpointError: it is neither.
        HubError: the Hub does not give it.
    """
    if os.path.lexists(text):
        return Source(Path(text))
    from bsa_export import hub

    if text.endswith((*WEIGHT_ENDINGS, ".json")) or (named := hub.parse_repo(text)) is None:
        raise CheckpointError(
            "expected a file, a folder, or a repository as org/name", found="nothing of that name", where=text
        )
    try:
        fetched = hub.fetch(*named, progress=progress)
    except HubError as error:
        if not Path(text).parent.is_dir():
            raise
        raise HubError(
            f"nothing of that name is in the folder {Path(text).parent}, and as a repository: {error}"
        ) from None
    return Source(fetched.folder, named[0], fetched.commit)


def plan_source(source: Source, options: Options, config_path: Path | None = None):
    """Opens a source and plans its conversion. Returns the checkpoint and the plan."""
    checkpoint = open_checkpoint(source.path)
    config = read_config(config_path or checkpoint.folder / "config.json")
    planned = plan(checkpoint.tensors, config, options, where=source.path)
    return checkpoint, replace(planned, skipped=dict(checkpoint.skipped))


@dataclass(frozen=True)
class Converted:
    """A conversion that was done: its plan, the content of conversion.json, and what it took in seconds."""

    plan: Plan
    record: dict
    seconds: float


def convert(
    source: Source,
    target: Path,
    options: Options = BARE,
    *,
    config_path: Path | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Converts a checkpoint into the folder `target`, which appears whole or not at all. The source is only read.

    Args:
        source: a weight file, an index of shards, or a folder.
        target: the folder to make.
        options: what the user chose.
        config_path: the source's config.json, if it does not lie beside the weights.
        max_shard_size: bytes of a file of weights; None writes one.
        overwrite: whether an earlier conversion may be replaced.
        progress: called with (bytes written, bytes in all).

    Raises:
        BsaError: with what was wrong; nothing is left behind then.
    """
    started = time.perf_counter()
    folder = AtomicFolder(target, overwrite=overwrite)
    folder.refuse_target()
    checkpoint, planned = plan_source(source, options, config_path)
    read = [path.resolve() for path in (checkpoint.folder, *checkpoint.files)]
    if any(folder.target in (path, *path.parents) for path in read):
        raise CheckpointError("the target would replace the source", where=target, hint="choose another folder")
    with folder as staging:
        records = write_weights(staging, planned.tensors, max_shard_size=max_shard_size, progress=progress)
        checkpoint.check_unchanged()
        write_json(staging / "config.json", planned.config)
        sidecars.write(checkpoint.folder, staging, planned.source_length, planned.max_length)
        for path in sorted(path for path in staging.rglob("*") if path.is_file()):
            name = path.relative_to(staging).as_posix()
            if name not in records:
                records[name] = _file_record(path)
        record = conversion_record(planned, source, checkpoint.files, options, records)
        write_json(staging / CONVERSION_RECORD, record)
        model_card.write(staging, repo=_text(Path(target).resolve().name))
    return Converted(planned, record, time.perf_counter() - started)


def conversion_record(
    planned: Plan, source: Source, source_files: list[Path], options: Options, files: Mapping[str, FileRecord]
) -> dict:
    """The content of conversion.json; docs/architecture.md describes it."""
    chosen = asdict(options)
    chosen["layout"] = options.layout and options.layout.name
    chosen["parameters"] = dict(options.parameters)
    return {
        "bsa_export": __version__,
        "family": planned.family.name,
        "source": {
            "path": _text(source.path.resolve().name),
            "repo": source.repo,
            "revision": source.revision,
            "license": model_card.source_license(source_files[0].parent),
            "files": {_text(path.name): {"bytes": path.stat().st_size, "sha256": None} for path in source_files},
            "config": planned.source_config,
        },
        "options": chosen,
        "seed": options.seed,
        "source_length": planned.source_length,
        "max_length": planned.max_length,
        "sparsity": planned.sparsity.to_dict(),
        "density": planned.facts.density,
        "renamed": planned.renamed,
        "changed": planned.changed,
        "added": planned.added,
        "dropped": planned.dropped,
        "tied": planned.tied,
        "positions": planned.positions,
        "sparse_source": planned.sparse_source,
        "skipped": planned.skipped,
        "notes": planned.notes,
        "not_finite": {name: what for file in files.values() for name, what in file.not_finite.items()},
        "files": {name: _file_entry(file) for name, file in files.items()},
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }


def _text(name: str) -> str:
    """A file's name as text, whatever bytes it has."""
    return name.encode("utf-8", "replace").decode()


def write_json(path: Path, content: Mapping) -> None:
    """Writes an object as transformers writes its configs: two spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _file_record(path: Path) -> FileRecord:
    data = path.read_bytes()
    return FileRecord(len(data), sha256=sha256(data).hexdigest())


def _file_entry(file: FileRecord) -> dict:
    entry = {"bytes": file.bytes, "sha256": file.sha256}
    return entry if file.checksum is None else entry | {"checksum": file.checksum}
