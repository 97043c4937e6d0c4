"""Files next to the weights: the source's folder implies them, whatever the conversion says."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from bsa_export.converted.folder import open_folder
from bsa_export.verify.sentences import compare
from bsa_export.verify.weights import check_weights

MODULES = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Router"}, {"idx": 2, "path": "2_Dense"}]


@pytest.fixture(scope="module")
def made(converted, tmp_path_factory):
    """(source, converted folder): a sentence-transformers folder whose modules have folders and weights of their
    own."""
    from bsa_export.conversion.convert import convert_source
    from bsa_export.conversion.options import Options
    from bsa_export.hub.source import Source

    folder = tmp_path_factory.mktemp("carried")
    source = shutil.copytree(converted()[0], folder / "source")
    content = {
        "modules.json": MODULES,
        "config_sentence_transformers.json": {"prompts": {}},
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
        "tokenizer_config.json": {"model_max_length": 64, "do_lower_case": True},
        "1_Router/router_config.json": {"types": {}},
        "1_Router/query_0_Dense/config.json": {"in_features": 4, "max_length": 64},
        "2_Dense/config.json": {"in_features": 4},
    }
    for name, value in content.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(json.dumps(value, indent=1))
    (source / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    save_file({"linear.weight": np.ones((4, 4), "f4")}, source / "1_Router/query_0_Dense/model.safetensors")
    torch.save({"linear.weight": torch.ones(4, 4)}, source / "2_Dense/pytorch_model.bin")
    convert_source(Source(source), folder / "out", Options(max_length=256))
    return source, folder / "out"


@pytest.fixture
def copied(made, tmp_path):
    return made[0], shutil.copytree(made[1], tmp_path / "out")


def faults(source, folder):
    return check_weights(open_folder(folder), source).faults


def test_what_the_conversion_carries_is_what_the_source_implies(made):
    assert faults(*made) == []
    assert (made[1] / "2_Dense/model.safetensors").is_file()


@pytest.mark.parametrize(
    "name",
    ["vocab.txt", "tokenizer_config.json", "modules.json", "1_Router/query_0_Dense/config.json",
     "1_Router/query_0_Dense/model.safetensors", "2_Dense/model.safetensors"],
)  # fmt: skip
def test_a_lost_file_is_found_at_any_depth(name, copied):
    (copied[1] / name).unlink()
    assert [fault for fault in faults(*copied) if fault.startswith(f"{name}: lost")], name


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer_config.json", "do_lower_case", False),
        ("tokenizer_config.json", "do_lower_case", 1),
        ("tokenizer_config.json", "model_max_length", 64),
        ("tokenizer_config.json", "model_max_length", 512),
        ("sentence_bert_config.json", "max_seq_length", 64),
        ("sentence_bert_config.json", "added", None),
        ("1_Router/query_0_Dense/config.json", "max_length", 256),
    ],
)
def test_a_changed_value_is_found(name, key, value, copied):
    path = copied[1] / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    (fault,) = faults(*copied)
    assert fault.startswith(f"{name}: {key}: expected ")


def test_other_white_space_is_no_fault(copied):
    path = copied[1] / "2_Dense/config.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert faults(*copied) == []


def test_changed_bytes_and_tensors_are_found(copied):
    source, folder = copied
    (folder / "vocab.txt").write_text("[PAD]\n[unk]\n")
    save_file({"linear.weight": np.zeros((4, 4), "f4")}, folder / "2_Dense/model.safetensors")
    assert sorted(fault.partition(":")[0] for fault in faults(source, folder)) == [
        "2_Dense/model.safetensors", "vocab.txt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["added_tokens.json", "merges.txt", "tokenizer.model", "old/tokenizer.json", "1_Router/more.txt", "modeling.py"],
)
def test_a_file_that_nobody_expects_is_found(name, copied):
    path = copied[1] / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    (fault,) = faults(*copied)
    assert fault.startswith(f"{name}: ")


def test_what_people_add_is_no_fault(copied):
    for name in ("LICENSE", "README.md", "notes.md", ".gitattributes", "picture.png"):
        (copied[1] / name).write_text("x")
    assert faults(*copied) == []


def test_embeddings_are_compared():
    one = torch.eye(3, 8)
    assert compare(one, one + 1e-6, 1e-3).passed
    for wrong in (one + 1e-2, one * float("nan"), one[:, :4]):
        assert compare(one, wrong, 1e-3).failed


LENGTHS = {
    "another length before": (lambda lengths: lengths[0].update(before="63"), "are not the source's"),
    "another length after": (lambda lengths: lengths[0].update(after="63"), "and it is another value"),
    "no such place": (lambda lengths: lengths[0].update(key=["a", "b"]), "and it is another value"),
    "one is not listed": (lambda lengths: lengths.pop(), "are not the source's"),
    "a file from nowhere": (lambda lengths: lengths[0].update(file="tokenizer.json"), "implies this file"),
}


@pytest.mark.parametrize("lie", LENGTHS)
def test_lengths_that_the_way_back_would_restore_wrongly_fail(lie, made, tmp_path):
    edit, words = LENGTHS[lie]
    source, folder = made[0], shutil.copytree(made[1], tmp_path / "out")
    record = json.loads((folder / "conversion.json").read_text())
    assert len(record["lengths"]) == 2
    edit(record["lengths"])
    (folder / "conversion.json").write_text(json.dumps(record))
    found = check_weights(open_folder(folder), source)
    assert any(words in row["fault"] for row in found.details), found.details
