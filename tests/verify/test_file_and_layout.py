"""The file and layout checks: right folders pass, and each fault is named."""

import json
import subprocess
import sys

import pytest
from safetensors.numpy import load_file, save_file

from bsa_export.verify import check_file, check_layout

LAYOUT = "bert.encoder.layer.{}.attention.self.sparse_self_attention.master_layout"


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def without_digests(folder):
    record = json.loads((folder / "conversion.json").read_text())
    for name, file in record["files"].items():
        file |= {"bytes": (folder / name).stat().st_size, "sha256": None, "checksum": None}
    (folder / "conversion.json").write_text(json.dumps(record))


def edit_weights(folder, edit, format="pt"):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": format})
    without_digests(folder)


CASES = {
    "windowed": {},
    "interpolated, rounded": {"positions": "interpolate", "dtype": "fp16"},
    "shards": {"shard": 60_000},
    "random blocks": {"mode": "bigbird", "seed": 5, "parameters": (("different_layout_per_head", True),)},
    "random blocks, each layer its own": {"mode": "bigbird", "seed": 7, "per_layer": True},
    "as long as the source": {"max_length": None, "mode": "fixed"},
    "roberta": {"family": "roberta"},
    "distilbert": {"family": "distilbert", "format": "bin"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_conversion_passes(case, converted):
    _, folder = converted(**CASES[case])
    for check in (check_file(folder), check_layout(folder)):
        assert check.passed, check.reason
    # The record itself, and the card with its picture, which the push completes, have no digest.
    covered = {path.name for path in folder.iterdir()} - {"conversion.json", "README.md", "layout.png"}
    assert check_file(folder).figures["digests"] == f"{len(covered)} of {len(covered)} files"
    assert check_layout(folder).figures["recomputed"].startswith("yes")


def test_neither_check_imports_torch(converted):
    _, folder = converted()
    program = (
        "import sys; from bsa_export.verify import *; folder = sys.argv[1]\n"
        "assert check_file(folder).passed and check_layout(folder).passed and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, folder], check=True)


def drop(name):
    return lambda tensors: tensors.pop(name)


def changed(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name])

    return edit


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
WRONG_WEIGHTS = {
    "a name is missing": (drop(QUERY), f"{QUERY}: missing"),
    "another shape": (changed(QUERY, lambda x: x[:32].copy()), "expected [64, 64] from config.json, found [32, 64]"),
    "another dtype": (changed(QUERY, lambda x: x.astype("i4")), "found I32"),
    "a layout is missing": (drop(LAYOUT.format(2)), f"{LAYOUT.format(2)}: missing"),
}


@pytest.mark.parametrize("fault", WRONG_WEIGHTS)
def test_wrong_weights_fail_without_digests(fault, damaged):
    edit, sentence = WRONG_WEIGHTS[fault]
    _, folder = damaged()
    edit_weights(folder, edit)
    check = check_file(folder)
    assert check.failed
    assert sentence in check.reason


def test_weights_that_transformers_would_not_load_fail(damaged):
    _, folder = damaged()
    edit_weights(folder, lambda tensors: None, format="tf")
    assert "format: pt" in check_file(folder).reason


def test_one_bit_of_a_weight_fails_by_its_digest(damaged):
    _, folder = damaged()
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    file.write_bytes(data)
    check = check_file(folder)
    assert check.failed
    assert check.reason.startswith("model.safetensors: its checksum is not the one in conversion.json")


def test_a_changed_tokenizer_or_config_fails_by_its_digest(damaged):
    _, folder = damaged()
    edit_json(folder / "config.json", layer_norm_eps=0.1)
    reasons = [row["fault"] for row in check_file(folder).details]
    assert any(reason.startswith("config.json: layer_norm_eps: expected 1e-12") for reason in reasons)
    assert any(reason.startswith("config.json: expected") and "bytes" in reason for reason in reasons)


@pytest.mark.parametrize("size", [-1, 1, 4096])
def test_a_file_of_another_length_fails(size, damaged):
    _, folder = damaged()
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size] if size < 0 else data + bytes(size))
    assert check_file(folder).failed
    without_digests(folder)
    assert check_file(folder).failed


def test_a_wrong_head_count_fails(damaged):
    _, folder = damaged()
    edit_json(folder / "config.json", num_attention_heads=8)
    without_digests(folder)
    assert check_file(folder).failed
    assert check_layout(folder).failed


def test_a_wrong_block_fails(damaged):
    _, folder = damaged()
    section = json.loads((folder / "config.json").read_text())["sparse_attention"]
    edit_json(folder / "config.json", sparse_attention=section | {"block": 32})
    without_digests(folder)
    assert check_file(folder).failed
    assert check_layout(folder).failed


def test_shards_must_be_those_of_the_index(damaged):
    _, folder = damaged(shard=60_000)
    without_digests(folder)
    assert check_file(folder).passed
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    edit_json(index, metadata={"total_size": 1})
    without_digests(folder)
    assert "total_size" in check_file(folder).reason
    (folder / content["weight_map"][QUERY]).unlink()
    assert check_file(folder).failed


def test_weights_that_nothing_reads_fail(damaged):
    _, folder = damaged()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin" in check_file(folder).reason


def test_no_converted_folder_fails(tmp_path, converted):
    source, _ = converted()
    assert "sparse_attention" in check_file(source).reason
    assert "nothing of that name" in check_layout(tmp_path / "absent").reason


@pytest.mark.parametrize("options", [{"dtype": []}, {"dtype": {}}, {"positions": [1]}])
def test_options_that_are_none_fail(options, damaged):
    _, folder = damaged()
    record = json.loads((folder / "conversion.json").read_text())
    edit_json(folder / "conversion.json", options=record["options"] | options)
    found = check_file(folder)
    assert found.failed and next(iter(options)) in found.reason
    assert check_layout(folder).failed


@pytest.mark.parametrize("density", [float("nan"), "0.5", 0.5])
def test_a_density_that_is_not_that_of_the_layouts_fails(density, damaged):
    _, folder = damaged()
    edit_json(folder / "conversion.json", density=density)
    found = check_layout(folder)
    assert found.failed and "conversion.json" in found.reason


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"family": 3}'])
def test_a_damaged_record_fails(content, damaged):
    _, folder = damaged()
    (folder / "conversion.json").write_text(content)
    assert "conversion.json" in check_file(folder).reason
    assert check_layout(folder).failed


def test_a_record_that_leads_out_of_the_folder_fails(damaged):
    _, folder = damaged()
    record = json.loads((folder / "conversion.json").read_text())
    record["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (folder / "conversion.json").write_text(json.dumps(record))
    found = check_file(folder)
    assert found.failed and "conversion.json" in found.reason and "files" in found.reason


@pytest.mark.parametrize("case", ["windowed", "random blocks, each layer its own"])
def test_one_block_of_a_layout_is_named(case, damaged):
    _, folder = damaged(**CASES[case])

    def edit(tensors):
        tensors[LAYOUT.format(1)][2, 5, 11] ^= 1

    edit_weights(folder, edit)
    check = check_layout(folder)
    assert check.failed
    assert check.reason.startswith("layer 1, head 2, row 5, column 11: expected")


@pytest.mark.parametrize("value, sentence", [(2, "expected only 0 and 1"), (0, "keeps no block")])
def test_a_layout_that_cannot_be_attended_with_fails(value, sentence, damaged):
    _, folder = damaged()

    def edit(tensors):
        tensors[LAYOUT.format(0)][1, 3] = value

    edit_weights(folder, edit)
    assert sentence in check_layout(folder).reason


def test_another_seed_fails(damaged):
    _, folder = damaged(**CASES["random blocks"])
    edit_json(folder / "conversion.json", seed=6)
    assert check_layout(folder).failed


def test_a_model_that_was_trained_on_has_no_record(damaged):
    _, folder = damaged()
    (folder / "conversion.json").unlink()
    assert check_file(folder).figures["digests"].startswith("none")
    assert check_file(folder).passed
    assert check_layout(folder).passed


NORM = {"layer_norm_eps": 0.5}
POSITIONS = "bert.embeddings.position_embeddings.weight"
# What a forger states so that a wrong folder fits its record -> edits of (conversion.json, config.json), and the words.
STATEMENTS = {
    "a field that tensors should have decided": (
        lambda record, config: (record["implied_config"].update(NORM), config.update(NORM)),
        "implied_config: layer_norm_eps",
    ),
    "a size that the source has": (
        lambda record, config: (record["implied_config"].update(num_attention_heads=2), config.update(NORM)),
        "implied_config: num_attention_heads",
    ),
    "a field that is taken out": (
        lambda record, config: (record["removed_fields"].append("layer_norm_eps"), config.pop("layer_norm_eps")),
        "removed_fields: layer_norm_eps",
    ),
    "another attention": (
        lambda record, config: [each.update(attn_implementation="sdpa") for each in (record, config)],
        "attn_implementation: expected block_sparse",
    ),
    "no attention": (
        lambda record, config: [each.pop("attn_implementation") for each in (record, config)],
        "attn_implementation: expected block_sparse, found None",
    ),
    "a layout of the source": (
        lambda record, config: record["changed"].update({LAYOUT.format(0): {"layout": True}}),
        "lists it both as added and as changed",
    ),
    "positions that are a layout": (
        lambda record, config: record["changed"][POSITIONS].update(layout=True),
        f"{POSITIONS}: conversion.json says that it is a layout",
    ),
    "rows": (lambda record, config: record["changed"][POSITIONS].update(rows=[1, 2]), "in two ways"),
    "a method": (lambda record, config: record["changed"][POSITIONS].update(method="interpolate"), "in two ways"),
    "a dtype": (lambda record, config: record["changed"][POSITIONS].update(dtype=["F32", "F16"]), "and it is F32"),
    "values of what is not a buffer": (
        lambda record, config: record["buffers"].update({QUERY: {"dtype": "F32", "values": [1.0]}}),
        "does not list it as dropped",
    ),
    "a shorter source": (lambda record, config: record.update(source_length=32), "source_length: expected 64 rows"),
    "another length": (lambda record, config: record["options"].update(max_length=64), "max_length: expected 64"),
    "another window": (lambda record, config: record["options"].update(window=32), "sparsity: expected"),
    "another mode": (lambda record, config: record["options"].update(mode="fixed"), "sparsity: expected"),
    "no mode": (lambda record, config: record["options"].update(mode="none"), "options: mode: expected one of"),
    "another parameter": (
        lambda record, config: record["options"].update(parameters={"num_local_blocks": 1}),
        "sparsity: expected",
    ),
    "an unknown parameter": (lambda record, config: record["options"].update(parameters={"more": 1}), "more"),
    "another family": (lambda record, config: record.update(family="ernie"), "the model_type of ernie is ernie"),
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement_that_cannot_be_fails_without_the_source(statement, damaged):
    edit, words = STATEMENTS[statement]
    _, folder = damaged()
    record, config = (json.loads((folder / name).read_text()) for name in ("conversion.json", "config.json"))
    edit(record, config)
    for name, content in (("config.json", config), ("conversion.json", record)):
        (folder / name).write_text(json.dumps(content))
    without_digests(folder)
    found = check_file(folder)
    assert any(words in row["fault"] for row in found.details), found.details
