"""huggingface_hub as `push` and `pull` use it: its token, its bars, errors and limits, and patience."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from bsa_export.errors import BsaError, HubError
from bsa_export.files import parse_json
from bsa_export.hub import guard
from bsa_export.hub.errors import endpoint, is_transient, sentence, status_of
from bsa_export.hub.names import COMMIT
from bsa_export.text import printable
from bsa_export.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

Result = TypeVar("Result")

# Seconds between attempts at what huggingface_hub does not repeat itself: for a question, and for work that took long.
SHORT_WAITS = (1, 2)
LONG_WAITS = (1, 2, 4, 8, 16)
MOST_FILES = 1_000_000  # in a repository
PATIENCE = 60.0  # seconds of trouble in all, after which there is no new attempt


def api(*, writing: bool) -> HfApi:
    """The Hub's client. Raises HubError for a token that cannot be used, or that is missing for writing."""
    from huggingface_hub import HfApi, constants, get_token

    token = get_token()
    if writing and constants.HF_HUB_OFFLINE:
        raise HubError("nothing can be pushed while HF_HUB_OFFLINE is set", hint="unset it")
    if writing and token is None:
        raise HubError(
            "pushing needs a token of the Hub, and none is set",
            hint=f"run hf auth login, or set HF_TOKEN to one with write access from {endpoint()}/settings/tokens",
        )
    # The HTTP client would refuse it too, and show it.
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise HubError(
            "the token of the Hub holds a character that no token has",
            hint="check HF_TOKEN, or run hf auth login again",
        )
    return HfApi(token=True if writing else None, library_name="bsa_export", library_version=__version__)


def is_offline() -> bool:
    """Whether $HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def find(hub: HfApi, repo_id: str, revision: str | None = None) -> ModelInfo | None:
    """The Hub's facts about a repository at a revision; None if it does not exist, or this token may not see it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def ask() -> ModelInfo | None:
        try:
            info = hub.model_info(repo_id, revision=revision)
            commit_of(info)
            return info
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None

    return patiently(ask)


def commit_of(info: ModelInfo) -> str:
    """The commit that the Hub names. Raises HubError where it is not one: paths are made of it."""
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha) or not isinstance(info.id, str):
        raise HubError("expected a commit of 40 hex digits from the Hub", found=info.sha, hint="check HF_ENDPOINT")
    return info.sha


def tree(hub: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    """The files of a commit: path -> size and hashes.

    Raises:
        HubError: the Hub lists something else, or more than a million files.
    """
    from huggingface_hub.hf_api import RepoFile

    def ask() -> list[RepoFile]:
        entries = islice(hub.list_repo_tree(repo_id, recursive=True, revision=commit), MOST_FILES + 1)
        return [entry for entry in entries if isinstance(entry, RepoFile)]

    files = patiently(ask)
    if len(files) > MOST_FILES:
        raise HubError(f"expected at most {MOST_FILES:,} files", where=repo_id)
    for file in files:
        hashes = [file.blob_id, *([file.lfs.sha256, file.lfs.size] if file.lfs else [])]
        kinds = [str, str, int][: len(hashes)]
        if not isinstance(file.path, str) or not _is_size(file.size) or list(map(type, hashes)) != kinds:
            raise HubError(
                "expected a path, a size and a hash for each file from the Hub",
                found=f"{file.path!s:.100}: {file.size}",
                where=repo_id,
                hint="check HF_ENDPOINT",
            )
    return {file.path: file for file in files}


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 50


def ask_for_room(repo_id: str, branch: str) -> None:
    """Asks for the right to upload, as hf_xet does, whose errors do not contain what the Hub says when it refuses.

    Raises:
        HfHubHTTPError: the Hub refuses.
    """
    from urllib.parse import quote

    from huggingface_hub import constants
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    url = f"{constants.ENDPOINT}/api/models/{repo_id}/xet-write-token/{quote(branch, safe='')}"
    hf_raise_for_status(get_session().get(url, headers=build_hf_headers(token=True)))


def refused_metadata(card: str) -> str | None:
    """What the Hub has against the metadata of a card; None if nothing, or if it cannot be asked.

    `RepoCard.validate` of huggingface_hub before 1.0 asks huggingface.co whatever HF_ENDPOINT says.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    url, asked = f"{constants.ENDPOINT}/api/validate-yaml", {"content": card, "repoType": "model"}
    response = get_session().post(url, json=asked, headers=build_hf_headers(token=True))
    if response.status_code == 400:
        return _refusal(response.text)
    if response.status_code not in (404, 405):  # a Hub of one's own may have no such check
        hf_raise_for_status(response)
    return None


def _refusal(text: str) -> str:
    """The reasons in an answer of the Hub: `{"errors": [{"message": ...}]}` or `{"error": ...}`."""
    try:
        answer = parse_json(text)
    except ValueError:
        return printable(text, 200)
    if not isinstance(answer, dict):
        return printable(text, 200)
    errors = answer.get("errors")
    found = (
        [str(error.get("message")) for error in errors if isinstance(error, dict)] if isinstance(errors, list) else []
    )
    return printable("; ".join(found) or answer.get("error"), 500)


def patiently(
    attempt: Callable[[], Result],
    went_through: Callable[[], Result | None] = lambda: None,
    waits: tuple[float, ...] = SHORT_WAITS,
) -> Result:
    """Calls `attempt`, again after trouble that may pass.

    Args:
        attempt: what is to be done.
        went_through: looks whether an attempt that failed did its work after all, and returns its result then.
        waits: seconds before each further attempt.

    Returns:
        The result of either.
    """
    start = time.monotonic()
    for wait in (*waits, None):
        try:
            return attempt()
        except Exception as error:
            conflict = status_of(error) == 412
            if not conflict and not is_transient(error):
                raise
            trouble = error
        if done := went_through():
            return done
        if conflict or wait is None or time.monotonic() - start > PATIENCE:
            raise trouble
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def sentences(
    repo_id: str, revision: str | None = None, *, pushing: bool = False, sizes: Collection[int] = ()
) -> Iterator[None]:
    """Puts `guard.limits` in force, and turns what huggingface_hub raises for outside reasons into a HubError.

    The cause is left out: it could show a secret.

    Args:
        repo_id, revision, pushing: as in `errors.sentence`.
        sizes: bytes of each file that is downloaded, as they are listed.
    """
    try:
        with guard.limits(sizes):
            yield
    except BsaError:
        raise
    except Exception as error:
        known = sentence(error, repo_id, revision, pushing=pushing)
        if known is None:
            raise
        raise known from None


@contextmanager
def bars(show: bool) -> Iterator[None]:
    """Hides huggingface_hub's progress bars, unless `show` or $HF_HUB_DISABLE_PROGRESS_BARS asks for them."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not show and not are_progress_bars_disabled() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
