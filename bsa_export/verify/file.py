"""The file check: what lies in the folder is what its config.json and conversion.json say. Torch is not imported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bsa_export.checkpoint.checksum import file_checksum
from bsa_export.checkpoint.dtypes import PIECE_BYTES
from bsa_export.checkpoint.source import WEIGHT_ENDINGS
from bsa_export.checkpoint.writer import INDEX_NAME
from bsa_export.errors import BsaError, FamilyError
from bsa_export.families import FAMILIES, bert_config
from bsa_export.plan import DTYPES, TORCH_NAMES
from bsa_export.sparsity import config_class_path
from bsa_export.state_dict import compare, sparse_spec
from bsa_export.verify.checks import Check, result
from bsa_export.verify.folder import ConvertedFolder, open_folder, recorded_sparsity

NAME = "file"


def check_file(folder: Path) -> Check:
    """Checks the safetensors header, shards and index, config.json and conversion.json against each other, and every recorded
    digest: that of weights at the speed of the disk."""
    try:
        opened = open_folder(folder)
    except BsaError as error:
        return result(NAME, [str(error)])
    faults = [*_table_faults(opened), *_weight_file_faults(opened)]
    figures = {
        "tensors": len(opened.tensors),
        "bytes": sum(row.nbytes for row in opened.tensors.values()),
        "files": len(opened.checkpoint.files),
    }
    if opened.record is None:
        figures["digests"] = "none: there is no conversion.json"
    else:
        faults += [*_config_faults(opened), *_record_faults(opened)]
        digest_faults, compared = _digest_faults(opened)
        faults += digest_faults
        figures["digests"] = f"{compared} of {len(opened.record['files'])} files"
    return result(NAME, faults, figures)


def _table_faults(opened: ConvertedFolder) -> list[str]:
    """Names, shapes and dtypes that config.json implies, and the metadata that transformers asks for."""
    faults = []
    try:
        misfits = compare(opened.tensors, sparse_spec(opened.family, opened.config, opened.prefix))
    except FamilyError as error:
        return [str(error)]
    faults += [f"{name}: missing" for name in misfits.missing]
    faults += [
        f"{name}: expected {expected} from config.json, found {found}"
        for name, (expected, found) in misfits.mismatched.items()
    ]
    if opened.checkpoint.metadata.get("format") != "pt":
        faults.append("the safetensors metadata lack format: pt, without which transformers does not load them")
    return faults


def _weight_file_faults(opened: ConvertedFolder) -> list[str]:
    """Weights that lie there besides those that are read, and an index that counts other bytes."""
    faults = [f"{name}: {why}" for name, why in opened.checkpoint.skipped]
    read = {file.name for file in opened.checkpoint.files}
    there = [entry.name for entry in sorted(opened.path.iterdir()) if entry.name.endswith(WEIGHT_ENDINGS)]
    told = {fault.partition(":")[0] for fault in faults}
    faults += [f"{name}: a file of weights that nothing reads" for name in there if name not in read | told]
    index = opened.path / INDEX_NAME
    if len(read) > 1 and index.is_file():
        content = json.loads(index.read_bytes())
        stated = (content.get("metadata") or {}).get("total_size")
        total = sum(row.nbytes for row in opened.tensors.values())
        if stated != total:
            faults.append(f"{INDEX_NAME}: expected a total_size of {total}, found {stated}")
    return faults


def _config_faults(opened: ConvertedFolder) -> list[str]:
    """config.json against the source's, which conversion.json holds, and against what it says was done."""
    record = opened.record
    expected = bert_config(FAMILIES[record["family"]], record["source"]["config"])
    if (dtype := record["options"].get("dtype")) in DTYPES:
        expected["dtype" if "dtype" in expected else "torch_dtype"] = TORCH_NAMES[dtype]
    try:
        sparsity = recorded_sparsity(record, opened.heads)
    except BsaError as error:
        return [str(error)]
    expected["sparse_config_cls"] = config_class_path(sparsity)
    expected["sparse_attention"] = sparsity.to_parameters()
    if record["positions"] is not None:
        expected["max_position_embeddings"] = record["positions"]["rows"]
    names = [*expected, *(name for name in opened.config if name not in expected)]
    absent = object()
    faults = [
        f"config.json: {name}: expected {expected.get(name, 'none')!r} from conversion.json, found {opened.config.get(name, 'none')!r}"
        for name in names
        if expected.get(name, absent) != opened.config.get(name, absent)
    ]
    if record["max_length"] != opened.longest:
        faults.append(
            f"conversion.json: max_length: expected {opened.longest} from config.json, found {record['max_length']}"
        )
    return faults


def _record_faults(opened: ConvertedFolder) -> list[str]:
    """Names of conversion.json that should be in the weights, or should not."""
    record, tensors = opened.record, opened.tensors
    there = {**dict.fromkeys(record["renamed"].values(), "renamed"), **dict.fromkeys(record["changed"], "changed")}
    there |= dict.fromkeys(record["added"], "added") | dict.fromkeys(record["tied"].values(), "tied")
    absent = dict.fromkeys(record["dropped"], "dropped") | dict.fromkeys(record["tied"], "tied")
    absent |= dict.fromkeys([old for old in record["renamed"] if old not in there], "renamed")
    faults = [
        f"{name}: missing, though conversion.json has it as {how}" for name, how in there.items() if name not in tensors
    ]
    return faults + [
        f"{name}: it is there, though conversion.json has it as {how}"
        for name, how in absent.items()
        if name in tensors
    ]


def _digest_faults(opened: ConvertedFolder) -> tuple[list[str], int]:
    """Sizes and digests of the recorded files; how many had a digest to compare with."""
    faults, compared = [], 0
    for name, expected in opened.record["files"].items():
        path = opened.path / name
        kind, digest = next(((kind, expected[kind]) for kind in DIGESTS if expected.get(kind)), (None, None))
        compared += kind is not None
        if not path.is_file():
            faults.append(f"{name}: missing, though conversion.json records it")
        elif path.stat().st_size != expected["bytes"]:
            found = path.stat().st_size
            faults.append(f"{name}: expected {expected['bytes']} bytes from conversion.json, found {found}")
        elif kind and DIGESTS[kind](path) != digest:
            faults.append(f"{name}: its {kind} is not the one in conversion.json: it was changed since")
    if opened.record["files"]:
        unrecorded = {file.name for file in opened.checkpoint.files} - set(opened.record["files"])
        faults += [f"{name}: conversion.json does not record it" for name in sorted(unrecorded)]
    return faults, compared


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


# By name in conversion.json; the first that is there counts.
DIGESTS = {"checksum": file_checksum, "sha256": sha256}
