"""huggingface_hub as `push` and `pull` use it: its token, its bars, its errors, patience with the network."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from bsa_export.errors import BsaError, HubError
from bsa_export.hub.errors import endpoint, is_transient, sentence, status_of
from bsa_export.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

Result = TypeVar("Result")

# Seconds between attempts at what huggingface_hub does not repeat itself: for a question, and for work that took long.
SHORT_WAITS = (1, 2)
LONG_WAITS = (1, 2, 4, 8, 16)
PATIENCE = 60.0  # seconds of trouble in all, after which there is no new attempt


def api(*, writing: bool) -> HfApi:
    """The Hub's client. Raises HubError for a token that cannot be used, or is missing where something is to be written."""
    from huggingface_hub import HfApi, constants, get_token

    token = get_token()
    if writing and constants.HF_HUB_OFFLINE:
        raise HubError("nothing can be pushed while HF_HUB_OFFLINE is set", hint="unset it")
    if writing and token is None:
        raise HubError(
            "pushing needs a token of the Hub, and there is none",
            hint=f"run hf auth login, or set HF_TOKEN to one with write access from {endpoint()}/settings/tokens",
        )
    # The HTTP client would refuse it too, and show it.
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise HubError(
            "the token of the Hub holds a character that no token has",
            hint="look at HF_TOKEN, or run hf auth login again",
        )
    return HfApi(token=True if writing else None, library_name="bsa_export", library_version=__version__)


def is_offline() -> bool:
    """Whether $HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def find(hub: HfApi, repo_id: str, revision: str | None = None) -> ModelInfo | None:
    """What the Hub says of a repository at a revision; None if there is none, or none that this token may see."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def ask() -> ModelInfo | None:
        try:
            return hub.model_info(repo_id, revision=revision)
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None

    return patiently(ask)


def tree(hub: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    """The files of a commit: path -> size and hashes."""
    from huggingface_hub.hf_api import RepoFile

    entries = patiently(lambda: list(hub.list_repo_tree(repo_id, recursive=True, revision=commit)))
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def ask_for_room(repo_id: str, branch: str) -> None:
    """Asks for the right to upload, as hf_xet does, which keeps to itself what the Hub says when it refuses.

    Raises:
        HfHubHTTPError: the Hub refuses.
    """
    from urllib.parse import quote

    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = f"{constants.ENDPOINT}/api/models/{repo_id}/xet-write-token/{quote(branch, safe='')}"
    hf_raise_for_status(get_session().get(url, headers=build_hf_headers(token=True)))


def refused_metadata(card: str) -> str | None:
    """What the Hub has against the metadata of a card; None if nothing, or if it cannot be asked."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url, asked = f"{constants.ENDPOINT}/api/validate-yaml", {"content": card, "repoType": "model"}
    response = get_session().post(url, json=asked, headers=build_hf_headers(token=True))
    if response.status_code == 400:
        answer = response.json()
        found = [str(error.get("message")) for error in answer.get("errors") or []]
        return "; ".join(found) or str(answer.get("error"))
    if response.status_code not in (404, 405):  # a Hub of one's own may have no such check
        hf_raise_for_status(response)
    return None


def patiently(
    attempt: Callable[[], Result],
    went_through: Callable[[], Result | None] = lambda: None,
    waits: tuple[float, ...] = SHORT_WAITS,
) -> Result:
    """The result of `attempt`, which is repeated after passing trouble; or of `went_through`, if that finds the work done."""
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


@contextmanager
def sentences(repo_id: str, revision: str | None = None, *, pushing: bool = False) -> Iterator[None]:
    """Turns what huggingface_hub raises for a reason outside of this program into a HubError. The cause is left out: it could show a secret."""
    try:
        yield
    except BsaError:
        raise
    except Exception as error:
        told = sentence(error, repo_id, revision, pushing=pushing)
        if told is None:
            raise
        raise told from None


@contextmanager
def bars(show: bool) -> Iterator[None]:
    """Keeps huggingface_hub's progress bars away, unless they are wanted here or by $HF_HUB_DISABLE_PROGRESS_BARS."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not show and not are_progress_bars_disabled() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
