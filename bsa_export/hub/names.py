"""Names of repositories and branches, and which files of a repository a checkpoint needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch

from bsa_export.checkpoint.open import SHARD, WEIGHT_ENDINGS
from bsa_export.checkpoint.writer import INDEX_NAME
from bsa_export.converted.names import (
    CARD,
    LICENSES,
    MODEL_FILES,
    PICKLE_INDEX,
    SAFE_NAME,
    is_weights,
    matches,
)

MAIN = "main"
REPO = re.compile(r"(?P<repo>(?:[A-Za-z0-9][\w.-]*/)?[\w-][\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.ASCII)
# What git forbids in the name of a branch, a tag or another reference, in addition to what REPO excludes.
NO_REFERENCE = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@|^[-/.]|/\.|[/.]$|\.lock(/|$)")
# Bytes of a file that can hold a head of one or two layers, and no encoder of use.
LARGEST_HEAD = 64 << 20
NOT_OF_MODULES = (
    "*.py", "*.pyc", "*.so", "*.sh", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.tflite", "*.keras", "*.pb",
    "openvino_*", "*.pkl", "*.pickle", "*.joblib",
)  # fmt: skip
COMMIT = re.compile(r"[0-9a-f]{40}")


def parse_repo(text: str, bare: bool = False) -> tuple[str, str | None] | None:
    """Splits `org/name` or `org/name@revision`; None if `text` is not such a name, or is that of a file of weights.

    A revision is a branch, tag, other reference or commit. Names that git refuses, such as `../x`, are refused.

    Args:
        text: what the user typed.
        bare: whether a name without an organisation is accepted: the Hub's oldest models, such as `bert-base-uncased`.
    """
    match = REPO.fullmatch(text)
    if match is None or not (bare or "/" in match["repo"]):
        return None
    if match["revision"] and NO_REFERENCE.search(match["revision"]):
        return None
    if ".." in match["repo"] or match["repo"].endswith((*WEIGHT_ENDINGS, ".json", ".git")):
        return None
    return match["repo"], match["revision"]


def is_branch(text: str) -> bool:
    """Whether `text` can be the name of a branch: `org/name@text` names it, and it is no commit or `refs/...`."""
    named = parse_repo(f"org/name@{text}") == ("org/name", text)
    return named and not (COMMIT.fullmatch(text) or text.startswith("refs/"))


def of_checkpoint(listed: Mapping[str, int], module_paths: Iterable[str] = ()) -> list[str]:
    """The names that a checkpoint needs, dense or converted, of those in a repository.

    Of several formats of weights only the safest is taken. Small files of other weights at the top are included: they
    may be trained heads, such as BGE-M3's colbert_linear.pt.

    Args:
        listed: name -> bytes of each file in the repository.
        module_paths: the folders of the modules that modules.json lists.
    """
    names = [name for name in listed if SAFE_NAME.fullmatch(name)]
    weights = [name for name in names if is_weights(name)]
    others = [name for name in names if name not in weights and matches(name, (*MODEL_FILES, *LICENSES, CARD))]
    others += _of_modules(names, [path for path in module_paths if path])
    shards = [name for name in weights if fnmatch(name, "model-*-of-*.safetensors")]
    pickled_shards = [name for name in weights if fnmatch(name, "pytorch_model-*-of-*.bin")]
    choices = (
        [INDEX_NAME, *shards] if shards and INDEX_NAME in names else [],
        [name for name in weights if name == "model.safetensors"],
        [PICKLE_INDEX, *pickled_shards] if pickled_shards and PICKLE_INDEX in names else [],
        [name for name in weights if name == "pytorch_model.bin"],
        [name for name in weights if name.endswith(".safetensors")],
        weights,
    )
    chosen = next(filter(None, choices), [])
    heads = [name for name in weights if listed[name] <= LARGEST_HEAD and not _is_encoder(name)]
    return sorted({*others, *chosen, *heads})


def _of_modules(names: list[str], paths: list[str]) -> list[str]:
    """The files of modules at any depth: no code, no other formats, no pickle next to a safetensors file."""
    found = []
    for name in names:
        folder, _, last = name.rpartition("/")
        if not any(name.startswith(f"{path}/") for path in paths) or any(fnmatch(last, one) for one in NOT_OF_MODULES):
            continue
        if not (last.endswith(".bin") and f"{folder}/model.safetensors" in names):
            found.append(name)
    return found


def _is_encoder(name: str) -> bool:
    """Whether a file of weights has one of the names under which encoders are stored."""
    return (
        name in (INDEX_NAME, PICKLE_INDEX) or bool(SHARD.search(name)) or name.startswith(("model.", "pytorch_model."))
    )
