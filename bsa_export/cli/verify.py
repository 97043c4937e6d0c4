"""bsa-verify."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from bsa_export.cli import command
from bsa_export.cli.progress import Progress, is_watched
from bsa_export.errors import BsaError, HubError

Result = TypeVar("Result")
BACKENDS = click.Choice(["torch", "triton", "deepspeed"])


@command(
    "bsa-verify",
    epilog="Exit code: 0 outputs were compared and nothing failed, 1 something failed, 2 wrong usage, 3 no outputs"
    " could be compared.",
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--source", metavar="SOURCE", help="What FOLDER was converted from: a path, or org/name of the Hub.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The source's config.json, if it is not next to the weights.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to compute on.",
)
@click.option(
    "--backend",
    "backends",
    type=BACKENDS,
    multiple=True,
    help="Compare this backend only; may be repeated.  [default: all]",
)
@click.option("--require", type=BACKENDS, multiple=True, help="Fail if this backend cannot run; may be repeated.")
@click.option(
    "--deepspeed",
    type=click.Path(exists=True, path_type=Path),
    metavar="FILE_OR_FOLDER",
    help="A release of DeepSpeed up to 0.19.6 to compare with.  [default: $BSA_DEEPSPEED, or the installed one]",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Measure the masked-LM loss on it: plain text, or .jsonl with a "text" in each line.',
)
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write report.html and pictures into this folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every comparison.")
@click.pass_context
def main(
    context: click.Context,
    folder: Path,
    source: str | None,
    config: Path | None,
    device: str,
    backends: tuple[str, ...],
    require: tuple[str, ...],
    deepspeed: Path | None,
    text: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Check that a converted model is right.

    FOLDER is what bsa-convert wrote or bsa-pull downloaded. Its files, layouts and weights are checked. Then every
    backend that can run here computes the model's attention, each in its own process, and the results are compared with
    plain PyTorch in float64. The verdict is recorded in FOLDER's verification.json, which bsa-push reads.
    """
    if report is not None:
        from bsa_export.verify.run import check_report

        _usage("--report", lambda: check_report(report, folder))
    from bsa_export.converted.check_lines import line
    from bsa_export.converted.names import VERIFICATION_RECORD
    from bsa_export.verify.documents import documents
    from bsa_export.verify.run import find_device, run_checks
    from bsa_export.verify.verification import Wanted

    if text is not None:
        _usage("--text", lambda: documents(text))
    found = None if source is None else _found_source(source, config)
    wanted = Wanted(
        folder=folder,
        source=found,
        config=config,
        device=_usage("--device", lambda: find_device(device)),
        backends=tuple(dict.fromkeys([*backends, *require])) if backends else tuple(BACKENDS.choices),
        require=require,
        text=text,
        source_name=None if source is None or os.path.lexists(source) else source,
        deepspeed=deepspeed,
    )
    with Progress() as progress:
        run = run_checks(
            wanted,
            None if as_json else lambda check: progress.write(line(check)),
            lambda what: progress.begin(what, "B" if what == "weights" else ""),
        )
    click.echo(json.dumps(run.to_dict(), indent=2) if as_json else f"{run.sentence} ({run.seconds:.1f} s)")
    record = folder / VERIFICATION_RECORD
    if run.unrecorded:
        then = "still reads that of an earlier run" if record.exists() else "will require one"
        click.echo(f"Warning: {record}: it cannot be written ({run.unrecorded}); bsa-push {then}", err=True)
    elif run.kept is not None:
        click.echo(
            f"{record} keeps the result of {run.kept.finished}, which compared more of the same files"
            f" ({run.kept.sentence})",
            err=True,
        )
    if report is not None:
        from bsa_export.verify.report import write_report

        write_report(report, wanted, run)
    context.exit(run.exit_code)


def _usage(option: str, get: Callable[[], Result]) -> Result:
    """What `get` returns; its BsaError is wrong usage of the option."""
    try:
        return get()
    except BsaError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def _found_source(source: str, config: Path | None) -> Path:
    """The local path of the source. If it is not a checkpoint, that says nothing about the folder: it is wrong
    usage."""
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
