"""What a conversion does or did, as facts in aligned lines and as JSON."""

from __future__ import annotations

from typing import Any

from bsa_export.conversion.convert import Converted
from bsa_export.conversion.plan import Plan
from bsa_export.converted.records import Change, DropReason, NoteKind, to_json
from bsa_export.sparsity.configs import WindowedSparsityConfig
from bsa_export.text import Lines, size, some

MAX_NAMES = 8
POSITION_WORDS = {"tile": "tiled", "interpolate": "interpolated"}
DROP_WORDS = {
    DropReason.BUFFER: "a buffer that the model computes",
    DropReason.CHANGED_BUFFER: "a buffer that the model computes, with other values",
    DropReason.IGNORED: "ignored, as --ignore-tensors says",
    DropReason.OTHER_ENCODER: "of another encoder than the one that is converted",
}


def change_words(change: Change) -> str:
    """What is done to a tensor, in words."""
    parts = []
    if change.layout:
        parts.append("the stored layout as U8, one 0 or 1 for each block")
    if change.rows:
        parts.append(f"{change.rows[0]} rows to {change.rows[1]}, {change.method}")
    if change.dtype:
        parts.append(f"{change.dtype[0]} to {change.dtype[1]}")
    return ", ".join(parts)


def conversion_lines(done: Converted, names: bool = False) -> Lines:
    """What a conversion did, and what it means for the model; on request with the names that are not just copied."""
    weights = [name for name in done.record.files if name.endswith(".safetensors") and "/" not in name]
    nbytes = sum(done.record.files[name].bytes for name in weights)
    files = f", {len(weights)} files of weights" if len(weights) > 1 else ""
    lines = plan_facts(done.plan)
    if broken := done.record.not_finite:
        (name, what), *others = broken.items()
        more = f", and {len(others)} more tensors" if others else ""
        lines.append(("warning", f"{name} holds {what} values{more}; they are copied as they are"))
    if names:
        lines += name_lines(done.plan)
    return [*lines, ("written", f"{done.folder}, {size(nbytes)}{files} in {done.seconds:.2f} s")]


def plan_lines(planned: Plan) -> Lines:
    """What a conversion would do, with the names that are not just copied."""
    return [*plan_facts(planned), *name_lines(planned), ("written", "nothing: this is a dry run")]


def name_lines(planned: Plan) -> Lines:
    """The names of tensors that are not just copied, the middle of long lists left out."""
    lines: Lines = []
    for label, names in (
        ("renamed", [f"{old} -> {new}" for old, new in planned.renamed.items()]),
        ("changed", [f"{name}: {change_words(change)}" for name, change in planned.changed.items()]),
        ("added", planned.added),
        ("dropped", [f"{name}: {DROP_WORDS[why]}" for name, why in planned.dropped.items()]),
        ("tied", [f"{name} = {holder}" for name, holder in planned.tied.items()]),
    ):
        shown = names if len(names) <= MAX_NAMES else [*names[:2], f"... {len(names) - 3} more", names[-1]]
        lines += [(label if number == 0 else "", name) for number, name in enumerate(shown)]
    return lines


def plan_facts(planned: Plan) -> Lines:
    """The facts of a conversion that hold before it is done."""
    facts, sparsity, config = planned.facts, planned.sparsity, planned.config
    parameters = ", ".join(
        f"{name} {value}"
        for name, value in sparsity.to_dict().items()
        if name not in ("mode", "block") and value is not None and value is not False
    )
    grown = planned.max_length != planned.source_length
    length = (
        f"{planned.source_length:,} -> {planned.max_length:,} tokens"
        if grown
        else f"{planned.max_length:,} tokens, unchanged"
    )
    if planned.positions:
        reserved = f", {planned.positions.reserved} reserved rows kept" if planned.positions.reserved else ""
        length += f", positions {POSITION_WORDS[planned.positions.method]}{reserved}"
    layouts = [name for name, change in planned.changed.items() if change == Change(layout=True)]
    counts = {
        "copied": planned.copied,
        "layouts kept": layouts,
        "changed": planned.changed.keys() - layouts,
        "added": planned.added,
        "dropped": planned.dropped,
        "tied": planned.tied,
    }
    blocks = planned.max_length // sparsity.block
    lines = [
        (
            "family",
            f"{planned.family.name}, {config['num_hidden_layers']} layers of {config['num_attention_heads']} heads",
        ),
        ("tensors", ", ".join(f"{len(names)} {kind}" for kind, names in counts.items() if names)),
        ("size", size(planned.nbytes)),
        ("length", length),
        ("sparsity", f"{sparsity.mode}, block {sparsity.block}" + (f", {parameters}" if parameters else "")),
        *_window(planned),
        *_local_layers(planned),
        ("density", f"{facts.density:.1%} of {blocks} x {blocks} blocks are kept"),
        (
            "attention",
            f"{_flops(planned.attention_flops(1.0))} dense, {_flops(planned.attention_flops(facts.density))} now, "
            f"for {planned.max_length:,} tokens",
        ),
        *meaning(planned),
        *training_lines(planned),
        *(("note", note.text) for note in planned.notes),
    ]
    if planned.skipped:
        (name, why), *others = planned.skipped.items()
        lines.append(("skipped", f"{name}: {why}" + (f"; and {len(others)} more" if others else "")))
    return lines


def _window(planned: Plan) -> Lines:
    """The window of the default mode: where it comes from."""
    sparsity = planned.sparsity
    if planned.sparse_source or not isinstance(sparsity, WindowedSparsityConfig):
        return []
    tokens, length = sparsity.num_local_blocks * sparsity.block, planned.source_length
    words = f"{tokens:,} tokens"
    if tokens < length:
        words += f" of the {length:,} that the source reads"
    elif tokens < length + sparsity.block:
        words += ", what the source reads" if tokens == length else f", the {length:,} that the source reads in blocks"
        if planned.max_length <= tokens:
            words += ", so nothing is dropped; a smaller --window costs less"
    return [("window", words)]


def _local_layers(planned: Plan) -> Lines:
    local = [window for window in planned.windows if window is not None]
    if not local:
        return []
    words = (
        f"{len(local)} of {len(planned.windows)}, each token attends up to {max(local):,} tokens away, as in the source"
    )
    return [("local layers", words)]


def meaning(planned: Plan) -> Lines:
    """What the layouts mean for outputs: for short inputs, for repeated positions, for training."""
    if planned.sparse_source:
        return [
            (
                "layouts",
                "the source's own, as stored"
                if planned.keeps_source_layouts
                else "recomputed from the source's config.json",
            )
        ]
    facts = planned.facts
    ignored = any(note.kind is NoteKind.IGNORED_TENSORS for note in planned.notes)
    length = f"{min(facts.source_length, facts.seq_len):,} tokens"
    if facts.interpolated:
        short = "outputs differ from the source's: the positions are interpolated"
    elif facts.short_inputs_differ and planned.sparsity.mode == "windowed":
        short = (
            f"same outputs as the source up to {facts.kept_length:,} tokens; in longer ones, {facts.kept_share:.1%} "
            f"of the blocks within {length} are kept"
        )
    elif facts.short_inputs_differ:
        short = f"outputs differ from the source's: {facts.kept_share:.1%} of the blocks within {length} are kept"
    elif ignored:
        short = "same outputs as the source, unless it computes with the ignored tensors"
    else:
        short = f"same outputs as the source: every block within {length} is kept"
    lines = [("short inputs", short)]
    if planned.max_length > planned.source_length:
        reach = f"each token attends up to {facts.local_reach:,} tokens away"
        if facts.reach > facts.local_reach:
            reach += f", and up to {facts.reach:,} through global or random blocks"
        if planned.positions is None:
            trained = ", distances that the source was trained on" if facts.reach < facts.source_length else ""
            reach += "; the source was trained on shorter distances" if facts.repeats_positions else trained
        elif facts.repeats_positions:
            reach += "; position embeddings repeat within that distance"
        elif not facts.interpolated and facts.reach < facts.source_length:
            reach += ", so no two visible tokens share a position embedding"
        lines.append(("reach", reach))
    training = "needed before it is as good as the source" if facts.needs_training else "not needed"
    return [*lines, ("training", training)]


def training_lines(planned: Plan) -> Lines:
    """What the source was trained from, and what the training changed."""
    training = planned.trained_from
    if training is None:
        return []
    name = training.path if training.repo is None else f"{training.repo}@{training.revision or 'main'}"
    former = training.record.origin.source
    lines = [("trained from", f"{name}, a conversion of {former.repo or former.path}")]
    values = [name for name in training.changed if name not in set(training.cast)]
    counts = {"changed": values, "only stored in another dtype": training.cast}
    counts |= {"added": training.added, "removed": training.removed}
    what = [f"{_tensors(names)} {kind}" for kind, names in counts.items() if names]
    if training.first_row is not None:
        what.append(f"position embeddings from row {training.first_row:,} on")
    same = len(planned.tensors) - len(training.changed) - len(training.added)
    others = f"all other tensors ({same})" if what else f"nothing changed: all {same} tensors"
    lines.append(("training", "; ".join([*([", ".join(what)] if what else []), f"{others} kept every bit"])))
    if training.files:
        lines.append(("", f"{some(training.files)} from the conversion, because the trained folder has none"))
    if training.changed and training.only_new_rows:
        lines.append(("short inputs", "same outputs as before the training: only rows for later positions changed"))
    return lines


def _tensors(names: list[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def plan_content(planned: Plan) -> dict[str, Any]:
    """`plan_lines` for programs, with every name."""
    return {
        "family": planned.family.name,
        "tensors": {name: {"dtype": row.dtype, "shape": list(row.shape)} for name, row in planned.tensors.items()},
        "bytes": planned.nbytes,
        "source_length": planned.source_length,
        "max_length": planned.max_length,
        "sparsity": planned.sparsity.to_dict(),
        "density": planned.facts.density,
        "kept_share": planned.facts.kept_share,
        "kept_length": planned.facts.kept_length,
        "short_inputs_differ": planned.facts.short_inputs_differ,
        "reach": planned.facts.reach,
        "local_reach": planned.facts.local_reach,
        "repeats_positions": planned.positions is not None and planned.facts.repeats_positions,
        "needs_training": planned.facts.needs_training,
        "attention_flops": {
            "dense": planned.attention_flops(1.0),
            "sparse": planned.attention_flops(planned.facts.density),
        },
        "renamed": planned.renamed,
        "changed": to_json(planned.changed),
        "added": planned.added,
        "dropped": to_json(planned.dropped),
        "tied": planned.tied,
        "positions": to_json(planned.positions),
        "implied_config": planned.implied_config,
        "sparse_source": planned.sparse_source,
        "trained_from": to_json(planned.trained_from),
        "skipped": planned.skipped,
        "notes": to_json(planned.notes),
    }


def _flops(count: float) -> str:
    for unit in ("GFLOP", "TFLOP"):
        count /= 1e9 if unit == "GFLOP" else 1e3
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1e3:,.3g} PFLOP"
