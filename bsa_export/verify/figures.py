"""The pictures of the report: layouts, errors by layer, drift. matplotlib, the extra `[plot]`, is imported where it is
used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from bsa_export.checkpoint.dtypes import read
from bsa_export.converted.checks import Check, worst
from bsa_export.converted.folder import open_folder
from bsa_export.sparsity.pictures import layout_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable without colour vision.
COLORS = {"torch": "#1f4e79", "triton": "#c2571a", "deepspeed": "#4c8c4a"}
BOUND, GRID = "#a01c1c", "#dfe3e8"


def folder_layout_figure(path: Path) -> Figure:
    """The layouts that a converted folder stores."""
    folder = open_folder(path)
    layouts = [read(folder.tensors[folder.layout_name(layer)]) for layer in range(folder.layers)]
    title = f"{folder.sparsity.mode}, block {folder.block}, {folder.longest:,} tokens"
    return layout_figure(layouts, folder.block, title, folder.source_length)


def error_figure(checks: list[Check]) -> Figure:
    """Errors of each backend layer by layer, in units of plain PyTorch's, with the bound: a panel a backend."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = [check for check in checks if any("ratio" in row and "layer" in row for row in check.details)]
    figure = Figure(figsize=(7.2, 0.6 + 2.5 * len(shown)), dpi=150, layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    for panel, check in zip(panels, shown, strict=True):
        rows = [row for row in check.details if "ratio" in row]
        backend = rows[0]["backend"]
        bound = rows[0]["bound"]
        top = max(bound * 1.15, 1.1 * max((row["ratio"] for row in rows if math.isfinite(row["ratio"])), default=0.0))
        situations = list(dict.fromkeys((row["situation"], row["length"]) for row in rows))
        for number, (situation, length) in enumerate(situations):
            ratios: dict[int, list[float]] = {}
            for row in rows:
                if row["situation"] == situation:
                    ratios.setdefault(row["layer"], []).append(row["ratio"])
            largest = {layer: worst(of_layer) for layer, of_layer in ratios.items()}
            heights = [ratio if math.isfinite(ratio) else math.nan for ratio in largest.values()]
            style = ("-", "--", ":", "-.")[number % 4]
            label = f"{situation}: {length:,} tokens"
            line = panel.plot(list(largest), heights, style, label=label, linewidth=1.3)[0]
            line.set(color=COLORS.get(backend), marker="osD^v"[number % 5], markersize=4, alpha=1 - 0.15 * number)
        broken = [row["layer"] for row in check.details if "gives" in row or not math.isfinite(row.get("ratio", 0.0))]
        if broken:
            panel.plot(broken, [0.95 * top] * len(broken), "X", color=BOUND, markersize=7, label="not finite")
        panel.axhline(bound, color=BOUND, linewidth=1.3, label=f"bound: {bound:g} x plain PyTorch's error")
        panel.set(ylim=(0, top), ylabel="error / plain PyTorch's")
        panel.set_title(
            f"{backend}, {check.figures['device']}, {', '.join(check.figures['dtypes'])}", fontsize=10, loc="left"
        )
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        _plain(panel)
    panels[-1].set_xlabel("layer")
    return figure


def drift_figure(drift: Check) -> Figure:
    """Cosine of sparse and dense hidden states layer by layer; next to it the losses, if a text was given."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = [row for row in drift.details if "cosine" in row]
    losses = [row for row in drift.details if "loss" in row]
    figure = Figure(figsize=(7.2 if not losses else 9.6, 3.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2 if losses else 1, squeeze=False)[0]
    numbers = [row["layer"] for row in layers]
    panels[0].plot(
        numbers,
        [row["cosine"] for row in layers],
        "o-",
        color=COLORS["torch"],
        markersize=4,
        label="mean over the tokens",
    )
    panels[0].plot(
        numbers, [row["least"] for row in layers], "s--", color=COLORS["triton"], markersize=4, label="smallest"
    )
    low = min((row["least"] for row in layers if math.isfinite(row["least"])), default=0.9)
    panels[0].set(xlabel="layer", ylabel="cosine of sparse and dense", ylim=(min(0.9, low - 0.05 * (1 - low)), 1.01))
    panels[0].set_title(f"hidden states, {drift.figures['length']:,} tokens", fontsize=10, loc="left")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    _plain(panels[0])
    if losses:
        names = [f"{row['attention']}\n{row['window']:,}" for row in losses]
        bars = panels[1].bar(names, [row["loss"] for row in losses], width=0.6)
        for bar, row in zip(bars, losses, strict=True):
            bar.set_color(COLORS["deepspeed"] if row["attention"] == "dense" else COLORS["torch"])
        panels[1].bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
        top = max((row["loss"] for row in losses if math.isfinite(row["loss"])), default=1.0)
        panels[1].set(ylabel="nats", xlabel="attention, tokens of a window", ylim=(0, 1.15 * top))
        panels[1].set_title(f"masked-LM loss, {losses[0]['masked tokens']:,} masked tokens", fontsize=10, loc="left")
        panels[1].tick_params(axis="x", labelsize=8)
        _plain(panels[1])
    return figure


def _plain(panel: Axes) -> None:
    panel.grid(axis="y", color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
