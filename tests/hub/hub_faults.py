"""Faults on request: what happens to a request instead of its answer, or to the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Status:
    """Answers with an HTTP status, and the words that the Hub puts into its headers."""

    code: int
    message: str = "out of order"
    error_code: str | None = None


@dataclass(frozen=True)
class Cut:
    """Drops the connection, before the answer, or after so many bytes of it."""

    after: int = 0


@dataclass(frozen=True)
class LoseAnswer:
    """Does what was asked and drops the connection."""


@dataclass(frozen=True)
class Slow:
    """Waits before the answer."""

    seconds: float


@dataclass(frozen=True)
class Corrupt:
    """Turns one bit of the answer's body."""

    at: int = 0


@dataclass(frozen=True)
class Redirect:
    """Sends the client elsewhere."""

    to: str


@dataclass(frozen=True)
class First:
    """Lets something else happen at the Hub just before."""

    act: Callable[[], None]


class Gone(ConnectionError):
    """The connection is dropped here."""


@dataclass(frozen=True)
class Headers:
    """Adds headers to the answer."""

    more: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """Answers with these bytes instead, whatever was asked."""

    content: bytes
    kind: str = "application/json"
    code: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Endless:
    """Answers with a body that never ends: this piece again and again."""

    piece: bytes = b" " * (1 << 20)
    headers: dict[str, str] = field(default_factory=dict)
