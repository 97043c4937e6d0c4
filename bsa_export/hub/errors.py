"""What can go wrong on the way to the Hub, each in its own sentence."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from bsa_export.errors import BsaError, HubError
from bsa_export.files import plain_error

TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
# hf_xet reports an HTTP status only in its text, as "... status client error (403 Forbidden) ...".
STATUS_IN_TEXT = re.compile(r"\b(?:error|status)\b[^(]{0,40}\((4\d\d|5\d\d)\b")
ERRNO = re.compile(r"\[Errno -?\d+\] ([\w ]+)")
FULL = re.compile(r"storage|quota|exceed|payment|upgrade", re.IGNORECASE)


def endpoint() -> str:
    """Where the Hub is, for people: $HF_ENDPOINT, less a password in it, or huggingface.co."""
    from huggingface_hub import constants

    return _without_userinfo(constants.ENDPOINT)


def _without_userinfo(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://", text)


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an exception of huggingface_hub or hf_xet, if an answer came at all."""
    for cause in _causes(error):
        if (response := getattr(cause, "response", None)) is not None:
            return response.status_code
        if isinstance(cause, (OSError, RuntimeError)) and (match := STATUS_IN_TEXT.search(str(cause))):
            return int(match[1])
    return None


def is_transient(error: BaseException) -> bool:
    """Whether another attempt may succeed: a server in trouble, or a connection that broke."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = status_of(error)
    if status is not None:
        return status in TRANSIENT
    return not isinstance(error, OfflineModeIsEnabled) and any(_is_network(cause) for cause in _causes(error))


def sentence(error: BaseException, repo_id: str, revision: str | None, *, pushing: bool) -> BsaError | None:
    """The error to raise for what huggingface_hub or hf_xet raised; None if it is not about the Hub, network or disk.

    Args:
        error: huggingface_hub before 1.0 raises exceptions of requests, later those of httpx; hf_xet builtin ones.
        repo_id: what it was about.
        revision: branch, tag or commit that was asked for.
        pushing: whether something was to be written.
    """
    from huggingface_hub import constants, errors, get_token

    url = f"{endpoint()}/{repo_id}"
    again = "run the same command again to continue"
    causes = list(_causes(error))

    def is_a(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_a(errors.OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set, and this needs the Hub", where=repo_id, hint="unset it")
    if is_a(errors.GatedRepoError):
        return HubError(
            "it is gated: its owners decide who may read it", where=repo_id, hint=f"ask for access at {url}, logged in"
        )
    if is_a(errors.DisabledRepoError):
        return HubError("the Hub has disabled it", where=repo_id, hint=f"see {url}")
    if is_a(errors.RevisionNotFoundError):
        return HubError(f"it has no revision {revision}", where=repo_id, hint=f"see its revisions at {url}/tree/main")
    status, said = status_of(error), _said(causes)
    if is_a(errors.RepositoryNotFoundError):
        if get_token() is None:
            return HubError(
                "there is no such repository, or it is private and no token is set",
                where=repo_id,
                hint="check its name; for a private one run hf auth login, or set HF_TOKEN",
            )
        return HubError(
            "there is no such repository that this token may see",
            where=repo_id,
            hint="check its name; the owner of a private one has to give you access",
        )
    if status == 401:
        return HubError(
            "the Hub does not accept this token; it may have expired or been revoked",
            hint=f"make one at {endpoint()}/settings/tokens, then set HF_TOKEN or run hf auth login",
        )
    if status in (402, 413, 507) or (status in (400, 403) and FULL.search(said)) or _batch_refusal(causes):
        return HubError(
            f"the Hub has no storage left for it{_quoted(said)}",
            where=repo_id,
            hint=f"see what fills {repo_id.split('/')[0]}'s storage at {endpoint()}/settings/billing",
        )
    if status == 403 and pushing:
        return HubError(
            f"this token may not write there{_quoted(said)}",
            where=repo_id,
            hint=f"give it write access to the repository at {endpoint()}/settings/tokens, or use another",
        )
    if status == 403:
        return HubError(f"this token may not read it{_quoted(said)}", where=repo_id, hint=f"see {url}")
    if status == 412:
        return HubError(
            f"somebody else committed to {revision} in the meantime",
            where=repo_id,
            hint=f"look at {url}/commits/{revision}, then push again",
        )
    if status == 429:
        return HubError("the Hub asks for fewer requests", where=repo_id, hint=f"wait some minutes, then {again}")
    if status is not None and status >= 500:
        return HubError(f"the Hub has a problem (HTTP {status})", where=repo_id, hint=f"wait, then {again}")
    if status is not None:
        return HubError(f"the Hub refuses this (HTTP {status}){_quoted(said)}", where=repo_id, hint=f"see {url}")
    if any(_is_network(cause) for cause in causes):
        return HubError(
            f"{endpoint()} cannot be reached, or the connection broke ({_reason(causes)})",
            where=repo_id,
            hint=f"check the network, HF_ENDPOINT and the proxy, then {again}",
        )
    if is_a(errors.FileMetadataError) or any(_is_misunderstood(cause) for cause in causes):
        return HubError(
            f"{endpoint()} does not answer as a Hub does",
            where=repo_id,
            hint="check HF_ENDPOINT; a login page of the network or a proxy may be in between",
        )
    for cause in causes:
        if isinstance(cause, OSError) and (cause.filename or cause.errno in (errno.ENOSPC, errno.EDQUOT)):
            return plain_error(cause, Path(constants.HF_HUB_CACHE))
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and those that led to it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _is_network(error: BaseException) -> bool:
    """Whether a connection could not be made or broke. OSErrors of the disk are not meant."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    http = HfHubHTTPError.__mro__[1]  # HTTPError of requests, httpx or httpx2
    family = http.__mro__[1] if issubclass(http, OSError) else http  # RequestException of requests
    xet = isinstance(error, RuntimeError) and re.search(r"CAS|[Nn]etwork|[Rr]equest|[Rr]econstruct", str(error))
    return isinstance(error, (ConnectionError, TimeoutError, LocalEntryNotFoundError, family)) or bool(xet)


def _is_misunderstood(error: BaseException) -> bool:
    """Whether huggingface_hub stumbled over an answer: no JSON, a key that lacks, another type than it expects."""
    if not isinstance(error, (ValueError, LookupError, TypeError, AttributeError, RecursionError)):
        return False
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    package = frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] if frame else ""
    return package in ("huggingface_hub", "json", "httpx", "httpx2", "requests", "dateutil", "_strptime")


def _batch_refusal(causes: list[BaseException]) -> bool:
    """Whether the large-file endpoint had no room for single files; huggingface_hub raises a ValueError then."""
    return any(
        isinstance(cause, ValueError) and "LFS batch" in str(cause) and FULL.search(str(cause)) for cause in causes
    )


def _said(causes: list[BaseException]) -> str:
    """The server's own words."""
    return next((words for cause in causes if (words := getattr(cause, "server_message", None))), "")


def _quoted(said: str) -> str:
    """The server's words in brackets, in one line, without what could be a token."""
    from huggingface_hub import get_token

    if token := get_token():
        said = said.replace(token, "...")
    # The whole text first: half a token at the end of an excerpt would be no token to these.
    said = _without_userinfo(re.sub(r"hf_[\w.-]+", "...", said))
    words = re.sub(r"\s+", " ", said)[:300]
    return f" ({re.sub(r'(?<![.])[.]$', '', words)})" if words else ""


def _reason(causes: list[BaseException]) -> str:
    """The innermost reason in a few words: an address or a header could be in the rest of the text."""
    for cause in reversed(causes):
        if match := ERRNO.search(str(cause)):
            return match[1].strip()
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(causes[-1]).__name__).lower()
