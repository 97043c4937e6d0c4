"""What becomes of an exception inside a check: a skipped check with its reason, never a verdict about the model. No
torch."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator

from bsa_export.converted.checks import Check, Kind, Status
from bsa_export.errors import BsaError
from bsa_export.text import printable


def guarded(kind: Kind, part: str, checks: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The checks; an exception becomes a skipped check, with the traceback in its details."""
    try:
        yield from checks()
    except Exception as error:
        yield stopped(kind, part, error)


def stopped(kind: Kind, part: str, error: Exception, after: str = "") -> Check:
    """The check that an exception ended: skipped, with the traceback in its details.

    Args:
        error: what was raised; call this where it is handled.
        after: what had been done before, in words.
    """
    while error.__cause__ is not None and type(error).__name__ == "InterpreterError":
        error = error.__cause__  # type: ignore[assignment]
    words = " ".join(str(error).split())
    named = str(error) if isinstance(error, BsaError) else f"{type(error).__name__}: {words}".removesuffix(": ")
    reason = f"it cannot run here{after}: {printable(named, 300)}"
    return Check(kind, Status.SKIPPED, part, reason, details=[{"traceback": traceback.format_exc()}])
