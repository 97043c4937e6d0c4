"""Converted models of every family in stock transformers classes: outputs, lengths, padding, refusals."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from sparse_folder import (  # noqa: E402
    BLOCK,
    FAMILIES,
    LAYERS,
    LONGEST,
    SHORT,
    assert_as_good_as_dense,
    batch,
    dense_folder,
    layouts_in,
    masked_by_layouts,
    outputs,
    sparse_folder,
)

import bsa_export  # noqa: E402
from bsa_export.errors import AttentionError  # noqa: E402

AutoModelForMaskedLM = transformers.AutoModelForMaskedLM


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Family -> its small model, converted once, with random blocks for each layer and head."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = sparse_folder(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


@pytest.fixture(scope="module")
def bert(folder_of):
    return folder_of("bert")


def under_layouts(folder, inputs, dtype, keep=None, auto=AutoModelForMaskedLM):
    """What the dense class makes of it, given the layouts as 4-D masks."""
    model = auto.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    masked_by_layouts(model, layouts_in(folder), BLOCK, inputs["attention_mask"] if keep is None else keep)
    return outputs(model, inputs)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_agrees_with_its_dense_class_under_the_same_mask(family, padding, folder_of):
    folder, inputs = folder_of(family), batch(padding=padding)
    auto = getattr(transformers, FAMILIES[family][1])
    found = outputs(auto.from_pretrained(folder, attn_implementation="block_sparse"), inputs)
    exact, dense = (under_layouts(folder, inputs, dtype, auto=auto) for dtype in (torch.float64, torch.float32))
    assert_as_good_as_dense(found, exact, dense)
    plain = outputs(auto.from_pretrained(folder, attn_implementation="sdpa"), inputs)
    assert (found - plain).abs().max() > 0.1  # the layouts do change something


@pytest.mark.parametrize("mode", ["dense", "windowed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_up_to_the_sources_length_it_agrees_with_the_source(family, mode, tmp_path):
    """Also DistilBERT's own class with the BERT that it becomes; `windowed` keeps every block up to that length."""
    folder, inputs = sparse_folder(tmp_path, family, options={"mode": mode}), batch(SHORT, "right")
    source = getattr(transformers, FAMILIES[family][0])
    exact, dense = (
        outputs(source.from_pretrained(tmp_path / "source", dtype=dtype), inputs)
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_good_as_dense(outputs(bsa_export.load(folder), inputs), exact, dense)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_length_up_to_the_longest(bert, length, dtype):
    inputs = batch(length)
    found = outputs(AutoModelForMaskedLM.from_pretrained(bert, attn_implementation="block_sparse", dtype=dtype), inputs)
    exact, dense = (under_layouts(bert, inputs, each) for each in (torch.float64, dtype))
    assert_as_good_as_dense(found, exact, dense)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_longer_text_is_refused_in_a_sentence(folder_of, family):
    model = bsa_export.load(folder_of(family))
    with pytest.raises(AttentionError, match="reads up to 128 tokens, found 129; truncate"):
        model(**batch(LONGEST + 1))
    with pytest.raises(AttentionError, match="found 130"):
        model(inputs_embeds=torch.zeros(1, 130, 32))


# Masks and padding


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_4d_mask_of_the_callers_own_works(bert, kind):
    inputs = batch(64)
    pairs = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(2)) < 0.8
    pairs = pairs | torch.eye(64, dtype=torch.bool)
    own = pairs if kind == "bool" else torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found = bsa_export.load(bert)(inputs["input_ids"], attention_mask=own).logits.flatten(0, 1).double()
    exact, dense = (under_layouts(bert, inputs, dtype, keep=pairs) for dtype in (torch.float64, torch.float32))
    assert_as_good_as_dense(found, exact, dense)


def test_one_4d_padding_mask_for_the_whole_batch_works(bert):
    model, inputs = bsa_export.load(bert), batch(64)
    keep = torch.ones(1, 64, dtype=torch.bool)
    keep[:, 50:] = False
    with torch.no_grad():
        found = model(inputs["input_ids"], attention_mask=keep[:, None, None]).logits
        expected = model(inputs["input_ids"], attention_mask=keep.expand(3, -1).long()).logits
    torch.testing.assert_close(found[:, :50], expected[:, :50], atol=1e-4, rtol=1e-4)


def test_attention_mask_may_be_left_out(bert):
    model, inputs = bsa_export.load(bert), batch()
    assert torch.equal(model(inputs["input_ids"]).logits, model(**inputs).logits)


def test_a_text_of_nothing_but_padding_is_fine(bert):
    model, inputs = bsa_export.load(bert), batch(padding="right")
    expected = model(**inputs).logits
    inputs["attention_mask"][1] = 0
    found = model(**inputs).logits
    assert found.isfinite().all()
    torch.testing.assert_close(found[2, :33], expected[2, :33], atol=1e-4, rtol=1e-4)
    inputs["attention_mask"][:] = 0
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_works_on_right_padding(folder_of, family):
    model, seen = bsa_export.load(folder_of(family)), []
    model.base_model.encoder.layer[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    inputs = batch(padding="right")
    out = model(**inputs).logits
    assert seen == [(1, int(inputs["attention_mask"].sum()), 32)]
    assert out.shape[:2] == inputs["input_ids"].shape


def test_texts_packed_as_transformers_packs_them_do_not_meet(bert):
    model, inputs = bsa_export.load(bert), batch()["input_ids"]
    texts = [inputs[0], inputs[1, :37], inputs[2, :70]]  # 207 tokens, more than the model's longest text
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packed = collate([{"input_ids": text.tolist()} for text in texts])
    with torch.no_grad():
        found = model(**packed).logits[0].split([len(text) for text in texts])
        for text, logits in zip(texts, found, strict=True):
            torch.testing.assert_close(logits, model(text[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("told", [True, False], ids=["max_length_q", "cu_seq_lens_q"])
def test_a_packed_text_that_is_too_long_is_refused_in_a_sentence(bert, told):
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packed = collate([{"input_ids": [5] * length} for length in (40, LONGEST + 1)])
    if not told:
        del packed["max_length_q"]
    with pytest.raises(AttentionError, match="reads up to 128 tokens, found 129; truncate"):
        bsa_export.load(bert)(**packed)


@pytest.mark.parametrize("padding", ["none", "right"])
def test_hidden_states_have_the_shape_of_the_batch(bert, padding):
    hidden = bsa_export.load(bert)(**batch(padding=padding), output_hidden_states=True).hidden_states
    assert [tuple(h.shape) for h in hidden] == [(3, 100, 32)] * (LAYERS + 1)


# What it refuses


def test_output_attentions_is_refused_in_a_sentence(bert):
    with pytest.raises(ValueError, match='never holds the probabilities; .*attn_implementation="eager"'):
        bsa_export.load(bert)(**batch(), output_attentions=True)


@pytest.mark.parametrize("changes", [{"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}], ids=str)
def test_decoders_and_cross_attention_are_refused_in_a_sentence(bert, changes):
    with pytest.raises(AttentionError, match="block-sparse attention runs encoders only"):
        transformers.BertLMHeadModel.from_pretrained(bert, attn_implementation="block_sparse", **changes)


def test_a_dense_checkpoint_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(AttentionError, match="needs the sparse_attention section of a converted model"):
        AutoModelForMaskedLM.from_pretrained(dense_folder(tmp_path), attn_implementation="block_sparse")


def test_a_missing_layout_is_never_made_up(bert):
    model = AutoModelForMaskedLM.from_pretrained(bert, attn_implementation="block_sparse").eval()
    fresh = AutoModelForMaskedLM.from_config(model.config, attn_implementation="block_sparse").eval()
    dense = AutoModelForMaskedLM.from_pretrained(bert, attn_implementation="sdpa")
    dense.set_attn_implementation("block_sparse")
    for each in (fresh, dense):
        with pytest.raises(AttentionError, match="no stored layout"):
            each(**batch())
