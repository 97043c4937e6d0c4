"""What the user typed as a source -> a local path: a file, a folder, or a repository of the Hub fetched into its cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bsa_export.checkpoint.open import WEIGHT_ENDINGS
from bsa_export.errors import CheckpointError, HubError
from bsa_export.hub.download import fetch
from bsa_export.hub.names import parse_repo


@dataclass(frozen=True)
class Source:
    """Where a conversion starts: a path, and the repository that it was fetched from, if any."""

    path: Path
    repo: str | None = None
    revision: str | None = None


def find_source(text: str, progress: bool = False) -> Source:
    """A path that exists, else a repository of the Hub, `org/name` or `org/name@revision`, fetched into its cache.

    Raises:
        CheckpointError: it is neither.
        HubError: the Hub does not give it.
    """
    if os.path.lexists(text):
        return Source(Path(text))
    if text.endswith((*WEIGHT_ENDINGS, ".json")) or (named := parse_repo(text)) is None:
        raise CheckpointError(
            "expected a file, a folder, or a repository as org/name", found="nothing of that name", where=text
        )
    try:
        fetched = fetch(*named, progress=progress)
    except HubError as error:
        if not Path(text).parent.is_dir():
            raise
        raise HubError(
            f"nothing of that name is in the folder {Path(text).parent}, and as a repository: {error}"
        ) from None
    return Source(fetched.folder, named[0], fetched.commit)
