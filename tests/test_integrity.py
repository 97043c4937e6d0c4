"""The file check: the safetensors library judges too, and files that the conversion did not write are named."""

import json
import shutil
from dataclasses import replace

import pytest
import safetensors
from support.tiny import dense_bert

from bsa_export.checkpoint.table import Tensor
from bsa_export.conversion.convert import convert_source
from bsa_export.conversion.options import Options
from bsa_export.converted import integrity
from bsa_export.converted.checks import Status
from bsa_export.converted.folder import open_folder
from bsa_export.hub.source import Source


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    place = tmp_path_factory.mktemp("integrity")
    convert_source(Source(dense_bert(place / "dense")), place / "out", Options(max_length=256, block=16))
    return place / "out"


@pytest.fixture
def folder(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "out")


def test_the_library_opens_each_weight_file(folder, monkeypatch):
    opened = []
    real = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda path, **options: opened.append(path) or real(path, **options))
    assert integrity.check_file(folder).status is Status.PASSED
    assert opened == [folder / "model.safetensors"]


def test_what_the_library_refuses_fails(folder, monkeypatch):
    def refuse(path, **_):
        raise safetensors.SafetensorError("header too strange")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    check = integrity.check_file(folder)
    assert check.status is Status.FAILED and "header too strange" in check.reason


@pytest.mark.parametrize("change", ["dtype", "shape", "name"])
def test_what_the_library_reads_differently_fails(folder, monkeypatch, change):
    def misread(path):
        opened = open_folder(path)
        tensors = dict(opened.tensors)
        row = tensors.pop("cls.predictions.bias")
        dtype, shape = ("I32" if change == "dtype" else row.dtype), ((1, 300) if change == "shape" else row.shape)
        tensors["x" if change == "name" else "cls.predictions.bias"] = Tensor(dtype, shape, row.data)
        return replace(opened, checkpoint=replace(opened.checkpoint, tensors=tensors))

    monkeypatch.setattr(integrity, "open_folder", misread)
    faults = integrity.check_file(folder).faults
    assert [fault for fault in faults if "safetensors library" in fault and "cls.predictions.bias" in fault]


def test_files_that_the_conversion_did_not_write_are_named(folder):
    assert integrity.NOT_RECORDED not in integrity.check_file(folder).figures
    for name in ("added_tokens.json", "merges.txt", "2_Dense/a/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    for name in ("LICENSE", "figure.png", ".hidden"):  # people's, or nobody's
        (folder / name).write_text("x")
    check = integrity.check_file(folder)
    assert check.status is Status.PASSED
    assert check.figures[integrity.NOT_RECORDED] == "2_Dense/a/config.json, added_tokens.json, merges.txt"
    assert not {"added_tokens.json", "merges.txt"} & integrity.digests(folder).keys()


def test_digests_are_those_of_the_recorded_files(folder):
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text("{}")
    record = open_folder(folder).record
    assert integrity.digests(folder).keys() == {*record.files, "conversion.json"}


def test_a_recorded_name_that_no_file_can_have_is_missing(folder):
    record = json.loads((folder / "conversion.json").read_text())
    record["files"]["a" * 300] = {"bytes": 1}
    (folder / "conversion.json").write_text(json.dumps(record))
    assert any("a" * 300 in fault and "missing" in fault for fault in integrity.check_file(folder).faults)
