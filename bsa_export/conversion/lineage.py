"""The conversion that a model was trained from: found, checked against the trained tensors, and compared with them.

`save_pretrained` and Trainer write weights, config.json and tokenizer. The source, its license and the lengths before
the conversion are recorded only in the conversion's folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bsa_export.bert.recognition import encoder_prefix, encoder_prefixes
from bsa_export.bert.structure import STORED_LAYOUT
from bsa_export.checkpoint.comparison import first_difference, same_bytes
from bsa_export.checkpoint.dtypes import CASTS, FLOATS, cast, first_values, read
from bsa_export.checkpoint.table import Checkpoint, Tensor
from bsa_export.conversion.carried_files import CarriedFile, CarriedFiles, How
from bsa_export.conversion.config_fields import from_a_conversion
from bsa_export.conversion.left_behind import LeftBehind
from bsa_export.conversion.source_folder import SourceFolder, stamp_of
from bsa_export.converted.card import source_license
from bsa_export.converted.folder import ConvertedFolder, open_folder
from bsa_export.converted.integrity import digest_faults
from bsa_export.converted.names import CONVERSION_RECORD, LICENSES, TOKENIZER_FILES, matches
from bsa_export.converted.records import ConversionRecord, Note, NoteKind, Training, read_pull
from bsa_export.errors import BsaError, CheckpointError
from bsa_export.hub.source import Source
from bsa_export.text import some

VOCABULARY = "vocab_size"  # of config.json
SECTION = "sparse_attention"  # of config.json
FOLDERS_ABOVE = 3  # folders above the trained one in which the conversion is looked for: out/run/checkpoint-500
# Correlation of weights. Fine-tuning keeps more than 0.9; between models that share no training it is about 0.
RELATED = 0.1
COMPARED = 1 << 14  # elements of each weight matrix


@dataclass(frozen=True)
class Ancestor:
    """A conversion that a model may have been trained from: its folder with its record, and where it came from."""

    folder: ConvertedFolder
    record: ConversionRecord
    repo: str | None
    revision: str | None
    changed_files: frozenset[str]  # files, not weights, that differ from their digest in the record

    def name_in(self, name: str, prefix: str) -> str:
        """The name of one of its tensors in a model whose encoder has another prefix, as in a class with a head."""
        own = self.folder.prefix
        inside = name.startswith(own) if own else self.folder.encoder.is_inside(name)
        return prefix + name.removeprefix(own) if inside else name

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Its tensors by their names in a model whose encoder has that prefix."""
        return {self.name_in(name, prefix): row for name, row in self.folder.tensors.items()}


def open_ancestor(source: Source) -> Ancestor:
    """Opens a conversion that the user names.

    Raises:
        BsaError: it is not a converted folder, or its weights are not those of its conversion.json.
    """
    with source.named_errors():
        folder = open_folder(source.path)
        if folder.record is None:
            raise CheckpointError(
                "expected a conversion",
                found=f"no {CONVERSION_RECORD}",
                where=source.path,
                hint="--trained-from names what bsa-convert wrote before the training",
            )
        faults, _ = digest_faults(folder, folder.record)
        if wrong := [faults[file.name] for file in folder.checkpoint.files if file.name in faults]:
            raise CheckpointError(
                "expected the conversion as it was before the training",
                found=wrong[0],
                where=source.path,
                hint="convert its source again with the same options, and name that folder",
            )
        pulled = read_pull(source.path)
    repo, revision = (pulled.repo, pulled.commit) if pulled else (source.repo, source.revision)
    return Ancestor(folder, folder.record, repo, revision, frozenset(faults))


def ancestors_around(folder: Path) -> tuple[list[Ancestor], list[str]]:
    """The conversions in the trained folder and in the folders around it, the nearest first.

    Returns:
        Those that are whole, and the names of the folders whose record cannot be used.
    """
    found, unusable = [], []
    for place in islice((folder, *folder.resolve().parents), 1 + FOLDERS_ABOVE):
        if (place / CONVERSION_RECORD).is_file():
            try:
                found.append(open_ancestor(Source(place)))
            except BsaError:
                unusable.append(place.resolve().name)
    return found, unusable


def find_ancestor(
    named: Source | None, checkpoint: Checkpoint, config: Mapping[str, Any], prefix: str | None = None
) -> tuple[Ancestor | None, list[Note]]:
    """The conversion that a checkpoint was trained from.

    One that was not named must fit, and its weights must be related to the trained ones. Of several, it is the one
    whose weights are most like them.

    Args:
        named: the one that the user names.
        checkpoint: the trained one.
        config: content of its config.json.
        prefix: which encoder is meant, where it holds several.

    Returns:
        The conversion, or None; and a note if a named one has unrelated weights, or if the model was trained from a
        conversion that was not found.

    Raises:
        CheckpointError: the named one has other layouts.
        BsaError: the named one cannot be opened.
    """
    if named is not None:
        ancestor = open_ancestor(named)
        if fault := _misfit(ancestor, checkpoint.tensors, config, prefix):
            raise CheckpointError(
                f"expected a model that was trained from {named.repo or named.path}",
                found=fault,
                where=checkpoint.folder,
                hint="name the conversion that it was trained from with --trained-from, or leave the option out",
            )
        if resemblance(ancestor, checkpoint.tensors, prefix) >= RELATED:
            return ancestor, []
        unlike = (
            f"the weights do not resemble those of {named.repo or named.path.resolve().name}, which --trained-from "
            "names: was the model trained from another conversion?"
        )
        return ancestor, [Note(NoteKind.UNLIKE_ANCESTOR, unlike)]
    if not from_a_conversion(config):
        return None, []
    around, unusable = ancestors_around(checkpoint.folder)
    fitting = [one for one in around if _misfit(one, checkpoint.tensors, config, prefix) is None]
    alike = [resemblance(one, checkpoint.tensors, prefix) for one in fitting]
    if fitting and max(alike) >= RELATED:
        return fitting[alike.index(max(alike))], []
    text = (
        "the conversion that this model was trained from was not found: name it with --trained-from, so that its "
        "source, its license and the tokenizer's former lengths are recorded"
    )
    if unusable:
        text += (
            f" (the {CONVERSION_RECORD} in {some(unusable)} cannot be used: it is damaged, or about weights that "
            "training may have replaced)"
        )
    return None, [Note(NoteKind.NO_ANCESTOR, text)]


def resemblance(ancestor: Ancestor, tensors: Mapping[str, Tensor], prefix: str | None = None) -> float:
    """How much trained weights are like those of a conversion: the median correlation of their weight matrices, at most
    1; 0 where no matrix can be compared. Reads the first `COMPARED` elements of each."""
    found = []
    for name, before in ancestor.tensors(encoder_prefix(tensors, prefix)).items():
        now = tensors.get(name)
        if now is None or now.shape != before.shape or len(now.shape) != 2 or not {now.dtype, before.dtype} <= FLOATS:
            continue
        pair = np.stack([first_values(row, COMPARED).astype(np.float64) for row in (now, before)])
        pair = pair[:, np.isfinite(pair).all(0)]
        if pair.size and (pair.max(1) > pair.min(1)).all():
            found.append(float(np.corrcoef(pair)[0, 1]))
    return float(np.median(found)) if found else 0.0


def with_layouts(ancestor: Ancestor, tensors: Mapping[str, Tensor], prefix: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with the conversion's layouts where training left them out."""
    if any(STORED_LAYOUT.fullmatch(name) for name in tensors):
        return dict(tensors)
    encoder = encoder_prefix(tensors, prefix)
    return {**tensors, **_layouts(ancestor.tensors(encoder))}


def training(
    ancestor: Ancestor, tensors: Mapping[str, Tensor], written_prefix: str, rounded: Mapping[str, str]
) -> Training:
    """What the training changed. Reads all tensors of both.

    Args:
        ancestor: the conversion.
        tensors: the trained ones, by their written names.
        written_prefix: the encoder's.
        rounded: those that are rounded afterwards -> the dtype that is written. If that is the conversion's, they are
            compared after it. Else a tensor that training stored in another dtype is rounded twice, so that nobody can
            judge later whether its values were the conversion's.
    """
    before = ancestor.tensors(written_prefix)
    back = [name for name, dtype in rounded.items() if name in before and dtype == before[name].dtype]
    tensors = {**tensors, **{name: cast(name, tensors[name], rounded[name]) for name in back}}
    own = ancestor.folder.encoder.position_name
    positions = own and ancestor.name_in(own, written_prefix)
    common = (name for name in tensors if name in before and not STORED_LAYOUT.fullmatch(name))  # layouts are the same
    changed = [name for name in common if not same_bytes(tensors[name], before[name])]
    twice = {name for name in changed if name in rounded and tensors[name].dtype != before[name].dtype}
    same_values = [name for name in changed if name not in twice and _is_cast(before[name], tensors[name])]
    moved = positions in changed and positions not in twice and positions not in same_values
    return Training(
        path=ancestor.folder.path.resolve().name,
        record=ancestor.record,
        changed=changed,
        cast=same_values,
        added=[name for name in tensors if name not in before],
        removed=[name for name in before if name not in tensors],
        first_row=_first_row(before[positions], tensors[positions]) if positions and moved else None,
        repo=ancestor.repo,
        revision=ancestor.revision,
        license=source_license(ancestor.folder.path) or ancestor.record.source.license,
    )


def with_missing_files(
    ancestor: Ancestor, carried: CarriedFiles, config: Mapping[str, Any]
) -> tuple[CarriedFiles, list[str]]:
    """Adds the conversion's tokenizer and licenses, where the trained folder has none: `model.save_pretrained` writes
    neither. Those that changed since the conversion are left behind, and no link out of its folder is followed.
    A tokenizer for another number of tokens is left behind too.

    Args:
        ancestor: the conversion.
        carried: what comes from the trained folder.
        config: content of the trained config.json.

    Returns:
        All files, and the names of those that were added.
    """
    there = [file.name for file in carried.carried if "/" not in file.name]
    own = [name for name in ancestor.record.files if "/" not in name]
    wanted: list[str] = []
    for kind in (TOKENIZER_FILES, LICENSES):
        if not any(_is_of(name, kind) for name in there):
            wanted += [name for name in own if _is_of(name, kind)]
    stale = {name: LeftBehind.STALE for name in wanted if name in ancestor.changed_files}
    if config.get(VOCABULARY) != ancestor.folder.config.get(VOCABULARY):
        stale |= {name: LeftBehind.OTHER_VOCABULARY for name in wanted if _is_of(name, TOKENIZER_FILES)}
    folder = SourceFolder(ancestor.folder.path)
    paths = {name: folder.own(folder.folder / name) for name in wanted if name not in stale}
    added = [CarriedFile(name, How.COPIED, path, stamps={path: stamp_of(path)}) for name, path in paths.items()]
    return CarriedFiles([*carried.carried, *added], {**carried.left_behind, **stale}), list(paths)


def _is_of(name: str, kind: Sequence[str]) -> bool:
    """Whether a file at the top is of a kind, licenses in any case of letters."""
    return matches(name, kind) or matches(name.upper(), kind)


def _is_cast(before: Tensor, now: Tensor) -> bool:
    """Whether a tensor has the values of another one, rounded to another dtype."""
    return now.dtype != before.dtype and now.shape == before.shape and _first_change(before, now) is None


def _first_row(before: Tensor, now: Tensor) -> int | None:
    """The first row in which the values of two tables differ; None where their shapes do."""
    if now.shape != before.shape:
        return None
    at = _first_change(before, now)
    assert at is not None
    return at // (now.nbytes // now.shape[0])


def _first_change(before: Tensor, now: Tensor) -> int | None:
    """The first byte that differs from another tensor of its shape, rounded to its dtype; None if none does."""
    if now.dtype != before.dtype:
        if now.dtype not in CASTS or before.dtype not in FLOATS:
            return 0
        before = cast("", before, now.dtype)
    try:
        return first_difference(before, now)
    except CheckpointError:  # a value that is too large for the dtype
        return 0


def _misfit(
    ancestor: Ancestor, tensors: Mapping[str, Tensor], config: Mapping[str, Any], prefix: str | None
) -> str | None:
    """Why a checkpoint was not trained from a conversion: another model or other layouts; None if it may have been."""
    for name in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if config.get(name) != ancestor.folder.config.get(name):
            return f"{name} {config.get(name)!r}, and {ancestor.folder.config.get(name)!r} in the conversion"
    if not encoder_prefixes(tensors):
        return "no encoder of a BERT family"
    stored = _layouts(tensors)
    expected = _layouts(ancestor.tensors(encoder_prefix(tensors, prefix)))
    if not stored:
        if SECTION not in config:
            return f"a dense model, without layouts and without {SECTION} in config.json"
        return None if config[SECTION] == ancestor.folder.config[SECTION] else f"another {SECTION} in config.json"
    if stored.keys() != expected.keys():
        return "layouts of other layers"
    other = next((name for name, row in stored.items() if not _same_layout(row, expected[name])), None)
    return other and f"another layout in {other}"


def _layouts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: row for name, row in tensors.items() if STORED_LAYOUT.fullmatch(name)}


def _same_layout(trained: Tensor, converted: Tensor) -> bool:
    """Whether a layout is the same in any integer dtype that training frameworks store it in."""
    if trained.dtype == converted.dtype:
        return same_bytes(trained, converted)
    return trained.shape == converted.shape and bool(((read(trained) != 0) == (read(converted) != 0)).all())
