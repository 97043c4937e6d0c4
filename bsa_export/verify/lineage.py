"""The weights check of a trained model against the conversion that it was trained from. No torch.

What is checked: every tensor of the conversion that is gone is listed, layouts stay, and what conversion.json lists as
unchanged has the conversion's bits. What training changed is counted. The rules are stated here again, and nothing is
imported from `conversion`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bsa_export.bert.structure import POSITIONS
from bsa_export.checkpoint.dtypes import read
from bsa_export.checkpoint.table import Tensor
from bsa_export.converted.checks import Check, Kind, result
from bsa_export.converted.folder import ConvertedFolder, open_folder
from bsa_export.converted.records import ConversionRecord, Training, read_conversion
from bsa_export.errors import BsaError
from bsa_export.verify.bits import both, first_difference, rows_of
from bsa_export.verify.carried import faults_of_kept_files
from bsa_export.verify.rules import is_rounded

FLOATS = {"F64", "F32", "F16", "BF16"}
# What the record of a conversion states about its tensors. A conversion that was made again has other versions.
STATED = (
    "family", "options", "seed", "source_length", "max_length", "sparsity", "density", "positions", "lengths",
    "renamed", "changed", "added", "dropped", "tied", "buffers", "sparse_source", "not_finite", "removed_fields",
    "implied_config", "attn_implementation", "trained_from",
)  # fmt: skip
# Fields of config.json that decide what the encoder computes. Training changes the others: dropout, labels, ids.
COMPUTING = (
    "model_type", "hidden_act", "hidden_activation", "activation_function", "layer_norm_eps", "norm_eps",
    "rms_norm_eps", "position_embedding_type", "rotary_dim", "rotary_base", "rope_theta", "global_rope_theta",
    "local_rope_theta", "rope_parameters", "rope_scaling", "local_attention", "layer_types",
    "global_attn_every_n_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "pre_layer_norm",
    "last_layer_norm", "emb_layer_norm_before", "token_dropout", "use_task_id", "sparse_attention",
)  # fmt: skip
LAYOUT = ".sparse_self_attention.master_layout"

Progress = Callable[[int, int], None]


def is_ancestor(folder: ConvertedFolder, source: Path) -> bool:
    """Whether a source is a conversion, and the folder a model that was trained from one."""
    if folder.record is None or folder.record.trained_from is None or not source.is_dir():
        return False
    return read_conversion(source) is not None


def check_lineage(folder: ConvertedFolder, ancestor: Path, progress: Progress | None = None) -> Check:
    """Compares a trained model with the conversion that its conversion.json names.

    Args:
        folder: the converted folder of the trained model.
        ancestor: the folder of the conversion.
        progress: called with (bytes compared, bytes in all).
    """
    assert folder.record is not None and folder.record.trained_from is not None
    training = folder.record.trained_from
    try:
        before = open_folder(ancestor)
        if before.record is None or before.record.files != training.record.files:
            fault = (
                f"expected the conversion that it was trained from ({training.path}), with the files that "
                "conversion.json lists for it, found one with other files"
            )
            return result(Kind.WEIGHTS, [fault])
        other = next((name for name in STATED if getattr(before.record, name) != getattr(training.record, name)), "")
        if before.record.source.config != training.record.source.config:
            other = other or "config.json of the source"
        if other:
            fault = f"trained_from in conversion.json states another {other} than the conversion's own conversion.json"
            return result(Kind.WEIGHTS, [fault])
        comparison = _Comparison(folder, before, folder.record, training, progress)
        faults = [*_config_faults(folder, before), *comparison.faults(), *faults_of_kept_files(folder)]
        before.checkpoint.check_unchanged()
    except BsaError as error:
        return result(Kind.WEIGHTS, [str(error)])
    figures: dict[str, object] = {"unchanged": comparison.unchanged, "in another dtype only": len(training.cast)}
    figures["changed by training"] = len(set(training.changed) - set(training.cast))
    figures |= {"added": len(training.added), "removed": len(training.removed)}
    if training.first_row:
        figures["first position rows unchanged"] = training.first_row
    return result(Kind.WEIGHTS, faults, {name: value for name, value in figures.items() if value})


def _config_faults(folder: ConvertedFolder, before: ConvertedFolder) -> Iterator[str]:
    """Fields that decide the computation and are not the conversion's. transformers may write a field that an older
    config.json lacks, and leave one out that another field replaced: what both have counts."""
    for name in COMPUTING:
        if name in folder.config and name in before.config and not _agree(folder.config[name], before.config[name]):
            yield (
                f"config.json: {name}: expected {before.config[name]!r} as in the conversion, because training does"
                f" not change it, found {folder.config[name]!r}"
            )


def _agree(now: object, before: object) -> bool:
    """Whether two values of JSON are equal; of objects, the values that both have."""
    if isinstance(now, dict) and isinstance(before, dict):
        return all(_agree(now[key], before[key]) for key in now.keys() & before.keys())
    return now == before


class _Comparison:
    """The tensors of a trained model against those of its conversion."""

    def __init__(
        self,
        folder: ConvertedFolder,
        before: ConvertedFolder,
        record: ConversionRecord,
        training: Training,
        progress: Progress | None,
    ):
        self.folder, self.record, self.training, self.progress = folder, record, training, progress
        self.before = {self.moved(name, before.prefix): row for name, row in before.tensors.items()}
        self.positions = folder.prefix + POSITIONS
        self.unchanged = self.done = 0
        self.total = sum(row.nbytes for row in folder.tensors.values())

    def moved(self, name: str, old: str) -> str:
        """A name of the conversion, whose encoder has the prefix `old`, in the trained model; a head keeps its name."""
        new = self.folder.prefix + name.removeprefix(old)
        is_known = new in self.folder.tensors or new in self.training.removed
        return new if name.startswith(old) and (old or is_known) else name

    def faults(self) -> Iterator[str]:
        """What is wrong, a sentence each."""
        now, training = self.folder.tensors, self.training
        stated = {"added": set(training.added), "removed": set(training.removed)}
        found = {"added": now.keys() - self.before.keys(), "removed": self.before.keys() - now.keys()}
        for kind, names in found.items():
            for name in sorted(names ^ stated[kind]):
                yield f"{name}: it is {'' if name in names else 'not '}{kind}, and conversion.json says otherwise"
        common = {name for name in now.keys() & self.before.keys() if not name.endswith(LAYOUT)}
        for name in sorted(set(training.changed) - common):
            yield f"{name}: conversion.json lists it as changed by training: it is not a weight of both models"
        if training.first_row is not None and self.positions not in set(training.changed) - set(training.cast):
            yield f"{self.positions}: conversion.json says that it changed from a row on, and lists it as unchanged"
        for name in sorted(set(training.cast) - set(training.changed)):
            yield f"{name}: conversion.json lists it as stored in another dtype, and not as changed"
        for name in sorted(name for name in found["removed"] if name.endswith(LAYOUT)):
            yield f"{name}: lost: the conversion has it"
        for name, row in now.items():
            if name in self.before and (fault := self.compare(name, self.before[name], row)):
                yield fault
            self.done += row.nbytes
            if self.progress:
                self.progress(self.done, self.total)

    def compare(self, name: str, before: Tensor, now: Tensor) -> str | None:
        """What is wrong with a tensor that both have."""
        if name.endswith(LAYOUT) and now.shape != before.shape:
            return None if _is_top_left(before, now) else f"{name}: it is not the layout of the conversion"
        same = self.is_same(name, before, now)
        if name.endswith(LAYOUT):
            return None if same else f"{name}: it is not the layout of the conversion"
        if name not in self.training.changed:
            self.unchanged += same
            return (
                None if same else f"{name}: conversion.json lists it as unchanged, and it differs from the conversion's"
            )
        if name in self.training.cast:
            return (
                None if self.is_cast(before, now) else f"{name}: its values are not the conversion's in another dtype"
            )
        if same and self.rounded_to(name) is None:
            return f"{name}: conversion.json lists it as changed by training, and it has the conversion's bits"
        if name == self.positions and (first := self.training.first_row) is not None:
            return self.early_rows(name, before, now, first)
        return None

    def early_rows(self, name: str, before: Tensor, now: Tensor, first: int) -> str | None:
        """Whether the position rows before the first one that changed are those of the conversion, and that is not."""
        if now.shape[1:] != before.shape[1:] or min(now.shape[0], before.shape[0]) <= first:
            return f"{name}: expected more than {first} rows as in the conversion, found {list(now.shape)}"

        def kept(start: int, rows: int) -> bool:
            pair = rows_of(before, start, rows), rows_of(now, start, rows)
            return self.is_same(name, *pair) or self.is_cast(*pair)

        if first and not kept(0, first):
            return f"{name}: conversion.json says that it changed from row {first} on, and earlier rows differ"
        if self.rounded_to(name) is None and kept(first, 1):
            return f"{name}: conversion.json says that it changed from row {first} on, and that row is the conversion's"
        return None

    def is_same(self, name: str, before: Tensor, now: Tensor) -> bool:
        """Whether a tensor has the conversion's bits, or those rounded as the second conversion was asked to."""
        if now.shape != before.shape:
            return False
        if self.rounded_to(name) == now.dtype != before.dtype:
            return all(is_rounded(one, other, before.dtype, now.dtype).all() for one, other in both(before, now))
        return now.dtype == before.dtype and first_difference(before, now) is None

    def is_cast(self, before: Tensor, now: Tensor) -> bool:
        """Whether a tensor has the conversion's values, rounded to another dtype."""
        if now.shape != before.shape or now.dtype == before.dtype or not {now.dtype, before.dtype} <= FLOATS:
            return False
        return all(is_rounded(one, other, before.dtype, now.dtype).all() for one, other in both(before, now))

    def rounded_to(self, name: str) -> str | None:
        """The dtype that the second conversion rounded a tensor to."""
        change = self.record.changed.get(name)
        return change.dtype[1] if change and change.dtype else None


def _is_top_left(before: Tensor, now: Tensor) -> bool:
    """Whether a layout `[heads, n, n]` is that of the conversion for fewer positions, which training cut."""
    if before.dtype != now.dtype or len(before.shape) != 3 or len(now.shape) != 3:
        return False
    return bool(np.array_equal(read(before)[:, : now.shape[1], : now.shape[2]], read(now)))
