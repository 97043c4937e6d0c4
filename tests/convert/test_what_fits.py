"""Which tensors and config fields a conversion accepts, and what a refusal blames. Nothing is written."""

from inspect import signature
from types import SimpleNamespace

import pytest

from bsa_export.bert.expected_tensors import dense_spec
from bsa_export.bert.families import FAMILIES
from bsa_export.checkpoint.table import Computed, Tensor
from bsa_export.cli.convert import main
from bsa_export.conversion.convert import convert
from bsa_export.conversion.options import Options, parse_dtype, parse_length
from bsa_export.conversion.plan import plan
from bsa_export.conversion.resources import refuse_full_disk
from bsa_export.converted.records import DropReason, NoteKind
from bsa_export.errors import CheckpointError, FamilyError, SparsityError

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
BERT = SIZES | {"model_type": "bert"}


def zeros(*shape: int, dtype: str = "F32") -> Tensor:
    row = Tensor(dtype, shape, Computed(lambda: iter(())))
    return Tensor(dtype, shape, Computed(lambda: iter([bytes(row.nbytes)])))


def encoder(prefix: str = "bert.", family: str = "bert", config: dict = SIZES) -> dict[str, Tensor]:
    """The tensors of an encoder, without those of heads."""
    spec = dense_spec(FAMILIES[family], config, prefix)
    return {name: zeros(*entry.shape) for name, entry in spec.items() if name.startswith(prefix) and "cls." not in name}


def refusal(tensors: dict[str, Tensor], config: dict = BERT, **options) -> str:
    with pytest.raises(FamilyError) as caught:
        plan(tensors, config, Options(**options))
    return str(caught.value)


LAYER = "bert.encoder.layer.1."
UNUSED = {
    "bert.encoder.LayerNorm.weight": "pre-layer-norm",
    "bert.encoder.FinalLayerNorm.bias": "pre-layer-norm",
    "bert.encoder.last_layer_ln.weight": "pre-layer-norm",
    "bert.embeddings.rank_embeddings.weight": "embeddings",
    "bert.embeddings.task_type_embeddings.weight": "ERNIE",
    "bert.embeddings.x_position_embeddings.weight": "LayoutLM",
    f"{LAYER}pre_attention_ln.weight": "pre-layer-norm",
    f"{LAYER}PreAttentionLayerNorm.weight": "pre-layer-norm",
    f"{LAYER}attention.self.distance_embedding.weight": "relative positions",
    f"{LAYER}attention.self.rotary_emb.inv_freq": "rotary positions",
    f"{LAYER}crossattention.self.query.weight": "cross-attention",
    f"{LAYER}output.adapter_down.weight": "adapters",
    f"{LAYER}attention.self.query.bias_of_mine": "BertModel lacks",
    "bert.embeddings_project.weight": "BertModel lacks",
    "bert.whatever": "BertModel lacks",
}


@pytest.mark.parametrize("name", UNUSED)
def test_tensors_that_the_class_would_not_use_are_refused_or_ignored(name):
    tensors = encoder() | {name: zeros(32)}
    text = refusal(tensors)
    assert name in text and UNUSED[name] in text
    planned = plan(tensors, BERT, Options(ignore_tensors=[name]))
    assert planned.dropped == {name: DropReason.IGNORED} and name not in planned.tensors
    assert [note.kind for note in planned.notes] == [NoteKind.IGNORED_TENSORS] and name in planned.notes[0].text


@pytest.mark.parametrize(
    ("name", "fits"),
    [("LayerNorm.weight", False), ("last_layer_ln.bias", False), ("encoder.norm.weight", False),
     ("classifier.weight", True), ("cls.predictions.transform.LayerNorm.weight", True), ("lm_head.layer_norm.weight",
      True)],
)  # fmt: skip
def test_without_a_prefix_heads_pass_and_layer_norms_on_top_do_not(name, fits):
    tensors = encoder("") | {name: zeros(32)}
    if fits:
        assert name in plan(tensors, BERT).tensors
    else:
        assert name in refusal(tensors)


def test_patterns_that_match_nothing_or_too_much_are_refused():
    assert "bert.rank*" in refusal(encoder(), ignore_tensors=["bert.rank*"])
    assert "cannot be left out" in refusal(encoder(), ignore_tensors=["*.query.*"])


def test_other_spellings_are_the_same_tensors():
    old = {
        "intermediate.dense.": "intermediate.dense_act.",
        "LayerNorm.weight": "LayerNorm.gamma",
        "LayerNorm.bias": "LayerNorm.beta",
    }
    tensors = {}
    for name, row in encoder().items():
        for new, found in old.items():
            name = name.replace(new, found)
        tensors[name] = row
    assert plan(tensors, BERT).tensors.keys() == plan(encoder(), BERT).tensors.keys()


def test_embeddings_of_the_family_itself_are_known():
    config = SIZES | {"model_type": "ernie", "use_task_id": True, "task_type_vocab_size": 3}
    tensors = encoder("ernie.", "ernie", config)
    name = "ernie.embeddings.task_type_embeddings.weight"
    assert name in plan(tensors, config).tensors
    assert "use_task_id" in refusal(tensors, config | {"use_task_id": False})
    assert name in refusal({key: row for key, row in tensors.items() if key != name}, config)
    config = SIZES | {"model_type": "electra", "embedding_size": 16}
    tensors = encoder("electra.", "electra", config)
    assert plan(tensors, config).tensors["electra.embeddings_project.weight"].shape == (32, 16)
    assert "pooler" in refusal(tensors | {"electra.pooler.dense.weight": zeros(32, 32)}, config)


@pytest.mark.parametrize(
    ("field", "prefix"),
    [({"attention_type": "block_sparse"}, "bert."), ({"max_2d_position_embeddings": 1024}, "bert."),
     ({"visual_embedding_dim": 512}, "bert."), ({"projection_dim": 0}, ""), ({"question_token_id": 104}, ""),
     ({"architectures": ["BigBirdForMaskedLM"]}, "bert."), ({"architectures": ["TapasModel"]}, ""),
     ({}, "ctx_encoder.bert_model."), ({}, "span_predictor.encoder.bert_model."), ({}, "splinter."), ({}, "bros.")],
    ids=str,
)  # fmt: skip
def test_without_a_model_type_other_models_do_not_pass(field, prefix):
    assert "model_type" in refusal(encoder(prefix), SIZES | field)
    assert plan(encoder(prefix), BERT | field).family.name == "bert"


FOREIGN = {
    "ZeRO-3": ({name: zeros(0) for name in encoder()}, "zero_to_fp32.py"),
    "pruning": (encoder() | {f"{LAYER}output.dense.weight_orig": zeros(32, 48),
                f"{LAYER}output.dense.weight_mask": zeros(32, 48)}, "prune.remove"),
    "PEFT": ({name.replace("query.", "query.base_layer."): row for name,
     row in encoder("base_model.model.bert.").items()},
             "merge_and_unload"),
    "8 bits": (encoder() | {f"{LAYER}attention.self.query.SCB": zeros(32)}, "SCB"),
    "int8": (encoder() | {f"{LAYER}attention.self.query.weight": zeros(32, 32, dtype="I8")}, "quantized"),
    "transposed": (encoder() | {f"{LAYER}output.dense.weight": zeros(48, 32)}, "transposed"),
    "pruned heads": (encoder() | {f"{LAYER}attention.self.{part}.weight": zeros(24, 32) for part in ("query", "key",
     "value")},
                     "heads"),
    "a part": ({name: row for name, row in encoder().items() if LAYER not in name or "output" not in name},
     "a part of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_config_json_is_not_blamed_for_what_the_tensors_are(kind):
    tensors, words = FOREIGN[kind]
    text = refusal(tensors)
    assert words in text and "is this config.json" not in text


def test_layers_of_another_build_are_named():
    fused = {name.replace("attention.self.query", "attention.self.Wqkv"): row for name, row in encoder().items()}
    text = refusal(fused)
    assert "Wqkv" in text and "BertModel lacks" in text and "a part of" not in text


@pytest.mark.parametrize(
    "field", ["hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers", "type_vocab_size"]
)
def test_config_json_is_blamed_where_other_sizes_explain_all(field):
    text = refusal(encoder(), BERT | {field: 8 if field == "type_vocab_size" else 2 * BERT[field]})
    assert "is this config.json from the same model?" in text and field in text


@pytest.mark.parametrize(
    ("field", "noted"),
    [({"output_attentions": True}, True), ({"torchscript": True}, True), ({"chunk_size_feed_forward": 16}, True),
     ({"auto_map": {"AutoModel": "m.M"}}, True),
     ({"_attn_implementation": "flash_attention_2"}, True), ({"attn_implementation": "eager"}, False),
     ({"_attn_implementation_autoset": True}, False)],
    ids=str,
)  # fmt: skip
def test_config_fields_that_block_sparse_attention_refuses_are_taken_out(field, noted):
    planned = plan(encoder(), BERT | field)
    (name,) = field
    assert planned.removed_fields == [name] and planned.source_config[name] == field[name]
    assert planned.config["attn_implementation"] == "block_sparse" and (name in planned.config) == (
        name == "attn_implementation"
    )
    assert [note.kind for note in planned.notes] == [NoteKind.CONFIG_FIELD] * noted


def test_one_of_two_encoders_is_chosen():
    tensors = encoder("query.bert.") | encoder("document.bert.") | {"scale": zeros(1)}
    text = refusal(tensors)
    assert "'query.bert'" in text and "'document.bert'" in text and "--prefix" in text
    planned = plan(tensors, BERT, Options(prefix="query.bert"))
    alone = plan(encoder("query.bert.") | {"scale": zeros(1)}, BERT)
    assert planned.tensors.keys() == alone.tensors.keys() and planned.renamed == alone.renamed
    assert set(planned.dropped) == set(encoder("document.bert.")) and set(planned.dropped.values()) == {
        DropReason.OTHER_ENCODER
    }
    assert "'query.bert'" in refusal(tensors, prefix="query")


@pytest.mark.parametrize(("length", "reads"), [(1_000_000, None), (262_144, 262_144)])
def test_lengths_that_do_not_fit_are_refused_before_anything_is_made(length, reads):
    options = Options(max_length=length, block=64)
    if reads:
        assert plan(encoder(), BERT, options).max_length == reads
    else:
        with pytest.raises(SparsityError, match="524,288"):
            plan(encoder(), BERT, options)


def test_layouts_that_differ_by_layer_need_memory_for_each(monkeypatch):
    monkeypatch.setattr("bsa_export.conversion.resources.available_memory", lambda: 1 << 20)
    options = Options(max_length=16384, mode="bigbird", block=16, different_layout_per_layer=True)
    with pytest.raises(SparsityError, match="memory"):
        plan(encoder(), BERT, options)


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    refuse_full_disk(tmp_path / "new" / "out", 1000)
    with pytest.raises(CheckpointError, match="1 kB"):
        refuse_full_disk(tmp_path / "new" / "out", 1001)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("4096", 4096), ("4,096", 4096), ("4_096", 4096), ("4k", 4096), ("32K", 32768), (" 16 k", 16384), (512, 512),
     ("0", None), ("-1", None), ("4,09", None), ("4m", None), ("", None), ("4.5k", None), ("9" * 30, None)],
)  # fmt: skip
def test_lengths_as_people_write_them(text, tokens):
    if tokens:
        assert parse_length(text) == tokens
    else:
        with pytest.raises(ValueError, match="4096"):
            parse_length(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [("float16", "fp16"), ("half", "fp16"), ("FP16", "fp16"), ("torch.bfloat16", "bf16"), ("float32", "fp32"),
     ("keep", "keep"),
     ("int8", None), ("", None)],
)  # fmt: skip
def test_dtypes_as_people_write_them(text, name):
    if name:
        assert parse_dtype(text) == name
    else:
        with pytest.raises(ValueError, match="bf16"):
            parse_dtype(text)


def test_the_function_has_the_options_of_the_command():
    names = {parameter.name for parameter in main.params}
    only_commands = {"to_dense", "dry_run", "plot", "as_json", "quiet", "verbose", "list_families", "version", "help"}
    renamed = {"config_path": "config"}
    options = {renamed.get(name, name) for name in names - only_commands}
    assert set(signature(convert).parameters) - {"progress"} == options
