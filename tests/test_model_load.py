"""`bsa_export.load`: the class it takes, what it refuses; registration; the same folder without bsa_export."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from sparse_folder import BLOCK, HEADS, LONGEST, batch, change, layout_name, outputs, sparse_folder  # noqa: E402

import bsa_export  # noqa: E402
from bsa_export.errors import AttentionError, CheckpointError  # noqa: E402


def run_python(code, **env):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_takes_the_class_that_config_json_names(tmp_path):
    folder = sparse_folder(tmp_path, class_name="BertForSequenceClassification", num_labels=3)
    model = bsa_export.load(folder, device="cpu", dtype=torch.bfloat16)
    assert type(model) is transformers.BertForSequenceClassification
    assert (model.dtype, model.training) == (torch.bfloat16, False)


@pytest.mark.parametrize("named", [["AntiBERTy"], [], None], ids=str)
@pytest.mark.parametrize(
    "family, source, expected",
    [
        ("bert", "BertForMaskedLM", "BertForMaskedLM"),
        ("roberta", "RobertaForMaskedLM", "RobertaForMaskedLM"),
        ("electra", "ElectraForPreTraining", "ElectraForPreTraining"),
        ("electra", "ElectraForMaskedLM", "ElectraForMaskedLM"),
        ("distilbert", "DistilBertForMaskedLM", "BertForMaskedLM"),
        ("bert", "BertModel", "BertModel"),
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


def without(*names):
    return lambda tensors: {key: value for key, value in tensors.items() if key not in names}


def with_layout(values):
    layout = torch.as_tensor(values, dtype=torch.uint8).expand(HEADS, LONGEST // BLOCK, LONGEST // BLOCK).contiguous()
    return lambda tensors: tensors | {layout_name("bert.", 0): layout}


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
DAMAGE = {
    "a weight is missing": ({"tensors": without(QUERY)}, CheckpointError, f"missing: {QUERY}.*; is this config.json"),
    "a layout is missing": ({"tensors": without(layout_name("bert.", 1))}, CheckpointError, "missing: .*master_layout"),
    "a layer too many": ({"num_hidden_layers": 1}, CheckpointError, "unexpected: bert.encoder.layer.1.* and 14 more"),
    "another width": (
        {"intermediate_size": 32},
        CheckpointError,
        r"of another shape: .*\(expected \(32,\), found \(64,\)\)",
    ),
    "a head without weights": (
        {"architectures": ["BertForTokenClassification"]},
        CheckpointError,
        "missing: classifier.bias, classifier.weight.*for a new head use BertForTokenClassification.from_pretrained",
    ),
    "an empty row": ({"tensors": with_layout(0)}, AttentionError, "no stored layout"),
    "a layout of other numbers": ({"tensors": with_layout(2)}, AttentionError, "no stored layout"),
    "no sparse_attention": ({"sparse_attention": None}, AttentionError, "needs the sparse_attention section"),
}


@pytest.mark.parametrize("damage, error, said", DAMAGE.values(), ids=DAMAGE)
def test_it_refuses_what_would_not_be_the_model(tmp_path, damage, error, said):
    with pytest.raises(error, match=said):
        bsa_export.load(change(sparse_folder(tmp_path), **damage))


def test_it_wants_a_folder_with_a_config(tmp_path):
    with pytest.raises(CheckpointError, match="expected a converted model's folder with a config.json, found none"):
        bsa_export.load(tmp_path)
    with pytest.raises(
        CheckpointError, match="expected a converted model's folder with a config.json, found no folder"
    ):
        bsa_export.load(tmp_path / "out")
    with pytest.raises(CheckpointError, match="expected .* a folder, or a repository as org/name, found nothing"):
        bsa_export.load(str(tmp_path / "out"))


def test_it_says_which_transformers_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(CheckpointError, match="needs transformers 5.0 or newer.*found 4.57.6"):
        bsa_export.load(tmp_path)


@pytest.mark.parametrize("then", ["import transformers.modeling_utils", "bsa_export.hf.load.register()"])
def test_importing_it_first_registers_once_and_imports_nothing_heavy(then):
    code = f"""
        import sys, bsa_export
        assert not {{"torch", "transformers"}} & set(sys.modules)
        if "register" in {then!r}:
            import bsa_export.hf.load
        {then}
        from torch.nn.modules.module import _global_module_registration_hooks as hooks
        from transformers import AttentionInterface, AttentionMaskInterface
        tables = AttentionInterface(), AttentionMaskInterface()
        print(len(hooks), *("block_sparse" in table.valid_keys() for table in tables))
    """
    assert run_python(code) == "1 True True"


def test_looking_for_transformers_does_not_use_the_registration_up():
    code = """
        import sys, importlib.util, bsa_export
        from bsa_export.hf.import_hook import _AfterTransformers
        for _ in range(2):
            assert importlib.util.find_spec("transformers.modeling_utils").origin.endswith("modeling_utils.py")
        from transformers.modeling_utils import AttentionInterface
        print("block_sparse" in AttentionInterface().valid_keys())
        print(any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path))
    """
    assert run_python(code).split() == ["True", "False"]


def test_plain_transformers_loads_it_as_a_dense_model_of_the_new_length(tmp_path):
    """In a process that never sees bsa_export; the outputs up to the source's length are the source's."""
    sparse_folder(tmp_path)
    code = f"""
        import sys, torch, transformers
        sparse, source = (
            transformers.AutoModelForMaskedLM.from_pretrained({str(tmp_path)!r} + name) for name in ("/out", "/source")
        )
        ids = torch.arange(128)[None] % 100
        assert torch.equal(sparse(ids[:, :64]).logits, source(ids[:, :64]).logits)
        assert not any(name.startswith("bsa_export") for name in sys.modules)
        print(sparse.config._attn_implementation, tuple(sparse(ids).logits.shape))
    """
    assert run_python(code) == "sdpa (1, 128, 100)"
