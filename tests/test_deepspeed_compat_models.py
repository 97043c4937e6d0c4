"""Old model code on `bsa_export.deepspeed_compat`: layers in fp16, and Hugging Face models made sparse in memory."""

import json

import pytest
import torch
from test_deepspeed_compat import WITHOUT_DEEPSPEED, run_python, to_mask

from bsa_export.deepspeed_compat.sparse_attention import (
    BigBirdSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    SparseAttentionUtils,
    SparseSelfAttention,
)

transformers = pytest.importorskip("transformers")

from sparse_folder import masked_by_layouts  # noqa: E402


def test_a_layer_of_old_code_runs_unchanged_in_fp16():
    code = """
    import bsa_export.deepspeed_compat

    import torch
    from torch import nn
    from deepspeed.ops.sparse_attention import FixedSparsityConfig, SparseSelfAttention

    class LongSelfAttention(nn.Module):
        def __init__(self, hidden_size=64, num_heads=4):
            super().__init__()
            self.num_heads = num_heads
            self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
            cfg = FixedSparsityConfig(num_heads=num_heads, block=16, num_local_blocks=4, num_global_blocks=1)
            self.sparse_self_attention = SparseSelfAttention(cfg, max_seq_length=4096)

        def forward(self, hidden_states, attention_mask):
            b, s, h = hidden_states.shape
            qkv = self.qkv(hidden_states).chunk(3, dim=-1)
            q, k, v = (x.view(b, s, self.num_heads, -1).permute(0, 2, 1, 3) for x in qkv)
            mask = (1.0 - attention_mask[:, None, None, :].to(q.dtype)) * -10000.0
            out = self.sparse_self_attention(q, k, v, key_padding_mask=mask)
            return out.permute(0, 2, 1, 3).reshape(b, s, h)

    torch.manual_seed(0)
    layer = LongSelfAttention().half()
    x = torch.randn(2, 256, 64).half().requires_grad_()
    mask = torch.ones(2, 256); mask[1, 200:] = 0
    out = layer(x, mask)
    out.float().square().sum().backward()
    buffer = layer.state_dict()["sparse_self_attention.master_layout"]
    print(out.dtype, tuple(out.shape), bool(x.grad.isfinite().all()), buffer.dtype, tuple(buffer.shape))
    """
    expected = "torch.float16 (2, 256, 64) True torch.int64 (4, 256, 256)"
    assert run_python(WITHOUT_DEEPSPEED + code) == expected


def test_a_gena_lm_style_config_names_classes_that_are_found(tmp_path):
    config = {
        "num_attention_heads": 12,
        "max_position_embeddings": 4096,
        "sparse_config_cls": "deepspeed.ops.sparse_attention:BigBirdSparsityConfig",
        "sparse_attention": {
            "num_heads": 12,
            "block": 64,
            "different_layout_per_head": True,
            "num_random_blocks": 3,
            "num_sliding_window_blocks": 3,
            "num_global_blocks": 2,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = f"""
    import bsa_export.deepspeed_compat
    import importlib, json
    config = json.load(open({str(tmp_path / "config.json")!r}))
    module, name = config["sparse_config_cls"].split(":")
    sparsity = getattr(importlib.import_module(module), name)(**config["sparse_attention"])
    SparseSelfAttention = importlib.import_module(module).SparseSelfAttention
    attention = SparseSelfAttention(sparsity, max_seq_length=config["max_position_embeddings"])
    print(tuple(attention.master_layout.shape))
    """
    assert run_python(WITHOUT_DEEPSPEED + code) == "(12, 64, 64)"


@pytest.mark.parametrize("key", ["as the query", "transposed"])
@pytest.mark.parametrize("padding", ["add", "mul"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sparse_self_attention_is_the_operators_in_a_row(key, padding, dtype):
    from bsa_export.deepspeed_compat.matmul import MatMul
    from bsa_export.deepspeed_compat.softmax import Softmax

    config = FixedSparsityConfig(num_heads=2, block=16)
    q, k, v = torch.randn(3, 1, 2, 128, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = torch.arange(128)[None] < 100
    mask = torch.where(kept, 0.0, -10000.0).to(dtype) if padding == "add" else kept.to(dtype)
    layout = config.make_layout(128)
    scores = MatMul(layout, 16, "sdd", trans_b=True)(q.float(), k.float())
    weights = Softmax(layout, 16)(scores, scale=32**-0.5, key_padding_mask=mask.float(), key_padding_mask_mode=padding)
    expected = MatMul(layout, 16, "dsd")(weights, v.float())
    module = SparseSelfAttention(config, key_padding_mask_mode=padding, max_seq_length=512)
    found = module(q, k.mT if key == "transposed" else k, v, key_padding_mask=mask)
    torch.testing.assert_close(found.float(), expected, atol=2e-3 if dtype == torch.float16 else 1e-5, rtol=0)


SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 1,
}
MODELS = {"bert": ("BertConfig", "BertForMaskedLM", 0), "roberta": ("RobertaConfig", "RobertaForMaskedLM", 2)}


def dense_model(family, attention):
    config_class, model_class, reserved = MODELS[family]
    config = getattr(transformers, config_class)(**SMALL, max_position_embeddings=64 + reserved)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model, reserved


def batch(length):
    ids = torch.randint(4, 100, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, length - 10 :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


@pytest.mark.parametrize("max_position", [65, 160, 256])
@pytest.mark.parametrize("family", MODELS)
def test_positions_are_extended_to_the_row(family, max_position):
    model, reserved = dense_model(family, "sdpa")
    table = model.base_model.embeddings.position_embeddings
    before = table.weight.detach().clone()
    SparseAttentionUtils.extend_position_embedding(model, max_position)
    assert (
        table.weight.shape[0] == table.num_embeddings == model.config.max_position_embeddings == max_position + reserved
    )
    assert torch.equal(table.weight[:reserved], before[:reserved])
    rows = torch.arange(max_position) % 64 + reserved
    assert torch.equal(table.weight[reserved:], before[rows])
    assert model(**batch(max_position)).logits.isfinite().all()


def test_positions_can_only_grow():
    with pytest.raises(ValueError, match="expected more than the model's 64 positions, found 64"):
        SparseAttentionUtils.extend_position_embedding(dense_model("roberta", "sdpa")[0], 64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MODELS)
def test_self_attention_is_replaced_in_hugging_face_models(family, attention):
    model, _ = dense_model(family, attention)
    SparseAttentionUtils.extend_position_embedding(model, 128)
    inputs = batch(128)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        dense = model(**inputs).logits[real]
        config = BigBirdSparsityConfig(num_heads=4, block=16)
        SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(model, 128, config)
        layers = model.base_model.encoder.layer
        layouts = [layer.attention.self.sparse_self_attention.master_layout for layer in layers]
        found = model(**inputs).logits[real]
        fresh, _ = dense_model(family, "sdpa")
        SparseAttentionUtils.extend_position_embedding(fresh, 128)
        masked_by_layouts(fresh, layouts, 16, inputs["attention_mask"])
        expected = fresh(**inputs).logits[real]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert (found - dense).abs().max() > 0.1
    assert 0 < to_mask(layouts[0]).float().mean() < 1


def sparse_model(family, attention="sdpa"):
    model, _ = dense_model(family, attention)
    config = BigBirdSparsityConfig(num_heads=4, block=16)
    return SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(model, 64, config)


@pytest.mark.parametrize("kind", ["bool", "additive", "per head"])
@torch.no_grad()
def test_a_mask_of_pairs_is_one_of_pairs(kind):
    model, inputs = sparse_model("bert"), batch(64)
    layouts = [layer.attention.self.sparse_self_attention.master_layout for layer in model.bert.encoder.layer]
    heads = 4 if kind == "per head" else 1
    pairs = torch.rand(2, heads, 64, 64, generator=torch.Generator().manual_seed(2)) < 0.8
    pairs = pairs | torch.eye(64, dtype=torch.bool)
    own = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min) if kind == "additive" else pairs
    found = model(inputs["input_ids"], attention_mask=own).logits
    fresh, _ = dense_model("bert", "sdpa")
    masked_by_layouts(fresh, layouts, 16, pairs)
    torch.testing.assert_close(found, fresh(inputs["input_ids"]).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_no_mask_of_pairs_is_made_of_padding(family, attention):
    pytest.importorskip("transformers", minversion="5.0")
    model, seen = sparse_model(family, attention), []
    model.base_model.encoder.layer[0].attention.self.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    inputs = batch(64)
    found = model(**inputs).logits
    model(inputs["input_ids"])
    assert torch.equal(seen[0], inputs["attention_mask"].bool()) and seen[1] is None
    model.base_model.encoder = model.base_model.encoder
    model.base_model.embeddings = model.base_model.embeddings
    assert torch.equal(model(**inputs).logits, found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_layers_that_are_not_replaced_stay_dense(attention):
    model, _ = dense_model("bert", attention)
    inputs = batch(64)
    before = model(**inputs).logits
    config = DenseSparsityConfig(num_heads=4, block=16)
    SparseAttentionUtils.replace_self_attention_layer_with_sparse_self_attention_layer(
        model.config, model.bert.encoder.layer[1:], config, max_seq_length=64
    )
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], before[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_what_is_saved_loads_as_a_dense_model_of_the_tables_length(family, tmp_path):
    model, reserved = dense_model(family, "sdpa")
    SparseAttentionUtils.extend_position_embedding(model, 128)
    config = DenseSparsityConfig(num_heads=4, block=16)
    SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(model, 64, config)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.max_position_embeddings == 128 + reserved
    inputs = batch(64)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(again(**inputs).logits[real], model(**inputs).logits[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_more_tokens_than_positions_are_refused_in_a_sentence(family):
    model, reserved = dense_model(family, "sdpa")
    said = "expected at most the model's 64 positions, found 80; extend them with extend_position_embedding"
    with pytest.raises(ValueError, match=said):
        SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(model, 80)
    assert model.config.max_position_embeddings == 64 + reserved


@pytest.mark.parametrize("family", MODELS)
def test_a_dense_layout_leaves_the_model_as_it_was(family):
    model, _ = dense_model(family, "sdpa")
    inputs = batch(50)
    with torch.no_grad():
        before = model(**inputs).logits
        config = DenseSparsityConfig(num_heads=4, block=16)
        SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(model, 64, config)
        after = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(after[real], before[real], atol=1e-4, rtol=1e-4)


def test_without_a_config_it_is_fixed_with_the_models_heads():
    model, _ = dense_model("bert", "sdpa")
    SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(model, 64)
    layout = model.bert.encoder.layer[0].attention.self.sparse_self_attention.master_layout
    assert torch.equal(layout.long(), FixedSparsityConfig(num_heads=4).make_layout(64))


def test_another_model_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="expected a Hugging Face BERT or RoBERTa, found Linear"):
        SparseAttentionUtils.extend_position_embedding(torch.nn.Linear(1, 1), 8)


def test_a_decoder_is_refused_in_a_sentence():
    model, _ = dense_model("bert", "sdpa")
    model.config.is_decoder = True
    with pytest.raises(ValueError, match="expected an encoder: sparse self-attention has no causal mask"):
        SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(model, 64)


@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_padding_to_whole_blocks_and_back(given):
    embed = torch.nn.Embedding(100, 8)
    ids = torch.randint(2, 100, (2, 37))
    ones = torch.ones(2, 37, dtype=torch.long)
    by_ids = given == "ids"
    added, padded_ids, mask, types, positions, embeds = SparseAttentionUtils.pad_to_block_size(
        16, ids if by_ids else None, ones, 0 * ones, ones.cumsum(1), None if by_ids else embed(ids), 1, embed
    )
    assert added == 11
    assert all(x.shape == (2, 48) for x in (mask, types, positions))
    assert not mask[:, 37:].any() and mask[:, :37].all()
    if by_ids:
        assert embeds is None and torch.equal(padded_ids[:, 37:], torch.ones(2, 11, dtype=torch.long))
    else:
        assert padded_ids is None and torch.equal(embeds[:, 37:], embed(torch.ones(2, 11, dtype=torch.long)))
    out = torch.randn(2, 48, 8)
    assert torch.equal(SparseAttentionUtils.unpad_sequence_output(added, out), out[:, :37])
    assert SparseAttentionUtils.unpad_sequence_output(0, out) is out


def test_padding_without_a_mask_makes_one():
    ids = torch.ones(1, 20, dtype=torch.long)
    _, _, mask, *_ = SparseAttentionUtils.pad_to_block_size(16, ids, None, None, None, None, 0, None)
    assert mask.tolist() == [[1] * 20 + [0] * 12]


def test_a_tokenizer_learns_its_new_length(minilm):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    assert SparseAttentionUtils.update_tokenizer_model_max_length(tokenizer, 4096) is tokenizer
    assert tokenizer.model_max_length == tokenizer.init_kwargs["model_max_length"] == 4096
