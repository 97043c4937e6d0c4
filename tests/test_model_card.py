"""The card of a converted model: metadata that the Hub takes, the facts of the records, and edits that are kept."""

import copy
import json
import os
import time

import msgspec
import numpy as np
import pytest
from huggingface_hub import ModelCard, ModelCardData
from safetensors.numpy import save_file

from bsa_export.converted import card as model_card
from bsa_export.converted.records import ConversionRecord
from bsa_export.errors import CheckpointError
from bsa_export.sparsity.configs import windowed_for
from bsa_export.sparsity.facts import layout_facts
from bsa_export.sparsity.layouts import make_layouts
from bsa_export.sparsity.sections import sparsity_config
from bsa_export.version import PROJECT_URL

CONVERSION = {
    "bsa_export": "0.1.0",
    "family": "bert",
    "source": {
        "path": "pytorch_model.bin",
        "repo": "org/dense",
        "revision": "0123abc",
        "license": "apache-2.0",
        "config": {},
        "files": {"pytorch_model.bin": {"bytes": 10, "sha256": "ab" * 32}},
    },
    "options": {},
    "seed": 0,
    "source_length": 512,
    "max_length": 4096,
    "sparsity": windowed_for(512, 12).to_dict(),
    "density": 0.159,
    "renamed": {},
    "changed": {"bert.embeddings.position_embeddings.weight": {"rows": [512, 4096], "method": "tile"}},
    "added": [f"bert.encoder.layer.{layer}.attention.self.sparse_self_attention.master_layout" for layer in range(6)],
    "dropped": {"bert.embeddings.position_ids": "buffer"},
    "tied": {},
    "positions": {"method": "tile", "reserved": 0, "source_rows": 512, "rows": 4096},
    "files": {"model.safetensors": {"bytes": 20, "sha256": "cd" * 32}},
    "versions": {"python": "3.11.2", "numpy": "2.4.6"},
}
CONFIG = {
    "architectures": ["BertForMaskedLM"],
    "sparse_attention": CONVERSION["sparsity"],
}
VERIFICATION = {
    "verdict": "passed",
    "files": {"model.safetensors": "cd" * 32},
    "checks": [
        {"kind": "weights", "status": "passed", "figures": {"tensors": 108, "bytes": 45_000_000}},
        {"kind": "outputs", "part": "deepspeed", "status": "skipped", "reason": "no GPU | <b>"},
    ],
    "device": "cpu",
    "versions": {"torch": "2.13.0"},
}


def conversion(**changes) -> dict:
    return copy.deepcopy(CONVERSION) | changes


def render(content: dict, config: dict, **more) -> str:
    return model_card.render(msgspec.convert(content, ConversionRecord), None, config, **more)


def facts_of(section: dict, length: int = 4096):
    layouts = make_layouts(sparsity_config(section, 12), length, 6, 0, False)
    return layout_facts(layouts, section["block"], 512)


@pytest.fixture
def folder(tmp_path):
    """A converted folder as `write` finds it: records, config and stored layouts."""
    folder = tmp_path / "converted"
    folder.mkdir()
    layouts = map(np.ascontiguousarray, make_layouts(windowed_for(512, 12), 4096, 6, 0, False))
    save_file(dict(zip(CONVERSION["added"], layouts, strict=True)), folder / "model.safetensors")
    (folder / "conversion.json").write_text(json.dumps(CONVERSION))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def text_of(folder) -> str:
    return (folder / "README.md").read_text()


def test_metadata_is_what_the_hub_reads(folder):
    model_card.write(folder, "me/model")
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert data == {
        "base_model": "org/dense",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "fill-mask",
        "tags": ["bsa_export", "block-sparse-attention", "long-context", "bert", "unverified"],
    }
    assert model_card.metadata(folder / "README.md") == data


def test_a_local_source_without_license_claims_neither(folder):
    source = conversion()["source"] | {"repo": None, "revision": None, "license": None}
    (folder / "conversion.json").write_text(json.dumps(conversion(source=source)))
    model_card.write(folder)
    data = model_card.metadata(folder / "README.md")
    assert not {"base_model", "base_model_relation", "license"} & data.keys()
    assert "`pytorch_model.bin`, converted to block-sparse attention" in text_of(folder)


@pytest.mark.parametrize(
    ("architecture", "tag", "auto_class"),
    [
        ("BertForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
        ("RobertaForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("ElectraForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
        ("XLMRobertaForQuestionAnswering", "question-answering", "AutoModelForQuestionAnswering"),
        ("BertModel", "feature-extraction", "AutoModel"),
        ("AntiBERTy", None, "AutoModel"),
        (None, None, "AutoModel"),
    ],
)
def test_pipeline_and_class_follow_the_architecture(architecture, tag, auto_class):
    text = render(CONVERSION, {"architectures": [architecture]} if architecture else {})
    assert ModelCard(text).data.to_dict().get("pipeline_tag") == tag
    assert f'{auto_class}.from_pretrained("org/name", attn_implementation="block_sparse")' in text


def test_sentence_transformers_folders_say_so():
    files = CONVERSION["files"] | {"modules.json": {"bytes": 1, "sha256": "0" * 64}}
    text = render(conversion(files=files), {"architectures": ["BertModel"]})
    data = ModelCard(text).data.to_dict()
    assert data["pipeline_tag"] == "sentence-similarity"
    assert "sentence-transformers" in data["tags"]
    assert "SentenceTransformer(" in text


def test_tells_what_was_done_from_what(folder):
    model_card.write(folder, "me/model")
    text = text_of(folder)
    for fact in (
        "[org/dense](https://huggingface.co/org/dense) at revision [`0123abc`](https://huggingface.co/org/dense/tree/0123abc)",
        "reads 4,096 tokens; the source reads 512.",
        "`windowed`, block 64",
        "`num_local_blocks` 8, `num_sliding_window_blocks` 9",
        "15.9% of the blocks are computed",
        "512 rows extended to 4,096, method `tile`",
        f"`pytorch_model.bin`, sha256 `{'ab' * 32}`",
        'bsa_export.load("me/model")',
        "Not verified.",
        "bsa\\_export 0.1.0, python 3.11.2, numpy 2.4.6",
    ):
        assert fact in text


def test_verification_is_a_table(folder):
    (folder / "verification.json").write_text(json.dumps(VERIFICATION))
    model_card.write(folder)
    text = text_of(folder)
    assert "`bsa-verify` on cpu: **passed**." in text
    assert "| weights | passed | 108 tensors, 45 MB |" in text
    assert "| outputs: deepspeed | skipped | no GPU \\| \\<b\\> |" in text
    assert "torch 2.13.0" in text


def test_a_verification_of_other_weights_is_not_shown(folder):
    other = VERIFICATION | {"files": {"model.safetensors": "ee" * 32}}
    (folder / "verification.json").write_text(json.dumps(other))
    model_card.write(folder)
    assert "**Not verified.**\n" in text_of(folder)
    assert model_card.PASSED_MARK not in text_of(folder)


def test_a_verification_counts_where_the_conversion_left_out_digests(folder):
    files = {"model.safetensors": {"bytes": 20, "sha256": None}}
    (folder / "conversion.json").write_text(json.dumps(conversion(files=files)))
    (folder / "verification.json").write_text(json.dumps(VERIFICATION))
    model_card.write(folder)
    assert "**passed**" in text_of(folder)


def test_what_is_published_unverified_says_why(folder):
    (folder / "verification.json").write_text(json.dumps(VERIFICATION))
    model_card.write(folder, unverified="it failed | bsa-verify (layers)")
    assert "**Not verified.** Published with `--unverified`: it failed \\| bsa-verify (layers).\n" in text_of(folder)
    assert "| weights | passed" not in text_of(folder)


@pytest.mark.parametrize(
    ("section", "said", "not_said"),
    [
        (
            CONVERSION["sparsity"],
            ["Up to 512 tokens every block is kept", "up to 511 positions away", "repeat those of the source"],
            ["Fine-tune the model", "outputs differ"],
        ),
        (
            {"mode": "bigbird", "block": 64},
            ["% of the blocks are kept, so outputs differ", "Fine-tune the model"],
            ["Up to 512 tokens every block is kept", "and not beyond"],
        ),
        (
            {"mode": "dense", "block": 64},
            ["Up to 512 tokens every block is kept", "where position embeddings repeat", "Fine-tune the model"],
            ["and not beyond"],
        ),
    ],
    ids=["windowed", "bigbird", "dense"],
)
def test_limits_follow_the_layout(section, said, not_said):
    text = render(conversion(sparsity=section), CONFIG, facts=facts_of(section))
    for sentence in said:
        assert sentence in text
    for sentence in not_said:
        assert sentence not in text


def test_the_picture_shows_the_distinct_layouts(folder):
    from matplotlib.image import imread

    model_card.write(folder)
    assert "](layout.png)" in text_of(folder)
    layout = make_layouts(windowed_for(512, 12), 4096, 1, 0, False)[0][0]
    shown = imread(folder / "layout.png")[..., 0]
    assert shown.shape == (384, 384)
    assert ((shown[::6, ::6] < 0.5) == (layout != 0)).all()

    heads = np.stack([layout, np.eye(64, dtype=np.uint8)])
    (folder / "layout.png").write_bytes(model_card.picture([heads, heads]))
    both = imread(folder / "layout.png")[..., 0]
    assert both.shape == (384, 384 + 16 + 384)
    assert (both[:, 384:400] == 1).all()
    assert ((both[::6, 400::6] < 0.5) == np.eye(64, dtype=bool)).all()


def test_another_picture_is_kept(folder):
    (folder / "layout.svg").write_text("<svg/>")
    model_card.write(folder)
    assert "](layout.svg)" in text_of(folder)
    assert not (folder / "layout.png").exists()


def test_its_own_card_is_completed_and_an_edited_one_kept(folder):
    assert not model_card.is_edited(folder)
    assert model_card.write(folder)
    assert not model_card.is_edited(folder)
    assert model_card.write(folder, "me/model")
    assert "me/model" in text_of(folder)

    edited = text_of(folder).replace("## Load", "## How to load")
    (folder / "README.md").write_text(edited)
    assert model_card.is_edited(folder)
    assert not model_card.write(folder, "me/other")
    assert text_of(folder) == edited


@pytest.mark.parametrize("text", ["# Mine\n", "", "\xff\n"])
def test_a_card_of_other_origin_counts_as_edited(folder, text):
    (folder / "README.md").write_bytes(text.encode("latin-1"))
    assert model_card.is_edited(folder)


HOSTILE = ["a|b\n# c<script>alert(1)</script>", "``` `x` | ![](x)", "\x1b]0;x\x07\u202e", '");import os;("']


@pytest.mark.parametrize("value", HOSTILE)
def test_values_cannot_leave_their_place(value):
    """Whatever a name holds, the card keeps its headings, table rows and code blocks."""
    note = {"kind": "other", "text": value}
    source = CONVERSION["source"] | {"repo": None, "path": value, "license": value, "files": {value: {"bytes": 1}}}
    hostile = conversion(
        source=source,
        dropped={value: "ignored"},
        notes=[note],
        not_finite={value: value},
        versions={value: value},
        sparsity=CONVERSION["sparsity"] | {value: value},
    )
    plain = json.loads(json.dumps(hostile).replace(json.dumps(value)[1:-1], "x"))
    text, like = (render(content, CONFIG, repo=repo) for content, repo in ((hostile, value), (plain, "x")))
    shape = [(line[:2] if line[:1] in "#|`-!" else "") for line in text.splitlines()]
    assert shape == [(line[:2] if line[:1] in "#|`-!" else "") for line in like.splitlines()]
    assert not set("\x1b\x07\u202e") & set(text)
    ModelCard(text)


def test_what_to_install_comes_first():
    lines = render(CONVERSION, CONFIG | {"attn_implementation": "block_sparse"}).split("---\n", 2)[2].splitlines()
    assert any(line.startswith("pip install ") and PROJECT_URL in line for line in lines[:5])
    text = "\n".join(lines)
    assert "refuses to load" in text
    assert 'attn_implementation="block_sparse"' not in text


@pytest.mark.parametrize(
    ("card", "license_id"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\r\nlicense: cc-by-4.0\r\n---\r\n", "cc-by-4.0"),
        ("\ufeff---\nlicense:\n- apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlicense: see <a>\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n- license\n---\n", None),
        ("# no metadata", None),
        (None, None),
    ],
)
def test_the_license_that_a_source_states(tmp_path, card, license_id):
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="utf-8", newline="")
    assert model_card.source_license(tmp_path) == license_id


def test_the_license_of_a_real_source(minilm):
    assert model_card.source_license(minilm) == "apache-2.0"


NESTED = "[" * 3000
MERGED = "a: &a {x: 1}\n" + "\n".join(f"b{n}: &a {{<<: [*a, *a]}}" for n in range(60))


@pytest.mark.parametrize(
    ("metadata", "fact"),
    [
        ("license: [", "line 2"),
        ("- license", ""),
        ("date: 2024-02-30", "day"),
        ("a: " + "[1," * 5_000_000, "262,144"),
        (f"a: {NESTED}", ""),
        (MERGED, "<<"),
        ("a: !!python/name:os.system x", "!!python"),
        ("? [a, b]\n: c", ""),
        ("1: a", ""),
        ("a: 1" + "0" * 5000, ""),
    ],
    ids=["open", "list", "date", "15 MB", "nested", "merged", "tag", "list as key", "number as key", "digits"],
)
def test_metadata_that_is_refused(tmp_path, metadata, fact):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    started = time.process_time()
    with pytest.raises(CheckpointError) as error:
        model_card.metadata(tmp_path / "README.md")
    assert fact in str(error.value)
    assert time.process_time() - started < 5
    assert model_card.source_license(tmp_path) is None


def test_aliases_do_not_grow(tmp_path):
    bomb = "a0: &a0 [x, x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{bomb}\n---\n")
    assert model_card.source_license(tmp_path) == "mit"


def test_a_card_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "README.md")
    assert model_card.source_license(tmp_path) is None
    with pytest.raises(CheckpointError):
        model_card.is_edited(tmp_path)


def test_a_folder_without_layouts_gets_a_sentence(folder):
    save_file({"x": np.zeros(1, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected stored layouts in its weights, found none"):
        model_card.write(folder)


def test_the_form_that_transformers_leaves_unfilled_is_not_the_card_of_a_person():
    described = model_card.UNFILLED_DESCRIPTION
    text = str(ModelCard.from_template(ModelCardData(tags=["a"]), model_description=described))
    assert not model_card.is_edited_text(text)
    assert model_card.is_edited_text(text.replace("[More Information Needed]", "Alice", 1))
    assert model_card.is_edited_text(model_card.UNFILLED_TITLE)
