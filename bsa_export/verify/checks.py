"""What a check says: passed, failed, skipped or only told, why, and its figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
TOLD = "told"  # figures that no rule judges


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked, such as `file` or `outputs: triton`.
        status: `passed`, `failed`, `skipped`, or `told` where there is nothing to pass.
        reason: why it failed or was skipped, one sentence; empty where it passed.
        figures: what was measured, short enough for a line; values that JSON holds.
        details: row by row what the figures sum up, for the report and `--json`.
        numerical: whether outputs of attention were computed and compared.
        seconds: since the check before it was done.
    """

    name: str
    status: str
    reason: str = ""
    figures: dict = field(default_factory=dict)
    details: list[dict] = field(default_factory=list)
    numerical: bool = False
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.status == PASSED

    @property
    def failed(self) -> bool:
        return self.status == FAILED

    @property
    def faults(self) -> list[str]:
        """Why it failed, a sentence each."""
        return [row["fault"] for row in self.details if "fault" in row] or ([self.reason] if self.failed else [])

    def to_dict(self) -> dict:
        """All of it, as JSON holds it."""
        return asdict(self)


def skipped(name: str, reason: str) -> Check:
    """A check that could not run, and why."""
    return Check(name, SKIPPED, reason)


def result(
    name: str,
    faults: Sequence[str],
    figures: Mapping = {},
    details: Sequence[Mapping] = (),
    numerical: bool = False,
) -> Check:
    """A check that ran: failed if there are faults, a sentence each, of which the reason tells the first and counts the others."""
    details = [*details, *({"fault": fault} for fault in faults)]
    if not faults:
        return Check(name, PASSED, "", dict(figures), details, numerical)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Check(name, FAILED, faults[0] + more, dict(figures), details, numerical)


def worst(ratios: Iterable[float]) -> float:
    """The largest of some errors; NaN if one is NaN, 0 if there are none."""
    ratios = [float(ratio) for ratio in ratios]
    return math.nan if any(map(math.isnan, ratios)) else max(ratios, default=0.0)
