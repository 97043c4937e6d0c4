"""Draws the pictures of the README: `python docs/make_pictures.py`. The rates are read from performance.md."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, StrMethodFormatter

from bsa_export.sparsity import windowed_for
from bsa_export.sparsity.pictures import layout_figure

DOCS = Path(__file__).resolve().parent
SHOWN = {  # column of the table -> label, color, marker
    "SDPA": ("dense attention (SDPA)", "#8a93a0", "s"),
    "block-sparse, `windowed`": ("block-sparse, default layout", "#1f4e79", "o"),
    "HF Longformer": ("Longformer in transformers", "#f28e2b", "^"),
}


def rates() -> dict[str, dict[int, float]]:
    """Column -> length -> million tokens a second, forward."""
    table = (DOCS / "performance.md").read_text().split("| forward |")[1].split("| **training step**")[0]
    header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in ("|" + table).splitlines()]
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        length = row[1].replace(",", "")
        if not length.isdigit():
            continue
        for name, cell in zip(header[1:], row[2:], strict=False):
            if match := re.match(r"[\d.]+", cell):
                found.setdefault(name, {})[int(length)] = float(match[0])
    return found


def tokens_per_second() -> Figure:
    figure = Figure(figsize=(7.2, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    measured = rates()
    for name, (label, color, marker) in SHOWN.items():
        lengths, values = zip(*sorted(measured[name].items()), strict=True)
        axes.plot(lengths, values, marker=marker, color=color, label=label, linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([512, 4096, 16384, 65536]))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set(xlabel="tokens in a text", ylabel="million tokens a second", ylim=(0, 2.3))
    axes.set_title("BERT-base, fp16, forward, one H100", fontsize=10, loc="left")
    axes.grid(axis="y", color="#dfe3e8", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(0.02, 0.42))
    return figure


def layout() -> Figure:
    sparsity = windowed_for(512, num_heads=12)
    title = "Default layout: a model of 512 tokens that reads 4,096"
    return layout_figure([sparsity.make_layout(4096)] * 12, sparsity.block, title, source_length=512)


if __name__ == "__main__":
    tokens_per_second().savefig(DOCS / "tokens_per_second.png")
    layout().savefig(DOCS / "layout.png")
