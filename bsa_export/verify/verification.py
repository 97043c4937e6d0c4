"""What one run of bsa-verify is asked for, and what it finds, as dataclasses."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from bsa_export.converted.checks import Check, Kind, Status
from bsa_export.converted.records import Verdict, VerificationRecord, to_json
from bsa_export.errors import BsaError
from bsa_export.version import __version__

BACKENDS = ("torch", "triton", "deepspeed")
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "sentence-transformers", "numpy", "safetensors")
EXIT_CODES = {Verdict.PASSED: 0, Verdict.FAILED: 1, Verdict.INCOMPLETE: 3}


@dataclass(frozen=True)
class Wanted:
    """What a user wants verified.

    Attributes:
        folder: the converted folder.
        source: what it was converted from, a path; None compares with recorded digests alone.
        source_name: what a person calls it, such as `org/name`; the path's last part by default.
        config: the source's config.json, if it is not stored next to the weights.
        device: `cpu` or `cuda`.
        backends: those that are compared, of BACKENDS.
        require: those that must not be skipped.
        text: a file whose masked tokens are predicted.
        deepspeed: a release of DeepSpeed, as a file or a folder; None uses $BSA_DEEPSPEED or the installed one.
    """

    folder: Path
    source: Path | None = None
    config: Path | None = None
    device: str = "cpu"
    backends: Sequence[str] = BACKENDS
    require: Sequence[str] = ()
    text: Path | None = None
    source_name: str | None = None
    deepspeed: Path | None = None


@dataclass
class Verification:
    """What a run found.

    Attributes:
        checks: those that have ended.
        files: name -> sha256 of the files that were verified.
        device: what computed, in words.
        seconds: how long it took.
        finished: whether all checks have ended.
        required: the backends that failed because they are required and were skipped.
        kept: the earlier record that verification.json keeps, because this run compared less of the same files.
        unrecorded: why verification.json could not be written.
    """

    checks: list[Check] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    device: str = ""
    seconds: float = 0.0
    finished: bool = False
    required: set[str] = field(default_factory=set)
    kept: VerificationRecord | None = None
    unrecorded: str | None = None

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
        words = ", ".join(count for count in counts if not count.startswith("0 ")) or "nothing was checked"
        if any(check.failed and check.kind is Kind.CONTROLS for check in self.checks):
            words += "; the verifier is broken: do not trust what passed"
        if self.verdict is Verdict.INCOMPLETE:
            words += "; " + ("no outputs could be compared" if self.finished else "it was interrupted")
        return f"{self.verdict}: {words}"

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

    def replaces(self, earlier: VerificationRecord) -> bool:
        """Whether this run says more about the same files than an earlier one that passed: it found a fault, or every
        check that passed then has passed again, with at least as many comparisons."""
        wrong = [check for check in self.checks if check.failed]
        if any(check.kind is not Kind.OUTPUTS or check.part not in self.required for check in wrong):
            return True
        compared = {(check.kind, check.part): _comparisons(check) for check in self.checks if check.passed}
        return self.verdict is Verdict.PASSED and all(
            compared.get((check.kind, check.part), 0) >= _comparisons(check) for check in earlier.checks if check.passed
        )

    def record(self) -> VerificationRecord:
        """What verification.json holds about this run."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return VerificationRecord(
            self.verdict, self.checks, self.files, self.sentence, self.device, self.seconds, versions(), now
        )


def _comparisons(check: Check) -> int:
    count = check.figures.get("comparisons")
    return count if isinstance(count, int) else 1


def versions() -> dict[str, str]:
    """The versions of Python, this package and those that compute, where they are installed."""
    found = {"python": platform.python_version(), "bsa_export": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
