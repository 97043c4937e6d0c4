"""All checks in order, the verdict, and verification.json. Imports no torch: what needs it runs in other processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from bsa_export.bert.config_file import find_config, read_config
from bsa_export.bert.expected_tensors import compare
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import Checkpoint
from bsa_export.conversion.source_folder import encoder_folder
from bsa_export.converted.checks import Check, Kind, Status, result, skipped
from bsa_export.converted.folder import ConvertedFolder, open_folder
from bsa_export.converted.integrity import check_file, check_layout, digests
from bsa_export.converted.records import (
    LaterRun,
    Verdict,
    VerificationRecord,
    read_verification,
    write_verification,
)
from bsa_export.errors import BsaError
from bsa_export.hub.source import find_source
from bsa_export.text import some
from bsa_export.verify.carried import unexpected_files
from bsa_export.verify.documents import documents
from bsa_export.verify.lineage import is_ancestor
from bsa_export.verify.verification import BACKENDS, Verification, Wanted
from bsa_export.verify.weights import check_weights, tiled_rows_fault
from bsa_export.verify.worker import MODEL, Job, Worker
from bsa_export.version import install_hint

Progress = Callable[[int, int], None]


def verify(
    folder: str | Path,
    *,
    source: str | Path | None = None,
    config: str | Path | None = None,
    device: str = "auto",
    backend: Sequence[str] = (),
    require: Sequence[str] = (),
    text: str | Path | None = None,
    deepspeed: str | Path | None = None,
    report: str | Path | None = None,
    on_check: Callable[[Check], None] | None = None,
    progress: Callable[[str], Progress | None] | None = None,
) -> Verification:
    """Checks that a converted folder is right, as the command bsa-verify does. Writes verification.json into it.

    Args:
        folder: what bsa-convert wrote or bsa-pull downloaded.
        source: what it was converted from: a path, or a repository of the Hub (`org/name[@revision]`).
        config: the source's config.json, if it is not stored next to its weights.
        device: where to compute: `auto`, `cpu` or `cuda`.
        backend: compares these backends only, of BACKENDS; all unless given.
        require: backends whose check fails if they cannot run here.
        text: a file whose masked tokens are predicted: plain text, or `.jsonl` with a `text` in each line.
        deepspeed: a release of DeepSpeed, as a file (.tar.gz, .whl) or a folder; $BSA_DEEPSPEED or the installed one
            unless given.
        report: a folder that report.html and its pictures are written into.
        on_check: called with each check when it has ended.
        progress: called with the name of each step; returns a function that is called with (done, in all), or None.

    Returns:
        What was found; `verdict` sums it up, `raise_if_failed()` raises.

    Raises:
        BsaError: an option is wrong, or the source or the text cannot be read (nothing is recorded then), or the report
            cannot be written (verification.json is written then).
    """
    for names in (backend, require):
        if unknown := [name for name in names if name not in BACKENDS]:
            raise BsaError(f"expected one of {', '.join(BACKENDS)}", found=repr(unknown[0]), where="backend")
    if text is not None:
        documents(Path(text))
    if report is not None:
        check_report(Path(report), Path(folder))
    found = None
    if source is not None:
        found = source if isinstance(source, Path) else find_source(source, progress=progress is not None).path
    wanted = Wanted(
        Path(folder),
        found,
        None if config is None else Path(config),
        find_device(device),
        tuple(dict.fromkeys([*backend, *require])) if backend else BACKENDS,
        tuple(require),
        None if text is None else Path(text),
        None if source is None or isinstance(source, Path) or os.path.lexists(source) else source,
        None if deepspeed is None else Path(deepspeed),
    )
    run = run_checks(wanted, on_check, progress)
    if report is not None:
        from bsa_export.verify.report import write_report

        write_report(Path(report), wanted, run)
    return run


def check_report(report: Path, folder: Path) -> None:
    """Raises BsaError where a report cannot be written: without matplotlib, or into the folder that is verified, whose
    card's picture it would replace."""
    if find_spec("matplotlib") is None:
        raise BsaError("a report needs matplotlib", where="report", hint=install_hint("plot"))
    if folder.resolve() in (report.resolve(), *report.resolve().parents):
        raise BsaError("it is inside the folder that is verified; choose another place", where=report)


def find_device(choice: str) -> str:
    """`cpu` or `cuda` for a choice of `auto`, `cpu` or `cuda`. Raises BsaError where torch finds no GPU for `cuda`."""
    if choice not in ("auto", "cpu", "cuda"):
        raise BsaError("expected auto, cpu or cuda", found=repr(choice), where="device")
    if choice == "cpu":
        return choice
    try:
        import torch
    except (ImportError, OSError):  # the check of outputs says why
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if choice == "cuda":
        raise BsaError("torch finds no CUDA GPU here", where="device cuda")
    return "cpu"


def run_checks(
    wanted: Wanted,
    on_check: Callable[[Check], None] | None = None,
    progress: Callable[[str], Progress | None] | None = None,
) -> Verification:
    """Runs all checks on a folder and writes verification.json into it, also when it is interrupted.

    Until the end the record says `incomplete`, so that a run that is killed leaves no verdict about other files. A
    passed verdict about the same files stays where this run compares less; the record then lists this run as `later`.
    Where the record cannot be written, the result says so in `unrecorded`.

    Args:
        wanted: what to verify, and how.
        on_check: called with each check when it has ended.
        progress: called with the name of each step; returns a function that is called with (done, in all), or None.

    Returns:
        What was found; `verdict` and `exit_code` sum it up.

    Raises:
        BsaError: the source cannot be opened; nothing is recorded then.
    """
    started = time.perf_counter()
    run = Verification()
    if wanted.source is not None:
        open_source(wanted.source, wanted.config)
    run.files = digests(wanted.folder)
    earlier = _earlier(wanted.folder, run.files)
    _write(wanted.folder, run, earlier)
    try:
        for check in _checks(wanted, run, progress or (lambda _: None)):
            if check.kind is Kind.OUTPUTS and check.part in wanted.require and check.status is Status.SKIPPED:
                run.required.add(check.part)
                check = replace(check, status=Status.FAILED, reason=f"it is required, and was skipped: {check.reason}")
            run.seconds, before = time.perf_counter() - started, run.seconds
            run.checks.append(check := replace(check, seconds=run.seconds - before))
            if on_check:
                on_check(check)
        run.finished = True
    finally:
        run.seconds = time.perf_counter() - started
        _write(wanted.folder, run, earlier)
    return run


def _earlier(folder: Path, files: dict[str, str]) -> VerificationRecord | None:
    """The recorded verification of the same files, if it passed."""
    try:
        record = read_verification(folder)
    except BsaError:
        return None
    return record if record and record.verdict is Verdict.PASSED and record.files == files else None


def _write(folder: Path, run: Verification, earlier: VerificationRecord | None) -> None:
    """Writes verification.json: about this run, or about the earlier one with this one as `later`."""
    record = run.record()
    run.kept = None if earlier is None or run.replaces(earlier) else earlier
    if run.kept is not None:
        later = LaterRun(
            record.verdict, record.sentence, record.device, record.seconds, record.versions, record.finished
        )
        record = replace(run.kept, later=later)
    run.unrecorded = write_verification(folder, record)


def open_source(source: Path, config: Path | None) -> Checkpoint:
    """What a folder is compared with. Raises BsaError: it is not a checkpoint, or its config.json cannot be read."""
    checkpoint = open_checkpoint(encoder_folder(source))
    path = config or find_config(checkpoint.folder)
    if path.is_file():
        read_config(path)
    return checkpoint


def _checks(wanted: Wanted, run: Verification, show: Callable[[str], Progress | None]) -> Iterator[Check]:
    yield check_file(wanted.folder)
    yield check_layout(wanted.folder)
    try:
        folder = open_folder(wanted.folder)
    except BsaError:
        yield from (skipped(kind, "the folder cannot be opened", part) for kind, part in _later(wanted))
        return
    reason = _cannot_compute(folder, run.checks)
    workers: dict[str, Worker] = {}
    try:
        if reason is None:
            for name in wanted.backends:
                job = Job(name, folder.path, wanted.device, deepspeed=wanted.deepspeed)
                workers[name] = Worker(job)
        source = None
        if wanted.source is None:
            yield _without_source(folder)
        else:
            weights = check_weights(folder, wanted.source, wanted.config, show("weights"), wanted.source_name)
            # The values before a training are not those that the model computes with.
            source = wanted.source if weights.passed and not is_ancestor(folder, wanted.source) else None
            yield weights
        if reason is not None:
            yield from (skipped(kind, reason, part) for kind, part in _later(wanted)[1:])
            return
        workers[MODEL] = Worker(Job(MODEL, folder.path, wanted.device, source, wanted.text, wanted.deepspeed))
        yield from _computed(wanted, run, workers, show)
    finally:
        for worker in workers.values():
            worker.stop()


def _computed(
    wanted: Wanted, run: Verification, workers: dict[str, Worker], show: Callable[[str], Progress | None]
) -> Iterator[Check]:
    """What the processes report, in the order of the checks."""
    model, backends = workers[MODEL], [workers[name] for name in wanted.backends]
    yield from model.wait(Kind.INTERCHANGE)
    run.device = model.device
    for worker in backends:
        yield from worker.wait(Kind.OUTPUTS, show(f"outputs: {worker.job.name}"))
    yield from model.wait(Kind.WHOLE_MODEL, show("whole model"))
    yield from model.wait(Kind.DRIFT, show("drift"))
    for worker in (model, *backends):
        yield from worker.wait(Kind.CONTROLS)


def _later(wanted: Wanted) -> list[tuple[Kind, str]]:
    """The checks after the layout check: kind and part."""
    return [
        (Kind.WEIGHTS, ""),
        (Kind.INTERCHANGE, ""),
        *((Kind.OUTPUTS, name) for name in wanted.backends),
        (Kind.WHOLE_MODEL, ""),
        (Kind.DRIFT, ""),
        (Kind.CONTROLS, ""),
    ]


def _without_source(folder: ConvertedFolder) -> Check:
    """The weights check without a source: tiled position rows repeat, and files that are not recorded are named."""
    if fault := tiled_rows_fault(folder):
        return result(Kind.WEIGHTS, [fault])
    recorded = set(folder.record.files) if folder.record else set()
    weights = {file.name for file in folder.checkpoint.files}
    reason = "no --source to compare with: " + _covered(folder)
    if recorded and (others := unexpected_files(folder, recorded | weights)):
        reason += f"; not from the conversion: {some(others)}"
    return skipped(Kind.WEIGHTS, reason)


def _covered(folder: ConvertedFolder) -> str:
    """What is compared instead of the source."""
    recorded = folder.record.files if folder.record else {}
    weights = [recorded.get(file.name) for file in folder.checkpoint.files]
    if all(entry and (entry.sha256 or entry.checksum) for entry in weights):
        return "the file check compares the digests of conversion.json instead"
    return "and conversion.json has no digest of the weights"


def _cannot_compute(folder: ConvertedFolder, checks: Iterable[Check]) -> str | None:
    """Why nothing can be computed with the folder, or None."""
    if any(check.failed and check.kind is Kind.LAYOUT for check in checks):
        return "the layout check failed"
    misfits = compare(folder.tensors, folder.encoder.sparse_spec())
    if misfits.missing or misfits.mismatched:
        return "the file check failed"
    if find_spec("torch") is None:
        return f"torch is not installed; {install_hint('verify')}"
    return None
