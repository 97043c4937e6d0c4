"""A check in a line of words."""

from __future__ import annotations

from bsa_export.converted.checks import Check, Status
from bsa_export.text import printable, size

WIDTH = 30
MOST_FAULTS = 5


def line(check: Check) -> str:
    """Status, name and figures; the reason of what failed or was skipped below."""
    text = f"{check.status:<8} {check.name:<{WIDTH}} "
    if check.status is Status.SKIPPED:
        return text + printable(check.reason)
    lines = [(text + figures(check)).rstrip()]
    lines += [f"{'':<9}{printable(fault)}" for fault in check.faults[:MOST_FAULTS]]
    if len(check.faults) > MOST_FAULTS:
        lines.append(f"{'':<9}and {len(check.faults) - MOST_FAULTS} more (--json lists them)")
    return "\n".join(lines)


def figures(check: Check) -> str:
    """The figures of a check in words."""
    found = dict(check.figures)
    parts = []
    if "error" in found:
        parts.append(f"error {found.pop('error'):.3g} x plain PyTorch's, limit {found.pop('bound'):g}")
    for name, value in found.items():
        parts.append(_figure(name, value))
    return ", ".join(printable(part) for part in parts if part)


def _figure(name: str, value: object) -> str:
    match name, value:
        case "bytes", int():
            return size(value)
        case "lengths", list():
            return f"{_numbers(value)} tokens"
        case "length", int():
            return f"{value:,} tokens"
        case "block", int():
            return f"block {value}"
        case "blocks", int():
            return f"{value} x {value} blocks"
        case "files", 1:
            return ""
        case "density", float():
            return f"density {value:.1%}"
        case (("dtypes" | "against" | "device" | "dtype"), _):
            return ("against " if name == "against" else "") + (
                ", ".join(value) if isinstance(value, list) else str(value)
            )
        case "sampled queries", dict():
            return "plain PyTorch on " + ", ".join(f"{count:,} of {length} queries" for length, count in value.items())
        case "not computed", dict():
            return "not computed: " + "; ".join(f"{what} ({why})" for what, why in value.items())
        case _, dict():
            return f"{name} " + "; ".join(f"{key} {item}" for key, item in value.items())
        case _, list():
            return f"{name} {_numbers(value)}"
        case _, float():
            return f"{name} {value:.4g}"
        case _, int():
            return f"{value:,} {name}"
        case _:
            return f"{name} {value}"


def _numbers(values: list) -> str:
    texts = [f"{value:,}" if isinstance(value, int) else str(value) for value in values]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]
