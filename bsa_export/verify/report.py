"""report.html: what bsa-verify found, with its pictures inside, and the pictures as files beside it."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from bsa_export.converted.check_lines import figures
from bsa_export.converted.checks import Check, Kind, Status, worst
from bsa_export.converted.folder import open_folder
from bsa_export.converted.records import to_json
from bsa_export.errors import BsaError
from bsa_export.sparsity.pictures import MAX_HEADS
from bsa_export.verify.run import Verification, Wanted, versions
from bsa_export.version import install_hint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
MOST_FAULTS = 20
# Distinguishable without colour vision, and by their markers without any colour.
COLORS = {"torch": "#1f4e79", "triton": "#c2571a", "deepspeed": "#4c8c4a"}
MARKERS = {"torch": "o", "triton": "s", "deepspeed": "^"}
BOUND, GRID = "#a01c1c", "#dfe3e8"
STYLE = """
:root { color-scheme: light dark; --line: #d5d9df; --soft: #667; --passed: #23743a; --failed: #b3211f; --skipped: #7a6a1e; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 0.8rem 0.35rem 0; border-bottom: 1px solid var(--line); }
.verdict { font-size: 1.15rem; font-weight: 600; } .soft { color: var(--soft); } code { font-size: 0.9em; }
.passed { color: var(--passed); } .failed { color: var(--failed); } .skipped, .incomplete, .info { color: var(--skipped); }
.picture { display: block; max-width: 100%; height: auto; background: white; padding: 0.5rem; border: 1px solid var(--line); }
pre { overflow-x: auto; font-size: 0.8rem; } details { margin-top: 1rem; } .scroll { overflow-x: auto; }
"""


def check_matplotlib() -> None:
    """Raises BsaError when pictures cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise BsaError("pictures need matplotlib", where="--report", hint=install_hint("plot"))


def write_report(target: Path, wanted: Wanted, run: Verification) -> list[Path]:
    """Writes report.html and its pictures into the folder `target`, which is made; what else lies there stays.

    Args:
        target: where to.
        wanted: what was verified.
        run: what was found.

    Returns:
        the files that were written.

    Raises:
        BsaError: they cannot be written.
    """
    images = {name: _png(draw) for name, draw in _pictures(wanted, run).items()}
    page = render(wanted, run, images)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".report") as beside:
            for name, data in {**images, REPORT: page.encode()}.items():
                (Path(beside) / name).write_bytes(data)
            for name in (*images, REPORT):
                shutil.move(Path(beside) / name, target / name)
    except OSError as error:
        raise BsaError(f"it cannot be written ({error.strerror})", where=target) from None
    return [target / name for name in (*images, REPORT)]


def _pictures(wanted: Wanted, run: Verification) -> dict[str, Callable[[], Figure]]:
    """File name -> what draws it, for what there is to show."""
    pictures = {}
    if any(check.kind is Kind.LAYOUT and "density" in check.figures for check in run.checks):
        pictures["layout.png"] = lambda: _layout_figure(wanted.folder)
    if any("layer" in row and "ratio" in row for check in run.checks for row in check.details):
        pictures["errors.png"] = lambda: error_figure(run.checks)
    drift = next((check for check in run.checks if check.kind is Kind.DRIFT and check.details), None)
    if drift:
        pictures["drift.png"] = lambda: drift_figure(drift)
    return pictures


def _png(draw: Callable[[], Figure]) -> bytes:
    image = io.BytesIO()
    draw().savefig(image, format="png")
    return image.getvalue()


def _layout_figure(path: Path) -> Figure:
    from bsa_export.checkpoint.dtypes import read
    from bsa_export.sparsity.pictures import layout_figure

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
    """Cosine of sparse and dense hidden states layer by layer; beside it, losses, where a text was given."""
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
        label="mean of the tokens",
    )
    panels[0].plot(
        numbers, [row["least"] for row in layers], "s--", color=COLORS["triton"], markersize=4, label="least of them"
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


def _plain(panel) -> None:
    panel.grid(axis="y", color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


CAPTIONS = {
    "layout.png": (
        "Layouts",
        "Which blocks of the score matrix {} keeps; queries down, keys to the right, in tokens.",
    ),
    "errors.png": (
        "Errors against the bound",
        "How far each backend is from float64, in units of plain PyTorch's error in the same dtype; the larger of the largest"
        " element and the root mean square.",
    ),
    "drift.png": (
        "Drift",
        "How far the sparse model is from the dense one on an input that both read. This is information: no rule says how far it may be.",
    ),
}


def render(wanted: Wanted, run: Verification, images: dict[str, bytes]) -> str:
    """The page, with the pictures (file name -> PNG) inside."""
    rows = "\n".join(_row(check) for check in run.checks)
    pictures = "\n".join(_picture(name, data, run) for name, data in images.items())
    facts = {
        "folder": Path(wanted.folder).resolve().name,
        "source": wanted.source_name or (wanted.source.name if wanted.source else "not compared"),
        "computed on": run.device or "nothing",
        "time": f"{run.seconds:.1f} s",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    told = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts.items())
    files = "".join(
        f"<tr><td>{_text(name)}</td><td><code>{digest}</code></td></tr>" for name, digest in run.files.items()
    )
    everything = json.dumps(to_json(run.checks), indent=1)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>bsa-verify: {_text(facts["folder"])}</title><style>{STYLE}</style></head>
<body>
<h1>bsa-verify: {_text(facts["folder"])}</h1>
<p class="verdict {run.verdict}">{_text(run.sentence)}</p>
<table>{told}</table>
<h2>Checks</h2>
<div class="scroll"><table><tr><th>result</th><th>check</th><th>figures</th></tr>
{rows}
</table></div>
{pictures}
<details><summary>sha256 of what was verified</summary><div class="scroll"><table>{files}</table></div></details>
<details><summary>Every comparison, as JSON</summary><pre>{_text(everything)}</pre></details>
</body>
</html>
"""


def _row(check: Check) -> str:
    told = [
        _text(figures(check)),
        *(f'<span class="failed">{_text(fault)}</span>' for fault in check.faults[:MOST_FAULTS]),
    ]
    if len(check.faults) > MOST_FAULTS:
        told.append(f"and {len(check.faults) - MOST_FAULTS} more")
    if check.status is Status.SKIPPED:
        told = [_text(check.reason)]
    joined = "<br>".join(part for part in told if part)
    return f'<tr><td class="{check.status}">{check.status}</td><td>{_text(check.name)}</td><td>{joined}</td></tr>'


def _picture(name: str, data: bytes, run: Verification) -> str:
    title, caption = CAPTIONS[name]
    if name == "layout.png":
        caption = caption.format(_drawn(run))
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    return f'<h2>{title}</h2>\n<p class="soft">{caption}</p>\n<img class="picture" alt="{title}: {caption}" src="{source}">'


def _drawn(run: Verification) -> str:
    """Whose layouts the picture shows."""
    distinct = next(check.figures["distinct"] for check in run.checks if "distinct" in check.figures)
    return (
        "each distinct head" if distinct <= MAX_HEADS else f"each of the first {MAX_HEADS} of {distinct} distinct heads"
    )


def _text(value: object) -> str:
    return html.escape(str(value))
