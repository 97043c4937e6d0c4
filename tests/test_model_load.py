"""`bsa_export.load`: the class it takes, what it refuses; registration; the same folder without bsa_export."""

import json
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from safetensors.torch import load_file, save_file  # noqa: E402
from sparse_folder import BLOCK, HEADS, LONGEST, batch, change, layout_name, outputs, sparse_folder  # noqa: E402

import bsa_export  # noqa: E402
from bsa_export.errors import AttentionError, BsaError, CheckpointError, FamilyError  # noqa: E402


def run_python(code, **env):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_takes_the_class_that_config_json_names(tmp_path):
    folder = sparse_folder(tmp_path, class_name="BertForSequenceClassification", num_labels=3)
    model = bsa_export.load(folder, device="cpu", dtype=torch.bfloat16)
    assert type(model) is transformers.BertForSequenceClassification
    assert (model.dtype, model.training) == (torch.bfloat16, False)


@pytest.mark.parametrize(
    "family, source, expected, named",
    [
        ("bert", "BertForMaskedLM", "BertForMaskedLM", ["AntiBERTy"]),
        ("roberta", "RobertaForMaskedLM", "RobertaForMaskedLM", []),
        ("electra", "ElectraForPreTraining", "ElectraForPreTraining", None),
        ("electra", "ElectraForMaskedLM", "ElectraForMaskedLM", ["Own"]),
        ("distilbert", "DistilBertForMaskedLM", "BertForMaskedLM", None),
        ("bert", "BertModel", "BertModel", ["Own"]),
    ],
)
def test_without_a_class_that_transformers_has_the_tensors_tell(tmp_path, caplog, named, family, source, expected):
    folder = sparse_folder(tmp_path, family, class_name=source)
    inputs = batch()
    known = outputs(bsa_export.load(folder), inputs)
    model = bsa_export.load(change(folder, architectures=named))
    assert type(model).__name__ == expected
    assert f"architectures names {named[0] if named else 'no class'}, which transformers does not have" in caplog.text
    assert torch.equal(outputs(model, inputs), known)


@pytest.mark.parametrize(
    "family, source, loaded",
    [
        ("distilbert", "DistilBertModel", "BertModel"),
        ("roberta", "RobertaForMaskedLM", "RobertaModel"),
        ("electra", "ElectraModel", "ElectraModel"),
    ],
)
def test_a_pooler_without_weights_is_left_out(tmp_path, family, source, loaded):
    folder = change(sparse_folder(tmp_path, family, class_name=source), architectures=[loaded])
    model = bsa_export.load(folder)
    assert type(model).__name__ == loaded
    assert getattr(model, "pooler", None) is None
    assert bsa_export.load(sparse_folder(tmp_path / "bert", class_name="BertModel")).pooler is not None


@pytest.mark.parametrize("family", ["camembert", "bert"])
def test_a_config_that_does_not_speak_of_ties_has_them(tmp_path, family):
    folder = sparse_folder(tmp_path, family)
    known = outputs(bsa_export.load(folder), batch())
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(outputs(bsa_export.load(folder), batch()), known)


def test_a_head_without_a_place_is_named(tmp_path, caplog):
    folder = change(sparse_folder(tmp_path), architectures=["BertModel"])
    bsa_export.load(folder)
    assert "BertModel has no place for cls.predictions" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        {"architectures": ["pipeline"]},
        {"architectures": ["LlamaModel"]},
        {"architectures": ["BertTokenizer"]},
        {"architectures": 7},
        {"architectures": [7]},
        {"num_hidden_layers": 10**6},
        {"hidden_act": "no such function"},
        {"num_attention_heads": None},
        {"sparse_attention": {"mode": "windowed", "block": "wide"}},
        {"sparse_attention": {"mode": "windowed", "block": 0}},
    ],
    ids=str,
)
def test_an_odd_config_is_refused_before_memory_is_spent(tmp_path, content):
    with pytest.raises(BsaError):
        bsa_export.load(change(sparse_folder(tmp_path), **content))


@pytest.mark.parametrize("content", ["[]", '{"source": 7}', '{"layout": {"seed": "x"}, "max_length": []}', "{"])
def test_an_odd_conversion_record_is_refused_in_a_sentence(tmp_path, content):
    folder = sparse_folder(tmp_path)
    (folder / "conversion.json").write_text(content)
    with pytest.raises(BsaError):
        bsa_export.load(folder)


# What importing changes, and silently dense models


def test_a_config_that_names_the_attention_loads_sparse_and_saving_keeps_the_name(tmp_path):
    folder, inputs = change(sparse_folder(tmp_path), attn_implementation="block_sparse"), batch()
    known = outputs(bsa_export.load(folder), inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
        model.save_pretrained(tmp_path / "again")
        again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "again")
    assert model.config._attn_implementation == again.config._attn_implementation == "block_sparse"
    assert torch.equal(outputs(again, inputs), known)


def test_a_model_with_a_sparse_section_that_is_built_dense_warns_once(tmp_path):
    folder = change(sparse_folder(tmp_path), attn_implementation="block_sparse")
    with pytest.warns(UserWarning, match="sparse_attention section") as seen:
        model = transformers.AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="sdpa")
    assert len([each for each in seen if "sparse_attention section" in str(each.message)]) == 1
    assert model.config._attn_implementation == "sdpa"


def test_unregister_undoes_what_importing_changed(tmp_path):
    from torch.nn.modules.module import _global_module_registration_hooks as hooks

    model, inputs = bsa_export.load(sparse_folder(tmp_path)), batch()
    known = outputs(model, inputs)
    bsa_export.unregister()
    try:
        for interface in (transformers.AttentionInterface(), transformers.AttentionMaskInterface()):
            assert not [name for name in interface.valid_keys() if name.startswith("block_sparse")]
        assert not hooks
        with pytest.raises(ValueError):
            transformers.AutoConfig.for_model("bsa_bert")
        with pytest.raises(AttentionError, match="not registered"):
            model(**inputs)
    finally:
        bsa_export.register()
    assert torch.equal(outputs(model, inputs), known)
    assert transformers.AutoConfig.for_model("bsa_bert").model_type == "bsa_bert"


def test_a_model_that_the_old_code_pickled_whole_loads(tmp_path):
    """Its pickle names the classes and hooks of `bsa_export.model`, where earlier releases had them."""
    model, inputs = bsa_export.load(sparse_folder(tmp_path)), batch(padding="right")
    old = {
        "bsa_export.hf.stored_layout\nStoredLayout\n": "bsa_export.model\nStoredLayout\n",
        "bsa_export.hf.unpadding\nunpad_input\n": "bsa_export.model\n_drop_padding\n",
        "bsa_export.hf.unpadding\npad_input\n": "bsa_export.model\n_restore_padding\n",
        "bsa_export.hf.register\n_refuse_longer\n": "bsa_export.model\n_refuse_longer\n",
        "bsa_export.hf.register\n_refuse_longer_in_row\n": "bsa_export.model\n_refuse_longer_in_row\n",
    }
    pickled = pickle.dumps(model, protocol=2)  # names are lines of text there
    for now, before in old.items():
        assert f"c{now}".encode() in pickled
        pickled = pickled.replace(f"c{now}".encode(), f"c{before}".encode())
    assert torch.equal(outputs(pickle.loads(pickled), inputs), outputs(model, inputs))


def without(*names):
    return lambda tensors: {key: value for key, value in tensors.items() if key not in names}


def with_layout(values):
    layout = torch.as_tensor(values, dtype=torch.uint8).expand(HEADS, LONGEST // BLOCK, LONGEST // BLOCK).contiguous()
    return lambda tensors: tensors | {layout_name("bert.", 0): layout}


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
DAMAGE = {
    "a weight is missing": ({"tensors": without(QUERY)}, FamilyError, QUERY),
    "a layout is missing": ({"tensors": without(layout_name("bert.", 1))}, FamilyError, "master_layout"),
    "a layer too many": ({"num_hidden_layers": 1}, CheckpointError, "unexpected: bert.encoder.layer.1.* and 14 more"),
    "another width": (
        {"intermediate_size": 32},
        FamilyError,
        r"intermediate.dense.bias: expected \[32\] .*found \[64\]",
    ),
    "a head without weights": (
        {"architectures": ["BertForTokenClassification"]},
        CheckpointError,
        "missing: classifier.bias, classifier.weight.*for a new head use BertForTokenClassification.from_pretrained",
    ),
    "an empty row": ({"tensors": with_layout(0)}, AttentionError, "no stored layout"),
    "a layout of other numbers": ({"tensors": with_layout(2)}, AttentionError, "no stored layout"),
    "no sparse_attention": ({"sparse_attention": None}, CheckpointError, "sparse_attention section"),
}


@pytest.mark.parametrize("damage, error, said", DAMAGE.values(), ids=DAMAGE)
def test_it_refuses_what_would_not_be_the_model(tmp_path, damage, error, said):
    with pytest.raises(error, match=said):
        bsa_export.load(change(sparse_folder(tmp_path), **damage))


def test_old_names_of_norms_load_as_transformers_reads_them(tmp_path):
    """transformers 5.24 saves a model that ZeRO 3 trained with `LayerNorm.gamma` and `.beta`."""
    folder = sparse_folder(tmp_path)
    expected = outputs(bsa_export.load(folder), batch())
    old = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for today, before in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            name = name.replace(today, before)
        old[name] = tensor
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    assert all(map(torch.equal, outputs(bsa_export.load(folder), batch()), expected))


def test_it_wants_a_folder_with_a_config(tmp_path):
    for path in (tmp_path, tmp_path / "out", str(tmp_path / "out")):
        with pytest.raises(BsaError, match=str(tmp_path)):
            bsa_export.load(path)


def test_it_says_which_transformers_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(CheckpointError, match="needs transformers 5.0 or newer.*found 4.57.6"):
        bsa_export.load(tmp_path)


def test_importing_it_first_imports_nothing_heavy_and_registers_once_after_a_look():
    code = """
        import sys, importlib.util, bsa_export
        from bsa_export.hf.import_hook import _AfterTransformers
        assert not {"torch", "transformers"} & set(sys.modules)
        for _ in range(2):
            assert importlib.util.find_spec("transformers.modeling_utils").origin.endswith("modeling_utils.py")
        from transformers.modeling_utils import AttentionInterface
        import bsa_export.hf.load
        bsa_export.hf.load.register()
        from torch.nn.modules.module import _global_module_registration_hooks as hooks
        from transformers import AttentionMaskInterface, AutoModel
        tables = AttentionInterface(), AttentionMaskInterface()
        print(len(hooks), *("block_sparse" in table.valid_keys() for table in tables))
        assert not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path)
    """
    assert run_python(code) == "1 True True"


def test_plain_transformers_refuses_the_name_and_runs_dense_where_it_is_asked_to(tmp_path):
    """In a process that never sees bsa_export; the dense outputs up to the source's length are the source's."""
    change(sparse_folder(tmp_path), attn_implementation="block_sparse")
    code = f"""
        import sys, torch, transformers
        auto = transformers.AutoModelForMaskedLM.from_pretrained
        try:
            print(auto("{tmp_path}/out").config._attn_implementation)
        except ValueError as error:
            print("refused", "block_sparse" in str(error))
        sparse, source = auto("{tmp_path}/out", attn_implementation="sdpa"), auto("{tmp_path}/source")
        ids = torch.arange(128)[None] % 100
        assert torch.equal(sparse(ids[:, :64]).logits, source(ids[:, :64]).logits)
        assert not any(name.startswith("bsa_export") for name in sys.modules)
        print(sparse.config._attn_implementation, tuple(sparse(ids).logits.shape))
    """
    ignores_the_key = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 4)
    first = "sdpa" if ignores_the_key else "refused True"
    assert run_python(code).split("\n") == [first, "sdpa (1, 128, 100)"]
