"""The result of a check: its kind, status, reason and figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Status(str, Enum):
    """How a check ended. `INFO` is for figures that no rule judges."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    INFO = "info"

    __str__ = str.__str__


class Kind(str, Enum):
    """What a check is about."""

    FILE = "file"
    LAYOUT = "layout"
    WEIGHTS = "weights"
    INTERCHANGE = "interchange"
    OUTPUTS = "outputs"
    WHOLE_MODEL = "whole model"
    DRIFT = "drift"
    CONTROLS = "controls"

    __str__ = str.__str__


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        kind: what was checked.
        status: how it ended.
        part: which of several checks of this kind, such as the name of a backend; empty for the only one.
        reason: why it failed or was skipped, one sentence; empty where it passed.
        figures: what was measured, short enough for a line; values that JSON holds.
        details: row by row what the figures sum up, for the report and `--json`.
        numerical: whether outputs of attention were computed and compared.
        seconds: since the check before it ended.
    """

    kind: Kind
    status: Status
    part: str = ""
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    details: list[dict[str, Any]] = field(default_factory=list)
    numerical: bool = False
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The check's name for people, such as `file` or `outputs: triton`."""
        return f"{self.kind}: {self.part}" if self.part else str(self.kind)

    @property
    def passed(self) -> bool:
        return self.status is Status.PASSED

    @property
    def failed(self) -> bool:
        return self.status is Status.FAILED

    @property
    def faults(self) -> list[str]:
        """Why it failed, a sentence each."""
        return [row["fault"] for row in self.details if "fault" in row] or ([self.reason] if self.failed else [])


def skipped(kind: Kind, reason: str, part: str = "") -> Check:
    """A check that could not run, and why."""
    return Check(kind, Status.SKIPPED, part, reason)


def result(
    kind: Kind,
    faults: Sequence[str],
    figures: Mapping[str, Any] | None = None,
    details: Sequence[Mapping[str, Any]] = (),
    *,
    part: str = "",
    numerical: bool = False,
) -> Check:
    """A check that ran: failed if there are faults, a sentence each. The reason is the first one, with a count."""
    rows = [*map(dict, details), *({"fault": fault} for fault in faults)]
    if not faults:
        return Check(kind, Status.PASSED, part, "", dict(figures or {}), rows, numerical)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Check(kind, Status.FAILED, part, faults[0] + more, dict(figures or {}), rows, numerical)


def worst(ratios: Iterable[float]) -> float:
    """The largest of some errors; NaN if one is NaN, 0 if there are none."""
    ratios = [float(ratio) for ratio in ratios]
    return math.nan if any(map(math.isnan, ratios)) else max(ratios, default=0.0)
