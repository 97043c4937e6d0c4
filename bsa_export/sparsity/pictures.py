"""Pictures of layouts. matplotlib, the extra `[plot]`, is imported where it is used."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bsa_export.errors import BsaError
from bsa_export.sparsity.facts import distinct_heads
from bsa_export.version import install_hint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT, DROPPED, SOURCE, BORDER = "#1f4e79", "#eef1f5", "#f28e2b", "#b8c0cc"
MAX_HEADS = 24
COLUMNS = 4
PICTURES = (".png", ".svg", ".pdf")
# A picture of more blocks than LONG is joined by one of its first DETAIL blocks.
LONG, DETAIL = 128, 64


def plot_layouts(
    path: Path | str, layouts: Sequence[np.ndarray], block: int, title: str, source_length: int | None = None
) -> None:
    """Draws the layouts of all layers, a panel for each distinct layout of a head, into an image file.

    Args:
        path: the file; its suffix says the format (`.png`, `.svg`, `.pdf`).
        layouts: 0 and 1 in `[heads, n, n]` for each layer.
        block: side of a block, in tokens; the axes count tokens.
        title: text above the picture.
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
        raise BsaError("pictures need matplotlib", hint=install_hint("plot"))


def layout_figure(layouts: Sequence[np.ndarray], block: int, title: str, source_length: int | None = None) -> Figure:
    """The figure that `plot_layouts` saves, with at most `MAX_HEADS` distinct layouts; the title counts the others."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise BsaError("pictures need matplotlib", hint=install_hint("plot")) from error

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
