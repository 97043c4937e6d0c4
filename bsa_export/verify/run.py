"""All checks in order, the verdict, and verification.json. torch is imported only for the checks that compute."""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from bsa_export.bert.expected_tensors import compare
from bsa_export.bert.families import read_config
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import Checkpoint
from bsa_export.converted.checks import Check, Kind, Status, result, skipped
from bsa_export.converted.folder import ConvertedFolder, open_folder
from bsa_export.converted.integrity import check_file, check_layout, digests
from bsa_export.converted.records import Verdict, VerificationRecord, to_json, write_verification
from bsa_export.errors import BsaError
from bsa_export.hub.source import find_source
from bsa_export.verify import interpreted as interpreter
from bsa_export.verify.weights import check_weights
from bsa_export.version import __version__

BACKENDS = ("torch", "triton", "deepspeed")
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "numpy", "safetensors")
EXIT_CODES = {Verdict.PASSED: 0, Verdict.FAILED: 1, Verdict.INCOMPLETE: 3}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What a user wants verified.

    Attributes:
        folder: the converted folder.
        source: what it was converted from, a path; None compares with recorded digests alone.
        source_name: what a person calls it, such as `org/name`; the path's last part by default.
        config: the source's config.json, if it does not lie beside the weights.
        device: `cpu` or `cuda`.
        backends: those that are compared, of BACKENDS.
        require: those that must not be skipped.
        text: a file whose masked tokens are predicted.
    """

    folder: Path
    source: Path | None = None
    config: Path | None = None
    device: str = "cpu"
    backends: Sequence[str] = BACKENDS
    require: Sequence[str] = ()
    text: Path | None = None
    source_name: str | None = None


@dataclass
class Verification:
    """What a run found."""

    checks: list[Check] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    device: str = ""
    seconds: float = 0.0
    finished: bool = False
    unrecorded: str | None = None  # why verification.json could not be written

    @property
    def verdict(self) -> Verdict:
        """`failed` if anything failed, `passed` if outputs were compared and nothing failed, else `incomplete`."""
        if any(check.failed for check in self.checks):
            return Verdict.FAILED
        compared = any(check.passed and check.numerical for check in self.checks)
        return Verdict.PASSED if self.finished and compared else Verdict.INCOMPLETE

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        counts = [
            f"{sum(check.status is status for check in self.checks)} {status}"
            for status in (Status.PASSED, Status.FAILED, Status.SKIPPED)
        ]
        told = ", ".join(count for count in counts if not count.startswith("0 ")) or "nothing was checked"
        if any(check.failed and check.kind is Kind.CONTROLS for check in self.checks):
            told += "; the verifier is broken: do not trust what passed"
        if self.verdict is Verdict.INCOMPLETE:
            told += "; " + ("no outputs could be compared" if self.finished else "it was interrupted")
        return f"{self.verdict}: {told}"

    def raise_if_failed(self) -> None:
        """Raises BsaError unless the verdict is `passed`, with what failed or why nothing could be compared."""
        if self.verdict is not Verdict.PASSED:
            failed = [f"{check.name}: {check.reason}" for check in self.checks if check.failed]
            raise BsaError(failed[0] if failed else self.sentence, where="bsa-verify")

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        content = to_json(self.record())
        for check, shown in zip(self.checks, content["checks"], strict=True):
            shown["name"] = check.name
        return content

    def record(self) -> VerificationRecord:
        """What verification.json keeps."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return VerificationRecord(
            self.verdict, self.checks, self.files, self.sentence, self.device, self.seconds, versions(), now
        )


def versions() -> dict[str, str]:
    """Of Python, this package and those that compute, where they are installed."""
    found = {"python": platform.python_version(), "bsa_export": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def verify(
    folder: str | Path,
    *,
    source: str | Path | None = None,
    config: str | Path | None = None,
    device: str = "auto",
    backend: Sequence[str] = (),
    require: Sequence[str] = (),
    text: str | Path | None = None,
    on_check: Callable[[Check], None] | None = None,
    progress: Callable[[str], Progress | None] | None = None,
) -> Verification:
    """Proves that a converted folder is right: the command bsa-verify. Leaves verification.json in it.

    Args:
        folder: what bsa-convert wrote or bsa-pull fetched.
        source: what it was converted from: a path, or a repository of the Hub (`org/name[@revision]`).
        config: the source's config.json, if it is not stored next to its weights.
        device: where to compute: `auto`, `cpu` or `cuda`.
        backend: compares these backends only, of BACKENDS; all unless given.
        require: backends whose check fails where they cannot run here.
        text: a file whose masked tokens are predicted: plain text, or `.jsonl` with a `text` in each line.
        on_check: called with each check when it is done.
        progress: called with the name of what begins; returns what is called with (done, in all), or None.

    Returns:
        What was found; `verdict` sums it up, `raise_if_failed()` raises.

    Raises:
        BsaError: the source or the text cannot be read; nothing is recorded then.
    """
    found = None
    if source is not None:
        found = source if isinstance(source, Path) else find_source(source, progress=progress is not None).path
    wanted = Wanted(
        Path(folder),
        found,
        None if config is None else Path(config),
        find_device(device),
        tuple(dict.fromkeys([*backend, *require])) if backend else BACKENDS,
        require,
        None if text is None else Path(text),
        None if source is None or isinstance(source, Path) or os.path.lexists(source) else source,
    )
    return run_checks(wanted, on_check, progress)


def find_device(choice: str) -> str:
    """`cpu` or `cuda` for a choice of `auto`, `cpu` or `cuda`. Raises BsaError where torch finds no GPU for `cuda`."""
    if choice not in ("auto", "cpu", "cuda"):
        raise BsaError("expected auto, cpu or cuda", found=repr(choice), where="device")
    if choice == "cpu":
        return choice
    try:
        import torch
    except ImportError:
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
    """Runs all checks on a folder and leaves verification.json in it, also when it is interrupted or cannot go on.

    Until it is done, the record says `incomplete`: what an earlier run found does not outlive the start of this one. Where it cannot be
    written, the result says so in `unrecorded`.

    Args:
        wanted: what to verify, and how.
        on_check: called with each check when it is done.
        progress: called with what begins; gives what is called with (done, in all), or None.

    Returns:
        what was found; `verdict` and `exit_code` sum it up.

    Raises:
        BsaError: the source cannot be opened; nothing is recorded then.
    """
    started = time.perf_counter()
    run = Verification()
    if wanted.source is not None:
        open_source(wanted.source, wanted.config)
    write_verification(wanted.folder, run.record())
    show = progress or (lambda _: None)
    try:
        run.files = digests(wanted.folder)
        for check in _checks(wanted, run, show):
            if check.kind is Kind.OUTPUTS and check.part in wanted.require and check.status is Status.SKIPPED:
                check = replace(check, status=Status.FAILED, reason=f"it is required, and was skipped: {check.reason}")
            run.seconds, before = time.perf_counter() - started, run.seconds
            run.checks.append(check := replace(check, seconds=run.seconds - before))
            if on_check:
                on_check(check)
        run.finished = True
    finally:
        run.seconds = time.perf_counter() - started
        run.unrecorded = write_verification(wanted.folder, run.record())
    return run


def open_source(source: Path, config: Path | None) -> Checkpoint:
    """What a folder is compared with. Raises BsaError: it is no checkpoint, or its config.json cannot be read."""
    checkpoint = open_checkpoint(source)
    beside = config or checkpoint.folder / "config.json"
    if beside.is_file():
        read_config(beside)
    return checkpoint


def _checks(wanted: Wanted, run: Verification, show: Callable[[str], Progress | None]) -> Iterator[Check]:
    yield check_file(wanted.folder)
    yield check_layout(wanted.folder)
    try:
        folder = open_folder(wanted.folder)
    except BsaError:
        yield from (skipped(kind, "the folder cannot be opened", part) for kind, part in _later(wanted))
        return
    checkpoint = None
    if wanted.source is None:
        yield skipped(Kind.WEIGHTS, "no --source to compare with: " + _covered(folder))
    else:
        weights = check_weights(folder, wanted.source, wanted.config, show("weights"), wanted.source_name)
        yield weights
        checkpoint = open_checkpoint(wanted.source) if weights.passed else None
    if reason := _cannot_compute(folder, run.checks):
        yield from (skipped(kind, reason, part) for kind, part in _later(wanted)[1:])
        return
    yield from _computed(wanted, run, folder, checkpoint, show)


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


def _covered(folder: ConvertedFolder) -> str:
    """What stands in for a comparison with the source."""
    recorded = folder.record.files if folder.record else {}
    weights = [recorded.get(file.name) for file in folder.checkpoint.files]
    if all(entry and (entry.sha256 or entry.checksum) for entry in weights):
        return "the file check compares the digests of conversion.json in its place"
    return "and conversion.json has no digest of the weights"


def _cannot_compute(folder: ConvertedFolder, checks: Iterable[Check]) -> str | None:
    """Why nothing can be computed with the folder, or None."""
    if any(check.failed and check.kind is Kind.LAYOUT for check in checks):
        return "the layout check failed"
    misfits = compare(folder.tensors, folder.encoder.sparse_spec())
    if misfits.missing or misfits.mismatched:
        return "the file check failed"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return None


def _computed(
    wanted: Wanted, run: Verification, folder: ConvertedFolder, checkpoint: Checkpoint | None, show: Callable
) -> Iterator[Check]:
    """The checks that need torch. What dies in one of them is its failure, and the others go on."""
    interpreted = (
        tuple(name for name in wanted.backends if name in interpreter.BACKENDS) if wanted.device == "cpu" else ()
    )
    process = interpreter.start(wanted.folder, interpreted) if interpreted else None
    try:
        run.device = device_name(wanted.device)
        yield from _guarded(Kind.INTERCHANGE, lambda: _interchange(folder))
        own = tuple(name for name in wanted.backends if name not in interpreted)
        yield from _guarded(Kind.OUTPUTS, lambda: _outputs(folder, wanted.device, own, show("outputs")))
        runs = []
        yield from _guarded(Kind.WHOLE_MODEL, lambda: _whole_model(folder, wanted.device, checkpoint, runs))
        yield from _guarded(Kind.DRIFT, lambda: [_drift(runs, wanted.text, show("drift"))])
        controls = [*_guarded(Kind.CONTROLS, lambda: _controls(folder, wanted.device, own))]
        if process is not None:
            found = interpreter.finish(process, interpreted)
            yield from (check for check in found if check.kind is not Kind.CONTROLS)
            controls += [check for check in found if check.kind is Kind.CONTROLS]
        yield from controls
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


def _guarded(kind: Kind, checks: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    try:
        yield from checks()
    except (
        Exception
    ) as error:  # a kernel that does not compile, a full GPU, another release of a package: the verdict is failed
        words = " ".join(str(error).split())[:300]
        details = [{"traceback": traceback.format_exc()}]
        yield result(kind, [f"it died: {type(error).__name__}: {words}"], {}, details)


def _interchange(folder: ConvertedFolder) -> Iterable[Check]:
    from bsa_export.verify.interchange import check_interchange

    return check_interchange(folder)


def _outputs(
    folder: ConvertedFolder, device: str, names: tuple[str, ...], progress: Progress | None
) -> Iterable[Check]:
    from bsa_export.verify.outputs import check_outputs

    return check_outputs(folder, device, names, progress)


def _whole_model(folder: ConvertedFolder, device: str, checkpoint: Checkpoint | None, runs: list) -> Iterable[Check]:
    """The checks; what the drift is measured with goes into `runs`."""
    from bsa_export.verify.whole_model import check_whole_model

    checks, found = check_whole_model(folder, device, checkpoint)
    runs += [found] if found else []
    return checks


def _drift(runs: list, text: Path | None, progress: Progress | None) -> Check:
    if not runs:
        return skipped(Kind.DRIFT, "the whole model did not run")
    from bsa_export.verify.drift import measure_drift

    return measure_drift(runs[0], text, progress)


def _controls(folder: ConvertedFolder, device: str, names: tuple[str, ...]) -> Iterator[Check]:
    from bsa_export.ops.dispatch import backends
    from bsa_export.verify.controls import backend_control, file_controls
    from bsa_export.verify.outputs import DTYPES

    yield file_controls(folder)
    reasons = backends()
    for name in names:
        if reasons[name] is None:
            yield backend_control(folder, device, name, DTYPES[device][name][0])


def device_name(device: str) -> str:
    """What computes, for people."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
