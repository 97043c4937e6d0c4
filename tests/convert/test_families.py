"""Every family, with and without prefix and heads: names, bits, the source's outputs. What is no BERT is refused."""

import json

import pytest
import torch
import transformers
from support.more_families import KINDS
from tiny_models import (
    CLASSES,
    LENGTH,
    RESERVED,
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
    tiny,
)

import bsa_export
from bsa_export.bert.families import FAMILIES

HEADS = (
    "Model", "ForMaskedLM", "ForPreTraining", "ForNextSentencePrediction", "ForSequenceClassification",
    "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice",
)  # fmt: skip
MODELS = [
    (family, head) for family, prefix in CLASSES.items() for head in HEADS if hasattr(transformers, prefix + head)
]
# Heads that compute what no head of BERT does: the encoder alone is as it was.
ENCODER_ONLY = [("distilbert", "ForSequenceClassification"), ("distilbert", "ForMultipleChoice")]


def is_extended(name):
    return name.endswith("position_embeddings.weight")


def outputs(model, head, length=LENGTH):
    """What a model says of a batch, without what stands on padding."""
    batch = inputs(length, choices=head == "ForMultipleChoice")
    with torch.no_grad():
        out = model(**batch)
    real = batch["attention_mask"].bool()
    found = [tensor for tensor in out.to_tuple() if torch.is_tensor(tensor)]
    return [tensor[real] if tensor.shape[:2] == real.shape else tensor for tensor in found]


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_a_longer_model_gives_the_sources_outputs(tmp_path, family, head):
    source = tiny(family, head)
    out = converted(save(source, tmp_path / "source"), "--max-length", 4 * LENGTH, "--block", 16)
    if (family, head) in ENCODER_ONLY:
        model, source, head = encoder(out), source.base_model, "Model"
    else:
        model = bsa_export.load(out)
    assert config(out)["max_position_embeddings"] == 4 * LENGTH + RESERVED.get(family, 0)
    found, expected = outputs(model, head), outputs(source, head)
    assert len(found) >= len(expected) > 0
    for one, other in zip(found, expected, strict=False):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    if head != "ForMultipleChoice":
        assert all(tensor.isfinite().all() for tensor in outputs(model, head, 4 * LENGTH - 5))


def encoder(out):
    return transformers.AutoModel.from_pretrained(out, attn_implementation="block_sparse").eval()


@pytest.mark.parametrize(("family", "head"), [case for case in MODELS if case[0] != "distilbert"])
def test_every_tensor_keeps_its_name_and_bits(tmp_path, family, head):
    source = save(tiny(family, head), tmp_path / "source")
    before = tensors(source)
    out = converted(source, "--max-length", 2 * LENGTH)
    after, told = tensors(out), record(out)
    layouts = {name for name in after if name.endswith(".attention.self.sparse_self_attention.master_layout")}
    assert len(layouts) == 2 and set(told["added"]) == layouts
    assert set(after) - layouts == set(before)
    assert (told["renamed"], told["dropped"], told["tied"]) == ({}, {}, {})
    assert list(told["changed"]) == [name for name in before if is_extended(name)]
    assert all(same_bits(after[name], before[name]) for name in before if not is_extended(name))


def test_distilbert_is_written_in_berts_names(tmp_path):
    model = tiny("distilbert")
    out = converted(save(model, tmp_path / "source"), "--max-length", LENGTH)
    after, before, told = tensors(out), model.state_dict(), record(out)
    bert = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(out))
    missing, unexpected = bert.load_state_dict(after, strict=False)
    assert all(name.endswith("master_layout") for name in unexpected)
    assert set(missing) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}  # tied
    assert told["tied"] == {"vocab_projector.weight": "bert.embeddings.word_embeddings.weight"} or told["tied"] == {}
    assert all(same_bits(after[new], before[old]) for old, new in told["renamed"].items())
    assert told["added"][0] == "bert.embeddings.token_type_embeddings.weight"
    assert not after["bert.embeddings.token_type_embeddings.weight"].any()
    assert config(out)["architectures"] == ["BertForMaskedLM"] and config(out)["model_type"] == "bert"
    assert told["source"]["config"]["model_type"] == "distilbert"


@pytest.mark.parametrize(("family", "head"), ENCODER_ONLY)
def test_a_distilbert_head_that_bert_lacks_is_kept_and_told(tmp_path, family, head):
    source = save(tiny(family, head), tmp_path / "source")
    result = convert(source, tmp_path / "out")
    assert result.exit_code == 0
    assert f"DistilBert{head}" in result.stdout
    assert [note["kind"] for note in record(tmp_path / "out")["notes"]] == ["head without class"]
    assert {"pre_classifier.weight", "classifier.weight"} < set(tensors(tmp_path / "out"))


@pytest.mark.parametrize("family", CLASSES)
def test_names_without_prefix_are_known(tmp_path, family):
    """An encoder saved alone, `embeddings...`, and the same inside a model with a head, `bert.embeddings...`."""
    model = tiny(family, "ForMaskedLM")
    fields = model.config.to_dict()
    bare = save_tensors(tmp_path / "bare", model.base_model.state_dict(), fields)
    whole = save_tensors(tmp_path / "whole", model.state_dict(), fields)
    bare, whole = (tensors(converted(source)) for source in (bare, whole) if not _remove(source.parent / "out"))
    prefix = "bert" if family == "distilbert" else FAMILIES[family].prefix
    assert "embeddings.word_embeddings.weight" in bare
    assert all(same_bits(tensor, whole[f"{prefix}.{name}"]) for name, tensor in bare.items())


def _remove(folder):
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    return False


@pytest.mark.parametrize("family", [family for family in CLASSES if family != "distilbert"])
def test_old_spellings_and_buffers(tmp_path, family):
    """`gamma` and `beta` of TensorFlow's heritage, and buffers that older transformers saved."""
    model = tiny(family)
    prefix, rows = FAMILIES[family].prefix, LENGTH + RESERVED.get(family, 0)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.state_dict().items()
    }
    old[f"{prefix}.embeddings.position_ids"] = torch.arange(rows)[None]
    old[f"{prefix}.embeddings.token_type_ids"] = torch.zeros(1, rows, dtype=torch.int64)
    fields = model.config.to_dict() | {"architectures": [f"{CLASSES[family]}ForMaskedLM"]}
    out = converted(save_tensors(tmp_path / "source", old, fields), "--max-length", 2 * LENGTH)
    told = record(out)
    assert set(told["dropped"]) == {f"{prefix}.embeddings.position_ids", f"{prefix}.embeddings.token_type_ids"}
    assert f"{prefix}.embeddings.LayerNorm.weight" in told["renamed"].values()
    assert not any(name.endswith((".gamma", ".beta", "_ids")) for name in tensors(out))
    torch.testing.assert_close(
        outputs(bsa_export.load(out), "ForMaskedLM")[0], outputs(model, "ForMaskedLM")[0], atol=2e-5, rtol=2e-5
    )


def tied_names(family):
    prefix = FAMILIES[family].prefix
    return {
        name: f"{prefix}{holder}" if holder.startswith(".") else holder
        for name, holder in FAMILIES[family].tied.items()
    }


@pytest.mark.parametrize("how", ["shared", "copied"])
@pytest.mark.parametrize("family", [family for family in CLASSES if family != "distilbert"])
def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path, family, how):
    model = tiny(family)
    state = dict(model.state_dict())
    for name, holder in tied_names(family).items():
        assert state[name].data_ptr() == state[holder].data_ptr()
        if how == "copied":
            state[name] = state[holder].clone()
    fields = model.config.to_dict() | {"architectures": [f"{CLASSES[family]}ForMaskedLM"]}
    out = converted(save_tensors(tmp_path / "source", state, fields))
    assert record(out)["tied"] == tied_names(family)
    assert not set(tied_names(family)) & set(tensors(out))
    loaded = bsa_export.load(out)
    parts = dict(loaded.named_parameters(remove_duplicate=False))
    assert all(parts[name] is parts[holder] for name, holder in tied_names(family).items())
    torch.testing.assert_close(
        outputs(loaded, "ForMaskedLM")[0], outputs(model, "ForMaskedLM")[0], atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: f"module.model._orig_mod.{name}",
        lambda name: name.replace("bert.", "encoder.", 1),
    ],
    ids=["torch.compile", "Lightning", "all of them", "another name of the encoder"],
)
def test_what_a_wrapper_puts_before_names_goes(tmp_path, wrapped, head):
    model = tiny("bert", head)
    state = {wrapped(name): tensor for name, tensor in model.state_dict().items()}
    fields = model.config.to_dict() | {"architectures": [type(model).__name__]}
    out = converted(save_tensors(tmp_path / "source", state, fields), "--max-length", 4 * LENGTH)
    loaded, found = type(model).from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"]
    plain = converted(save(model, tmp_path / "plain" / "source"), "--max-length", 4 * LENGTH)
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert convert(out, tmp_path / "dense", "--to-dense").exit_code == 0
    assert set(tensors(tmp_path / "dense")) == {
        name.replace("_orig_mod.", "").removeprefix("module.") for name in state
    }


def test_the_class_tells_the_family_where_no_prefix_does(tmp_path):
    model = tiny("roberta", "Model")
    fields = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "pad_token_id")}
    source = save_tensors(tmp_path / "source", model.state_dict(), fields | {"architectures": ["RobertaModel"]})
    out = converted(source, "--max-length", 4 * LENGTH)
    assert record(out)["family"] == "roberta" and record(out)["positions"]["reserved"] == 2


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_shared_storage_that_the_config_does_not_tie_is_written_twice(tmp_path, family):
    model = tiny(family)
    fields = model.config.to_dict() | {"tie_word_embeddings": False, "architectures": [type(model).__name__]}
    out = converted(save_tensors(tmp_path / "source", model.state_dict(), fields))
    loaded, found = type(model).from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"] and record(out)["tied"] == {}
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_a_tied_decoder_that_lies_transposed_is_seen(tmp_path):
    model = tiny("bert", vocab_size=12000, hidden_size=48)
    state = model.state_dict()
    state["cls.predictions.decoder.weight"] = state["cls.predictions.decoder.weight"].t().contiguous().t()
    fields = model.config.to_dict() | {"architectures": ["BertForMaskedLM"]}
    out = converted(save_tensors(tmp_path / "source", state, fields))
    assert "cls.predictions.decoder.weight" in record(out)["tied"]


@pytest.mark.parametrize("family", [family for family in CLASSES if family != "distilbert"])
def test_decoders_of_their_own_stay_untied(tmp_path, family):
    model = tiny(family, tie_word_embeddings=False)
    source = save(model, tmp_path / "source")
    assert set(tied_names(family)) <= set(tensors(source))
    out = converted(source)
    assert record(out)["tied"] == {}
    torch.testing.assert_close(
        outputs(bsa_export.load(out), "ForMaskedLM")[0], outputs(model, "ForMaskedLM")[0], atol=2e-5, rtol=2e-5
    )


def test_an_absent_decoder_bias_is_no_fault(tmp_path):
    model = tiny("bert")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "cls.predictions.decoder.bias"}
    fields = model.config.to_dict() | {"architectures": ["BertForMaskedLM"]}
    out = converted(save_tensors(tmp_path / "source", state, fields))
    torch.testing.assert_close(
        outputs(bsa_export.load(out), "ForMaskedLM")[0], outputs(model, "ForMaskedLM")[0], atol=2e-5, rtol=2e-5
    )


def test_heads_that_no_table_knows_pass_through(tmp_path):
    model = tiny("bert")
    extra = {"species_head.weight": torch.randn(3, 32), "steps": torch.tensor(7)}
    fields = model.config.to_dict() | {"architectures": ["MyBert"]}
    out = converted(save_tensors(tmp_path / "source", dict(model.state_dict()) | extra, fields))
    assert all(same_bits(tensors(out)[name], tensor) for name, tensor in extra.items())
    assert config(out)["architectures"] == ["MyBert"]


@pytest.mark.parametrize("prefixed", [True, False], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("family", CLASSES)
def test_without_a_model_type_the_names_tell(tmp_path, family, prefixed):
    model = tiny(family, length=128)
    fields = model.config.to_dict() | {"architectures": ["TheirOwnModel"]}
    del fields["model_type"]
    state = model.state_dict() if prefixed else model.base_model.state_dict()
    out = converted(save_tensors(tmp_path / "source", state, fields), "--max-length", 512)
    layout = next(tensor for name, tensor in tensors(out).items() if name.endswith("master_layout"))
    assert layout.shape == (4, 8, 8)
    assert config(out)["max_position_embeddings"] == 512 + RESERVED.get(family, 0)
    # Only what the names do not show, which relative of RoBERTa or BERT it is, may differ.
    alike = {"xlm-roberta": "roberta", "camembert": "roberta"} | ({} if prefixed else {"data2vec-text": "roberta"})
    alike |= {} if prefixed else {"ernie": "bert"}
    assert record(out)["family"] == alike.get(family, family)


def test_a_config_without_optional_fields_is_enough(tmp_path):
    model = tiny("bert")
    names = (
        "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size",
        "max_position_embeddings",
    )  # fmt: skip
    fields = {name: model.config.to_dict()[name] for name in names}
    out = converted(save_tensors(tmp_path / "source", model.state_dict(), fields))
    assert record(out)["family"] == "bert"


def test_list_families():
    result = convert("--list-families")
    assert result.exit_code == 0
    assert result.stdout.split() == list(FAMILIES)
    assert {*FAMILIES} == {*CLASSES, *(row.family for row in KINDS.values()), "bsa_bert"}


OTHERS = {
    "longformer": ("LongformerConfig", "LongformerForMaskedLM", {"attention_window": 16}),
    "big_bird": ("BigBirdConfig", "BigBirdForMaskedLM", {}),
    "layoutlm": ("LayoutLMConfig", "LayoutLMForMaskedLM", {}),
    "visual_bert": ("VisualBertConfig", "VisualBertForPreTraining", {"visual_embedding_dim": 16}),
    "markuplm": ("MarkupLMConfig", "MarkupLMModel", {}),
    "bros": ("BrosConfig", "BrosModel", {}),
    "splinter": ("SplinterConfig", "SplinterForPreTraining", {}),
    "dpr": ("DPRConfig", "DPRQuestionEncoder", {}),
    "mobilebert": ("MobileBertConfig", "MobileBertForMaskedLM", {"embedding_size": 32, "intra_bottleneck_size": 32,
     "true_hidden_size": 32}),
    "roc_bert": ("RoCBertConfig", "RoCBertForMaskedLM", {}),
    "mpnet": ("MPNetConfig", "MPNetForMaskedLM", {}),
    "megatron-bert": ("MegatronBertConfig", "MegatronBertForMaskedLM", {}),
    "deberta": ("DebertaConfig", "DebertaForMaskedLM", {}),
    "deberta-v2": ("DebertaV2Config", "DebertaV2ForMaskedLM", {}),
    "convbert": ("ConvBertConfig", "ConvBertForMaskedLM", {"embedding_size": 32}),
    "roformer": ("RoFormerConfig", "RoFormerForMaskedLM", {"embedding_size": 32}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "t5": ("T5Config", "T5EncoderModel", {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48, "d_kv": 8}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"n_layer": 2, "n_head": 4}),
    "vit": ("ViTConfig", "ViTModel", {"image_size": 32}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "told"),
    [(kind, told) for kind in OTHERS for told in (True, False)],
)
def test_other_architectures_are_refused_with_the_families(tmp_path, kind, told):
    config_class, model_class, fields = OTHERS[kind]
    sizes = {} if kind in ("gpt2", "t5") else {"max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 1}
    config = getattr(transformers, config_class)(**{"vocab_size": 99, "num_hidden_layers": 2, "hidden_size": 32} | {
        "num_attention_heads": 4, "intermediate_size": 48} | special | sizes | fields)  # fmt: skip
    source = save(getattr(transformers, model_class)(config), tmp_path / "source")
    if not told:
        fields = json.loads((source / "config.json").read_text())
        del fields["model_type"]
        (source / "config.json").write_text(json.dumps(fields))
    text = refused(source, tmp_path / "out")
    if told:
        assert text.endswith(f"found {kind!r}")  # whatever its tensors look like
    if told or kind != "bloom":  # its tensors are named as Megatron-LM's
        assert all(family in text for family in FAMILIES), text
    if kind == "llama" and not told:
        assert text.endswith("none, and tensors such as lm_head.weight")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"is_decoder": True}, "found is_decoder"),
        ({"add_cross_attention": True}, "found add_cross_attention"),
        ({"pre_layer_norm": True}, "found pre_layer_norm"),
        ({"rotary_value": True}, "found rotary_value"),
        ({"pruned_heads": {"0": [1]}}, "found pruned_heads"),
        ({"quantization_config": {"load_in_8bit": True}}, "found quantization_config"),
        ({"position_embedding_type": "relative_key"}, "found position_embedding_type 'relative_key'"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers: expected at most"),
        ({"num_attention_heads": 5}, "expected num_attention_heads that divides hidden_size 32, found 5"),
        ({"num_attention_heads": None}, "num_attention_heads: expected a positive integer, found none"),
        ({"hidden_size": "32"}, "hidden_size: expected a positive integer, found '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer, found 0"),
    ],
)  # fmt: skip
def test_configs_of_what_cannot_be_converted(tmp_path, fields, told):
    model = tiny("bert")
    source = save_tensors(tmp_path / "source", model.state_dict(), model.config.to_dict() | fields)
    assert told in refused(source, tmp_path / "out")
