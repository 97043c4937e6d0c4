"""The way back: `--to-dense` gives the source's names and bits."""

import json
import random

import pytest
import torch
from tiny_models import (
    CLASSES,
    RESERVED,
    config,
    convert,
    converted,
    refused,
    same_bits,
    save,
    save_tensors,
    tensors,
    tiny,
)

import bsa_export


def to_dense(folder, *options):
    target = folder.parent / "dense"
    result = convert(folder, target, "--to-dense", *options)
    assert result.exit_code == 0, result.output
    return target


def assert_same_tensors(found, expected):
    assert set(found) == set(expected)
    assert [name for name, tensor in expected.items() if not same_bits(found[name], tensor)] == []


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("family", CLASSES)
def test_there_and_back_gives_names_and_bits(tmp_path, family, head):
    source = save(tiny(family, head), tmp_path / "source")
    dense = to_dense(converted(source, "--max-length", 512))
    assert_same_tensors(tensors(dense), tensors(source))
    assert config(dense) == config(source)
    assert not (dense / "conversion.json").exists()


@pytest.mark.parametrize("family", CLASSES)
def test_old_pickles_come_back_with_all_that_was_in_them(tmp_path, family):
    """Tied weights under each of their names, buffers, old spellings, tensors that no table knows."""
    model = tiny(family)
    prefix = {"xlm-roberta": "roberta", "camembert": "roberta", "data2vec-text": "data2vec_text"}.get(family, family)
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.state_dict().items()
    }
    state[f"{prefix}.embeddings.position_ids"] = torch.arange(64 + RESERVED.get(family, 0))[None]
    state["extra.weight"] = torch.randn(3).half()
    source = save_tensors(tmp_path / "source", state, model.config.to_dict())
    dense = to_dense(converted(source, "--max-length", 256, "--mode", "bigbird", "--block", 16))
    assert_same_tensors(tensors(dense), state)
    assert config(dense) == config(source)


@pytest.mark.parametrize("name", ["minilm", "antiberty", "english_mlm"])
def test_real_models_come_back(tmp_path, request, name):
    folder = request.getfixturevalue(name)
    assert convert(folder, tmp_path / "out", "--max-length", 4096).exit_code == 0
    dense = to_dense(tmp_path / "out")
    pickle = folder / "pytorch_model.bin"
    source = torch.load(pickle, map_location="cpu", weights_only=True) if pickle.is_file() else tensors(folder)
    assert_same_tensors(tensors(dense), source)
    assert config(dense) == config(folder)
    if name == "minilm":
        assert json.loads((dense / "sentence_bert_config.json").read_text())["max_seq_length"] == 256


@pytest.mark.parametrize(
    ("length", "options", "exact"), [(512, (), True), (80, (), False), (512, ("--max-length", 512), None)]
)
def test_interpolated_positions_come_back(tmp_path, length, options, exact):
    """Bit for bit where the length was a multiple; else a sentence says that they are near."""
    source = save(tiny("roberta"), tmp_path / "source")
    out = converted(source, "--max-length", length, "--block", 16, "--positions", "interpolate")
    dense = to_dense(out, *options)
    name = "roberta.embeddings.position_embeddings.weight"
    before, after = tensors(source)[name], tensors(dense)[name]
    if exact:
        assert_same_tensors(tensors(dense), tensors(source))
    elif exact is None:
        assert same_bits(after, tensors(out)[name])
    else:
        assert after.shape == before.shape and same_bits(after[:2], before[:2])
        assert "its rows are near the source's, not equal" in convert(out, tmp_path / "again", "--to-dense").stdout


@pytest.mark.parametrize(("options", "rows"), [((), 64), (("--max-length", 256), 256), (("--max-length", 100), 100)])
def test_the_dense_model_reads_what_is_asked(tmp_path, options, rows):
    source = save(tiny("roberta"), tmp_path / "source")
    out = converted(source, "--max-length", 256)
    dense = to_dense(out, *options)
    name = "roberta.embeddings.position_embeddings.weight"
    assert config(dense)["max_position_embeddings"] == rows + 2
    assert same_bits(tensors(dense)[name], tensors(out)[name][: rows + 2])
    assert "expected at most the 256 tokens that it reads" in refused(
        out, tmp_path / "x", "--to-dense", "--max-length", 257
    )


def test_rounded_values_stay_rounded_and_this_is_told(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")
    out = converted(source, "--dtype", "bf16")
    result = convert(out, tmp_path / "dense", "--to-dense")
    assert "the conversion rounded to bf16: values stay rounded" in result.stdout
    before, after = tensors(source), tensors(tmp_path / "dense")
    assert all(same_bits(after[name], tensor.bfloat16()) for name, tensor in before.items())


def test_a_checkpoint_that_was_trained_sparse_becomes_dense(tmp_path):
    """No conversion.json: the layouts go, positions and all else stay."""
    model = tiny("bert", length=256)
    random.seed(0)
    name = "bert.encoder.layer.{}.attention.self.sparse_self_attention.master_layout"
    layouts = {name.format(layer): torch.ones(4, 16, 16, dtype=torch.int64) for layer in range(2)}
    fields = model.config.to_dict() | {"sparse_attention": {"mode": "dense", "block": 16}}
    source = save_tensors(tmp_path / "source", dict(model.state_dict()) | layouts, fields)
    dense = to_dense(source)
    assert_same_tensors(tensors(dense), model.state_dict())
    assert "sparse_attention" not in config(dense) and config(dense)["max_position_embeddings"] == 256


def test_a_model_that_was_trained_on_keeps_what_it_learned(tmp_path):
    out = converted(save(tiny("bert"), tmp_path / "source"), "--max-length", 256)
    model = bsa_export.load(out)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    trained = tmp_path / "trained"
    model.save_pretrained(trained)
    (trained / "conversion.json").write_bytes((out / "conversion.json").read_bytes())
    learned = {name: tensor for name, tensor in tensors(trained).items() if not name.endswith("master_layout")}
    assert_same_tensors(tensors(to_dense(trained, "--max-length", 256)), learned)


def test_what_is_no_conversion_is_refused(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")
    assert "expected a sparse checkpoint, found neither stored layouts nor conversion.json" in refused(
        source, tmp_path / "out", "--to-dense"
    )
    out = converted(source)
    (out / "conversion.json").write_text("{}")
    assert "conversion.json: it is damaged" in refused(out, tmp_path / "x", "--to-dense")


@pytest.mark.parametrize("option", [("--mode", "fixed"), ("--dtype", "fp16"), ("--dry-run",), ("--seed", "1")])
def test_options_of_the_other_way_are_usage_errors(tmp_path, option):
    out = converted(save(tiny("bert"), tmp_path / "source"))
    result = convert(out, tmp_path / "x", "--to-dense", *option)
    assert result.exit_code == 2 and f"--to-dense does not accept {option[0]}" in result.stderr
