"""What the user typed as a source becomes a local path: a file, a folder, or a repository of the Hub in its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from bsa_export.checkpoint.open import WEIGHT_ENDINGS
from bsa_export.errors import BsaError, CheckpointError, HubError
from bsa_export.hub.download import fetch
from bsa_export.hub.names import parse_repo

# Pages of the Hub: the repository, and what a page shows of it.
_URL = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/?#\s]+(?:/[^/?#\s]+)?)"
    r"(?:/(?:tree|blob|resolve|raw|commit)/(?P<revision>[^/?#\s]+)(?:/(?P<path>[^?#\s]+))?)?/?(?:[?#].*)?"
)
_MOST_NAMES = 10_000  # of a folder, among which a mistyped name is sought


@dataclass(frozen=True)
class Source:
    """Where a conversion starts: a path, and the repository that it was fetched from, if any."""

    path: Path
    repo: str | None = None
    revision: str | None = None

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Errors raised inside name the repository, not the place where its files are cached."""
        try:
            yield
        except BsaError as error:
            text = str(error)
            if self.repo is None or str(self.path) not in text:
                raise
            raise type(error)(
                text.replace(f"{self.path}/", f"{self.repo}/").replace(str(self.path), self.repo)
            ) from None


@dataclass(frozen=True)
class HubPath:
    """A place on the Hub: a repository, a revision, and a folder or a file of weights in it."""

    repo: str
    revision: str | None = None
    path: str = ""

    @property
    def is_file(self) -> bool:
        """Whether it is a file of weights or an index of shards."""
        return self.path.endswith((*WEIGHT_ENDINGS, ".json"))


def parse_hub_path(text: str) -> HubPath | None:
    """The place on the Hub that `text` names, None if it cannot be one.

    That is `name`, `org/name` or `org/name/folder`, each also with `@revision` at its end, or the address of a page.
    """
    if match := _URL.fullmatch(text):
        repo, revision, path = match["repo"], match["revision"], match["path"] or ""
    else:
        name, _, revision = text.partition("@")
        parts = name.split("/")
        repo, path = "/".join(parts[:2]), "/".join(parts[2:])
        if "@" in text and not revision:
            return None
    if parse_repo(f"{repo}@{revision}" if revision else repo, bare=True) is None:
        return None
    path = path.rstrip("/")
    folders = PurePosixPath(path).parts
    if path != "/".join(folders) or any(folder.startswith(".") for folder in folders):
        return None
    return HubPath(repo, revision or None, path)


def find_source(text: str, progress: bool = False) -> Source:
    """A path that exists, else a place on the Hub (`parse_hub_path`), fetched into its cache.

    Raises:
        CheckpointError: it is neither.
        HubError: the Hub does not have it, or refuses.
    """
    if not text.strip():
        raise CheckpointError("expected a file, a folder or a repository org/name", found="an empty name")
    if os.path.lexists(text):
        return Source(Path(text))
    place = parse_hub_path(text)
    near = None if _URL.fullmatch(text) else _near(text)
    looks_local = text.startswith(("/", "./", "../", "~"))
    if place is not None and not _URL.fullmatch(text):
        # A repository has one slash. A name without one, or a longer path, may be mistyped.
        looks_local |= ("/" not in text and near is not None) or (
            place.path != "" and Path(text).parts[0] in os.listdir()
        )
    if place is None or looks_local:
        raise CheckpointError(
            "no such file or folder, and not a repository name (org/name)"
            if place is None
            else "no such file or folder",
            where=text,
            hint=_did_you_mean(near),
        )
    try:
        fetched = fetch(place.repo, place.revision, path=place.path, progress=progress)
    except HubError as error:
        if _URL.fullmatch(text) or (near is None and not Path(text).parent.is_dir()):
            raise
        raise HubError(f"no such file or folder, and as a repository: {error}", hint=_did_you_mean(near)) from None
    folder = fetched.folder / PurePosixPath(place.path).name if place.is_file else fetched.folder
    return Source(folder, place.repo, fetched.commit)


def _near(text: str) -> str | None:
    """The path whose last part is most like that of a path that does not exist; None if no part of its folder is."""
    path = Path(text).expanduser()
    try:
        if path.is_absolute() and path.exists():
            return str(path)
        names = [entry.name for entry, _ in zip(os.scandir(path.parent), range(_MOST_NAMES), strict=False)]
    except (OSError, ValueError):
        return None
    match = get_close_matches(path.name, names, n=1, cutoff=0.7)
    return str(path.parent / match[0]) if match else None


def _did_you_mean(near: str | None) -> str | None:
    return None if near is None else f"did you mean {near}?"
