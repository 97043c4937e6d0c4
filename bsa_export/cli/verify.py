"""bsa-verify."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from bsa_export.cli import command
from bsa_export.cli.progress import Progress, is_watched
from bsa_export.errors import BsaError, HubError

BACKENDS = click.Choice(["torch", "triton", "deepspeed"])


@command(
    "bsa-verify",
    epilog="Exit code: 0 everything that ran passed and outputs were compared, 1 something failed, 2 wrong usage, 3 no outputs"
    " could be compared.",
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--source", metavar="SOURCE", help="What it was converted from: a path, or org/name of the Hub.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The source's config.json, if not beside its weights.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
@click.option(
    "--backend",
    "backends",
    type=BACKENDS,
    multiple=True,
    help="Compare this one only; may be repeated.  [default: all]",
)
@click.option("--require", type=BACKENDS, multiple=True, help="Fail if this one cannot run here; may be repeated.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Measure the masked-LM loss on it: plain text, or .jsonl with a "text" a line.',
)
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write report.html and pictures into this folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every comparison.")
@click.pass_context
def main(
    context: click.Context, folder: Path, source: str | None, device: str, report: Path | None, as_json: bool, **choices
) -> None:
    """Prove that a converted model is right.

    FOLDER is what bsa-convert wrote or bsa-pull fetched. Its files, layouts and weights are checked, and its attention is computed
    by every backend that runs here and compared with plain PyTorch in float64. What was found is recorded in FOLDER's
    verification.json, which bsa-push reads.
    """
    # torch's threads wait for each other by spinning, which starves the interpreter's process beside them; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if report is not None:
        from bsa_export.verify.report import check_matplotlib

        _refuse_report(report, folder)
        check_matplotlib()
    backends = (
        tuple(dict.fromkeys([*choices["backends"], *choices["require"]])) if choices["backends"] else BACKENDS.choices
    )
    from bsa_export.converted.check_lines import line
    from bsa_export.converted.names import VERIFICATION_RECORD
    from bsa_export.verify.run import Wanted, run_checks

    if (text := choices["text"]) is not None:
        _checked_text(text)
    found = None if source is None else _found_source(source, choices["config"])
    wanted = Wanted(
        folder,
        found,
        choices["config"],
        _device(device),
        tuple(backends),
        choices["require"],
        text,
        None if source is None or os.path.lexists(source) else source,
    )
    with Progress() as progress:
        run = run_checks(
            wanted,
            None if as_json else lambda check: progress.write(line(check)),
            lambda what: progress.begin(what, "B" if what == "weights" else ""),
        )
    click.echo(json.dumps(run.to_dict(), indent=2) if as_json else f"{run.sentence} ({run.seconds:.1f} s)")
    if run.unrecorded:
        record = folder / VERIFICATION_RECORD
        then = "still reads that of an earlier run" if record.exists() else "will want one"
        click.echo(f"Warning: {record}: it cannot be written ({run.unrecorded}); bsa-push {then}", err=True)
    if report is not None:
        from bsa_export.verify.report import write_report

        write_report(report, wanted, run)
    context.exit(run.exit_code)


def _refuse_report(report: Path, folder: Path) -> None:
    """A report in the converted folder would replace its card's picture, and be pushed with it."""
    if folder.resolve() in (report.resolve(), *report.resolve().parents):
        raise click.BadParameter(
            f"{report} is in the folder that is verified; choose another place", param_hint="--report"
        )


def _checked_text(path: Path) -> None:
    from bsa_export.verify.documents import documents

    try:
        documents(path)
    except BsaError as error:
        raise click.BadParameter(str(error), param_hint="--text") from None


def _found_source(source: str, config: Path | None) -> Path:
    """Where the source lies. One that is no checkpoint is no reason to call the folder wrong."""
    from bsa_export.hub.source import find_source
    from bsa_export.verify.run import open_source

    try:
        found = find_source(source, progress=is_watched()).path
        open_source(found, config)
    except HubError:
        raise
    except BsaError as error:
        raise click.BadParameter(str(error), param_hint="--source") from None
    return found


def _device(choice: str) -> str:
    from bsa_export.verify.run import find_device

    try:
        return find_device(choice)
    except BsaError as error:
        raise click.UsageError(f"--device {choice}: {error}") from None
