"""No decision depends on an English sentence: none is compared, and rewording all of them changes nothing else."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from support.tiny import dense_bert

import bsa_export
from bsa_export.conversion.convert import convert_source
from bsa_export.conversion.options import Options
from bsa_export.conversion.to_dense import to_dense
from bsa_export.converted.card import PASSED_MARK, UNVERIFIED_TAG, complete
from bsa_export.converted.checks import Check, Kind, Status
from bsa_export.converted.folder import open_folder
from bsa_export.converted.integrity import check_file, check_layout, digests
from bsa_export.converted.records import Note, Verdict, VerificationRecord, write_verification
from bsa_export.errors import BsaError
from bsa_export.files import hashes_of
from bsa_export.hub.pushed_files import folder_files, planned_files, unverified_because
from bsa_export.hub.source import Source
from bsa_export.verify.weights import check_weights

PACKAGE = Path(bsa_export.__file__).parent
METHODS = {"startswith", "endswith", "removeprefix", "removesuffix", "partition", "split", "index", "find", "count"}
ALLOWED = {
    # Records from before 0.2 hold sentences.
    ("converted/records.py", "a buffer that the model makes itself"),
    ("converted/records.py", "with other values"),
    ("converted/records.py", "the stored layout"),
    # Names of figures, which are keys.
    ("converted/check_lines.py", "sampled queries"),
    ("converted/check_lines.py", "not computed"),
    # huggingface_hub raises a bare ValueError there.
    ("hub/errors.py", "LFS batch"),
}


def compared_sentences(tree: ast.AST):
    """String literals of more than one word that the code compares something with."""
    for node in ast.walk(tree):
        operands: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            operands = node.args
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        for operand in operands:
            for part in ast.walk(operand):
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value.strip():
                    yield part.value


def test_no_sentence_is_compared():
    found = {
        (path.relative_to(PACKAGE).as_posix(), text)
        for path in PACKAGE.rglob("*.py")
        for text in compared_sentences(ast.parse(path.read_text()))
    }
    assert found == ALLOWED


def test_the_scan_finds_comparisons():
    source = "if x == 'a b' or 'c d' in y or z.startswith(('e f',)): pass\nmatch w:\n    case 'g h': pass"
    assert sorted(compared_sentences(ast.parse(source))) == ["a b", "c d", "e f", "g h"]


class Reworded:
    """Every message, reason and note says nothing."""

    def __init__(self, monkeypatch):
        def message(self, *_, **__):
            Exception.__init__(self, "zz")

        check_init, note_init = Check.__init__, Note.__init__

        def check(self, *arguments, **options):
            check_init(self, *arguments, **options)
            object.__setattr__(self, "reason", self.reason and "zz")
            rows = [{key: "zz" if key == "fault" else value for key, value in row.items()} for row in self.details]
            object.__setattr__(self, "details", rows)

        def note(self, *arguments, **options):
            note_init(self, *arguments, **options)
            object.__setattr__(self, "text", "zz")

        monkeypatch.setattr(BsaError, "__init__", message)
        monkeypatch.setattr(Check, "__init__", check)
        monkeypatch.setattr(Note, "__init__", note)


def without_sentences(value):
    """JSON without what is for people."""
    if isinstance(value, dict):
        spoken = {"reason", "text", "sentence", "fault", "name", "seconds", "finished", "skipped"}
        return {key: without_sentences(item) for key, item in value.items() if key not in spoken}
    return [without_sentences(item) for item in value] if isinstance(value, list) else value


def damaged(folder: Path):
    """The folder, whole and with one fault each."""
    yield "whole", folder
    for name in ("config.json", "conversion.json", "model.safetensors", "vocab.txt"):
        for kind, act in (("gone", Path.unlink), ("cut", lambda path: path.write_bytes(path.read_bytes()[:-40]))):
            copy = shutil.copytree(folder, folder.with_name(f"{folder.name} {kind} {name}"))
            act(copy / name)
            yield f"{kind} {name}", copy


def decisions(place: Path, monkeypatch=None) -> dict:
    """What a conversion, its checks, a push, a card and the way back decide: statuses, errors, records."""
    place.mkdir()
    source = dense_bert(place / "dense")
    (source / "run.py").write_text("pass")  # left behind, with a note
    (source / "second.bin").write_bytes(b"no tensors")
    if monkeypatch:
        Reworded(monkeypatch)
    found = {}
    for mode in ("windowed", "bigbird"):
        folder = place / mode
        convert_source(Source(source), folder, Options(max_length=256, block=16, mode=mode))
        found[mode] = without_sentences(json.loads((folder / "conversion.json").read_text()))
        for name, one in damaged(folder):
            found[mode, name] = judged(one, source)
        to_dense(folder, place / f"{mode} dense")
        found[mode, "dense"] = digests(place / f"{mode} dense")
    for wrong in (Options(mode="x"), Options(max_length=7), Options(block=-1)):
        found[repr(wrong)] = outcome(convert_source, Source(source), place / "no", wrong)
    return found


def judged(folder: Path, source: Path) -> list:
    checks = [check_file(folder), check_layout(folder)]
    checks.append(outcome(lambda: check_weights(open_folder(folder), source)))
    statuses = [
        (check.kind, check.status, len(check.faults)) if isinstance(check, Check) else check for check in checks
    ]
    passed = all(isinstance(check, Check) and check.passed for check in checks)
    for verdict in (Verdict.PASSED if passed else Verdict.FAILED, Verdict.INCOMPLETE):
        record = VerificationRecord(verdict, [check for check in checks if isinstance(check, Check)], digests(folder))
        write_verification(folder, record)
        statuses.append(outcome(pushed, folder))
    return statuses


def pushed(folder: Path):
    """What a push would publish, whether as verified, and what the card says of it."""
    names, left_out = folder_files(folder)
    hashes = {name: hashes_of(folder / name) for name in names}
    reason = unverified_because(folder, hashes)
    files = planned_files(folder, "org/name", hashes, reason)
    text = complete(folder, "org/name", reason) or ""
    return [file.name for file in files], left_out, reason is None, UNVERIFIED_TAG in text, PASSED_MARK in text


def outcome(function, *arguments):
    """What a function returns, or the class of its error."""
    try:
        return function(*arguments)
    except BsaError as error:
        return type(error).__name__


def test_reworded_messages_change_no_decision(tmp_path):
    plain = decisions(tmp_path / "a")
    with pytest.MonkeyPatch.context() as patch:
        reworded = decisions(tmp_path / "b", patch)
        assert str(BsaError("a sentence")) == "zz" and Check(Kind.FILE, Status.FAILED, reason="x").reason == "zz"
    assert reworded.keys() == plain.keys()
    for step in plain:
        assert reworded[step] == plain[step], step
    verified = plain["windowed", "whole"]
    assert [status for _, status, _ in verified[:3]] == [Status.PASSED] * 3
    assert verified[3][2:] == (True, False, True) and verified[4][2:] == (False, True, False)
