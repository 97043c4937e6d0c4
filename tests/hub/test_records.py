"""The JSON records of a converted folder: those of 0.1 stay readable, and content of any shape is one sentence."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest

from bsa_export.converted import card
from bsa_export.converted.checks import Kind, Status
from bsa_export.converted.integrity import check_file, check_layout, digests
from bsa_export.converted.records import (
    DropReason,
    Verdict,
    read_conversion,
    read_pull,
    read_verification,
    write_verification,
)
from bsa_export.errors import BsaError
from bsa_export.files import hashes_of
from bsa_export.hub.pushed_files import folder_files, planned_files, unverified_because

OLD = Path(__file__).parent / "records_of_0_1"
NO_RECORDS = [b"", b"[]", b"7", b"null", b"{", b'{"a": NaN}', b"\xff\xfe{}", b"[" * 100_000, b'{"a": 1, "a": 2}']
VALUES = [
    None,
    True,
    7,
    -1,
    0,
    1 << 80,
    0.5,
    "x",
    "a\nb\x1b",
    "",
    [],
    {},
    [None],
    {"x": None},
    [[]],
    "../x",
    "x" * 3000,
]


def test_records_of_0_1_are_read():
    conversion, verification = read_conversion(OLD), read_verification(OLD)
    positions = conversion.changed["bert.embeddings.position_embeddings.weight"]
    assert (positions.rows, positions.method, positions.dtype) == ((64, 256), "tile", ("F32", "F16"))
    assert conversion.changed["bert.embeddings.LayerNorm.bias"].rows is None
    assert verification.verdict is Verdict.PASSED
    assert {check.status for check in verification.checks} == {Status.PASSED, Status.INFO}
    kinds = [check.kind for check in verification.checks]
    assert kinds[:4] == [Kind.FILE, Kind.LAYOUT, Kind.WEIGHTS, Kind.INTERCHANGE]
    assert {"triton", "deepspeed"} <= {check.part for check in verification.checks if check.kind is Kind.OUTPUTS}


def test_reasons_and_notes_of_0_1_are_read(tmp_path):
    content = json.loads((OLD / "conversion.json").read_text())
    buffer = "a buffer that the model makes itself"
    content["dropped"] = {"a": buffer, "b": f"{buffer}, with other values"}
    content["notes"] = ["its layouts are not stored"]
    content["changed"] = {"c": "the stored layout, I64 to U8"}
    (tmp_path / "conversion.json").write_text(json.dumps(content))
    record = read_conversion(tmp_path)
    assert record.dropped == {"a": DropReason.BUFFER, "b": DropReason.CHANGED_BUFFER}
    assert [note.text for note in record.notes] == content["notes"]
    assert any(change.layout for change in record.changed.values())


def test_a_verification_is_written_as_it_is_read(tmp_path):
    shutil.copytree(OLD, tmp_path / "out")
    record = read_verification(tmp_path / "out")
    assert write_verification(tmp_path / "out", record) is None
    assert read_verification(tmp_path / "out") == record


@pytest.mark.parametrize("name", ["conversion.json", "verification.json", "pulled.json"])
@pytest.mark.parametrize("content", NO_RECORDS, ids=[repr(content[:12]) for content in NO_RECORDS])
def test_what_is_no_record_is_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    read = {"conversion.json": read_conversion, "verification.json": read_verification, "pulled.json": read_pull}[name]
    with pytest.raises(BsaError):
        read(tmp_path)


def mutations(content: dict, count: int, seed: int):
    """Copies of a record with one value replaced, removed or added somewhere."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(content)
        place = changed
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = rng.choice(keys)
            if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
                place = place[key]
                continue
            break
        act = rng.random()
        if act < 0.7:
            place[key] = rng.choice(VALUES)
        elif act < 0.85:
            del place[key]
        elif isinstance(place, dict):
            place[rng.choice(["x", "../x", "", "\n"])] = rng.choice(VALUES)
        yield changed


def use(folder: Path) -> None:
    """What verify, push and the card do with the records."""
    check_file(folder), check_layout(folder), digests(folder)
    card.complete(folder)
    names, _ = folder_files(folder)
    hashes = {name: hashes_of(folder / name) for name in names}
    planned_files(folder, "org/name", hashes, unverified_because(folder, hashes))


@pytest.mark.parametrize("name", ["conversion.json", "verification.json"])
def test_records_of_odd_shapes(finished, tmp_path, name):
    folder = shutil.copytree(finished, tmp_path / "model")
    content = json.loads((folder / name).read_text())
    refused = 0
    for number, changed in enumerate(mutations(content, 80, seed=1)):
        (folder / name).write_text(json.dumps(changed))
        try:
            use(folder)
        except BsaError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 3000
        except Exception as error:
            raise AssertionError(f"mutation {number}: {json.dumps(changed)[:2000]}") from error
    assert 20 < refused < 80
