"""The encoders that are not built as BERT is: names, bits, the source's outputs, the way back, and what is refused."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.more_families import KINDS, random_model
from tiny_models import (
    LENGTH,
    config,
    convert,
    converted,
    inputs,
    record,
    refused,
    same_bits,
    save,
    save_tensors,
    tensors,
)

import bsa_export
from bsa_export.bert.expected_tensors import dense_spec
from bsa_export.bert.families import FAMILIES
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import Computed, Tensor
from bsa_export.conversion.plan import plan
from bsa_export.converted.checks import Kind
from bsa_export.converted.folder import open_folder
from bsa_export.converted.integrity import check_file, check_layout
from bsa_export.errors import AttentionError, CheckpointError
from bsa_export.verify.controls import file_controls
from bsa_export.verify.interchange import check_interchange
from bsa_export.verify.outputs import check_outputs
from bsa_export.verify.weights import check_weights
from bsa_export.verify.whole_model import check_whole_model


def runnable(*case):
    """A case whose model runs in the installed transformers."""
    name = f"{KINDS[case[0]].classes}Model"
    reason = f"transformers {transformers.__version__} has no {name}"
    return pytest.param(*case, marks=pytest.mark.skipif(not hasattr(transformers, name), reason=reason))


MODELS = [runnable(kind, head) for kind, row in KINDS.items() for head in row.heads]
RUN = [runnable(kind) for kind in KINDS]


def outputs(model, length=LENGTH):
    """The hidden states and logits of a padded batch at its real tokens."""
    batch = inputs(length)
    with torch.no_grad():
        out = model(**batch)
    real = batch["attention_mask"].bool()
    found = [tensor for tensor in out.to_tuple() if torch.is_tensor(tensor)]
    return [tensor[real] if tensor.shape[:2] == real.shape else tensor for tensor in found]


def assert_same(found, expected, tolerance=2e-5):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("kind", "head"), MODELS)
def test_a_longer_model_gives_the_sources_outputs(tmp_path, kind, head):
    source, row = random_model(kind, head), KINDS[kind]
    out = converted(save(source, tmp_path / "source"), "--max-length", 4 * LENGTH, "--block", 16)
    before, after, told = tensors(tmp_path / "source"), tensors(out), record(out)
    prefix = "" if head == "Model" else row.prefix
    name = f"{prefix}{row.layouts}.sparse_self_attention.master_layout"
    assert told["added"] == [name.format(layer) for layer in range(row.count)]
    assert (told["family"], told["dropped"], told["tied"]) == (row.family, {}, {})
    renamed = {told["renamed"].get(old, old): tensor for old, tensor in before.items()}
    assert set(after) - set(told["added"]) == set(renamed)
    assert all(same_bits(after[new], tensor) for new, tensor in renamed.items() if new not in told["changed"])
    assert config(out)["max_position_embeddings"] == 4 * LENGTH + row.reserved

    model = bsa_export.load(out)
    assert type(model) is type(source)
    assert_same(outputs(model), outputs(source))
    assert all(tensor.isfinite().all() for tensor in outputs(model, 4 * LENGTH - 5))
    with pytest.raises(AttentionError, match="reads up to 256 tokens"):
        outputs(model, 4 * LENGTH + 1)


@pytest.mark.parametrize("kind", RUN)
def test_the_way_back_gives_the_sources_bits(tmp_path, kind):
    source = save(random_model(kind), tmp_path / "source")
    out = converted(source, "--max-length", 4 * LENGTH, "--block", 16)
    assert convert(out, tmp_path / "dense", "--to-dense").exit_code == 0
    before, after = tensors(source), tensors(tmp_path / "dense")
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    assert config(source) == config(tmp_path / "dense")


@pytest.mark.parametrize("kind", RUN)
def test_the_way_back_from_a_shorter_model(tmp_path, kind):
    """Without a position table nothing is lost with the length."""
    source = save(random_model(kind), tmp_path / "source")
    out = converted(source, "--max-length", LENGTH // 2, "--block", 16)
    assert convert(out, tmp_path / "dense", "--to-dense").exit_code == 0
    lost = {"max_position_embeddings": LENGTH // 2 + KINDS[kind].reserved}
    assert config(tmp_path / "dense") == config(source) | ({} if KINDS[kind].is_rotary else lost)


def test_the_way_back_to_another_length_keeps_the_scaling(tmp_path):
    source = save(random_model("eurobert"), tmp_path / "source")
    change(source, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4})
    out = converted(source, "--max-length", LENGTH, "--block", 16)
    assert "yarn scaling" in refused(out, tmp_path / "dense", "--to-dense", "--max-length", LENGTH // 2)
    assert convert(out, tmp_path / "dense", "--to-dense").exit_code == 0
    assert config(tmp_path / "dense") == config(source)


@pytest.mark.parametrize("kind", RUN)
def test_the_tensors_tell_the_head_of_an_unknown_class(tmp_path, kind):
    source = save(random_model(kind), tmp_path / "source")
    change(source, architectures=["OfItsOwnCode"])
    model = bsa_export.load(converted(source, "--max-length", LENGTH, "--block", 16))
    assert type(model).__name__ == f"{KINDS[kind].classes}ForMaskedLM"


@pytest.mark.parametrize("kind", RUN)
def test_a_model_that_is_saved_again_loads_again(tmp_path, kind):
    out = converted(save(random_model(kind), tmp_path / "source"), "--max-length", 4 * LENGTH, "--block", 16)
    model = bsa_export.load(out)
    model.save_pretrained(tmp_path / "again")
    again = bsa_export.load(tmp_path / "again")
    assert_same(outputs(again, 4 * LENGTH), outputs(model, 4 * LENGTH), 0)
    for check in (check_file(tmp_path / "again"), check_layout(tmp_path / "again")):  # without a conversion.json
        assert check.passed, check.reason


def checked(tmp_path, kind, device, backends, **fields):
    """The checks of bsa-verify on a kind's conversion that a device and backends have a part in, in this process."""
    source = save(random_model(kind, **fields), tmp_path / "source")
    folder = open_folder(converted(source, "--max-length", 4 * LENGTH, "--block", 16))
    checks = [check_file(folder.path), check_layout(folder.path), check_weights(folder, source), file_controls(folder)]
    checks += [*check_interchange(folder), *check_outputs(folder, device, backends)]
    checks += check_whole_model(folder, device, open_checkpoint(source))
    assert not [(check.name, check.reason) for check in checks if check.failed]
    whole = [check.figures["against"] for check in checks if check.kind is Kind.WHOLE_MODEL]
    assert whole == [f"the source in {KINDS[kind].classes}ForMaskedLM", "reference"]
    assert all(check.passed for check in checks if check.kind in (Kind.OUTPUTS, Kind.CONTROLS))


@pytest.mark.parametrize("kind", RUN)
def test_each_check_of_bsa_verify_passes(tmp_path, kind):
    checked(tmp_path, kind, "cpu", ("torch",))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", RUN)
def test_each_check_of_bsa_verify_passes_on_a_gpu(tmp_path, kind):
    checked(tmp_path, kind, "cuda", ("triton", "torch"), hidden_size=64)


FORGED = [
    ("albert", {"layer_norm_eps": 0.1}),
    ("esm-rotary", {"token_dropout": False}),
    ("eurobert", {"rms_norm_eps": 0.1}),
    ("eurobert-grouped", {"hidden_act": "relu"}),
    ("gte", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}),
    ("modernbert", {"local_attention": 12}),
    ("modernbert", {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]}),
]


@pytest.mark.parametrize(("kind", "fields"), [runnable(*case) for case in FORGED])
def test_the_whole_model_check_runs_the_sources_config(tmp_path, kind, fields):
    """Nothing that the folder says about itself enters what is expected, nor the bound."""
    source = save(random_model(kind), tmp_path / "source")
    out = converted(source, "--max-length", 4 * LENGTH, "--block", 16)
    change(out, **fields)
    kept, own = check_whole_model(open_folder(out), "cpu", open_checkpoint(source))
    assert kept.failed and own.passed


@pytest.mark.parametrize("kind", list(map(runnable, ["modernbert", "nomic_bert"])))
def test_the_whole_model_check_runs_the_sources_weights(tmp_path, kind):
    out = converted(save(random_model(kind), tmp_path / "source"), "--max-length", 4 * LENGTH, "--block", 16)
    other = save(random_model(kind, seed=1), tmp_path / "other")
    kept, own = check_whole_model(open_folder(out), "cpu", open_checkpoint(other))
    assert kept.failed and own.passed


@pytest.mark.skipif(not hasattr(transformers, "NomicBertModel"), reason="this transformers has no NomicBertModel")
def test_a_size_that_config_json_leaves_out_is_that_of_the_class(tmp_path):
    """NomicBertConfig has 12 heads by default; conversion.json is forged to say 6, and everything else fits."""
    source = save(random_model("nomic_bert", hidden_size=24, num_attention_heads=12), tmp_path / "source")
    dense = {name: value for name, value in config(source).items() if name not in ("num_attention_heads", "head_dim")}
    (source / "config.json").write_text(json.dumps(dense))
    out = converted(source, "--max-length", 2 * LENGTH, "--block", 16)
    told = record(out)
    assert told["implied_config"] == {"num_attention_heads": 12}
    assert check_weights(open_folder(out), source).passed
    told["implied_config"]["num_attention_heads"] = 6
    (out / "conversion.json").write_text(json.dumps(told))
    change(out, num_attention_heads=6, sparse_attention=config(out)["sparse_attention"] | {"num_heads": 6})
    weights = {name: x[:6].clone() if name.endswith("layout") else x for name, x in tensors(out).items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    assert not check_layout(out).failed
    kept, _ = check_whole_model(open_folder(out), "cpu", open_checkpoint(source))
    assert kept.failed


@pytest.mark.parametrize("kind", list(map(runnable, ["gte", "nomic_bert", "jina_embeddings_v3"])))
def test_the_names_of_the_classes_are_known_too(tmp_path, kind):
    """transformers stores these models under the names of their own code, unless it is asked for those of its class."""
    model = random_model(kind)
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    out = converted(tmp_path / "source", "--max-length", 4 * LENGTH, "--block", 16)
    layouts = [f"{KINDS[kind].prefix}layers.{layer}.self_attn.sparse_self_attention.master_layout" for layer in (0, 1)]
    assert (record(out)["added"], record(out)["renamed"]) == (layouts, {})
    assert_same(outputs(bsa_export.load(out)), outputs(model))


@pytest.mark.parametrize(
    "kind", list(map(runnable, ["gte", "nomic_bert", "jina_embeddings_v3", "eurobert", "esm-rotary"]))
)
def test_a_longer_rotary_model_changes_one_field(tmp_path, kind):
    source = save(random_model(kind), tmp_path / "source")
    out = converted(source, "--max-length", 4 * LENGTH, "--block", 16)
    new = {"attn_implementation", "max_position_embeddings", "sparse_attention", "sparse_config_cls"}
    before, after = config(source), config(out)
    assert {name for name in {*before, *after} if before.get(name) != after.get(name)} == new
    assert record(out)["changed"] == {} and record(out)["positions"] is None


def test_local_layers_keep_the_blocks_that_their_band_touches(tmp_path):
    source = save(random_model("modernbert"), tmp_path / "source")
    result = convert(source, tmp_path / "out", "--max-length", 4 * LENGTH, "--block", 16)
    assert "2 of 4, each token attends up to 12 tokens away" in result.stdout
    assert "every block within 64 tokens is kept" in result.stdout  # in the global layers, which are the others
    tokens = np.arange(4 * LENGTH)
    near = abs(tokens[:, None] - tokens) <= 12
    touched = near.reshape(16, 16, 16, 16).any(axis=(1, 3))
    layouts = [
        tensors(tmp_path / "out")[f"model.layers.{i}.attn.sparse_self_attention.master_layout"] for i in range(4)
    ]
    assert all(np.array_equal(head, touched) for layer in (1, 2) for head in layouts[layer])
    assert torch.equal(layouts[0], layouts[3]) and not np.array_equal(layouts[0][0], touched)
    assert "| local layers | 2 of 4: a token attends to 12 tokens" in (tmp_path / "out" / "README.md").read_text()
    assert record(tmp_path / "out")["density"] == pytest.approx(float(torch.stack(layouts).float().mean()))


def test_local_layers_keep_their_band_under_a_mask_of_the_caller(tmp_path):
    model = random_model("modernbert")
    sparse = bsa_export.load(converted(save(model, tmp_path / "source"), "--max-length", 4 * LENGTH, "--block", 16))
    tokens = torch.arange(LENGTH)
    near = abs(tokens[:, None] - tokens) <= 12
    keep = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3
    keep |= torch.eye(LENGTH, dtype=torch.bool)
    ids, masks = inputs()["input_ids"], {"full_attention": keep, "sliding_attention": keep & near}
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=masks).logits
        for mask in (keep, masks):
            assert_same([sparse(input_ids=ids, attention_mask=mask).logits], [expected])


@pytest.mark.parametrize(
    ("stated", "expected"),
    [({}, [None, 64, 64, None]), ({"global_attn_every_n_layers": 2, "local_attention": 48}, [None, 24, None, 24]),
     ({"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, [64, 64, 64, None]),
     ({"layer_types": ["full_attention"] * 4, "global_attn_every_n_layers": None}, [None] * 4)],
)  # fmt: skip
def test_which_layers_are_local(stated, expected):
    assert FAMILIES["modernbert"].windows(stated, 4) == expected


def test_esm_2_as_it_is_on_the_hub(tmp_path):
    """Frequencies in each layer, a decoder that is tied, and two tables that the class never reads."""
    model = random_model("esm-rotary")
    state, fields = dict(model.state_dict()), model.config.to_dict() | {"architectures": ["EsmForMaskedLM"]}
    frequencies = state.pop("esm.rotary_embeddings.inv_freq")
    for layer in (0, 1):
        state[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = frequencies.clone()
    state["esm.embeddings.position_embeddings.weight"] = torch.randn(66, 32)
    state["esm.embeddings.position_ids"] = torch.arange(66)[None]
    source = save_tensors(tmp_path / "source", state, fields)
    out = converted(source, "--max-length", 4 * LENGTH, "--block", 16)
    told = record(out)
    assert told["tied"] == {"lm_head.decoder.weight": "esm.embeddings.word_embeddings.weight"}
    assert told["dropped"] == {"esm.embeddings.position_ids": "buffer"} and told["changed"] == {}
    assert_same(outputs(bsa_export.load(out)), outputs(model))
    assert convert(out, tmp_path / "dense", "--to-dense").exit_code == 0
    back = tensors(tmp_path / "dense")
    assert back.keys() == state.keys() and all(same_bits(back[name], state[name]) for name in state)


def test_modernbert_as_it_is_on_the_hub(tmp_path):
    """A config.json from before `layer_types` and `rope_parameters`."""
    source = save(random_model("modernbert"), tmp_path / "source")
    fields = {name: value for name, value in config(source).items() if name not in ("layer_types", "rope_parameters")}
    old = {"global_attn_every_n_layers": 3, "position_embedding_type": "absolute", "global_rope_theta": 160000.0}
    (source / "config.json").write_text(json.dumps(fields | old | {"local_rope_theta": 10000.0}))
    out = converted(source, "--max-length", 4 * LENGTH, "--block", 16)
    assert transformers.AutoConfig.from_pretrained(out).layer_types[:2] == ["full_attention", "sliding_attention"]
    assert "2 of 4" in convert(source, "--dry-run").stdout


@pytest.mark.skipif(not hasattr(transformers, "JinaEmbeddingsV3Model"), reason="this transformers has no Jina v3")
def test_a_class_of_another_model_does_not_count(tmp_path):
    """Jina's own code states XLM-RoBERTa's class for a model with rotary positions."""
    source = save(random_model("jina_embeddings_v3"), tmp_path / "source")
    change(source, model_type=None, architectures=["XLMRobertaModel"])
    model = bsa_export.load(converted(source, "--max-length", LENGTH, "--block", 16))
    assert_same(outputs(model), outputs(random_model("jina_embeddings_v3")))


def test_a_model_type_of_null_is_none(tmp_path):
    source = save(random_model("albert"), tmp_path / "source")
    change(source, model_type=None)
    out = converted(source, "--max-length", LENGTH, "--block", 16)
    assert config(out)["model_type"] == "albert"
    assert_same(outputs(bsa_export.load(out)), outputs(random_model("albert")))


def test_eurobert_is_not_tied_unless_its_config_says_so(tmp_path):
    """A head that was copied from the embeddings stays, because the class does not look for it there."""
    model = random_model("eurobert")
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    source = save(model, tmp_path / "source")
    fields = {name: value for name, value in config(source).items() if name != "tie_word_embeddings"}
    (source / "config.json").write_text(json.dumps(fields))
    out = converted(source, "--max-length", LENGTH, "--block", 16)
    assert record(out)["tied"] == {}
    assert_same(outputs(bsa_export.load(out)), outputs(model))


def test_padding_is_put_back_into_a_tuple_too(tmp_path):
    source = save(random_model("esm-rotary", "Model"), tmp_path / "source")
    model, batch = bsa_export.load(converted(source, "--max-length", LENGTH, "--block", 16)), inputs()
    expected = model(**batch).last_hidden_state
    model.config.return_dict = False
    assert torch.equal(model(**batch)[0], expected)


def test_nomic_bert_as_it_is_on_the_hub():
    """transformers takes the sizes from its class, because the config.json has other names for them."""
    fields = {"model_type": "nomic_bert", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 30528}
    fields |= {"activation_function": "swiglu", "causal": False, "layer_norm_epsilon": 1e-12, "parallel_block": False}
    fields |= {"prenorm": False, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False}
    fields |= {"rotary_emb_scale_base": None, "rotary_scaling_factor": None, "use_rms_norm": False}
    family = FAMILIES["nomic_bert"]
    spec = dense_spec(family, fields, "", family.structures[1])
    own = {name: entry.shape for name, entry in spec.items() if not name.startswith(("cls.", "pooler."))}
    rows = {name: Tensor("F32", shape, Computed(lambda: iter(()))) for name, shape in own.items()}
    planned = plan(rows, fields)
    assert planned.source_length == 2048 and planned.max_length == 8 * 2048
    assert planned.config["num_attention_heads"] == 12 and planned.implied_config["hidden_size"] == 768
    assert "encoder.layers.11.self_attn.sparse_self_attention.master_layout" in planned.added


REFUSED = {
    "kinds of too few layers": ("modernbert", {"layer_types": ["full_attention"]}, "the kind of each of 4 layers"),
    "a kind of layers of another model": (
        "modernbert",
        {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]},
        "expected sliding_attention or full_attention, found 'chunked_attention'",
    ),
    "a band of nothing": ("modernbert", {"local_attention": 0}, "local_attention: expected a positive integer"),
    "a decoder": ("roberta-prelayernorm", {"is_decoder": True}, "found is_decoder"),
    "a causal encoder": ("modernbert", {"is_causal": True}, "found is_causal"),
    "another base": (
        "nomic_bert",
        {"rotary_emb_base": 10_000},
        "rotary_emb_base: expected 1000, because NomicBertModel",
    ),
    "scaling by its own code": ("nomic_bert", {"rotary_scaling_factor": 2.0}, "rotary_scaling_factor: expected none"),
    "norms by its own code": ("gte", {"layer_norm_type": "rms_norm"}, "layer_norm_type: expected layer_norm"),
    "pooling by its own code": (
        "eurobert",
        {"clf_pooling": "mean"},
        "clf_pooling: expected late, because EuroBertModel",
    ),
    "ESMFold": ("esm-rotary", {"is_folding_model": True}, "is_folding_model: expected False, found True"),
    "relative positions": ("esm-absolute", {"position_embedding_type": "relative_key"}, "'relative_key'"),
    "ALiBi": ("xlm-roberta-xl", {"alibi_starting_size": 64}, "found alibi_starting_size: ALiBi"),
    "inner groups": ("albert", {"inner_group_num": 2}, "inner_group_num: expected 1, found 2"),
    "more layers": ("xlm-roberta-xl", {"num_hidden_layers": 3}, "encoder.layer.2."),
    "fewer layers": ("esm-rotary", {"num_hidden_layers": 1}, "num_hidden_layers 1 but the tensors 2"),
    "another size": ("albert", {"intermediate_size": 56}, "config.json has intermediate_size 56"),
    "another hidden size": ("jina_embeddings_v3", {"hidden_size": 64}, "hidden_size 64 but the tensors 32"),
    "sizes by other names": (
        "nomic_bert",
        {"hidden_size": None, "n_embd": 32, "head_dim": None},
        "config.json has hidden_size 768 by default but the tensors 32",
    ),
    "a scaling by the length": (
        "gte",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        "yarn scaling",
    ),
    "a scaling that is no object": ("gte", {"rope_parameters": "linear"}, "rope_parameters: expected an object"),
    "a scaling that transformers lacks": (
        "nomic_bert",
        {"rope_parameters": None, "rope_scaling": {"type": "ntk", "factor": 2.0}},
        "found 'ntk'",
    ),
    "one scaling of two by the length": (
        "modernbert",
        {"rope_parameters": {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {"rope_type": "default"}}},
        "yarn scaling",
    ),
    "a scaling in the older field": (
        "jina_embeddings_v3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "yarn scaling",
    ),
    "heads that are rotated in part": (
        "eurobert",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor: expected 1, because the class rotates whole heads, found 0.5",
    ),
    "heads that do not divide": ("eurobert-grouped", {"num_key_value_heads": 3}, "num_key_value_heads"),
    "a decoder of the same names": ("eurobert", {"model_type": "llama"}, "model_type of a BERT family"),
    "neither type nor class": ("eurobert", {"model_type": None, "architectures": None}, "of a BERT family"),
    "positions of another kind": ("esm-absolute", {"position_embedding_type": "rotary"}, None),
}


@pytest.mark.parametrize(("kind", "what"), [runnable(kind, what) for what, (kind, *_) in REFUSED.items()])
def test_what_is_refused(tmp_path, kind, what):
    _, fields, words = REFUSED[what]
    source = save(random_model(kind), tmp_path / "source")
    (source / "config.json").write_text(json.dumps(config(source) | fields))
    if words is None:  # ESM-2 on the Hub has a position table that its class does not read
        assert record(converted(source))["changed"] == {}
    else:
        assert words in refused(source, tmp_path / "out")


@pytest.mark.parametrize("kind", RUN)
def test_a_missing_tensor_is_named(tmp_path, kind):
    source = save(random_model(kind), tmp_path / "source")
    weights = tensors(source)
    gone = next(name for name in weights if name.endswith(KINDS[kind].projection))
    del weights[gone]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert gone in refused(source, tmp_path / "out")


def layers_of(model):
    """The layers, in the order in which they run."""
    base = model.base_model
    encoder = getattr(base, "encoder", base)
    groups = getattr(encoder, "albert_layer_groups", None)
    return groups or getattr(encoder, "layer", None) or encoder.layers


@pytest.mark.parametrize("kind", RUN)
def test_no_layer_works_on_right_padding(tmp_path, kind):
    model = bsa_export.load(converted(save(random_model(kind), tmp_path / "source"), "--block", 16))
    seen, layers, batch = [], layers_of(model), inputs()
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    out = model(**batch).logits
    assert set(seen) == {(1, int(batch["attention_mask"].sum()), 32)} and out.shape[:2] == batch["input_ids"].shape
    seen.clear()
    hidden = model(**batch, output_hidden_states=True).hidden_states
    assert set(seen) == {(*batch["input_ids"].shape, 32)} and {state.shape for state in hidden[1:]} == set(seen)
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    seen.clear()
    assert model(**batch).logits.isfinite().all()
    assert set(seen) == {(*batch["input_ids"].shape, 32)}


@pytest.mark.parametrize("kind", RUN)
def test_gradients_do_not_depend_on_padding(tmp_path, kind):
    """Of a loss over the real tokens, in a batch and text by text, with checkpoints and without."""
    model = bsa_export.load(converted(save(random_model(kind), tmp_path / "source"), "--block", 16))
    batch = inputs()
    lengths = batch["attention_mask"].sum(1).tolist()

    def gradients(*calls):
        model.zero_grad()
        for ids, mask in calls:
            logits = model(input_ids=ids, attention_mask=mask).logits
            logits[mask.bool()].square().sum().backward()
        return [x.grad.clone() for x in model.base_model.parameters() if x.grad is not None]

    alone = [
        (ids[None, :length], torch.ones(1, length).long())
        for ids, length in zip(batch["input_ids"], lengths, strict=True)
    ]
    expected, whole = gradients(*alone), (batch["input_ids"], batch["attention_mask"])
    found = [gradients(whole)]
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
        found.append(gradients(whole))
    for each in found:
        for one, other in zip(each, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3 * float(other.abs().max()) + 1e-6, rtol=1e-3)


PACKS = [runnable(kind) for kind, row in KINDS.items() if row.reserved == 0]


@pytest.mark.parametrize("kind", PACKS)
def test_texts_packed_as_transformers_packs_them_do_not_meet(tmp_path, kind):
    model = bsa_export.load(
        converted(save(random_model(kind), tmp_path / "source"), "--max-length", 128, "--block", 16)
    )
    ids = torch.randint(4, 99, (3, 100), generator=torch.Generator().manual_seed(1))
    texts = [ids[0], ids[1, :37], ids[2, :70]]  # 207 tokens, more than the model's longest text
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packed = collate([{"input_ids": text.tolist()} for text in texts])
    with torch.no_grad():
        found = model(**packed).logits[0].split([len(text) for text in texts])
        for text, logits in zip(texts, found, strict=True):
            torch.testing.assert_close(logits, model(text[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", RUN)
def test_a_trained_model_is_converted_as_it_is(tmp_path, kind):
    out = converted(save(random_model(kind), tmp_path / "source"), "--max-length", 4 * LENGTH, "--block", 16)
    model = bsa_export.load(out)
    model.save_pretrained(tmp_path / "trained")
    assert convert(tmp_path / "trained", tmp_path / "again").exit_code == 0
    assert record(tmp_path / "again")["sparse_source"] and record(tmp_path / "again")["added"] == []
    assert_same(outputs(bsa_export.load(tmp_path / "again"), 4 * LENGTH), outputs(model, 4 * LENGTH), 0)
    assert not check_layout(tmp_path / "again").failed


def change(folder, **fields):
    (folder / "config.json").write_text(json.dumps(config(folder) | fields))


@pytest.mark.skipif(not hasattr(transformers, "GteModel"), reason="this transformers has no GteModel")
def test_a_transformers_that_is_too_old_is_named(tmp_path, monkeypatch):
    """ModernBERT of transformers 5.0 does not call the attention interface, and GTE came later."""
    out = converted(save(random_model("gte"), tmp_path / "source"))
    monkeypatch.setattr(transformers.GteForMaskedLM, "_supports_attention_backend", False)
    with pytest.raises(CheckpointError, match="calls no registered attention function.*install a newer transformers"):
        bsa_export.load(out)
    change(out, architectures=["OfATransformersToCome"])
    monkeypatch.delitem(transformers.CONFIG_MAPPING._mapping, "gte")
    with pytest.raises(CheckpointError, match="has no model_type gte; install a newer transformers"):
        bsa_export.load(out)
