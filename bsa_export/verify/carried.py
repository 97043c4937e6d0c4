"""The files next to the weights: what the source's folder implies about them, by rules of this module. No torch.

The rules are stated here again, so that they judge the conversion: nothing is imported from `conversion`.

1. Tokenizer and sentence-transformers files of the source are in the folder under the same names.
2. So is every file of the folders that modules.json names, at any depth. Hidden files, code, training state and other
   formats of weights are not expected.
3. A file has the source's bytes. Weights have the source's tensors; pickled ones are stored as safetensors. JSON has
   the source's values; where the model reads more tokens than the source, the lengths in it are the new length. An
   encoder that has a folder of its own moves to the top: modules.json has that path, and a class that exists today.
4. A trained model may keep the tokenizer and license of its conversion, with the bytes that were recorded there.
5. No other tokenizer, module, weights or code is in the folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import Checkpoint
from bsa_export.converted.folder import ConvertedFolder
from bsa_export.converted.records import LengthChange
from bsa_export.errors import BsaError
from bsa_export.files import MAX_JSON_BYTES, read_json, sha256
from bsa_export.verify.bits import first_difference

MODULES = "modules.json"
# Names that transformers' tokenizers of the BERT families read (`vocab_files_names` of their classes).
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "bpe.codes", "dict.txt", "sentencepiece.bpe.model", "sentencepiece.model",
    "spiece.model", "spm.model", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
SENTENCE = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
CODE = ("*.py", "*.pyc", "*.so", "*.sh", "*.ipynb")
NOT_EXPECTED = (
    ".*", *CODE, "__pycache__", "onnx", "openvino", "*.onnx", "*.onnx_data", "openvino_*", "*.h5", "*.msgpack", "*.ot",
    "*.gguf", "*.ggml", "*.tflite", "*.keras", "*.pb", "*.mlmodel", "optimizer*", "scheduler*", "rng_state*", "scaler*",
    "training_args*", "trainer_state.json", "sampler*.bin", "sampler*.pt", "events.out.tfevents*",
)  # fmt: skip
# Neither the model's nor the tokenizer's: those of the conversion, and what people add.
BESIDE = (
    "config.json", "conversion.json", "verification.json", "pulled.json", "*.safetensors.index.json", "README.md",
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "license*", "*.png", "*.svg", "*.jpg", ".*",
)  # fmt: skip
WITH_LENGTHS = ("tokenizer.json", "tokenizer_config.json", "sentence_*_config.json")
LENGTHS = ("model_max_length", "max_length", "max_len", "max_seq_length")


@dataclass(frozen=True)
class Expected:
    """A file that the source implies: its file there, and whether its tensors count instead of its bytes."""

    source: Path
    tensors: bool = False


def carried_faults(folder: ConvertedFolder, source: Path, checkpoint: Checkpoint) -> Iterator[str]:
    """What is not as the source's folder implies, a sentence each.

    Args:
        folder: the converted folder.
        source: what was converted, a folder or a file of weights.
        checkpoint: its weights.
    """
    assert folder.record is not None
    top = source if source.is_dir() and (source / MODULES).is_file() else checkpoint.folder
    expected = dict(expected_files(top, checkpoint.folder))
    encoder = PurePosixPath(os.path.relpath(checkpoint.folder.resolve(), top.resolve()))
    length = folder.record.max_length if folder.record.max_length != folder.record.source_length else None
    for name, file in expected.items():
        path = folder.path / name
        if not path.is_file():
            yield f"{name}: lost: the source has {file.source.name}"
            continue
        if file.tensors:
            if not _same_tensors(file.source, path):
                yield f"{name}: its tensors are not those of the source"
            continue
        fault = _difference(name, file.source, path, length, encoder)
        if fault := fault or _lengths_fault(name, file.source, path, folder.record.lengths):
            yield f"{name}: {fault}"
    yield from faults_of_kept_files(folder)
    for name in sorted({change.file for change in folder.record.lengths or ()} - expected.keys()):
        yield f"{name}: conversion.json lists a length in it, and nothing in the source implies this file"
    kept = folder.record.trained_from.files if folder.record.trained_from else []
    weights = {file.name for file in folder.checkpoint.files}
    for name in unexpected_files(folder, {*expected, *weights, *kept}):
        if not _is_head(folder.path / name, top, checkpoint.folder):
            yield f"{name}: nothing in the source implies this file"


def faults_of_kept_files(folder: ConvertedFolder) -> Iterator[str]:
    """What is wrong with the files of an earlier conversion that a trained model keeps."""
    training = folder.record.trained_from if folder.record else None
    if training is None:
        return
    for name in training.files:
        path, recorded = folder.path / name, training.record.files.get(name)
        if recorded is None or not path.is_file():
            yield f"{name}: lost: conversion.json lists it as a file of the conversion before the training"
        elif path.stat().st_size != recorded.bytes or sha256(path) != recorded.sha256:
            yield f"{name}: it is not the file of the conversion before the training"


def expected_files(top: Path, encoder: Path) -> Iterator[tuple[str, Expected]]:
    """The files that a source implies: name in the converted folder -> where it comes from.

    Args:
        top: the source's folder.
        encoder: the folder of its weights, inside `top`.
    """
    for entry in sorted(encoder.iterdir()):
        if entry.is_file() and _matches(entry.name, (*TOKENIZER, "sentence_*_config.json")):
            yield entry.name, Expected(entry)
    for name in (MODULES, "config_sentence_transformers.json"):
        if (top / name).is_file():
            yield name, Expected(top / name)
    if (top / MODULES).is_file():
        for path in module_paths(top / MODULES):
            if path.parts and os.path.isdir(top / path) and (top / path).resolve() != encoder.resolve():
                yield from _module_files(top, path)


def module_paths(modules: Path) -> list[PurePosixPath]:
    """The folders that a modules.json names. Raises BsaError where it is not a list of modules inside its folder."""
    entries = read_json(modules)
    if not isinstance(entries, list):
        raise BsaError("expected a list of modules", where=modules)
    paths = []
    for entry in entries:
        path = PurePosixPath(entry["path"]) if isinstance(entry, dict) and isinstance(entry.get("path"), str) else None
        if path is None or path.is_absolute() or ".." in path.parts:
            raise BsaError("expected modules with a path inside the folder", found=repr(entry), where=modules)
        paths.append(path)
    return paths


def _module_files(top: Path, folder: PurePosixPath) -> Iterator[tuple[str, Expected]]:
    names = sorted(entry.name for entry in (top / folder).iterdir())
    safe = "model.safetensors" in names or "model.safetensors.index.json" in names
    for name in names:
        path = top / folder / name
        if _matches(name, NOT_EXPECTED):
            continue
        if path.is_dir():
            yield from _module_files(top, folder / name)
        elif name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json")):
            if not safe and name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
                yield str(folder / "model.safetensors"), Expected(path, tensors=True)
        else:
            yield str(folder / name), Expected(path, tensors=name.endswith(".safetensors"))


def unexpected_files(folder: ConvertedFolder, expected: set[str]) -> list[str]:
    """The files of a converted folder that are part of a model or tokenizer, or that conversion.json lists, and are not
    among those that are expected."""
    modules: list[PurePosixPath] = []
    if (folder.path / MODULES).is_file():
        modules = [path for path in module_paths(folder.path / MODULES) if path.parts]
    recorded = folder.record.files if folder.record else {}
    found = []
    for path in sorted(folder.path.rglob("*")):
        name = path.relative_to(folder.path).as_posix()
        if not path.is_file() or name in expected or ("/" not in name and _matches(name, BESIDE)):
            continue
        parents = PurePosixPath(name).parents
        model_file = _matches(path.name, (*TOKENIZER, *SENTENCE, *CODE)) or path.name.endswith(WEIGHTS)
        if name in recorded or model_file or any(module in parents for module in modules):
            found.append(name)
    return found


def _is_head(path: Path, *folders: Path) -> bool:
    """Whether a file of tensors at the top is a file of tensors next to the source's weights, under the same stem."""
    if path.suffix != ".safetensors":
        return False
    candidates = [folder / f"{path.stem}{ending}" for folder in folders for ending in WEIGHTS]
    return any(file.is_file() and _same_tensors(file, path) for file in candidates)


def _same_tensors(source: Path, found: Path) -> bool:
    theirs, mine = open_checkpoint(source).tensors, open_checkpoint(found).tensors
    return theirs.keys() == mine.keys() and all(
        (row.dtype, row.shape) == (mine[name].dtype, mine[name].shape) and first_difference(row, mine[name]) is None
        for name, row in theirs.items()
    )


def _difference(name: str, source: Path, found: Path, length: int | None, encoder: PurePosixPath) -> str | None:
    """How a file is not the source's, None where it is. `length` is the new one, None where lengths stay."""
    if name.endswith(".json"):
        try:
            theirs, mine = read_json(source, MAX_JSON_BYTES), read_json(found, MAX_JSON_BYTES)
        except BsaError as error:
            return str(error)
        if name == MODULES and encoder.parts and isinstance(theirs, list):
            theirs = [_at_the_top(entry) if PurePosixPath(entry["path"]) == encoder else entry for entry in theirs]
        return _json_difference(name, theirs, mine, length)
    return None if _same_bytes(source, found) else "it is not the source's"


def _at_the_top(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of an encoder that moved to the top. sentence-transformers 0.x had a class a family (models.BERT)."""
    package, _, name = str(entry.get("type")).rpartition(".")
    families = ("BERT", "RoBERTa", "DistilBERT", "CamemBERT", "XLMRoBERTa", "ALBERT", "XLNet")
    old = package == "sentence_transformers.models" and name in families
    return {**entry, "path": ""} | ({"type": f"{package}.Transformer"} if old else {})


def _same_bytes(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as first, open(other, "rb") as second:
        while piece := first.read(1 << 20):
            if piece != second.read(len(piece)):
                return False
    return True


def _json_difference(name: str, theirs: Any, mine: Any, length: int | None) -> str | None:
    rules = {} if length is None else _length_rules(name, theirs, length)
    mine, theirs = _flat(mine), _flat(theirs)
    for key in [*theirs, *(key for key in mine if key not in theirs)]:
        before, after = theirs.get(key, "none"), mine.get(key, "none")
        allowed = rules.get(key, (before,))
        if after not in allowed:
            where = ".".join(map(str, key))
            return f"{where or 'its content'}: expected {_shown(allowed[-1])}, found {_shown(after)}"
    return None


def _lengths_fault(name: str, source: Path, found: Path, recorded: list[LengthChange] | None) -> str | None:
    """How the lengths that conversion.json lists for a file are not those that differ from the source's.

    The way back depends on them: with every `before` set again, the file has the source's values.
    """
    if recorded is None or not _matches(name, WITH_LENGTHS):
        return None
    theirs, mine = read_json(source, MAX_JSON_BYTES), read_json(found, MAX_JSON_BYTES)
    for change in (change for change in recorded if change.file == name):
        place = mine
        for key in change.key[:-1]:
            place = place.get(key) if isinstance(place, dict) else None
        last = change.key[-1] if change.key else None
        if not isinstance(place, dict) or last not in place or _flat(place[last]) != _flat(json.loads(change.after)):
            return f"conversion.json lists {'.'.join(change.key)} {change.after}, and it is another value"
        if change.before is None:
            del place[last]
        else:
            place[last] = json.loads(change.before)
    same = _flat(mine) == _flat(theirs)
    return None if same else "the lengths before the conversion, as conversion.json lists them, are not the source's"


Key = tuple[str | int, ...]


def _length_rules(name: str, content: Any, length: int) -> dict[Key, tuple[str, ...]]:
    """The place of each length -> the JSON texts that are right there."""
    if not isinstance(content, dict):
        return {}
    new = json.dumps(length)
    rules: dict[Key, tuple[str, ...]] = {}
    if name == "tokenizer.json":
        truncation, padding = content.get("truncation"), content.get("padding")
        if isinstance(truncation, dict) and _is_number(truncation.get("max_length")):
            rules["truncation", "max_length"] = (new,)
        if isinstance(padding, dict) and isinstance(padding.get("strategy"), dict):
            rules["padding", "strategy"] = (json.dumps("BatchLongest"),)
            rules |= {("padding", "strategy", *key): ("none",) for key in _flat(padding["strategy"])}
        return rules
    if name != "tokenizer_config.json" and not fnmatch(name, "sentence_*_config.json"):
        return {}
    nested = {(key,): value for key, value in content.items()}
    for key, value in content.items():
        if isinstance(value, dict):
            nested |= {(key, inner): item for inner, item in value.items()}
    for place, value in nested.items():
        if place[-1] in LENGTHS and (_is_number(value) or value is None):
            rules[place] = (new,) if value is not None else (json.dumps(None), new)
    if name == "tokenizer_config.json" and not any(key in content for key in LENGTHS):
        rules["model_max_length",] = ("none", new)
    return rules


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _flat(content: Any) -> dict[Key, str]:
    """The values of JSON by their place, each as JSON text: what compares 1 and true, or 1 and 1.0, as different."""
    found: dict[Key, str] = {}
    stack: list[tuple[Key, Any]] = [((), content)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict) and value:
            stack += [((*key, name), item) for name, item in value.items()]
        elif isinstance(value, list) and value:
            stack += [((*key, number), item) for number, item in enumerate(value)]
        else:
            found[key] = json.dumps(value)
    return found


def _shown(text: str) -> str:
    return text if len(text) < 80 else text[:77] + "..."


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
