"""The names of files in a converted folder: which belong to the model, and which people add."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from bsa_export.checkpoint.open import NOT_WEIGHTS, WEIGHT_ENDINGS
from bsa_export.checkpoint.writer import INDEX_NAME

CONFIG = "config.json"
CONVERSION_RECORD = "conversion.json"
VERIFICATION_RECORD = "verification.json"
PULL_RECORD = "pulled.json"
CARD = "README.md"
PICKLE_INDEX = "pytorch_model.bin.index.json"

# Names that the tokenizers of the BERT families read (transformers 5.23), and those of sentence-transformers 1 to 6.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "bpe.codes", "dict.txt", "sentencepiece.bpe.model", "sentencepiece.model",
    "spiece.model", "spm.model", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
MODULES = "modules.json"
SENTENCE_FILES = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
# What a module of sentence-transformers, such as 1_Pooling or 2_Dense, saves in its folder.
MODULE_FILES = ("*.json", "*.txt", "model.safetensors")
MODULE_PICKLE = "pytorch_model.bin"
# Names by which a model is known where no conversion.json lists its files.
MODEL_FILES = (
    CONFIG, "model.safetensors", "model-*-of-*.safetensors", INDEX_NAME, CONVERSION_RECORD, VERIFICATION_RECORD,
    *TOKENIZER_FILES, *SENTENCE_FILES,
)  # fmt: skip
# What people add to it.
LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
OTHER_FILES = (CARD, *LICENSES, "*.png", "*.svg", "*.jpg")
# Code, and formats that run code when they are read. No conversion writes such a file.
RUNNABLE = (
    "*.py", "*.pyc", "*.so", "*.sh", "*.ipynb", "*.pkl", "*.pickle", "*.joblib", "*.h5", "*.keras", "*.npy", "*.npz",
    *(f"*{ending}" for ending in WEIGHT_ENDINGS if ending != ".safetensors"),
)  # fmt: skip
# At most 8 folders deep; no hidden file, no way out of the folder, nothing that reads as a pattern or a control.
_PART = r"[\w-][\w.,+=@()' -]{0,199}"
SAFE_NAME = re.compile(rf"{_PART}(/{_PART}){{0,8}}")
MODULE_FILE = re.compile(r"\d+_\w+/(?:.+/)?([^/]+)", re.ASCII)


def of_model(name: str) -> bool:
    """Whether a file looks like a part of a model, where no conversion.json says."""
    return matches(name, MODEL_FILES)


def of_people(name: str) -> bool:
    """Whether a file is one that people add to a model: its card, license or pictures."""
    return bool(SAFE_NAME.fullmatch(name)) and "/" not in name and _any(name, OTHER_FILES)


def of_conversion(name: str, recorded: Iterable[str]) -> bool:
    """Whether a file belongs to a conversion: one that its conversion.json lists (`recorded`), or a record itself."""
    return name in recorded or name in (CONFIG, CONVERSION_RECORD, VERIFICATION_RECORD)


def is_runnable(name: str) -> bool:
    """Whether a file is code, or runs code when its format's usual reader reads it."""
    return _any(name.rpartition("/")[2].lower(), RUNNABLE)


def is_weights(name: str) -> bool:
    """Whether a file at the top of a repository holds weights, or lists the files that do."""
    if "/" in name or _any(name, NOT_WEIGHTS):
        return False
    return name.endswith(WEIGHT_ENDINGS) or name in (INDEX_NAME, PICKLE_INDEX)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name at the top matches one of `patterns`, or is a file of a sentence-transformers module."""
    if not SAFE_NAME.fullmatch(name):
        return False
    if module := MODULE_FILE.fullmatch(name):
        name, patterns = module[1], MODULE_FILES
    return "/" not in name and _any(name, patterns)


def files_in(folder: Path) -> Iterator[str]:
    """The files of a folder at any depth, sorted: paths with `/`, links to folders not followed."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    yield from sorted(path.relative_to(folder).as_posix() for path in paths)


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
