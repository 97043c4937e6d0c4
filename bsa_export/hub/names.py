"""Names: of repositories, and of the files in them that belong to a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch

from bsa_export import model_card, sidecars
from bsa_export.checkpoint.folder import CONVERSION_RECORD
from bsa_export.checkpoint.source import NOT_WEIGHTS, WEIGHT_ENDINGS
from bsa_export.checkpoint.writer import INDEX_NAME

MAIN = "main"
VERIFICATION_RECORD = "verification.json"
REPO = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.ASCII)

# A converted model. What a repository holds of these, and the folder does not, is of an earlier model.
MODEL_FILES = (
    "config.json", "model.safetensors", "model-*-of-*.safetensors", INDEX_NAME, CONVERSION_RECORD, VERIFICATION_RECORD,
    *sidecars.TOKENIZER_FILES, *sidecars.SENTENCE_FILES,
)  # fmt: skip
# What people add to it.
OTHER_FILES = (model_card.FILE_NAME, "LICENSE*", "NOTICE*", "*.png", "*.svg", "*.jpg")
# No hidden file, no way out of the folder, nothing that reads as a pattern; at most one folder deep.
SAFE_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
# What git forbids in the name of a branch, besides what no name of a revision holds here (see REPO).
NO_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@|^[-/.]|/\.|[/.]$|\.lock(/|$)")
COMMIT = re.compile(r"[0-9a-f]{40}")
MODULE_FILE = re.compile(r"\d+_\w+/([^/]+)", re.ASCII)
PICKLE_INDEX = "pytorch_model.bin.index.json"


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


def of_model(name: str) -> bool:
    """Whether a file is a part of a converted model."""
    return _matches(name, MODEL_FILES)


def of_repository(name: str) -> bool:
    """Whether a file belongs into the repository of a converted model: a part of it, its card, license or pictures."""
    return _matches(name, (*MODEL_FILES, *OTHER_FILES))


def of_checkpoint(listed: Iterable[str]) -> list[str]:
    """The names that a checkpoint needs, dense or converted, of those in a repository. Of several formats of weights, the safest."""
    listed = [name for name in listed if SAFE_NAME.fullmatch(name)]
    weights = [name for name in listed if is_weights(name)]
    others = [name for name in listed if name not in weights and _matches(name, (*MODEL_FILES, model_card.FILE_NAME))]
    for name in listed:
        safe_name = name.replace(sidecars.MODULE_PICKLE, "model.safetensors")
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


def is_weights(name: str) -> bool:
    """Whether a file at the top of a repository holds weights, or lists the files that do."""
    if "/" in name or any(fnmatch(name, pattern) for pattern in NOT_WEIGHTS):
        return False
    return name.endswith(WEIGHT_ENDINGS) or name in (INDEX_NAME, PICKLE_INDEX)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    if not SAFE_NAME.fullmatch(name):
        return False
    if module := MODULE_FILE.fullmatch(name):
        name, patterns = module[1], sidecars.MODULE_FILES
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)
