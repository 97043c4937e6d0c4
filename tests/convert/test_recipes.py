"""Checkpoints of DeepSpeed's own BERT recipe and of GENA-LM, built by hand and judged by `support.prenorm`."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.prenorm import encoded, head_outputs, linear, norm, turned
from tiny_models import config, convert, converted, record, refused, same_bits, tensors
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.0")

import bsa_export  # noqa: E402
from bsa_export.checkpoint.open import open_checkpoint  # noqa: E402
from bsa_export.converted.folder import open_folder  # noqa: E402
from bsa_export.converted.integrity import check_file, check_layout  # noqa: E402
from bsa_export.deepspeed_compat import sparse_attention as old  # noqa: E402
from bsa_export.errors import AttentionError  # noqa: E402
from bsa_export.verify.attention_inputs import Projections  # noqa: E402
from bsa_export.verify.interchange import check_interchange  # noqa: E402
from bsa_export.verify.weights import check_weights  # noqa: E402
from bsa_export.verify.whole_model import check_whole_model  # noqa: E402

HEADS, HIDDEN, LAYERS, VOCAB, LENGTH, BLOCK = 4, 32, 2, 64, 128, 16
SIZES = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 48,
    "max_position_embeddings": LENGTH, "type_vocab_size": 2, "hidden_act": "gelu", "vocab_size": VOCAB,
}  # fmt: skip
BIGBIRD = {
    "sparse_config_cls": "deepspeed.ops.sparse_attention:BigBirdSparsityConfig",
    "sparse_attention": {
        "num_heads": HEADS, "block": BLOCK, "different_layout_per_head": True, "num_sliding_window_blocks": 3,
        "num_global_blocks": 1, "num_random_blocks": 1,
    },
}  # fmt: skip
# Names of the statement -> those that the recipe's code gives.
DEEPSPEED = {
    "intermediate.dense.": "intermediate.dense_act.",
    "pooler.dense.": "pooler.dense_act.",
    "transform.dense.": "transform.dense_act.",
}
GENA = {
    "PreAttentionLayerNorm": "pre_attention_ln",
    "PostAttentionLayerNorm": "post_attention_ln",
    "FinalLayerNorm": "last_layer_ln",
}
ROTARY = {"position_embedding_type": "rotary", "rotary_dim": 4, "rotary_base": 500}


@dataclass
class Recipe:
    """One checkpoint: what it computes, what its file and its config.json say, and what is written."""

    names: dict[str, str]
    head: str = "PreTraining"
    pre_layer_norm: bool = True
    last_layer_norm: bool = True
    positions: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    sparse: bool = False
    layout_tokens: int = LENGTH
    family: str = "bsa_bert"

    @property
    def settings(self) -> dict:
        """Fields of config.json for the statement."""
        norms = {"pre_layer_norm": self.pre_layer_norm, "last_layer_norm": self.last_layer_norm}
        absolute = {"position_embedding_type": "absolute"}
        return SIZES | {"layer_norm_eps": self.config.get("layer_norm_eps", 1e-12)} | norms | absolute | self.positions

    def statement(self) -> dict[str, torch.Tensor]:
        """Random tensors by the names of the statement, without a prefix."""
        wide, rotary = SIZES["intermediate_size"], bool(self.positions)
        shapes = {
            "embeddings.word_embeddings.weight": (VOCAB, HIDDEN),
            "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        }
        norms, linears = ["embeddings.LayerNorm"], {}
        if not rotary:
            shapes["embeddings.position_embeddings.weight"] = (LENGTH, HIDDEN)
        for i in range(LAYERS):
            layer = f"encoder.layer.{i}"
            linears |= {f"{layer}.attention.self.{name}": (HIDDEN, HIDDEN) for name in ("query", "key", "value")}
            linears |= {f"{layer}.attention.output.dense": (HIDDEN, HIDDEN)}
            linears |= {f"{layer}.intermediate.dense": (wide, HIDDEN), f"{layer}.output.dense": (HIDDEN, wide)}
            pre = ("PreAttentionLayerNorm", "PostAttentionLayerNorm")
            norms += [
                f"{layer}.{name}"
                for name in (pre if self.pre_layer_norm else ("attention.output.LayerNorm", "output.LayerNorm"))
            ]
        norms += ["encoder.FinalLayerNorm"] if self.last_layer_norm else []
        if self.head in ("PreTraining", "SequenceClassification"):
            linears["pooler.dense"] = (HIDDEN, HIDDEN)
        if self.head in ("PreTraining", "MaskedLM"):
            linears["cls.predictions.transform.dense"] = (HIDDEN, HIDDEN)
            norms.append("cls.predictions.transform.LayerNorm")
            shapes["cls.predictions.bias"] = (VOCAB,)
        if self.head == "PreTraining":
            linears["cls.seq_relationship"] = (2, HIDDEN)
        if self.head == "QuestionAnswering":
            linears["qa_outputs"] = (2, HIDDEN)
        if "Classification" in self.head:
            linears["classifier"] = (3, HIDDEN)
        for name, shape in linears.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        for name in norms:
            shapes |= {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}
        generator = torch.Generator().manual_seed(0)
        return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}

    def layouts(self) -> list[torch.Tensor]:
        """Random layouts, int64 `[heads, n, n]` a layer."""
        generator, n = torch.Generator().manual_seed(9), self.layout_tokens // BLOCK
        return [
            ((torch.rand(HEADS, n, n, generator=generator) < 0.2) | torch.eye(n).bool()).long() for _ in range(LAYERS)
        ]

    def state(self) -> dict[str, torch.Tensor]:
        """The state dict of the recipe's own code."""
        state = {}
        for name, tensor in self.statement().items():
            own = name if name.startswith(("cls.", "classifier", "qa_outputs")) else f"bert.{name}"
            for ours, theirs in self.names.items():
                own = own.replace(ours, theirs)
            state[own] = tensor
        if "cls.predictions.bias" in state:
            state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
        for i, layout in enumerate(self.layouts()):
            start = f"bert.encoder.layer.{i}.attention.self"
            if self.sparse:
                state[f"{start}.sparse_self_attention.master_layout"] = layout
            if self.positions:
                dim, base = self.positions["rotary_dim"], self.positions["rotary_base"]
                state[f"{start}.rotary_emb.inv_freq"] = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        if self.positions:
            state["bert.embeddings.position_ids"] = torch.arange(LENGTH)[None]
        return state


STATED = {"model_type": "bert", "pre_layer_norm": True, "pad_token_id": 3, "layer_norm_eps": 1e-5}
NO_LAST = {"last_layer_norm": False}
RECIPES = {
    "deepspeed sparse": Recipe(DEEPSPEED, config={"vocab_size": 58}, sparse=True, layout_tokens=2048),
    "deepspeed answers": Recipe(DEEPSPEED, head="QuestionAnswering", sparse=True, layout_tokens=2048),
    "deepspeed dense": Recipe(DEEPSPEED, head="MaskedLM", config={"model_type": "bert"}),
    "gena sparse rotary": Recipe(
        GENA, "MaskedLM", True, False, ROTARY,
        STATED | NO_LAST | ROTARY | BIGBIRD | {"architectures": ["BertForMaskedLM"]}, sparse=True,
    ),
    "gena dense rotary": Recipe(
        GENA, "SequenceClassification", True, True, ROTARY, STATED | ROTARY | {"id2label": {0: "a", 1: "b", 2: "c"}}
    ),
    "gena sparse absolute": Recipe(GENA, "TokenClassification", True, True, config=BIGBIRD, sparse=True),
    "rotary after": Recipe(GENA, "Model", False, False, ROTARY, {"rotary_base": 500}),
    "deepspeed after": Recipe(DEEPSPEED, "PreTraining", False, False, sparse=True, family="bert"),
}  # fmt: skip


def save(recipe: Recipe, folder, **changes):
    """The source as people have it: GENA-LM's folder, or the file of DeepSpeed's engine with bert_config.json."""
    folder.mkdir()
    content = SIZES | recipe.config | changes
    if recipe.names is GENA:
        torch.save(recipe.state(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(content))
        return folder
    file = folder / "mp_rank_00_model_states.pt"
    torch.save({"module": recipe.state(), "global_steps": 3, "buffer_names": [], "optimizer": None}, file)
    (folder / "bert_config.json").write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=RECIPES)
def case(request, tmp_path_factory):
    recipe = RECIPES[request.param]
    source = save(recipe, tmp_path_factory.mktemp("recipe") / "source")
    target = (source if source.is_dir() else source.parent).parent / "out"
    options = () if recipe.sparse else ("--max-length", 4 * LENGTH, "--block", BLOCK)
    result = convert(source, target, *options)
    assert result.exit_code == 0, result.output
    return recipe, source, target


def expected(recipe: Recipe, ids, keys, layouts) -> list[list[torch.Tensor]]:
    """The outputs of the statement, one list a sequence; `layouts` are `[heads, n, n]` a layer."""
    tensors = {name: tensor.double() for name, tensor in recipe.statement().items()}
    if (table := "embeddings.position_embeddings.weight") in tensors:
        tensors[table] = tensors[table].repeat(2, 1)  # tiled, as the conversion extends it
    seq, n = ids.shape[1], -(-ids.shape[1] // BLOCK)
    blocks = [layout[:, :n, :n].bool() for layout in layouts]
    whole = [kept.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :seq, :seq] for kept in blocks]
    found = []
    for row, kept in zip(ids, keys.bool(), strict=True):
        x = encoded(tensors, recipe.settings, row, torch.zeros_like(row), kept, whole)
        found.append(head_outputs(tensors, recipe.head, x, kept, recipe.settings["layer_norm_eps"]))
    return found


def padded_inputs(length: int):
    ids = torch.randint(4, 58, (2, length), generator=torch.Generator().manual_seed(1))
    keys = torch.ones_like(ids)
    keys[1, 61:] = 0
    return ids, keys


def layout_of(folder, layer: int) -> torch.Tensor:
    return tensors(folder)[f"bert.encoder.layer.{layer}.attention.self.sparse_self_attention.master_layout"]


@pytest.mark.parametrize("length", [100, 200], ids=["short", "long"])
def test_outputs_are_those_of_the_statement(case, length):
    recipe, _, out = case
    model = bsa_export.load(out)
    ids, keys = padded_inputs(length)
    if recipe.sparse and length > LENGTH:
        with pytest.raises(AttentionError, match=f"reads up to {LENGTH} tokens"):
            model(input_ids=ids, attention_mask=keys)
        return
    if recipe.sparse:
        layouts = recipe.layouts()
    elif length > LENGTH:
        layouts = [layout_of(out, layer) for layer in range(LAYERS)]
    else:  # windows keep all that the source could read
        layouts = [torch.ones(HEADS, LENGTH // BLOCK, LENGTH // BLOCK)] * LAYERS
    with torch.no_grad():
        outputs = model(input_ids=ids, attention_mask=keys).to_tuple()
    for i, stated in enumerate(expected(recipe, ids, keys, layouts)):
        for output, judge in zip(outputs, stated, strict=True):
            of_tokens = output.ndim == 3 or output.shape == keys.shape
            found = output[i][keys[i].bool()] if of_tokens else output[i]
            torch.testing.assert_close(found.double(), judge, atol=2e-4, rtol=2e-4)


def test_config_json_says_what_the_tensors_are(case):
    recipe, _, out = case
    written = config(out)
    assert written["model_type"] == recipe.family and written["vocab_size"] == VOCAB
    assert record(out)["family"] == recipe.family and record(out)["sparse_source"] is recipe.sparse
    if recipe.family == "bert":
        assert "pre_layer_norm" not in written
        return
    assert {name: written[name] for name in ("pre_layer_norm", "last_layer_norm")} == {
        "pre_layer_norm": recipe.pre_layer_norm, "last_layer_norm": recipe.last_layer_norm,
    }  # fmt: skip
    positions = {name: written.get(name) for name in ROTARY}
    assert positions == (recipe.positions or dict.fromkeys(ROTARY) | {"position_embedding_type": "absolute"})
    name = recipe.head if recipe.head == "Model" else f"For{recipe.head}"
    assert written["architectures"] == [f"BsaBert{name}"]
    assert record(out)["positions"] is None or not recipe.positions


def test_stored_layouts_stay(case):
    recipe, _, out = case
    stored = tensors(out)
    n = config(out)["max_position_embeddings"] // BLOCK
    for i, layout in enumerate(recipe.layouts() if recipe.sparse else ()):
        found = stored[f"bert.encoder.layer.{i}.attention.self.sparse_self_attention.master_layout"]
        assert found.dtype == torch.uint8 and torch.equal(found.long(), layout[:, :n, :n])


def test_the_way_back_has_the_names_and_bits_of_the_source(case, tmp_path):
    recipe, source, out = case
    result = convert(out, tmp_path / "back", "--to-dense")
    assert result.exit_code == 0, result.output
    found, state = load_file(tmp_path / "back" / "model.safetensors"), recipe.state()
    state = {name: tensor for name, tensor in state.items() if "master_layout" not in name}
    assert found.keys() == state.keys() and all(same_bits(found[name], tensor) for name, tensor in state.items())
    again = converted(tmp_path / "back", *(("--max-length", 4 * LENGTH, "--block", BLOCK) if not recipe.sparse else ()))
    assert config(again)["model_type"] == recipe.family


def test_our_own_output_converts_to_itself(case, tmp_path):
    _, _, out = case
    assert convert(out, tmp_path / "again").exit_code == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert config(tmp_path / "again") == config(out)


def test_the_checks_of_verify_pass(case):
    _, source, out = case
    folder = open_folder(out)
    checks = [check_file(out), check_layout(out), check_weights(folder, source), *check_interchange(folder)]
    checks += check_whole_model(folder, "cpu", open_checkpoint(source))
    for check in checks:
        assert check.passed or check.status == "skipped", (check.kind, check.part, check.reason)
    assert checks[-2].passed and checks[-1].passed
    assert "the source in" in checks[-2].figures["against"]


def test_the_judge_of_a_layer_gets_what_the_layer_gets(case):
    """The first layer: the embeddings, through the norm before it, projected and rotated as the statement does."""
    recipe, _, out = case
    found = Projections(open_folder(out), torch.device("cpu"))(0, 1, 40)
    ids = torch.from_numpy(np.random.default_rng(0).integers(VOCAB, size=40))
    stated = {name: tensor.double() for name, tensor in recipe.statement().items()}
    eps = recipe.settings["layer_norm_eps"]
    none = recipe.settings | {"num_hidden_layers": 0, "last_layer_norm": False}
    hidden = encoded(stated, none, ids, torch.zeros_like(ids), torch.ones(40).bool())
    if recipe.pre_layer_norm:
        hidden = norm(stated, "encoder.layer.0.PreAttentionLayerNorm", hidden, eps)
    for name, actual in zip(("query", "key", "value"), found, strict=True):
        heads = linear(stated, f"encoder.layer.0.attention.self.{name}", hidden).view(40, HEADS, -1).unbind(1)
        if recipe.positions and name != "value":
            heads = [turned(head, ROTARY["rotary_dim"], ROTARY["rotary_base"]) for head in heads]
        torch.testing.assert_close(actual[0].double(), torch.stack(list(heads)), atol=1e-4, rtol=1e-4)


# Old code


def test_old_code_loads_the_source_strictly_and_computes_what_the_converted_model_does(tmp_path):
    """A layer as people wrote it for such models, unchanged, on this package's `deepspeed.ops.sparse_attention`."""
    longest, (wide, dim) = 4096, (SIZES["intermediate_size"], HIDDEN // HEADS)

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
            sparsity = old.FixedSparsityConfig(num_heads=HEADS, block=BLOCK)
            self.sparse_self_attention = old.SparseSelfAttention(sparsity, max_seq_length=longest)

        def forward(self, x, mask):
            q, k, v = (f(x).view(*x.shape[:2], HEADS, dim).transpose(1, 2) for f in (self.query, self.key, self.value))
            return self.sparse_self_attention(q, k, v, key_padding_mask=mask).transpose(1, 2).reshape(x.shape)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pre_attention_ln, self.post_attention_ln = (
                nn.LayerNorm(HIDDEN, eps=1e-12),
                nn.LayerNorm(HIDDEN, eps=1e-12),
            )
            parts = {"self": Self(), "output": nn.ModuleDict({"dense": nn.Linear(HIDDEN, HIDDEN)})}
            self.attention = nn.ModuleDict(parts)
            self.intermediate = nn.ModuleDict({"dense": nn.Linear(HIDDEN, wide)})
            self.output = nn.ModuleDict({"dense": nn.Linear(wide, HIDDEN)})

        def forward(self, x, mask):
            x = x + self.attention["output"]["dense"](self.attention["self"](self.pre_attention_ln(x), mask))
            hidden = nn.functional.gelu(self.intermediate["dense"](self.post_attention_ln(x)))
            return x + self.output["dense"](hidden)

    recipe = replace(RECIPES["gena sparse absolute"], layout_tokens=longest)
    state = recipe.state()
    table = "bert.embeddings.position_embeddings.weight"
    state[table] = state[table].repeat(longest // LENGTH, 1)
    source = save(recipe, tmp_path / "source", max_position_embeddings=longest)
    torch.save(state, source / "pytorch_model.bin")
    layers = nn.ModuleList(Layer() for _ in range(LAYERS))
    start = "bert.encoder.layer."
    layers.load_state_dict(
        {name.removeprefix(start): x for name, x in state.items() if name.startswith(start)}, strict=True
    )

    model = bsa_export.load(converted(source)).base_model
    ids, keys = padded_inputs(300)
    with torch.no_grad():
        x = model.embeddings(ids)
        for layer in layers:
            x = layer(x, (1.0 - keys[:, None, None].float()) * -10000.0)
        x = model.encoder.FinalLayerNorm(x)
        expect = model(input_ids=ids, attention_mask=keys).last_hidden_state
    torch.testing.assert_close(x[keys.bool()], expect[keys.bool()], atol=2e-4, rtol=2e-4)


# Other forms of the same, and what is refused.


def test_the_training_config_of_the_recipe_is_read(tmp_path):
    """Its vocabulary is never that of the model, which has the tokenizer's, padded."""
    recipe = RECIPES["deepspeed dense"]
    file = save(recipe, tmp_path / "source")
    inner = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    inner["vocab_size_or_config_json_file"] = 119547
    (tmp_path / "train.json").write_text(json.dumps({"name": "bing_bert", "bert_model_config": inner}))
    assert convert(file, tmp_path / "out", "--config", tmp_path / "train.json").exit_code == 0
    assert config(tmp_path / "out")["vocab_size"] == VOCAB


def test_a_padded_vocabulary_is_noted_and_another_one_refused(tmp_path):
    recipe = RECIPES["deepspeed dense"]
    assert convert(save(recipe, tmp_path / "a", vocab_size=59), tmp_path / "out").exit_code == 0
    (note,) = record(tmp_path / "out")["notes"]
    assert note["kind"] == "config field" and "59" in note["text"] and "64" in note["text"]
    assert "vocab_size" in refused(save(recipe, tmp_path / "b", vocab_size=70), tmp_path / "no")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_folder_of_deepspeed_zero_is_read(tmp_path, stage):
    recipe = RECIPES["gena sparse rotary"]
    state, run = recipe.state(), tmp_path / "checkpoint-500"
    step = run / "global_step500"
    step.mkdir(parents=True)
    (run / "latest").write_text("global_step500")
    (run / "config.json").write_text(json.dumps(SIZES | recipe.config))
    tied = "cls.predictions.decoder.weight"
    buffers = {name: tensor for name, tensor in state.items() if name.endswith(("layout", "inv_freq", "position_ids"))}
    trained = {name: tensor for name, tensor in state.items() if name not in buffers and name != tied}
    model = {
        "module": buffers,
        "buffer_names": list(buffers),
        "param_shapes": [{name: tensor.shape for name, tensor in trained.items()}],
        "shared_params": {tied: "bert.embeddings.word_embeddings.weight"},
    }
    flat = torch.cat([tensor.reshape(-1) for tensor in trained.values()])
    parts = {"fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups": [flat]}
    parts |= {"zero_stage": stage, "partition_count": 1 if stage == 3 else [1]}
    torch.save({"optimizer_state_dict": parts}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    torch.save(model, step / name)
    for source in (run, step):
        assert convert(source, tmp_path / "out", "--overwrite").exit_code == 0
        assert (
            convert(save(recipe, tmp_path / f"plain-{source.name}"), tmp_path / "plain", "--overwrite").exit_code == 0
        )
        weights = "model.safetensors"
        assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()


def test_rounded_frequencies_are_noted_and_come_back(tmp_path):
    recipe = RECIPES["gena dense rotary"]
    source = save(recipe, tmp_path / "source")
    state = {name: tensor.half() if name.endswith("inv_freq") else tensor for name, tensor in recipe.state().items()}
    torch.save(state, source / "pytorch_model.bin")
    out = converted(source)
    assert [note["kind"] for note in record(out)["notes"]] == ["rotary frequencies"]
    assert check_weights(open_folder(out), source).passed
    assert convert(out, tmp_path / "back", "--to-dense").exit_code == 0
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert all(same_bits(found[name], tensor) for name, tensor in state.items())


def test_stored_frequencies_say_the_base_where_config_json_does_not(tmp_path):
    recipe = RECIPES["gena dense rotary"]
    silent = replace(recipe, config={name: value for name, value in recipe.config.items() if name not in ROTARY})
    written = config(converted(save(silent, tmp_path / "source")))
    assert {name: written[name] for name in ROTARY} == ROTARY


def test_layouts_are_drawn_again_only_where_none_are_stored(tmp_path):
    recipe = RECIPES["gena sparse rotary"]
    source = save(recipe, tmp_path / "source")
    state = {name: tensor for name, tensor in recipe.state().items() if not name.endswith("master_layout")}
    torch.save(state, source / "pytorch_model.bin")
    out = converted(source)
    assert [note["kind"] for note in record(out)["notes"]] == ["layouts redrawn"]
    assert layout_of(out, 0).shape == (HEADS, LENGTH // BLOCK, LENGTH // BLOCK) and check_layout(out).passed


def test_the_block_of_a_layout_is_not_guessed(tmp_path):
    """32 blocks a row are 2,048 tokens in blocks of 64, or the 512 tokens of the positions in blocks of 16."""
    recipe = replace(RECIPES["gena sparse rotary"], layout_tokens=512)
    bare = {name: value for name, value in recipe.config.items() if name not in BIGBIRD}
    source = save(replace(recipe, config=bare), tmp_path / "source", max_position_embeddings=512)
    text = refused(source, tmp_path / "out")
    assert "16" in text and "64" in text and "sparse_attention" in text
    stated = json.loads((source / "config.json").read_text()) | {"sparse_attention": {"block": 16}}
    (source / "config.json").write_text(json.dumps(stated))
    assert config(converted(source))["sparse_attention"]["block"] == 16


CONTRADICTIONS = {
    "norms": ({"pre_layer_norm": False}, "pre_layer_norm"),
    "last norm": ({"last_layer_norm": True}, "last_layer_norm"),
    "positions": ({"position_embedding_type": "absolute"}, "position_embedding_type"),
    "rotated elements": ({"rotary_dim": 8}, "rotary_dim"),
    "base": ({"rotary_base": 10000}, "rotary_base 10000"),
    "bias": ({"position_embedding_type": "relative_attention_bias"}, "relative_attention_bias"),
    "relative keys": ({"position_embedding_type": "relative_key"}, "relative_key"),
    "decoder": ({"is_decoder": True}, "is_decoder"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_config_json_and_tensors_do_not_agree_on_is_refused(tmp_path, name):
    changes, said = CONTRADICTIONS[name]
    assert said in refused(save(RECIPES["gena sparse rotary"], tmp_path / "source", **changes), tmp_path / "out")


def test_a_relative_attention_bias_is_refused_by_its_tensor(tmp_path):
    recipe = RECIPES["gena sparse absolute"]
    source = save(recipe, tmp_path / "source")
    name = "bert.encoder.layer.0.attention.self.relative_attention_bias.weight"
    torch.save(recipe.state() | {name: torch.zeros(32, HEADS)}, source / "pytorch_model.bin")
    text = refused(source, tmp_path / "out")
    assert name in text and "relative positions" in text


def test_rotary_positions_have_nothing_to_interpolate(tmp_path):
    source = save(RECIPES["gena dense rotary"], tmp_path / "source")
    assert "--positions" in refused(source, tmp_path / "out", "--positions", "interpolate")


def test_transformers_alone_does_not_load_it(case):
    recipe, _, out = case
    if recipe.family != "bsa_bert":
        pytest.skip("transformers' own class")
    bsa_export.unregister()
    try:
        with pytest.raises(ValueError, match="bsa_bert"):
            transformers.AutoModel.from_pretrained(out)
    finally:
        bsa_export.register()
