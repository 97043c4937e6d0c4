"""What a person reads: facts in aligned lines, and pictures. matplotlib, the extra `[plot]`, is imported where it is used."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bsa_export.errors import BsaError
from bsa_export.layout import distinct_heads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bsa_export.convert import Converted
    from bsa_export.plan import Plan

Lines = list[tuple[str, str]]

KEPT, DROPPED, SOURCE, BORDER = "#1f4e79", "#eef1f5", "#f28e2b", "#b8c0cc"
MAX_HEADS = 24
MAX_NAMES = 8
POSITION_WORDS = {"tile": "tiled", "interpolate": "interpolated"}
COLUMNS = 4
PICTURES = (".png", ".svg", ".pdf")
NO_MATPLOTLIB = 'pip install "bsa_export[plot]"'
# A picture of more blocks than LONG is joined by one of its first DETAIL blocks.
LONG, DETAIL = 128, 64


def aligned(lines: Lines) -> str:
    """One fact a line: label, value, the values one below the other; an empty label continues the last."""
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {value}".rstrip() for label, value in lines)


def size(nbytes: int) -> str:
    """Bytes in powers of 1000, as file managers and the Hub show them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes} B"
        nbytes /= 1000
    return f"{nbytes:,.3g} TB"


def conversion_lines(done: Converted, target: Path) -> Lines:
    """What a conversion did, and what its choice means."""
    weights = [name for name in done.record["files"] if name.endswith(".safetensors") and "/" not in name]
    nbytes = sum(done.record["files"][name]["bytes"] for name in weights)
    files = f", {len(weights)} files of weights" if len(weights) > 1 else ""
    lines = plan_facts(done.plan)
    if broken := done.record["not_finite"]:
        (name, what), *others = broken.items()
        more = f", and {len(others)} more tensors" if others else ""
        lines.append(("warning", f"{name} holds {what} values{more}; they are copied as they are"))
    return [*lines, ("written", f"{target}, {size(nbytes)}{files} in {done.seconds:.2f} s")]


def plan_lines(planned: Plan) -> Lines:
    """What a conversion would do, with the names that are not just copied."""
    lines = plan_facts(planned)
    for label, names in (
        ("renamed", [f"{old} -> {new}" for old, new in planned.renamed.items()]),
        ("changed", [f"{name}: {rule}" for name, rule in planned.changed.items()]),
        ("added", planned.added),
        ("dropped", [f"{name}: {why}" for name, why in planned.dropped.items()]),
        ("tied", [f"{name} = {holder}" for name, holder in planned.tied.items()]),
    ):
        shown = names if len(names) <= MAX_NAMES else [*names[:2], f"... {len(names) - 3} more", names[-1]]
        lines += [(label if number == 0 else "", name) for number, name in enumerate(shown)]
    return [*lines, ("written", "nothing: this is a dry run")]


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
        else f"{planned.max_length:,} tokens, as it was"
    )
    if planned.positions:
        reserved = f", {planned.positions['reserved']} reserved rows kept" if planned.positions["reserved"] else ""
        length += f", positions {POSITION_WORDS[planned.positions['method']]}{reserved}"
    counts = {
        "copied": planned.copied,
        "changed": planned.changed,
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
        ("density", f"{facts.density:.1%} of {blocks} x {blocks} blocks are kept"),
        (
            "attention",
            f"{_flops(planned.attention_flops(1.0))} dense, {_flops(planned.attention_flops(facts.density))} now, "
            f"for {planned.max_length:,} tokens",
        ),
        *meaning(planned),
        *(("note", note) for note in planned.notes),
    ]
    if planned.skipped:
        (name, why), *others = planned.skipped.items()
        lines.append(("skipped", f"{name}: {why}" + (f"; and {len(others)} more" if others else "")))
    if not grown and not planned.sparse_source:
        lines.append(
            ("longer", f"--max-length {8 * planned.source_length} lets it read {8 * planned.source_length:,} tokens")
        )
    return lines


def meaning(planned: Plan) -> Lines:
    """What the layouts mean for outputs: for short inputs, for repeated positions, for training."""
    if planned.sparse_source:
        stored = any(row.startswith("the stored layout") for row in planned.changed.values())
        return [("layouts", "the source's own, as stored" if stored else "made again from the source's config.json")]
    facts = planned.facts
    length = f"{min(facts.source_length, facts.seq_len):,} tokens"
    if facts.interpolated:
        short = "other outputs than the source's: no position is one that it knows"
    elif facts.short_inputs_differ:
        short = f"other outputs than the source's: {facts.kept_share:.1%} of the blocks within {length} are kept"
    else:
        short = f"the source's outputs: every block within {length} is kept"
    lines = [("short inputs", short)]
    if planned.max_length > planned.source_length:
        if facts.interpolated:
            reach = f"a token sees others up to {facts.reach:,} tokens away"
        elif facts.repeats_positions:
            reach = f"a token sees others {facts.reach:,} tokens away, where positions repeat"
        else:
            reach = f"a token sees others up to {facts.reach:,} tokens away, fewer than repeat a position"
        lines.append(("reach", reach))
    training = "needed before it is as good as its source" if facts.needs_training else "not needed"
    return [*lines, ("training", training)]


def plan_content(planned: Plan) -> dict:
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
        "short_inputs_differ": planned.facts.short_inputs_differ,
        "reach": planned.facts.reach,
        "repeats_positions": planned.facts.repeats_positions,
        "needs_training": planned.facts.needs_training,
        "attention_flops": {
            "dense": planned.attention_flops(1.0),
            "sparse": planned.attention_flops(planned.facts.density),
        },
        "renamed": planned.renamed,
        "changed": planned.changed,
        "added": planned.added,
        "dropped": planned.dropped,
        "tied": planned.tied,
        "positions": planned.positions,
        "sparse_source": planned.sparse_source,
        "skipped": planned.skipped,
        "notes": planned.notes,
    }


def _flops(count: float) -> str:
    for unit in ("GFLOP", "TFLOP"):
        count /= 1e9 if unit == "GFLOP" else 1e3
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1e3:,.3g} PFLOP"


def plot_layouts(
    path: Path | str, layouts: Sequence[np.ndarray], block: int, title: str, source_length: int | None = None
) -> None:
    """Draws the layouts of all layers, a panel for each distinct layout of a head, into an image file.

    Args:
        path: the file; its suffix says the format (`.png`, `.svg`, `.pdf`).
        layouts: 0 and 1 in `[heads, n, n]` for each layer.
        block: side of a block, in tokens; the axes count tokens.
        title: stands on top.
        source_length: tokens that the dense model reads; framed where the layout is longer.

    Raises:
        BsaError: matplotlib is absent, it cannot write such a file, or the file cannot be written.
    """
    path = Path(path)
    check_picture(path)
    figure = layout_figure(layouts, block, title, source_length)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:])
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(image.getbuffer())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise BsaError("cannot be written", found=error.strerror, where=path) from error


def check_picture(path: Path) -> None:
    """Raises BsaError where `plot_layouts` could not draw into that file, before anything is computed for it."""
    if path.suffix not in PICTURES:
        raise BsaError("expected a picture ending in .png, .svg or .pdf", found=repr(path.name), where="plot")
    if not path.absolute().parent.is_dir():
        raise BsaError("there is no such folder", where=path.absolute().parent)
    if find_spec("matplotlib") is None:
        raise BsaError("pictures need matplotlib", hint=NO_MATPLOTLIB)


def layout_figure(layouts: Sequence[np.ndarray], block: int, title: str, source_length: int | None = None) -> Figure:
    """The figure that `plot_layouts` saves, with at most `MAX_HEADS` distinct layouts; the title tells of the rest."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise BsaError("pictures need matplotlib", hint=NO_MATPLOTLIB) from error

    n = layouts[0].shape[-1]
    heads = distinct_heads(layouts)
    if len(heads) > MAX_HEADS:
        title += f"\nthe first {MAX_HEADS} of {len(heads)} distinct layouts"
    pictures = []
    for head in heads[:MAX_HEADS]:
        label = _members(head.members, len(layouts), len(layouts[0]))
        pictures.append((head.pattern, f"{label}\n{np.mean(head.pattern != 0):.1%} of blocks kept"))
        if n > LONG:
            pictures.append((head.pattern[:DETAIL, :DETAIL], f"the same\nfirst {DETAIL * block:,} tokens"))

    columns = min(len(pictures), COLUMNS)
    rows = -(-len(pictures) // columns)
    side = 6.4 if columns == 1 else 5.2 if columns == 2 else 4.0
    figure = Figure(figsize=(side * columns, side * rows + 0.8), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (pattern, label) in zip(panels, pictures, strict=False):
        _draw(panel, pattern, block, source_length, pixels=int(side * figure.dpi * 0.8))
        panel.set_title(label, fontsize=9)
    for panel in panels[len(pictures) :]:
        panel.remove()

    legend = [
        Patch(color=KEPT, label=f"kept block, {block} x {block} tokens"),
        Patch(color=DROPPED, label="dropped block"),
    ]
    if source_length and source_length < n * block:
        label = f"dense model's {source_length:,} tokens"
        legend.append(Patch(fill=False, edgecolor=SOURCE, linestyle="--", linewidth=1.5, label=label))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8, frameon=False)
    return figure


def _draw(panel: Axes, pattern: np.ndarray, block: int, source_length: int | None, pixels: int) -> None:
    """Draws `[n, n]` with tokens on the axes: queries down, keys to the right."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FixedLocator, StrMethodFormatter

    n = len(pattern)
    tokens = n * block
    kept = pattern != 0
    # With fewer pixels than blocks, single blocks would be lost: then a cell shows whether any of its blocks is kept.
    pool = -(-n // pixels)
    if pool > 1:
        kept = np.pad(kept, (0, -n % pool))
        cells = len(kept) // pool
        kept = kept.reshape(cells, pool, cells, pool).any(axis=(1, 3))
    side = len(kept) * pool * block
    colors = LinearSegmentedColormap.from_list("kept", [DROPPED, KEPT])
    panel.imshow(kept.astype(float), cmap=colors, vmin=0, vmax=1, extent=(0, side, side, 0))
    panel.set(xlim=(0, tokens), ylim=(tokens, 0), xlabel="key token", ylabel="query token")
    if n <= DETAIL:
        lines = np.arange(block, tokens, block)
        panel.hlines(lines, 0, tokens, color="white", linewidth=0.4)
        panel.vlines(lines, 0, tokens, color="white", linewidth=0.4)
    if source_length and source_length < tokens:
        frame = Rectangle((0, 0), source_length, source_length, fill=False, edgecolor=SOURCE, linestyle="--")
        frame.set(linewidth=1.5, clip_on=False, zorder=3)
        panel.add_patch(frame)
    step = block * -(-n // 4)
    ticks = [*range(0, tokens, step), *([tokens] if tokens % step == 0 else [])]
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.tick_params(labelsize=8, color=BORDER)
    panel.spines[:].set_color(BORDER)


def _members(members: list[tuple[int, int]], num_layers: int, num_heads: int) -> str:
    """The (layer, head) pairs that share a layout, in few words: `all layers, all heads`, `layers 0-3, heads 1, 5`."""
    heads_of: dict[int, tuple[int, ...]] = {}
    for layer, head in members:
        heads_of[layer] = (*heads_of.get(layer, ()), head)
    layers_of: dict[tuple[int, ...], list[int]] = {}
    for layer, heads in heads_of.items():
        layers_of.setdefault(heads, []).append(layer)
    (heads, layers), *rest = layers_of.items()
    text = f"{_numbers('layer', layers, num_layers)}, {_numbers('head', heads, num_heads)}"
    more = sum(len(heads) * len(layers) for heads, layers in rest)
    return f"{text} and {more} more" if more else text


def _numbers(noun: str, numbers: Sequence[int], count: int) -> str:
    """`all heads`, `head 3`, `heads 0-3, 7`."""
    if len(numbers) == count:
        return f"all {noun}s" if count > 1 else f"the one {noun}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{noun}{'s' if len(numbers) > 1 else ''} {text}"
