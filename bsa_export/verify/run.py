"""All checks in order, the verdict, and verification.json. torch is imported only for the checks that compute."""

from __future__ import annotations

import math
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

from bsa_export import __version__
from bsa_export.checkpoint.source import open_checkpoint
from bsa_export.checkpoint.table import Checkpoint
from bsa_export.errors import BsaError
from bsa_export.families import read_config
from bsa_export.state_dict import compare, sparse_spec
from bsa_export.verify import interpreter
from bsa_export.verify.checks import FAILED, PASSED, SKIPPED, Check, result, skipped
from bsa_export.verify.file import check_file
from bsa_export.verify.folder import ConvertedFolder, open_folder
from bsa_export.verify.layout import check_layout
from bsa_export.verify.record import digests, write_record
from bsa_export.verify.weights import check_weights

BACKENDS = ("torch", "triton", "deepspeed")
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "numpy", "safetensors")
INCOMPLETE = "incomplete"
EXIT_CODES = {PASSED: 0, FAILED: 1, INCOMPLETE: 3}

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
    def verdict(self) -> str:
        """`failed` if anything failed, `passed` if outputs were compared and nothing failed, else `incomplete`."""
        if any(check.failed for check in self.checks):
            return FAILED
        compared = any(check.passed and check.numerical for check in self.checks)
        return PASSED if self.finished and compared else INCOMPLETE

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        counts = [
            f"{sum(check.status == status for check in self.checks)} {status}" for status in (PASSED, FAILED, SKIPPED)
        ]
        told = ", ".join(count for count in counts if not count.startswith("0 ")) or "nothing was checked"
        if any(check.failed and check.name.startswith("controls") for check in self.checks):
            told += "; the verifier is broken: do not trust what passed"
        if self.verdict == INCOMPLETE:
            told += "; " + ("no outputs could be compared" if self.finished else "it was interrupted")
        return f"{self.verdict}: {told}"

    def to_dict(self) -> dict:
        """All of it, as JSON holds it."""
        return finite(
            {
                "verdict": self.verdict,
                "sentence": self.sentence,
                "checks": [check.to_dict() for check in self.checks],
                "files": self.files,
                "device": self.device,
                "seconds": self.seconds,
                "versions": versions(),
            }
        )

    def record(self) -> dict:
        """The content of verification.json; docs/architecture.md describes it."""
        kept = ("name", "status", "reason", "figures")
        checks = [{name: value for name, value in check.to_dict().items() if name in kept} for check in self.checks]
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return self.to_dict() | {"checks": finite(checks), "finished": now}


def versions() -> dict[str, str]:
    """Of Python, this package and those that compute, where they are installed."""
    found = {"python": platform.python_version(), "bsa_export": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def finite(value: object) -> object:
    """A value with what JSON has no number for as text."""
    match value:
        case dict():
            return {str(name): finite(item) for name, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case _:
            return value


def verify(
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
    write_record(wanted.folder, run.record())
    show = progress or (lambda _: None)
    try:
        run.files = digests(wanted.folder)
        for check in _checks(wanted, run, show):
            if check.name.removeprefix("outputs: ") in wanted.require and check.status == SKIPPED:
                check = replace(check, status=FAILED, reason=f"it is required, and was skipped: {check.reason}")
            run.seconds, before = time.perf_counter() - started, run.seconds
            run.checks.append(check := replace(check, seconds=run.seconds - before))
            if on_check:
                on_check(check)
        run.finished = True
    finally:
        run.seconds = time.perf_counter() - started
        run.unrecorded = write_record(wanted.folder, run.record())
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
        yield from (skipped(name, "the folder cannot be opened") for name in _later(wanted))
        return
    checkpoint = None
    if wanted.source is None:
        yield skipped("weights", "no --source to compare with: " + _covered(folder))
    else:
        weights = check_weights(folder, wanted.source, wanted.config, show("weights"), wanted.source_name)
        yield weights
        checkpoint = open_checkpoint(wanted.source) if weights.passed else None
    if reason := _cannot_compute(folder, run.checks):
        yield from (skipped(name, reason) for name in _later(wanted)[1:])
        return
    yield from _computed(wanted, run, folder, checkpoint, show)


def _later(wanted: Wanted) -> list[str]:
    """The checks after the layout check, by name."""
    return [
        "weights",
        "interchange",
        *(f"outputs: {name}" for name in wanted.backends),
        "whole model",
        "drift",
        "controls",
    ]


def _covered(folder: ConvertedFolder) -> str:
    """What stands in for a comparison with the source."""
    recorded = folder.record["files"] if folder.record else {}
    weights = [recorded.get(file.name, {}) for file in folder.checkpoint.files]
    if all(file.get("sha256") or file.get("checksum") for file in weights):
        return "the file check compares the digests of conversion.json in its place"
    return "and conversion.json has no digest of the weights"


def _cannot_compute(folder: ConvertedFolder, checks: Iterable[Check]) -> str | None:
    """Why nothing can be computed with the folder, or None."""
    if any(check.failed and check.name == "layout" for check in checks):
        return "the layout check failed"
    misfits = compare(folder.tensors, sparse_spec(folder.family, folder.config, folder.prefix))
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
        yield from _guarded("interchange", lambda: _interchange(folder))
        own = tuple(name for name in wanted.backends if name not in interpreted)
        yield from _guarded("outputs", lambda: _outputs(folder, wanted.device, own, show("outputs")))
        runs = []
        yield from _guarded("whole model", lambda: _whole_model(folder, wanted.device, checkpoint, runs))
        yield from _guarded("drift", lambda: [_drift(runs, wanted.text, show("drift"))])
        controls = [*_guarded("controls", lambda: _controls(folder, wanted.device, own))]
        if process is not None:
            found = interpreter.finish(process, interpreted)
            yield from (check for check in found if not check.name.startswith("controls"))
            controls += [check for check in found if check.name.startswith("controls")]
        yield from controls
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


def _guarded(name: str, checks: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    try:
        yield from checks()
    except (
        Exception
    ) as error:  # a kernel that does not compile, a full GPU, another release of a package: the verdict is failed
        words = " ".join(str(error).split())[:300]
        details = [{"traceback": traceback.format_exc()}]
        yield result(name, [f"it died: {type(error).__name__}: {words}"], {}, details)


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
        return skipped("drift", "the whole model did not run")
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
