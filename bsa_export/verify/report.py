"""report.html: the result of a verification with its pictures inside, and the pictures as files next to it."""

from __future__ import annotations

import base64
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bsa_export.converted.check_lines import figures
from bsa_export.converted.checks import Kind
from bsa_export.converted.records import to_json
from bsa_export.errors import BsaError
from bsa_export.sparsity.pictures import MAX_HEADS
from bsa_export.text import printable
from bsa_export.verify.figures import drift_figure, error_figure, folder_layout_figure
from bsa_export.verify.verification import Verification, Wanted, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
TEMPLATE = "report.html.jinja"
MOST_FAULTS = 20
CAPTIONS = {
    "layout.png": (
        "Layouts",
        "Which blocks of the score matrix {} keeps; queries down, keys to the right, in tokens.",
    ),
    "errors.png": (
        "Errors against the bound",
        "How far each backend is from float64, in units of plain PyTorch's error in the same dtype; the larger of the"
        " largest element and the root mean square.",
    ),
    "drift.png": (
        "Drift",
        "How far the sparse model is from the dense one on an input that both can read. This is information: no rule"
        " limits it.",
    ),
}


def write_report(target: Path, wanted: Wanted, run: Verification) -> list[Path]:
    """Writes report.html and its pictures into the folder `target`, which is created; other files there stay.

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
    pictures: dict[str, Callable[[], Figure]] = {}
    if any(check.kind is Kind.LAYOUT and "density" in check.figures for check in run.checks):
        pictures["layout.png"] = partial(folder_layout_figure, wanted.folder)
    if any("layer" in row and "ratio" in row for check in run.checks for row in check.details):
        pictures["errors.png"] = partial(error_figure, run.checks)
    drift = next((check for check in run.checks if check.kind is Kind.DRIFT and "length" in check.figures), None)
    if drift:
        pictures["drift.png"] = partial(drift_figure, drift)
    return pictures


def _png(draw: Callable[[], Figure]) -> bytes:
    image = io.BytesIO()
    draw().savefig(image, format="png")
    return image.getvalue()


def render(wanted: Wanted, run: Verification, images: Mapping[str, bytes]) -> str:
    """The page, with the pictures (file name -> PNG) inside."""
    facts = {
        "folder": printable(Path(wanted.folder).resolve().name),
        "source": printable(wanted.source_name or (wanted.source.name if wanted.source else "not compared")),
        "computed on": run.device or "nothing",
        "time": f"{run.seconds:.1f} s",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    environment = Environment(loader=PackageLoader("bsa_export.verify", ""), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"figures": figures, "printable": printable}
    return environment.get_template(TEMPLATE).render(
        facts=facts,
        run=run,
        pictures=[_picture(name, data, run) for name, data in images.items()],
        most_faults=MOST_FAULTS,
        comparisons=json.dumps(to_json(run.checks), indent=1),
    )


def _picture(name: str, data: bytes, run: Verification) -> dict[str, Any]:
    title, caption = CAPTIONS[name]
    if name == "layout.png":
        caption = caption.format(_drawn(run))
    return {"title": title, "caption": caption, "data": base64.b64encode(data).decode()}


def _drawn(run: Verification) -> str:
    """Whose layouts the picture shows."""
    distinct = next(check.figures["distinct"] for check in run.checks if "distinct" in check.figures)
    return (
        "each distinct head" if distinct <= MAX_HEADS else f"each of the first {MAX_HEADS} of {distinct} distinct heads"
    )
