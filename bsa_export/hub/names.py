"""Names of repositories and branches, and which files of a repository a checkpoint needs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch

from bsa_export.checkpoint.open import WEIGHT_ENDINGS
from bsa_export.checkpoint.writer import INDEX_NAME
from bsa_export.converted.names import (
    CARD,
    MODEL_FILES,
    MODULE_FILE,
    MODULE_PICKLE,
    PICKLE_INDEX,
    SAFE_NAME,
    is_weights,
    matches,
)

MAIN = "main"
REPO = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.ASCII)
# What git forbids in the name of a branch, besides what no name of a revision holds here (see REPO).
NO_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@|^[-/.]|/\.|[/.]$|\.lock(/|$)")
COMMIT = re.compile(r"[0-9a-f]{40}")


def parse_repo(text: str) -> tuple[str, str | None] | None:
    """Splits `org/name` or `org/name@revision`; None if `text` does not look like a repository, or names a file of weights."""
    match = REPO.fullmatch(text)
    if match is None or ".." in match["repo"] or match["repo"].endswith((*WEIGHT_ENDINGS, ".json", ".git")):
        return None
    return match["repo"], match["revision"]


def is_branch(text: str) -> bool:
    """Whether `text` can be the name of a branch, which `org/name@text` names again: no commit, no reference such as refs/pr/1."""
    named = parse_repo(f"org/name@{text}") == ("org/name", text)
    return named and not (NO_BRANCH.search(text) or COMMIT.fullmatch(text) or text.startswith("refs/"))


def of_checkpoint(listed: Iterable[str]) -> list[str]:
    """The names that a checkpoint needs, dense or converted, of those in a repository. Of several formats of weights, the safest."""
    listed = [name for name in listed if SAFE_NAME.fullmatch(name)]
    weights = [name for name in listed if is_weights(name)]
    others = [name for name in listed if name not in weights and matches(name, (*MODEL_FILES, CARD))]
    for name in listed:
        safe_name = name.replace(MODULE_PICKLE, "model.safetensors")
        if MODULE_FILE.fullmatch(name) and safe_name != name and safe_name not in listed:
            others.append(name)
    shards = [name for name in weights if fnmatch(name, "model-*-of-*.safetensors")]
    pickled_shards = [name for name in weights if fnmatch(name, "pytorch_model-*-of-*.bin")]
    choices = (
        [INDEX_NAME, *shards] if shards and INDEX_NAME in listed else [],
        [name for name in weights if name == "model.safetensors"],
        [PICKLE_INDEX, *pickled_shards] if pickled_shards and PICKLE_INDEX in listed else [],
        [name for name in weights if name == "pytorch_model.bin"],
        [name for name in weights if name.endswith(".safetensors")],
        weights,
    )
    return sorted({*others, *next(filter(None, choices), [])})
