"""The names of the files that make a converted folder: which belong to the model, and which people add."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch

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
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "bpe.codes", "dict.txt", "sentencepiece.bpe.model", "sentencepiece.model", "spiece.model", "spm.model", "tokenizer.model",
)  # fmt: skip
SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json")
# What a module of sentence-transformers, such as 1_Pooling or 2_Dense, saves in its folder.
MODULE_FILES = ("*.json", "*.txt", "model.safetensors")
MODULE_PICKLE = "pytorch_model.bin"
# A converted model. What a repository holds of these, and the folder does not, belongs to an earlier model.
MODEL_FILES = (
    CONFIG, "model.safetensors", "model-*-of-*.safetensors", INDEX_NAME, CONVERSION_RECORD, VERIFICATION_RECORD,
    *TOKENIZER_FILES, *SENTENCE_FILES,
)  # fmt: skip
# What people add to it.
OTHER_FILES = (CARD, "LICENSE*", "NOTICE*", "*.png", "*.svg", "*.jpg")
# No hidden file, no way out of the folder, nothing that reads as a pattern; at most one folder deep.
SAFE_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
MODULE_FILE = re.compile(r"\d+_\w+/([^/]+)", re.ASCII)


def of_model(name: str) -> bool:
    """Whether a file is a part of a converted model."""
    return matches(name, MODEL_FILES)


def of_repository(name: str) -> bool:
    """Whether a file belongs into the repository of a converted model: a part of it, its card, license or pictures."""
    return matches(name, (*MODEL_FILES, *OTHER_FILES))


def is_weights(name: str) -> bool:
    """Whether a file at the top of a repository holds weights, or lists the files that do."""
    if "/" in name or any(fnmatch(name, pattern) for pattern in NOT_WEIGHTS):
        return False
    return name.endswith(WEIGHT_ENDINGS) or name in (INDEX_NAME, PICKLE_INDEX)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name at the top matches one of `patterns`, or is a file of a sentence-transformers module."""
    if not SAFE_NAME.fullmatch(name):
        return False
    if module := MODULE_FILE.fullmatch(name):
        name, patterns = module[1], MODULE_FILES
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)
