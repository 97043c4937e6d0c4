"""A converted model in use: saving, copying, training, compiling, switching to dense attention."""

import copy
import json
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from sparse_folder import BLOCK, LONGEST, batch, layouts_in, masked_by_layouts, outputs, sparse_folder  # noqa: E402

import bsa_export  # noqa: E402
from bsa_export.errors import AttentionError  # noqa: E402
from bsa_export.hf.stored_layout import StoredLayout  # noqa: E402
from bsa_export.ops import triton_backend  # noqa: E402
from bsa_export.ops.schedule import ScheduleCache  # noqa: E402

pytestmark = pytest.mark.slow

AutoModelForMaskedLM = transformers.AutoModelForMaskedLM


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return sparse_folder(tmp_path_factory.mktemp("bert"))


def layouts_of(model):
    return [module.master_layout.cpu() for module in model.modules() if isinstance(module, StoredLayout)]


def reassign_self(model):
    for layer in model.base_model.encoder.layer:
        layer.attention.self = layer.attention.self
    return model


def compile_self(model):
    torch.compiler.reset()
    for layer in model.base_model.encoder.layer:
        layer.attention.self = torch.compile(layer.attention.self, backend="eager")
    return model


def reassign_encoder(model):
    model.base_model.encoder, model.base_model.embeddings = model.base_model.encoder, model.base_model.embeddings
    return model


def compile_encoder(model):
    torch.compiler.reset()
    model.base_model.encoder = torch.compile(model.base_model.encoder, backend="eager")
    return model


def take_into_another_module(model):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.encoder, self.embeddings = model.config, model.bert.encoder, model.bert.embeddings

    Own()
    return model


PUT_BACK = [reassign_self, compile_self, reassign_encoder, compile_encoder, take_into_another_module]


@pytest.mark.parametrize("put_back", PUT_BACK, ids=lambda function: function.__name__)
def test_a_module_that_is_wrapped_or_put_elsewhere_stays_what_it_is(bert, put_back):
    inputs = batch(padding="right")
    expected = outputs(bsa_export.load(bert), inputs)
    model = put_back(bsa_export.load(bert))
    torch.testing.assert_close(outputs(model, inputs), expected, atol=1e-4, rtol=1e-4)
    assert all(map(torch.equal, layouts_of(model), layouts_in(bert)))


def test_a_strangers_config_is_left_alone(bert):
    class Stranger(torch.nn.Module):
        @property
        def config(self):
            raise RuntimeError("not yet")

    parent = torch.nn.Module()
    for name in ("encoder", "self", "other"):
        setattr(parent, name, Stranger())


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
    for module in stored:
        module.check()  # there is nothing to look at yet


@pytest.mark.parametrize("padding", ["none", "right"])
def test_layouts_that_are_loaded_later_are_looked_at_too(bert, padding):
    model, inputs = bsa_export.load(bert), batch(padding=padding)
    before = outputs(model, inputs)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("master_layout")}
    with pytest.raises(
        RuntimeError, match="layer.1.attention.self.sparse_self_attention.master_layout: .*no stored layout"
    ):
        model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in stored.items()}, strict=False)
    with pytest.raises(AttentionError, match="no stored layout"):
        model(**inputs)
    model.load_state_dict(stored, strict=False)
    assert torch.equal(outputs(model, inputs), before)
    layer = model.bert.encoder.layer[0].attention.self.sparse_self_attention
    kept = layer.master_layout.clone()
    layer.master_layout.zero_()
    with pytest.raises(AttentionError, match="no stored layout"):
        model(**inputs)
    layer.master_layout = kept
    assert torch.equal(outputs(model, inputs), before)
    layer.master_layout = torch.zeros_like(kept)
    with pytest.raises(AttentionError, match="no stored layout"):
        model(**inputs)


def test_a_state_dict_without_layouts_is_no_reason_to_look_at_them(bert):
    model = bsa_export.load(bert)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("master_layout")}
    fresh = AutoModelForMaskedLM.from_config(model.config, attn_implementation="block_sparse").eval()
    fresh.load_state_dict(weights, strict=False)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(**batch()).logits, model(**batch()).logits)


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


def test_torch_compile_compiles_for_a_length_and_once_for_all_others(bert):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(bsa_export.load(bert), backend=counter)
    for seq in (LONGEST, 50, 17, 90, 64, LONGEST):
        compiled(torch.randint(4, 100, (2, seq)))
    assert counter.frame_count == 2


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_cuda_graphs_of_a_compiled_model_give_the_same(tmp_path, monkeypatch, training):
    monkeypatch.setattr(triton_backend, "_schedules", ScheduleCache())  # no work list is there before the graphs are
    folder = sparse_folder(tmp_path, hidden_size=64)  # head_dim 16, the least that the fused kernel takes
    model = bsa_export.load(folder, device="cuda", dtype=torch.float16).requires_grad_(training)
    exact_model = copy.deepcopy(model).double()
    torch.compiler.reset()
    compiled = torch.compile(model, mode="reduce-overhead")
    weight, exact_weight = (
        each.get_submodule("bert.encoder.layer.0.attention.self.query").weight for each in (model, exact_model)
    )

    def computed(model, weight, ids):
        """The outputs, or a gradient that comes through every layer."""
        logits = model(ids).logits
        if not training:
            return logits.clone()
        (logits.float() if logits.dtype == torch.float16 else logits).square().sum().backward()
        gradient = weight.grad.clone()
        model.zero_grad()  # the next run of a graph writes where these are
        return gradient

    for seq in (LONGEST, LONGEST, LONGEST, 50, 50, 50, LONGEST):  # run, recorded, replayed
        ids = torch.randint(4, 100, (2, seq), device="cuda")
        found = computed(compiled, weight, ids)
        exact, plain = computed(exact_model, exact_weight, ids), computed(model, weight, ids)
        assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()


def needs_two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU on this machine")


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_layers_may_be_on_several_gpus(tmp_path, padding):
    needs_two_gpus()
    folder = sparse_folder(tmp_path, hidden_size=64)
    devices = {"bert.embeddings": 0, "bert.encoder.layer.0": 0, "bert.encoder.layer.1": 1, "cls": 0}
    split, whole = (
        AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="block_sparse", device_map=each).eval()
        for each in (devices, {"": 0})
    )
    inputs = {name: x.to("cuda:0") for name, x in batch(padding=padding).items()}
    assert torch.equal(outputs(split, inputs), outputs(whole, inputs))


@pytest.mark.gpu
def test_data_parallel_gives_the_same_and_reads_no_layout_again(tmp_path):
    needs_two_gpus()
    model = bsa_export.load(sparse_folder(tmp_path, hidden_size=64), device="cuda:0")
    ids = torch.randint(4, 100, (4, LONGEST), device="cuda:0")
    with torch.no_grad():
        parallel = torch.nn.DataParallel(model, device_ids=[0, 1])
        assert torch.equal(parallel(ids).logits, torch.cat([model(half).logits for half in ids.chunk(2)]))
        torch.cuda.set_sync_debug_mode("error")  # to read a layout is to wait for its GPU
        try:
            parallel(ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_refuses_layouts_that_are_none(bert, backend):
    model, inputs = bsa_export.load(bert), batch()
    fresh = AutoModelForMaskedLM.from_config(model.config, attn_implementation="block_sparse").eval()
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="no stored layout"), torch.no_grad():
        torch.compile(fresh, backend=backend, fullgraph=True)(**inputs)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert outputs(compiled, inputs).isfinite().all()
    with pytest.raises(RuntimeError, match="no stored layout"):
        compiled.load_state_dict({name: torch.zeros_like(t) for name, t in compiled.state_dict().items()})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_trace_takes_texts_of_other_lengths(bert):
    model, inputs = bsa_export.load(bert).requires_grad_(False), batch(padding="right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        traced = torch.jit.trace(
            lambda ids, mask: model(ids, attention_mask=mask).logits, (ids, mask), check_trace=False
        )
        other = mask.flip(0)
        found, expected = traced(ids, other), model(ids, attention_mask=other).logits
    torch.testing.assert_close(found[other.bool()], expected[other.bool()], atol=1e-4, rtol=1e-4)


def test_feed_forward_in_chunks_takes_padding(bert):
    inputs = batch(padding="right")
    inputs["attention_mask"][1, 50:] = 0  # 183 tokens, which no chunk of 50 divides
    model = AutoModelForMaskedLM.from_pretrained(
        bert, attn_implementation="block_sparse", chunk_size_feed_forward=50
    ).eval()
    torch.testing.assert_close(outputs(model, inputs), outputs(bsa_export.load(bert), inputs), atol=1e-4, rtol=1e-4)


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
