"""`prenorm_bert` against a float64 statement of the mathematics that shares no code with it, and stock classes."""

import itertools
import warnings

import pytest
import torch
from support.prenorm import encoded, head_outputs
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", minversion="5.0")

import bsa_export  # noqa: E402, F401
from bsa_export.errors import AttentionError  # noqa: E402
from bsa_export.hf.prenorm_bert import BsaBertForMaskedLM, BsaBertModel  # noqa: E402
from bsa_export.hf.prenorm_config import BsaBertConfig  # noqa: E402

VOCAB, HIDDEN, HEADS, LAYERS, LONGEST, BLOCK = 60, 32, 4, 2, 64, 16
SECTION = {"mode": "bigbird", "block": BLOCK}
NORMS = [dict(pre_layer_norm=pre, last_layer_norm=last) for pre in (True, False) for last in (True, False)]
POSITIONS = [
    {"position_embedding_type": "absolute"},
    {"position_embedding_type": "rotary", "rotary_base": 500.0},
    {"position_embedding_type": "rotary", "rotary_dim": 4},
]
HEAD_CLASSES = [
    "AutoModel", "MaskedLM", "PreTraining", "QuestionAnswering", "SequenceClassification", "TokenClassification",
]  # fmt: skip


def make_config(**changes):
    settings = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48,
        max_position_embeddings=LONGEST, num_labels=3, layer_norm_eps=1e-5, pad_token_id=3,
    )  # fmt: skip
    return BsaBertConfig(**(settings | changes))


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.eval()


def make_inputs(seed=1, length=40, padding="right"):
    ids = torch.randint(4, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 23:] = 0
    elif padding == "left":
        mask[1, :17] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids % 2).long()}


def stated(model, inputs, layouts=None):
    """The outputs of a model by the statement of `support.prenorm`, one row a sequence."""
    everything = {name: tensor.double() for name, tensor in model.state_dict().items()}
    tensors = {name.removeprefix("bert."): tensor for name, tensor in everything.items()}
    config = vars(model.config) | {"rotary_dim": model.config.rotary_dim}
    head = next((head for head in HEAD_CLASSES[1:] if head in type(model).__name__), "Model")
    found = []
    for ids, keys, types in zip(
        inputs["input_ids"], inputs["attention_mask"].bool(), inputs["token_type_ids"], strict=True
    ):
        x = encoded(tensors, config, ids, types, keys, layouts)
        found.append(head_outputs(tensors, head, x, keys, config["layer_norm_eps"]))
    return found


@torch.no_grad()
def computed(model, inputs):
    keys, outputs = inputs["attention_mask"].bool(), model(**inputs).to_tuple()
    tokens = [out.ndim == 3 or out.shape == keys.shape for out in outputs]
    return [
        [out[i][keys[i]] if of_tokens else out[i] for out, of_tokens in zip(outputs, tokens, strict=True)]
        for i in range(len(keys))
    ]


def assert_same(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)


COMBINATIONS = [norms | positions for norms, positions in itertools.product(NORMS, POSITIONS)]


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_norm_position_and_head_is_the_statement(settings):
    inputs = make_inputs()
    for head in HEAD_CLASSES:
        auto = getattr(transformers, head if head == "AutoModel" else f"AutoModelFor{head}")
        model = randomised(
            auto.from_config(
                make_config(**settings, num_labels=2 if head.startswith("Question") else 3), attn_implementation="eager"
            ).double()
        )
        assert_same(computed(model, inputs), stated(model, inputs), 1e-9)


def test_the_last_norm_is_by_default_that_of_pre_norm():
    assert "encoder.FinalLayerNorm.weight" in BsaBertModel(make_config()).state_dict()
    assert "encoder.FinalLayerNorm.weight" not in BsaBertModel(make_config(pre_layer_norm=False)).state_dict()


def test_it_is_roberta_prelayernorm_where_both_can_compute_it():
    ours = randomised(BsaBertModel(make_config(attn_implementation="eager"))).double()
    names = {
        "PreAttentionLayerNorm": "attention.LayerNorm",
        "PostAttentionLayerNorm": "intermediate.LayerNorm",
        "encoder.FinalLayerNorm": "LayerNorm",
    }
    state = {}
    for name, tensor in ours.state_dict().items():
        for own, theirs in names.items():
            name = name.replace(own, theirs)
        # RoBERTa's positions start behind that of padding, 1.
        state[name] = F.pad(tensor, (0, 0, 2, 0)) if "position_embeddings" in name else tensor
    settings = make_config().to_dict() | {"max_position_embeddings": LONGEST + 2, "pad_token_id": 1}
    del settings["model_type"]
    theirs = transformers.RobertaPreLayerNormModel(transformers.RobertaPreLayerNormConfig(**settings)).double().eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in name or "token_type_ids" in name for name in missing)
    inputs = make_inputs()
    assert_same(computed(theirs, inputs), computed(ours, inputs), 1e-9)


# Sparse


def sparse_model(path, **settings):
    """A masked LM with a random layout for each layer and head, saved and loaded; and its layouts for 40 tokens."""
    model = BsaBertForMaskedLM._from_config(
        make_config(sparse_attention=SECTION, **settings), attn_implementation="block_sparse"
    )
    randomised(model)
    generator = torch.Generator().manual_seed(5)
    layouts = []
    for layer in model.bert.encoder.layer:
        n = LONGEST // BLOCK
        layout = (torch.rand(HEADS, n, n, generator=generator) < 0.4) | torch.eye(n).bool()
        layer.attention.self.sparse_self_attention.master_layout.copy_(layout)
        layouts.append(layout.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[:, :40, :40])
    model.save_pretrained(path)
    return transformers.AutoModelForMaskedLM.from_pretrained(path, attn_implementation="block_sparse").eval(), layouts


KINDS = {
    "deepspeed": {},
    "gena": {"position_embedding_type": "rotary", "rotary_dim": 4, "last_layer_norm": False},
    "post-norm rotary": {"position_embedding_type": "rotary", "pre_layer_norm": False},
}


@pytest.fixture(scope="module", params=KINDS, ids=list(KINDS))
def sparse(request, tmp_path_factory):
    return sparse_model(tmp_path_factory.mktemp("sparse"), **KINDS[request.param])


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_a_sparse_model_is_the_statement_under_its_layouts(sparse, padding):
    model, layouts = sparse
    inputs = make_inputs(padding=padding)
    assert_same(computed(model, inputs), stated(model, inputs, layouts), 2e-4)


def test_layers_work_on_packed_tokens_and_packed_rows_do_not_mix(sparse):
    model, _ = sparse
    seen = []
    hook = model.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    inputs = make_inputs()
    padded = computed(model, inputs)
    hook.remove()
    assert seen == [(1, 63, HIDDEN)]
    texts = [ids[keys.bool()].tolist() for ids, keys in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    row = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": ids} for ids in texts])
    row["token_type_ids"] = torch.cat([torch.tensor(ids) % 2 for ids in texts])[None]
    row.pop("labels", None)
    with torch.no_grad():
        packed = model(**row).logits[0].split([40, 23])
    for ours, (theirs,) in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_torch_compile_computes_the_same(sparse):
    model, inputs = sparse[0], make_inputs(padding="none")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_every_weight_gets_a_gradient_with_checkpointing_too(sparse):
    model, inputs = sparse[0], make_inputs()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    model.gradient_checkpointing_disable()
    model.eval()
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


# Loading


def test_plain_config_and_auto_classes_know_it_while_the_package_is_imported(tmp_path):
    sparse_model(tmp_path)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is BsaBertConfig
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(model) is BsaBertModel and model.config._attn_implementation == "block_sparse"


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"position_embedding_type": "rotary", "rotary_dim": 3}, "found 3"),
        ({"position_embedding_type": "rotary", "rotary_dim": 10}, "found 10"),
        ({"is_decoder": True}, "is_decoder"),
    ],
    ids=str,
)
def test_what_it_cannot_compute_is_refused(settings, said):
    with pytest.raises(AttentionError, match=said):
        BsaBertModel(make_config(**settings))
