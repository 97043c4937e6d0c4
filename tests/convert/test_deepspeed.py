"""Converted files and deepspeed 0.19.6's own classes: files load into them, theirs are taken with their layouts."""

import json
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file, load_model
from tiny_models import config, convert, converted, record, refused, same_bits, save, save_tensors, tensors, tiny

sparse_attention = pytest.importorskip(
    "deepspeed.ops.sparse_attention", reason="deepspeed 0.19.7 removed it", exc_type=ImportError
)
BertSparseSelfAttention = sparse_attention.BertSparseSelfAttention
SparseSelfAttention = sparse_attention.SparseSelfAttention

CONFIGS = {
    "fixed": sparse_attention.FixedSparsityConfig,
    "variable": sparse_attention.VariableSparsityConfig,
    "bigbird": sparse_attention.BigBirdSparsityConfig,
    "bslongformer": sparse_attention.BSLongformerSparsityConfig,
    "local": sparse_attention.LocalSlidingWindowSparsityConfig,
    "dense": sparse_attention.DenseSparsityConfig,
}


MASTER = "attention.self.sparse_self_attention.master_layout"


def made_sparse(model, sparsity, length=None):
    """The model with DeepSpeed's self-attention in every layer; masters have 2,048 tokens unless a length is given."""
    for layer in model.base_model.encoder.layer:
        layer.attention.self = BertSparseSelfAttention(model.config, sparsity)
        if length is not None:
            layer.attention.self.sparse_self_attention = SparseSelfAttention(sparsity, max_seq_length=length)
    return model


def layouts(model):
    return [layer.attention.self.sparse_self_attention.master_layout for layer in model.base_model.encoder.layer]


def antiberty_model(bert_config):
    """The class of AntiBERTy: a masked-LM head with three more next to it."""
    model = transformers.BertForPreTraining(bert_config)
    del model.cls.seq_relationship
    for name, size in {"species": 6, "chain": 2, "graft": 2}.items():
        setattr(model.cls, name, torch.nn.Linear(bert_config.hidden_size, size))
    return model


REAL = {
    "minilm": transformers.BertModel,
    "antiberty": antiberty_model,
    "english_mlm": transformers.BertForMaskedLM,
}


@pytest.mark.parametrize(
    ("options", "length"),
    [
        (("--max-length", 2048, "--mode", "fixed", "--block", 16), None),
        (("--max-length", 4096), 4096),
        (("--max-length", 1536, "--mode", "bigbird", "--block", 32), 1536),
    ],
    ids=["fixed 2048", "default 4096", "bigbird 1536"],
)
@pytest.mark.parametrize("name", REAL)
def test_real_models_load_strictly_into_deepspeeds_classes(tmp_path, request, name, options, length):
    source, out = request.getfixturevalue(name), tmp_path / "out"
    assert convert(source, out, *options).exit_code == 0
    written = transformers.BertConfig.from_pretrained(out)
    section = config(out)["sparse_attention"]
    sparsity = sparse_attention.DenseSparsityConfig(written.num_attention_heads, section["block"])
    model = made_sparse(REAL[name](written), sparsity, length)
    missing, unexpected = load_model(model, out / "model.safetensors", strict=True)
    assert not missing and not unexpected
    stored = tensors(out)
    names = [f"{prefix(stored)}encoder.layer.{i}.{MASTER}" for i in range(written.num_hidden_layers)]
    assert all(torch.equal(layout, stored[each].long()) for each, layout in zip(names, layouts(model), strict=True))
    if name == "minilm":  # has no tied weights: the plain way works too
        made_sparse(REAL[name](written), sparsity, length).load_state_dict(
            load_file(out / "model.safetensors"), strict=True
        )


def prefix(stored):
    return "bert." if any(name.startswith("bert.") for name in stored) else ""


SECTIONS = [
    {"mode": "fixed", "block": 16, "num_local_blocks": 4, "num_global_blocks": 1, "attention": "bidirectional",
     "horizontal_global_attention": True, "different_layout_per_head": True, "num_different_global_patterns": 4},
    {"mode": "variable", "block": 32, "num_random_blocks": 1, "local_window_blocks": [2, 4],
     "global_block_indices": [0, 3], "global_block_end_indices": [1, 5]},
    {"mode": "bigbird", "block": 16, "num_random_blocks": 2, "num_sliding_window_blocks": 3, "num_global_blocks": 1},
    {"mode": "bigbird", "block": 16, "different_layout_per_head": True, "num_random_blocks": 3},
    {"mode": "bslongformer", "block": 16, "num_sliding_window_blocks": 3, "global_block_indices": [0, 7]},
    {"mode": "local", "block": 64, "num_sliding_window_blocks": 5, "attention": "bidirectional"},
    {"mode": "dense", "block": 64},
]  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section["mode"])
@pytest.mark.parametrize("whole", [True, False], ids=["a DeepSpeed config", "the section alone"])
def test_a_deepspeed_json_gives_deepspeeds_layouts(tmp_path, section, whole):
    content = {"train_batch_size": 8, "fp16": {"enabled": True}, "sparse_attention": section} if whole else section
    (tmp_path / "ds.json").write_text(json.dumps(content))
    source = save(tiny("bert"), tmp_path / "source")
    out = converted(source, "--sparsity", tmp_path / "ds.json", "--max-length", 1024, "--seed", 7)
    parameters = {name: value for name, value in section.items() if name != "mode"}
    random.seed(7)
    judge = SparseSelfAttention(CONFIGS[section["mode"]](num_heads=4, **parameters), max_seq_length=1024).master_layout
    stored = [tensor for name, tensor in tensors(out).items() if name.endswith("master_layout")]
    assert len(stored) == 2 and all(torch.equal(layout.long(), judge) for layout in stored)


def test_each_layer_draws_as_deepspeeds_layers_do(tmp_path):
    source = save(tiny("bert", num_hidden_layers=3), tmp_path / "source")
    out = converted(source, "--mode", "bigbird", "--block", 16, "--max-length", 512, "--num-random-blocks", 2,
                    "--different-layout-per-head", "--different-layout-per-layer", "--seed", 11)  # fmt: skip
    stored = tensors(out)
    found = [stored[f"bert.encoder.layer.{i}.attention.self.sparse_self_attention.master_layout"] for i in range(3)]
    assert len({layout.numpy().tobytes() for layout in found}) == 3
    sparsity = sparse_attention.BigBirdSparsityConfig(4, 16, different_layout_per_head=True, num_random_blocks=2)
    random.seed(11)
    for layout in found:
        judge = SparseSelfAttention(sparsity, max_seq_length=512).master_layout
        assert torch.equal(layout.long(), judge)


@pytest.mark.parametrize(("positions", "reads"), [(2048, 2048), (512, 512), (4096, 2048), (500, 496)])
def test_a_checkpoint_of_berts_sparse_class_keeps_its_layouts(tmp_path, positions, reads):
    """Its masters are int64 of 2,048 tokens whatever its positions are: the model reads what both cover."""
    torch.manual_seed(0)
    model = tiny("bert", length=positions)
    random.seed(0)
    made_sparse(model, sparse_attention.BigBirdSparsityConfig(4, 16, different_layout_per_head=True))
    state, fields = model.state_dict(), model.config.to_dict() | {"architectures": ["BertForMaskedLM"]}
    assert layouts(model)[0].dtype == torch.int64 and layouts(model)[0].shape == (4, 128, 128)
    out = converted(save_tensors(tmp_path / "source", state, fields))
    stored, n = tensors(out), reads // 16
    for name, layout in state.items():
        if name.endswith("master_layout"):
            assert stored[name].dtype == torch.uint8
            assert torch.equal(stored[name].long(), layout[:, :n, :n])
    assert config(out)["max_position_embeddings"] == reads == record(out)["max_length"]
    assert stored["bert.embeddings.position_embeddings.weight"].shape[0] == reads
    assert config(out)["sparse_attention"]["block"] == 16
    told = convert(tmp_path / "source", "--dry-run").stdout
    assert "the source's own, as stored" in told and "training" not in told and "--max-length" not in told
    assert ("that both cover" in told) == (positions != 2048)


GENA = {
    "sparse_config_cls": "deepspeed.ops.sparse_attention:BigBirdSparsityConfig",
    "sparse_attention": {
        "num_heads": 4,
        "block": 32,
        "different_layout_per_head": True,
        "num_sliding_window_blocks": 3,
        "num_global_blocks": 2,
        "num_random_blocks": 3,
    },
}


def test_a_gena_lm_style_checkpoint_keeps_its_stored_layouts(tmp_path):
    model = tiny("bert", length=1024)
    parameters = GENA["sparse_attention"]
    random.seed(5)
    made_sparse(model, sparse_attention.BigBirdSparsityConfig(**parameters), 1024)
    fields = model.config.to_dict() | GENA | {"architectures": ["BertForMaskedLM"]}
    out = converted(save_tensors(tmp_path / "source", model.state_dict(), fields))
    stored = tensors(out)
    for i, layout in enumerate(layouts(model)):
        name = f"bert.encoder.layer.{i}.attention.self.sparse_self_attention.master_layout"
        assert torch.equal(stored[name].long(), layout)
    assert config(out)["sparse_config_cls"] == GENA["sparse_config_cls"]
    assert parameters.items() <= config(out)["sparse_attention"].items()
    assert same_bits(
        stored["bert.embeddings.position_embeddings.weight"],
        model.base_model.embeddings.position_embeddings.weight.data,
    )


def test_a_gena_lm_style_config_without_stored_layouts_makes_them(tmp_path):
    model = tiny("bert", length=1024)
    fields = model.config.to_dict() | GENA
    out = converted(save_tensors(tmp_path / "source", model.state_dict(), fields), "--seed", 3)
    random.seed(3)
    judge = sparse_attention.BigBirdSparsityConfig(**GENA["sparse_attention"]).make_layout(1024)
    stored = [tensor for name, tensor in tensors(out).items() if name.endswith("master_layout")]
    assert all(torch.equal(layout.long(), judge) for layout in stored)
    told = convert(tmp_path / "source", "--dry-run").stdout
    assert "random blocks are drawn again" in told
    assert [note["kind"] for note in record(out)["notes"]] == ["layouts redrawn"]


@pytest.mark.parametrize(
    "option", [("--mode", "fixed"), ("--max-length", 2048), ("--block", 64), ("--positions", "interpolate")]
)
def test_the_layouts_of_a_sparse_checkpoint_are_not_chosen_again(tmp_path, option):
    model = tiny("bert", length=1024)
    source = save_tensors(tmp_path / "source", model.state_dict(), model.config.to_dict() | GENA)
    assert "the source is sparse already, and its layouts are kept" in refused(source, tmp_path / "out", *option)


def test_the_sparsity_of_a_gena_lm_style_config_is_that_of_its_class(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")
    (tmp_path / "gena.json").write_text(json.dumps(GENA))
    out = converted(source, "--sparsity", tmp_path / "gena.json", "--max-length", 512)
    assert config(out)["sparse_config_cls"] == GENA["sparse_config_cls"]
    assert GENA["sparse_attention"].items() <= config(out)["sparse_attention"].items()


@pytest.mark.parametrize("section", [False, None, {}], ids=repr)
def test_an_empty_section_is_that_of_a_dense_model(tmp_path, section):
    model = tiny("bert")
    source = save_tensors(
        tmp_path / "source", model.state_dict(), model.config.to_dict() | {"sparse_attention": section}
    )
    assert record(converted(source))["sparse_source"] is False


def test_stored_layouts_with_a_section_that_is_none_are_a_sentence(tmp_path):
    out = converted(save(tiny("bert"), tmp_path / "source"))
    (out / "config.json").write_text(json.dumps(config(out) | {"sparse_attention": ["fixed"]}))
    assert "config.json: sparse_attention: expected an object with a block" in refused(out, tmp_path / "again")


def test_our_own_output_converts_to_itself(tmp_path):
    out = converted(save(tiny("roberta"), tmp_path / "source"), "--max-length", 256)
    again = tmp_path / "again"
    assert convert(out, again).exit_code == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert config(again) == config(out)
