"""A model that was trained after its conversion: made whole again, judged against its conversion, and taken back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny import dense_bert

import bsa_export
from bsa_export.conversion.convert import convert_source
from bsa_export.conversion.options import Options
from bsa_export.conversion.to_dense import to_dense
from bsa_export.converted.card import metadata
from bsa_export.converted.folder import open_folder
from bsa_export.converted.integrity import check_file, check_layout
from bsa_export.converted.records import NoteKind, read_conversion
from bsa_export.errors import BsaError
from bsa_export.hub.source import Source
from bsa_export.verify.weights import check_weights

LENGTH, LONGEST = 64, 256
POSITIONS = "bert.embeddings.position_embeddings.weight"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
LAYOUT = "bert.encoder.layer.1.attention.self.sparse_self_attention.master_layout"
RANDOM = {"mode": "bigbird", "parameters": {"num_random_blocks": 2, "num_sliding_window_blocks": 3}, "seed": 7}


def conversion(place: Path, **options) -> Path:
    source = dense_bert(place / "dense")
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LENGTH}))
    out = place / "out"
    convert_source(Source(source), out, Options(**{"max_length": LONGEST, "block": 16} | options))
    return out


def train(out: Path, trained: Path, change, files=("config.json", "vocab.txt", "tokenizer_config.json")) -> Path:
    """What `save_pretrained` writes after training: weights, config.json and tokenizer, and none of the records."""
    trained.mkdir(parents=True)
    weights = load_file(out / "model.safetensors")
    change(weights)
    save_file(weights, trained / "model.safetensors", {"format": "pt"})
    for name in files:
        shutil.copy(out / name, trained / name)
    return trained


def everything(weights) -> None:
    for name, values in weights.items():
        if values.dtype == np.float32:
            weights[name] = values + np.float32(0.01)


def new_rows(weights) -> None:
    weights[POSITIONS][LENGTH + 3 :] += 1


def whole(trained: Path, place: Path, ancestor: Path | None, **options) -> Path:
    named = None if ancestor is None else Source(ancestor)
    convert_source(Source(trained), place, Options(**options), trained_from=named)
    return place


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return conversion(tmp_path_factory.mktemp("conversion"))


@pytest.fixture
def trained(out, tmp_path) -> Path:
    return train(out, tmp_path / "trained", everything)


def test_source_license_and_layouts_of_the_conversion_are_kept(out, trained, tmp_path):
    made = whole(trained, tmp_path / "made", out)
    record, first = read_conversion(made), read_conversion(out)
    assert record.trained_from.record == first == record.origin
    assert record.source.license == "mit"
    weights, before = (load_file(folder / "model.safetensors") for folder in (made, out))
    floats = {name for name, values in weights.items() if values.dtype == np.float32}
    assert set(record.trained_from.changed) == floats
    assert record.trained_from.first_row == 0 and not record.trained_from.only_new_rows
    assert all(np.array_equal(weights[name], before[name]) for name in weights.keys() - floats)
    assert check_weights(open_folder(made), out).passed
    assert check_weights(open_folder(made), trained).passed


def test_random_layouts_are_judged_by_the_seed_of_the_conversion(tmp_path):
    out = conversion(tmp_path, **RANDOM)
    made = whole(train(out, tmp_path / "trained", everything), tmp_path / "made", out)
    assert check_layout(made).figures["recomputed"].startswith("yes")


def test_new_rows_alone_leave_all_else_bit_for_bit(out, tmp_path):
    made = whole(train(out, tmp_path / "trained", new_rows), tmp_path / "made", out)
    training = read_conversion(made).trained_from
    assert (training.changed, training.first_row, training.only_new_rows) == ([POSITIONS], LENGTH + 3, True)
    figures = check_weights(open_folder(made), out).figures
    assert figures["changed by training"] == 1 and figures["first position rows unchanged"] == LENGTH + 3


def test_a_trained_folder_without_a_tokenizer_gets_that_of_the_conversion(out, trained, tmp_path):
    for name in ("vocab.txt", "tokenizer_config.json"):
        (trained / name).unlink()
    made = whole(trained, tmp_path / "made", out)
    assert read_conversion(made).trained_from.files == ["tokenizer_config.json", "vocab.txt"]
    for name in ("vocab.txt", "tokenizer_config.json"):
        assert (made / name).read_bytes() == (out / name).read_bytes()
    assert check_weights(open_folder(made), trained).passed
    assert check_weights(open_folder(made), out).passed
    (made / "vocab.txt").write_text("others\n")
    assert check_weights(open_folder(made), trained).failed
    assert check_weights(open_folder(made), out).failed


def test_the_tokenizer_of_another_vocabulary_is_not_taken(out, tmp_path):
    """Training added a token, and did not save the tokenizer."""
    words = "bert.embeddings.word_embeddings.weight"

    def add_a_token(weights) -> None:
        weights[words] = np.concatenate([weights[words], weights[words][:1]])
        weights["cls.predictions.bias"] = np.append(weights["cls.predictions.bias"], np.float32(0))

    trained = train(out, tmp_path / "trained", add_a_token, ("config.json",))
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    made = whole(trained, tmp_path / "made", out)
    record = read_conversion(made)
    assert record.trained_from.files == [] and not (made / "vocab.txt").exists()
    assert [note.kind for note in record.notes] == [NoteKind.LEFT_BEHIND]
    assert check_weights(open_folder(made), out).passed


def test_a_license_of_the_conversion_is_kept_and_a_changed_file_is_not(tmp_path):
    source = dense_bert(tmp_path / "dense")
    (source / "license.txt").write_text("MIT\n")
    out = tmp_path / "out"
    convert_source(Source(source), out, Options(max_length=LONGEST, block=16))
    trained = train(out, tmp_path / "trained", everything, ("config.json",))
    (out / "vocab.txt").write_text("others\n")
    made = whole(trained, tmp_path / "made", out)
    assert read_conversion(made).trained_from.files == ["license.txt"]
    assert (made / "license.txt").read_text() == "MIT\n" and not (made / "vocab.txt").exists()
    assert [note.kind for note in read_conversion(made).notes] == [NoteKind.LEFT_BEHIND]


def test_a_card_of_a_trained_model_is_kept(out, trained, tmp_path):
    (trained / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nTrained on our own texts.\n")
    (trained / "loss.png").write_bytes(b"PNG")
    made = whole(trained, tmp_path / "made", out)
    assert metadata(made / "README.md")["license"] == "cc-by-4.0" and (made / "loss.png").is_file()
    text = (made / "README.md").read_text()
    assert "\nTrained on our own texts.\n" in text and "import bsa_export" in text


@pytest.mark.parametrize("text", ["", "\n", "---\nlicense: cc-by-4.0\n---\n"])
def test_a_card_without_words_is_replaced(out, trained, tmp_path, text):
    (trained / "README.md").write_text(text)
    card = whole(trained, tmp_path / "made", out) / "README.md"
    assert "trained afterwards" in card.read_text()
    assert metadata(card)["license"] == ("cc-by-4.0" if "license" in text else "mit")


@pytest.mark.parametrize("data", [b"\xff words", b"---\n1: 2\n---\nwords"])
def test_a_card_that_cannot_be_completed_keeps_every_byte(out, trained, tmp_path, data):
    (trained / "README.md").write_bytes(data)
    assert (whole(trained, tmp_path / "made", out) / "README.md").read_bytes() == data


def test_a_link_out_of_the_conversion_is_not_followed(out, trained, tmp_path):
    ancestor = Path(shutil.copytree(out, tmp_path / "ancestor"))
    shutil.move(ancestor / "vocab.txt", tmp_path / "secret")
    (ancestor / "vocab.txt").symlink_to(tmp_path / "secret")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (trained / name).unlink()
    with pytest.raises(BsaError, match="link"):
        whole(trained, tmp_path / "made", ancestor)
    assert not (tmp_path / "made").exists()


def test_a_tokenizer_of_its_own_is_kept(out, trained, tmp_path):
    (trained / "tokenizer_config.json").unlink()
    (trained / "vocab.txt").write_text("others\n")
    made = whole(trained, tmp_path / "made", out)
    assert (made / "vocab.txt").read_text() == "others\n"
    assert not (made / "tokenizer_config.json").exists()


def test_rounding_afterwards_is_not_training(out, tmp_path):
    made = whole(train(out, tmp_path / "trained", new_rows), tmp_path / "made", out, dtype="bf16")
    assert read_conversion(made).trained_from.changed == [POSITIONS]
    assert check_weights(open_folder(made), out).passed


@pytest.mark.parametrize(("before", "now"), [("fp32", np.float16), ("fp16", np.float32)])
def test_another_dtype_is_not_training(tmp_path, before, now):
    """Positions alone are trained, and the model is saved in another dtype than that of the conversion."""
    out = conversion(tmp_path, dtype=before)

    def change(weights) -> None:
        for name, values in weights.items():
            weights[name] = values.astype(now) if values.dtype.kind == "f" else values
        weights[POSITIONS][LENGTH + 3 :] += 1

    made = whole(train(out, tmp_path / "trained", change), tmp_path / "made", out)
    training = read_conversion(made).trained_from
    assert set(training.changed) - set(training.cast) == {POSITIONS} and training.first_row == LENGTH + 3
    assert not training.only_new_rows
    assert check_weights(open_folder(made), out).passed
    twice = whole(tmp_path / "trained", tmp_path / "twice", out, dtype="bf16")
    assert check_weights(open_folder(twice), out).passed
    if before == "fp16":  # every bit of the conversion is there again
        back = whole(tmp_path / "trained", tmp_path / "back", out, dtype="fp16")
        training = read_conversion(back).trained_from
        assert training.only_new_rows and (training.changed, training.first_row) == ([POSITIONS], LENGTH + 3)
        assert check_weights(open_folder(back), out).passed
    weights = load_file(made / "model.safetensors")
    weights[QUERY].flat[-1] *= 2
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    assert check_weights(open_folder(made), out).failed


def claim(record, **fields) -> None:
    record["trained_from"] |= fields


@pytest.mark.parametrize(
    "plant",
    [
        lambda record: claim(record, changed=[]),
        lambda record: claim(record, changed=[POSITIONS, QUERY]),
        lambda record: claim(record, first_row=LENGTH + 4),
        lambda record: claim(record, first_row=LENGTH + 2),
        lambda record: claim(record, changed=[POSITIONS, LAYOUT]),
        lambda record: claim(record, changed=[POSITIONS, "other.weight"]),
        lambda record: record["trained_from"]["record"].update(source_length=LENGTH + 16),
        lambda record: claim(record, cast=[POSITIONS]),
        lambda record: claim(record, cast=[QUERY]),
        lambda record: claim(record, added=[QUERY]),
        lambda record: claim(record, removed=["pooler.dense.weight"]),
        lambda record: record["trained_from"]["record"]["files"].clear(),
        lambda record: record["trained_from"]["record"]["source"]["config"].update(layer_norm_eps=0.5),
        lambda record: record["trained_from"]["record"].update(density=0.5),
    ],
)
def test_a_false_record_fails(out, tmp_path, plant):
    made = whole(train(out, tmp_path / "trained", new_rows), tmp_path / "made", out)
    record = json.loads((made / "conversion.json").read_text())
    plant(record)
    (made / "conversion.json").write_text(json.dumps(record))
    assert check_weights(open_folder(made), out).failed


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"layer_norm_eps": 0.5}, "layer_norm_eps: expected 1e-12 as in the conversion"),
        ({"hidden_act": "relu"}, "hidden_act: expected 'gelu' as in the conversion"),
        ({"hidden_dropout_prob": 0.5, "pad_token_id": 3, "rope_parameters": {"rope_type": "default"}}, None),
    ],
)
def test_training_does_not_change_what_the_encoder_computes(out, tmp_path, fields, fault):
    """Its config.json and the copy of it in conversion.json are forged alike."""
    trained = train(out, tmp_path / "trained", new_rows)
    config = json.loads((trained / "config.json").read_text()) | fields
    (trained / "config.json").write_text(json.dumps(config))
    found = check_weights(open_folder(whole(trained, tmp_path / "made", out)), out)
    assert fault in found.reason if fault else found.passed


def test_an_earlier_record_that_cannot_be_fails_without_the_source(out, trained, tmp_path):
    made = whole(trained, tmp_path / "made", out)
    assert check_file(made).passed
    record = json.loads((made / "conversion.json").read_text())
    record["trained_from"]["record"]["changed"][LAYOUT] = {"layout": True}
    (made / "conversion.json").write_text(json.dumps(record))
    assert f"{LAYOUT}: conversion.json lists it both as added and as changed" in check_file(made).reason


def test_a_first_row_of_positions_that_did_not_change_fails(out, tmp_path):
    def query(weights) -> None:
        weights[QUERY] += 1

    made = whole(train(out, tmp_path / "trained", query), tmp_path / "made", out)
    record = json.loads((made / "conversion.json").read_text())
    claim(record, first_row=LENGTH)
    (made / "conversion.json").write_text(json.dumps(record))
    assert check_weights(open_folder(made), out).failed


@pytest.mark.parametrize("fields", [{"first_row": -1}, {"changed": [QUERY, QUERY]}, {"cast": 5}])
def test_a_record_of_the_wrong_kind_is_damaged(out, trained, tmp_path, fields):
    made = whole(trained, tmp_path / "made", out)
    record = json.loads((made / "conversion.json").read_text())
    claim(record, **fields)
    (made / "conversion.json").write_text(json.dumps(record))
    with pytest.raises(BsaError, match="damaged"):
        read_conversion(made)


@pytest.mark.parametrize("name", ["../dense/README.md", "/etc/hostname", "..", ""])
def test_a_record_that_names_a_file_elsewhere_is_damaged(out, trained, tmp_path, name):
    made = whole(trained, tmp_path / "made", out)
    record = json.loads((made / "conversion.json").read_text())
    claim(record, files=[name])
    (made / "conversion.json").write_text(json.dumps(record))
    with pytest.raises(BsaError, match="damaged"):
        read_conversion(made)


@pytest.mark.parametrize("name", [QUERY, LAYOUT])
def test_a_tensor_that_changed_without_a_word_fails(out, tmp_path, name):
    made = whole(train(out, tmp_path / "trained", new_rows), tmp_path / "made", out)
    weights = load_file(made / "model.safetensors")
    weights[name].flat[-1] += 1
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    assert check_weights(open_folder(made), out).failed


def test_a_lost_layout_comes_from_the_conversion(tmp_path):
    out = conversion(tmp_path, **RANDOM)

    def without_layouts(weights) -> None:
        for name in [name for name in weights if name.endswith("master_layout")]:
            del weights[name]

    made = whole(train(out, tmp_path / "trained", without_layouts), tmp_path / "made", out)
    weights, before = (load_file(folder / "model.safetensors") for folder in (made, out))
    assert all(np.array_equal(weights[name], before[name]) for name in before)
    assert check_weights(open_folder(made), out).passed
    assert check_weights(open_folder(made), tmp_path / "trained").passed
    assert "dense" in check_weights(open_folder(made), tmp_path / "dense").reason


def test_the_conversion_is_found_in_the_folders_around_the_trained_one(out, tmp_path):
    around = Path(shutil.copytree(out, tmp_path / "out"))
    checkpoint = train(around, around / "run" / "checkpoint-2", everything)
    made = whole(checkpoint, tmp_path / "made", None)
    assert read_conversion(made).trained_from.path == "out"


def test_a_conversion_that_training_wrote_over_is_named(out, tmp_path):
    around = Path(shutil.copytree(out, tmp_path / "out"))
    checkpoint = train(around, around / "checkpoint-2", everything)
    shutil.copy(checkpoint / "model.safetensors", around / "model.safetensors")
    (note,) = read_conversion(whole(checkpoint, tmp_path / "made", None)).notes
    assert note.kind is NoteKind.NO_ANCESTOR and "conversion.json in out " in note.text


def test_the_conversion_of_another_model_around_it_is_not_taken(out, tmp_path):
    other = conversion(tmp_path, mode="local")
    made = whole(train(out, other / "trained", everything), tmp_path / "made", None)
    record = read_conversion(made)
    assert record.trained_from is None
    assert NoteKind.NO_ANCESTOR in [note.kind for note in record.notes]


def test_of_several_conversions_around_it_the_one_that_it_resembles_is_taken(out, tmp_path):
    """The nearest has other layouts, the next one the weights of another model."""
    right = Path(shutil.copytree(out, tmp_path / "right"))
    unrelated = right / "unrelated"
    convert_source(Source(dense_bert(tmp_path / "2", seed=2)), unrelated, Options(max_length=LONGEST, block=16))
    conversion(unrelated, mode="local")
    trained = train(out, unrelated / "out" / "trained", everything)
    assert read_conversion(whole(trained, tmp_path / "made", None)).trained_from.path == "right"
    shutil.move(unrelated, tmp_path / "elsewhere")
    record = read_conversion(whole(tmp_path / "elsewhere" / "out" / "trained", tmp_path / "none", None))
    assert record.trained_from is None and NoteKind.NO_ANCESTOR in [note.kind for note in record.notes]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_named_conversion_of_another_model_is_remarked_on(trained, tmp_path, dtype):
    unrelated = tmp_path / "unrelated"
    convert_source(Source(dense_bert(tmp_path / "2", seed=2)), unrelated, Options(max_length=LONGEST, block=16))
    record = read_conversion(whole(trained, tmp_path / "made", unrelated))
    assert NoteKind.UNLIKE_ANCESTOR in [note.kind for note in record.notes]

    def rounded(weights) -> None:
        everything(weights)
        weights.update({name: row.astype(dtype) for name, row in weights.items() if row.dtype == np.float32})

    record = read_conversion(
        whole(train(unrelated, tmp_path / "own", rounded, ("config.json", "vocab.txt")), tmp_path / "fits", unrelated)
    )
    assert record.notes == []


def test_without_stored_layouts_the_sparsity_must_be_that_of_the_conversion(out, tmp_path):
    def without_layouts(weights) -> None:
        for name in [name for name in weights if name.endswith("master_layout")]:
            del weights[name]

    trained = train(out, tmp_path / "trained", without_layouts)
    other = conversion(tmp_path, mode="local")
    with pytest.raises(BsaError):
        whole(trained, tmp_path / "made", other)
    assert read_conversion(whole(trained, tmp_path / "made", out)).trained_from is not None


def test_fewer_positions_keep_the_layouts_in_front(tmp_path):
    out = conversion(tmp_path, **RANDOM)

    def cut(weights) -> None:
        weights[POSITIONS] = weights[POSITIONS][: LONGEST // 2].copy()

    trained = train(out, tmp_path / "trained", cut)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LONGEST // 2}))
    made = whole(trained, tmp_path / "made", out)
    assert check_weights(open_folder(made), out).passed
    weights = load_file(made / "model.safetensors")
    weights[LAYOUT][0, 0, 0] ^= 1
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    assert check_weights(open_folder(made), out).failed


@pytest.mark.parametrize("name", ["", " ", "\x1b[31m", "a" * 5000, "nul\0"])
def test_a_conversion_that_cannot_be_named_gets_a_sentence(trained, tmp_path, name):
    from click.testing import CliRunner

    from bsa_export.cli.convert import main

    ended = CliRunner().invoke(main, [str(trained), str(tmp_path / "made"), "--trained-from", name])
    assert ended.exit_code == 1 and ended.output.startswith("Error: ") and "\x1b" not in ended.output
    assert not (tmp_path / "made").exists()


def test_a_dense_source_was_not_trained_from_a_conversion(out, tmp_path):
    with pytest.raises(BsaError, match="a dense model"):
        whole(dense_bert(tmp_path / "dense"), tmp_path / "made", out)


@pytest.mark.parametrize("kind", ["other layouts", "other size", "overwritten", "dense"])
def test_what_it_was_not_trained_from_is_refused(out, trained, tmp_path, kind):
    ancestor = tmp_path / "ancestor"
    if kind == "other layouts":
        ancestor = conversion(tmp_path, mode="local")
    elif kind == "dense":
        dense_bert(ancestor)
    else:
        shutil.copytree(out, ancestor)
    if kind == "other size":
        config = json.loads((trained / "config.json").read_text())
        (trained / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    elif kind == "overwritten":
        shutil.copy(trained / "model.safetensors", ancestor / "model.safetensors")
    with pytest.raises(BsaError):
        whole(trained, tmp_path / "made", ancestor)
    assert not (tmp_path / "made").exists()


def test_the_conversion_is_not_replaced_by_what_was_trained_from_it(out, trained, tmp_path):
    ancestor = Path(shutil.copytree(out, tmp_path / "ancestor"))
    with pytest.raises(BsaError):
        convert_source(Source(trained), ancestor, trained_from=Source(ancestor), overwrite=True)
    assert read_conversion(ancestor) == read_conversion(out)


def test_the_card_names_the_repository_that_it_was_trained_from(out, trained, tmp_path):
    ancestor = Path(shutil.copytree(out, tmp_path / "ancestor"))
    pulled = {"repo": "alice/long-bert", "revision": "main", "commit": "0" * 40, "files": {}}
    (ancestor / "pulled.json").write_text(json.dumps(pulled))
    made = whole(trained, tmp_path / "made", ancestor)
    stated = metadata(made / "README.md")
    assert (stated["base_model"], stated["base_model_relation"]) == ("alice/long-bert", "finetune")
    assert stated["license"] == "mit"


def test_license_and_base_model_are_those_of_the_nearest_generation(out, trained, tmp_path):
    first = Path(shutil.copytree(out, tmp_path / "first"))
    pulled = {"repo": "alice/long-bert", "revision": "main", "commit": "0" * 40, "files": {}}
    (first / "pulled.json").write_text(json.dumps(pulled))
    (trained / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\nTrained on our own texts.\n")
    second = whole(trained, tmp_path / "second", first)
    third = whole(train(second, tmp_path / "again", everything), tmp_path / "third", second)
    stated = metadata(third / "README.md")
    assert (stated["base_model"], stated["license"]) == ("alice/long-bert", "cc-by-nc-4.0")
    (second / "README.md").write_text("---\nlicense: gpl-3.0\n---\nOur card.\n")
    assert metadata(whole(tmp_path / "again", tmp_path / "4", second) / "README.md")["license"] == "gpl-3.0"


CARD = """---
tags:
- sentence-transformers
- loss:CosineSimilarityLoss
widget:
- source_sentence: hello
  sentences:
  - bye: 1
{more}
---
# Ours

Our words.
"""


@pytest.mark.parametrize(
    ("more", "base_model", "relation"),
    [
        ("base_model: /models/out", "alice/long-bert", "finetune"),
        ("base_model: out", "alice/long-bert", "finetune"),
        ("base_model: [alice/long-bert]", ["alice/long-bert"], "finetune"),
        ("base_model: bob/other", "bob/other", None),
        ("language: en", "alice/long-bert", "finetune"),
    ],
)
def test_a_kept_card_is_completed(tmp_path, more, base_model, relation):
    source = dense_bert(tmp_path / "dense")
    (source / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "Transformer"}]')
    out = tmp_path / "out"
    convert_source(Source(source), out, Options(max_length=LONGEST, block=16))
    (out / "pulled.json").write_text(
        json.dumps({"repo": "alice/long-bert", "revision": "main", "commit": "0" * 40, "files": {}})
    )
    trained = train(out, tmp_path / "trained", everything, ("config.json", "modules.json"))
    (trained / "README.md").write_text(CARD.format(more=more))
    card = whole(trained, tmp_path / "made", out) / "README.md"
    stated = metadata(card)
    assert (stated["base_model"], stated.get("base_model_relation"), stated["license"]) == (base_model, relation, "mit")
    assert stated["widget"] == [{"source_sentence": "hello", "sentences": [{"bye": 1}]}]
    assert (
        stated["tags"][:2] == ["sentence-transformers", "loss:CosineSimilarityLoss"] and "bsa_export" in stated["tags"]
    )
    text = card.read_text()
    assert "\n# Ours\n\nOur words.\n" in text and "import bsa_export" in text and "`alice/long-bert`" in text


def test_a_card_does_not_deny_a_training_that_is_not_known(trained, tmp_path):
    card = (whole(trained, tmp_path / "made", None) / "README.md").read_text()
    assert "was not trained after the conversion" not in card and "may have been trained" in card


def test_a_conversion_that_is_converted_again_was_not_trained(out, tmp_path):
    made = whole(out, tmp_path / "made", None)
    record = read_conversion(made)
    assert record.trained_from.changed_nothing and record.training is None
    tensors = ("| tensors added", "| tensors changed")
    before, after = ((folder / "README.md").read_text().splitlines() for folder in (out, made))
    assert [line for line in after if line.startswith(tensors)] == [line for line in before if line.startswith(tensors)]
    assert any("was not trained after the conversion" in line for line in after)
    assert check_weights(open_folder(made), out).passed


def test_trained_twice(out, trained, tmp_path):
    made = whole(trained, tmp_path / "made", out)
    again = whole(train(made, tmp_path / "again", new_rows), tmp_path / "made again", made)
    record = read_conversion(again)
    assert record.trained_from.changed == [POSITIONS]
    assert record.origin == read_conversion(out)
    assert check_weights(open_folder(again), made).passed
    assert check_weights(open_folder(again), out).failed  # two trainings ago
    card = (again / "README.md").read_text()  # of both trainings, although the last one changed new rows only
    assert "trained afterwards, 2 times" in card and "changed by the last training" in card
    assert "Outputs differ from those of the source" in card


def test_the_way_back_has_the_lengths_of_the_dense_source(out, trained, tmp_path):
    (trained / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": LONGEST, "max_length": LONGEST, "stride": LONGEST})
    )
    made = whole(trained, tmp_path / "made", out)
    to_dense(made, tmp_path / "dense")
    weights, values = load_file(tmp_path / "dense" / "model.safetensors"), load_file(trained / "model.safetensors")
    assert np.array_equal(weights[POSITIONS], values[POSITIONS][:LENGTH])
    assert np.array_equal(weights[QUERY], values[QUERY])
    tokenizer = json.loads((tmp_path / "dense" / "tokenizer_config.json").read_text())
    assert tokenizer == {"model_max_length": LENGTH, "max_length": LENGTH, "stride": LONGEST}


def test_the_way_back_without_a_record_says_what_is_not_known(out, trained, tmp_path):
    dense = to_dense(trained, tmp_path / "dense")
    assert dense.plan.max_length == LONGEST and any("--trained-from" in note for note in dense.plan.notes)
    assert not any("--trained-from" in note for note in to_dense(out, tmp_path / "own").plan.notes)
    fault = check_weights(open_folder(trained), out)
    assert fault.failed and "--trained-from" in fault.reason


def test_a_new_head_over_an_encoder_without_prefix(tmp_path):
    """The class with a head puts the encoder's names behind a prefix."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from sparse_folder import sparse_folder

    out = sparse_folder(tmp_path, class_name="BertModel")
    transformers.set_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out, num_labels=3)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.add_(1)
    model.save_pretrained(tmp_path / "trained")
    made = whole(tmp_path / "trained", tmp_path / "made", out)
    training = read_conversion(made).trained_from
    assert training.changed == ["bert.encoder.layer.1.output.dense.weight"]
    assert {name.partition(".")[0] for name in training.added} == {"classifier"}
    assert training.removed == []
    masked = transformers.AutoModelForMaskedLM.from_pretrained(out)
    masked.save_pretrained(tmp_path / "masked")
    no_pooler = whole(tmp_path / "masked", tmp_path / "masked made", out)
    assert {name.partition(".dense")[0] for name in read_conversion(no_pooler).trained_from.removed} == {"bert.pooler"}
    assert check_weights(open_folder(no_pooler), out).passed
    assert check_weights(open_folder(made), out).passed
    loaded = bsa_export.load(made).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
