"""A converted model in use: saving, copying, training, compiling, switching to dense attention."""

import copy
import json
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from sparse_folder import BLOCK, batch, layouts_in, masked_by_layouts, outputs, sparse_folder  # noqa: E402

import bsa_export  # noqa: E402
from bsa_export.model import StoredLayout  # noqa: E402

AutoModelForMaskedLM = transformers.AutoModelForMaskedLM


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return sparse_folder(tmp_path_factory.mktemp("bert"))


def layouts_of(model):
    return [module.master_layout.cpu() for module in model.modules() if isinstance(module, StoredLayout)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_saving_and_loading_again_keeps_the_layouts(bert, tmp_path, dtype):
    model = bsa_export.load(bert, dtype=dtype)
    model.save_pretrained(tmp_path)
    again = bsa_export.load(tmp_path)
    assert again.dtype == (dtype or torch.float32)
    assert all(map(torch.equal, layouts_of(again), layouts_in(bert)))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (bert, tmp_path))
    assert before["sparse_attention"] == after["sparse_attention"]
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_works_as_the_model_does(bert, copied):
    model, inputs = bsa_export.load(bert), batch()
    assert torch.equal(copied(model)(**inputs).logits, model(**inputs).logits)


def test_a_layout_moves_with_the_model_and_keeps_its_dtype(bert):
    model = bsa_export.load(bert).half().to("meta")
    stored = [module for module in model.modules() if isinstance(module, StoredLayout)]
    assert {(s.master_layout.dtype, s.master_layout.device.type) for s in stored} == {(torch.uint8, "meta")}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_can_be_switched_to_dense_attention(bert, attention):
    model, inputs = bsa_export.load(bert), batch(padding="right")
    model.set_attn_implementation(attention)
    dense = AutoModelForMaskedLM.from_pretrained(bert, attn_implementation=attention)
    assert torch.equal(outputs(model, inputs), outputs(dense, inputs))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient-checkpointing"])
def test_gradients_are_those_of_the_dense_class_under_the_same_mask(bert, checkpointing):
    inputs = batch(padding="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients(model, dtype):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.to(dtype)(**inputs, labels=labels).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    def dense():
        return masked_by_layouts(
            AutoModelForMaskedLM.from_pretrained(bert), layouts_in(bert), BLOCK, inputs["attention_mask"]
        )

    model = bsa_export.load(bert)
    if checkpointing:
        model.gradient_checkpointing_enable()
    found, plain, exact = (
        gradients(model, torch.float32),
        gradients(dense(), torch.float32),
        gradients(dense(), torch.float64),
    )
    assert found.keys() == exact.keys()
    for name in found:
        error, plain_error = ((each[name] - exact[name]).norm() for each in (found, plain))
        assert error <= 2 * plain_error + 1e-7 * exact[name].norm(), name


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_torch_compile_takes_it_whole_and_gives_the_same(bert, padding):
    model, inputs = bsa_export.load(bert), batch(padding=padding)
    expected = outputs(model, inputs)
    torch.compiler.reset()
    found = outputs(torch.compile(model, backend="aot_eager", fullgraph=True), inputs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_attention_dropout_has_no_effect_and_that_is_said_once(bert, caplog):
    auto = AutoModelForMaskedLM.from_pretrained
    model = auto(bert, attn_implementation="block_sparse", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0)
    training, evaluating = model.train()(**batch()).logits, model.eval()(**batch()).logits
    assert torch.equal(training, evaluating)
    assert caplog.text.count("attention_probs_dropout_prob=0.3 has no effect") == 1


def test_trainer_trains_and_saves_a_sparse_model(bert, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = AutoModelForMaskedLM.from_pretrained(bert, attn_implementation="block_sparse")
    data = [{"input_ids": ids, "labels": ids} for ids in batch()["input_ids"]]
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_steps=2,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    before = model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    trainer.train()
    trained = bsa_export.load(tmp_path / "checkpoint-2")
    assert not torch.equal(trained.bert.encoder.layer[0].attention.self.query.weight, before)
    assert all(map(torch.equal, layouts_of(trained), layouts_in(bert)))
