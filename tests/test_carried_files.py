"""Files that a conversion carries over, and why others stay behind; sentence-transformers loads what it loaded."""

import json
import os
import random
import shutil
import string
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.conversion import carried_files, json_text
from bsa_export.conversion.carried_files import How
from bsa_export.conversion.left_behind import LeftBehind
from bsa_export.conversion.lengths import set_lengths
from bsa_export.conversion.source_folder import encoder_folder
from bsa_export.converted.records import LengthChange, NoteKind
from bsa_export.errors import CheckpointError

MODULE = "sentence_transformers.sentence_transformer.modules."


def planned(source: Path, max_length: int = 4096, **options):
    return carried_files.plan(source, open_checkpoint(encoder_folder(source)), 512, max_length, **options)


def carried(source: Path, target: Path, max_length: int = 4096, **options):
    """Plans and writes; returns the plan."""
    found = planned(source, max_length, **options)
    records = carried_files.write(found, target)
    assert records.keys() == {file.name for file in found.carried}
    for name, record in records.items():
        assert record.bytes == (target / name).stat().st_size
    return found


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"encoder.layer.0.attention.self.query.weight": torch.zeros(64, 64)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def target(tmp_path):
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


@pytest.fixture(scope="module")
def from_minilm(minilm, tmp_path_factory):
    target = tmp_path_factory.mktemp("minilm-4096")
    return target, carried(minilm, target)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# A real model.


def test_takes_the_tokenizer_and_the_modules_and_says_what_stays(from_minilm):
    target, found = from_minilm
    assert files(target) == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
        "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
    }  # fmt: skip
    assert {name: why for name, why in found.left_behind.items() if name != ".gitattributes"} == {
        "README.md": LeftBehind.CARD,
        "config.json": LeftBehind.REPLACED,
        "data_config.json": LeftBehind.NOT_OF_THE_MODEL,
    }  # fmt: skip
    (note,) = found.notes()
    assert note.kind is NoteKind.LEFT_BEHIND and "data_config.json" in note.text and "README.md" not in note.text


def test_changes_lengths_and_no_other_character(minilm, from_minilm):
    target, found = from_minilm
    assert [(change.file, change.key, change.before, change.after) for change in found.changes] == [
        ("sentence_bert_config.json", ("max_seq_length",), "256", "4096"),
        ("tokenizer.json", ("truncation", "max_length"), "128", "4096"),
        ("tokenizer.json", ("padding", "strategy"), '{"Fixed":128}', '"BatchLongest"'),
        ("tokenizer_config.json", ("model_max_length",), "512", "4096"),
    ]
    for file in found.carried:
        text = (minilm / file.name).read_text()
        for change in file.changes:
            assert text.count(change.before) == 1 or change.before == "128"
            text = text.replace(f'"{change.key[-1]}":{change.before}', f'"{change.key[-1]}":{change.after}')
            text = text.replace(f'"{change.key[-1]}": {change.before}', f'"{change.key[-1]}": {change.after}')
        assert text == (target / file.name).read_text(), file.name


def test_the_way_back_restores_every_length(minilm, from_minilm, target):
    there, found = from_minilm
    shutil.copy(minilm / "model.safetensors", there)
    checkpoint = open_checkpoint(there)
    back = carried_files.plan(there, checkpoint, 4096, 512, restore=found.changes)
    carried_files.write(back, target)
    (there / "model.safetensors").unlink()
    assert back.changes == []
    for name in files(target):
        assert (target / name).read_bytes() == (minilm / name).read_bytes(), name


def test_transformers_and_tokenizers_read_the_new_length(from_minilm):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, BertConfig

    target, _ = from_minilm
    BertConfig(max_position_embeddings=4096).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.model_max_length == 4096
    alone = Tokenizer.from_file(str(target / "tokenizer.json"))
    long, short = alone.encode_batch(["word " * 5000, "word " * 3000])
    assert (len(long.ids), sum(short.attention_mask)) == (4096, 3002)
    (target / "config.json").unlink()


def test_the_same_length_changes_nothing(minilm, target):
    assert carried(minilm, target, 512).changes == []
    for name in files(target):
        assert (target / name).read_bytes() == (minilm / name).read_bytes()


# Lengths.


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("tokenizer_config.json", '{\r\n  "max_len": 512,\r\n "a": 1}\r\n', '{\r\n  "max_len": 4096,\r\n "a": 1}\r\n'),
        ("tokenizer_config.json", '{"max_len": 512}', '{"max_len": 4096}'),
        ("tokenizer_config.json", '{"max_len": 1000000000000000019884624838656}', '{"max_len": 4096}'),
        ("tokenizer_config.json", '{"model_max_length": 128.0}', '{"model_max_length": 4096}'),
        ("tokenizer_config.json", '{"model_max_length": 1e30}', '{"model_max_length": 4096}'),
        ("tokenizer_config.json", '{"model_max_length": null}', '{"model_max_length": 4096}'),
        ("tokenizer_config.json", '{"model_max_length": -1}', '{"model_max_length": 4096}'),
        ("tokenizer_config.json", '{"do_lower_case": true}', '{"do_lower_case": true, "model_max_length": 4096}'),
        ("tokenizer_config.json", '{\n "a": "{é}\\u00e9"\n}', '{\n "a": "{é}\\u00e9",\n "model_max_length": 4096\n}'),
        ("tokenizer_config.json", "{ }", '{"model_max_length": 4096 }'),
        ("tokenizer_config.json", "[1]", "[1]"),
        ("tokenizer_config.json", '{"max_length": 128, "max_len": 512}', '{"max_length": 4096, "max_len": 4096}'),
        ("tokenizer_config.json", '{"model_max_length": [512]}', '{"model_max_length": [512]}'),
        ("sentence_bert_config.json", '{"max_seq_length": null}', '{"max_seq_length": null}'),
        ("sentence_roberta_config.json", '{"max_seq_length": 128}', '{"max_seq_length": 4096}'),
        ("sentence_bert_config.json", '{"tokenizer_args": {"max_len": 512}}', '{"tokenizer_args": {"max_len": 4096}}'),
        ("tokenizer.json", '{"truncation": null, "padding": null}', '{"truncation": null, "padding": null}'),
        ("tokenizer.json", '{"truncation": [1], "padding": 7}', '{"truncation": [1], "padding": 7}'),
        ("tokenizer.json", '{"truncation": {"max_length": [1]}}', '{"truncation": {"max_length": [1]}}'),
        ("tokenizer.json", '{"padding": {"strategy": "BatchLongest"}}', '{"padding": {"strategy": "BatchLongest"}}'),
        ("special_tokens_map.json", '{"max_length": 512}', '{"max_length": 512}'),
    ],
)  # fmt: skip
def test_edits_in_place_and_back(source, target, name, before, after):
    (source / name).write_text(before, encoding="utf-8", newline="")
    found = carried(source, target)
    assert (target / name).read_bytes().decode() == after
    assert set_lengths(name, after, 512, found.changes) == (before, [])


def test_on_the_way_back_a_length_that_the_conversion_did_not_change_stays():
    text = '{"model_max_length": 4096}'  # as in the source, which said so for 512 tokens
    assert set_lengths("tokenizer_config.json", text, 4096) == (text, [])
    assert set_lengths("tokenizer_config.json", text, 512, []) == (text, [])
    assert set_lengths("tokenizer_config.json", text, 512) != (text, [])  # there is no record


def test_a_length_that_was_changed_since_is_set_and_not_restored():
    recorded = [LengthChange("tokenizer_config.json", ("model_max_length",), "128", "4096")]
    text, changes = set_lengths("tokenizer_config.json", '{"model_max_length": 2048}', 512, recorded)
    assert text == '{"model_max_length": 512}'
    assert [change.before for change in changes] == ["2048"]


def random_json(draw: random.Random, depth: int = 0):
    kind = draw.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return draw.choice([0, -1, 128, 512, 10**30, 1.5, 1e30, True, None])
    if kind < 5:
        return "".join(draw.choices(string.printable + 'é\u2028"\\{}[],:', k=draw.randrange(6)))
    keys = ["model_max_length", "max_length", "strategy", "truncation", "padding", "a", "\u20ac", 'q"\\', ""]
    if kind < 7:
        return {draw.choice(keys): random_json(draw, depth + 1) for _ in range(draw.randrange(5))}
    return [random_json(draw, depth + 1) for _ in range(draw.randrange(4))]


def test_edited_json_is_the_same_document_with_other_lengths():
    """Random documents in random layout, judged by the json module."""
    draw = random.Random(0)
    for number in range(3000):
        content = {f"k{number}": random_json(draw), **{key: random_json(draw) for key in ("truncation", "padding")}}
        if draw.random() < 0.5:
            content["model_max_length"] = random_json(draw, 3)
        layout = draw.choice(
            [{"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}, {"separators": (" , ", " : ")}]
        )
        text = draw.choice(["", " \n"]) + json.dumps(content, ensure_ascii=draw.random() < 0.5, **layout)
        name = draw.choice(["tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"])
        edited, changes = set_lengths(name, text, 4096)
        expected = json.loads(text)
        for change in changes:
            place = expected
            for key in change.key[:-1]:
                place = place[key]
            assert (change.key[-1] in place) == (change.before is not None)
            place[change.key[-1]] = json.loads(change.after)
        assert json.loads(edited) == expected and list(json.loads(edited)) == list(expected)
        assert set_lengths(name, edited, 512, changes)[0] == text
        for key, span in json_text.members(text).items():
            assert json.loads(text[span.start : span.end]) == content[key]


# Which files, and why not.


def test_every_file_is_carried_or_named_with_its_reason(source, target):
    big = {f"head.{number}": torch.zeros(8, 8) for number in range(100)}
    torch.save({"weight": torch.randn(4, 8), "bias": torch.randn(4)}, source / "colbert_linear.pt")
    torch.save(
        {"module.encoder.layer.0.attention.self.query.weight": torch.zeros(64, 64)}, source / "pytorch_model.bin"
    )
    torch.save(big, source / "decoder.bin")
    for name in ("tf_model.h5", "model.onnx", "modeling_x.py", "training_args.bin", "optimizer.pt",
                 "adapter_config.json", "LICENSE", "license.txt", ".gitattributes", "results.csv",
                 "conversion.json", "model.pkl"):  # fmt: skip
        (source / name).write_bytes(b"text")
    for name in ("onnx", "checkpoint-500", ".git", "notes", "__pycache__"):
        (source / name).mkdir()
        (source / name / "x").touch()
    found = carried(source, target)
    assert {file.name: file.how for file in found.carried} == {
        "LICENSE": How.COPIED, "license.txt": How.COPIED, "colbert_linear.safetensors": How.AS_SAFETENSORS
    }  # fmt: skip
    assert load_file(target / "colbert_linear.safetensors").keys() == {"weight", "bias"}
    assert found.left_behind == {
        "config.json": LeftBehind.REPLACED,
        "conversion.json": LeftBehind.RECORD,
        "tf_model.h5": LeftBehind.OTHER_FORMAT,
        "model.onnx": LeftBehind.OTHER_FORMAT,
        "onnx/": LeftBehind.OTHER_FORMAT,
        "pytorch_model.bin": LeftBehind.SAME_WEIGHTS,
        "decoder.bin": LeftBehind.OTHER_WEIGHTS,
        "model.pkl": LeftBehind.UNREADABLE,
        "adapter_config.json": LeftBehind.ADAPTER,
        "training_args.bin": LeftBehind.TRAINING_STATE,
        "optimizer.pt": LeftBehind.TRAINING_STATE,
        "checkpoint-500/": LeftBehind.TRAINING_STATE,
        "modeling_x.py": LeftBehind.CODE,
        "__pycache__/": LeftBehind.CODE,
        ".gitattributes": LeftBehind.HIDDEN,
        ".git/": LeftBehind.HIDDEN,
        "results.csv": LeftBehind.NOT_OF_THE_MODEL,
        "notes/": LeftBehind.NOT_OF_THE_MODEL,
    }


def test_beside_a_named_file_only_the_tokenizer_counts(source, target):
    for name in ("LICENSE", "vocab.txt", "thesis.doc"):
        (source / name).write_text("text")
    torch.save({"weight": torch.randn(4, 8)}, source / "head.pt")
    found = carried(source / "model.safetensors", target)
    assert files(target) == {"vocab.txt"}
    assert found.left_behind == {}


def test_pickles_never_run(source):
    class Run:
        def __reduce__(self):
            return os.system, (f"touch {source}/ran",)

    torch.save({"linear.weight": Run()}, source / "head.pt")
    assert planned(source).left_behind["head.pt"] is LeftBehind.UNREADABLE
    (source / "head.pt").rename(source / "1_Dense.pt")
    modules(source, "2_Dense")
    torch.save({"linear.weight": Run()}, source / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        planned(source)
    assert not (source / "ran").exists()


# Modules.


def modules(source: Path, *paths: str, kind: str = f"{MODULE}Dense") -> None:
    """A modules.json with these paths after the encoder's, and their folders."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": f"{MODULE}Transformer"}]
    entries += [{"idx": n, "name": str(n), "path": path, "type": kind} for n, path in enumerate(paths, 1)]
    (source / "modules.json").write_text(json.dumps(entries))
    for path in paths:
        if path and ".." not in path and not path.startswith("/") and path.isprintable():
            (source / path).mkdir(parents=True, exist_ok=True)
            (source / path / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["."], set()),
        (["./."], set()),
        (["./1_A/"], {"1_A/config.json"}),
        (["1_A", "1_A", "./1_A"], {"1_A/config.json"}),
        (["1_A/b/c", "1_A"], {"1_A/config.json", "1_A/b/c/config.json"}),
    ],
)
def test_paths_of_modules_are_compared_resolved(source, target, paths, names):
    modules(source, *paths)
    (source / "config.json").write_text('{"the": "source"}')
    (target / "config.json").write_text('{"the": "converted one"}')
    carried(source, target)
    assert files(target) == {"modules.json", "config.json"} | names
    assert "converted" in (target / "config.json").read_text()


@pytest.mark.parametrize(
    "path", ["../other", "/etc", "a/../..", "a/../.", "1_A\0", "1_A\n", "1\ud800", "..\\other", "config.json/a"]
)
def test_paths_of_modules_stay_inside(source, path):
    (source / "config.json").unlink()
    modules(source, path)
    with pytest.raises(CheckpointError, match="module"):
        planned(source)


def test_nothing_that_is_there_is_overwritten(source, target):
    (source / "vocab.txt").write_text("a")
    (target / "vocab.txt").write_text("b")
    with pytest.raises(CheckpointError):
        carried(source, target)
    assert (target / "vocab.txt").read_text() == "b"


def test_folders_of_modules_are_carried_whole_without_code(source, target):
    modules(source, "1_Router")
    nested = source / "1_Router" / "query_0_Dense" / "deeper"
    nested.mkdir(parents=True)
    (nested / "config.json").write_text('{"in_features": 8}')
    (nested / "emoji.dat").write_bytes(bytes(256))
    weights = {"linear.weight": torch.randn(4, 8), "linear.bias": torch.randn(4)}
    torch.save(weights, nested / "pytorch_model.bin")
    save_file(weights, source / "1_Router" / "model.safetensors")
    torch.save(weights, source / "1_Router" / "pytorch_model.bin")
    (source / "1_Router" / "training.py").touch()
    (source / "1_Router" / "onnx").mkdir()
    found = carried(source, target)
    assert files(target) == {
        "modules.json", "1_Router/config.json", "1_Router/model.safetensors",
        "1_Router/query_0_Dense/deeper/config.json", "1_Router/query_0_Dense/deeper/emoji.dat",
        "1_Router/query_0_Dense/deeper/model.safetensors",
    }  # fmt: skip
    loaded = load_file(target / "1_Router/query_0_Dense/deeper/model.safetensors")
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert found.left_behind == {
        "config.json": LeftBehind.REPLACED,
        "1_Router/onnx/": LeftBehind.OTHER_FORMAT,
        "1_Router/pytorch_model.bin": LeftBehind.SAME_WEIGHTS,
        "1_Router/training.py": LeftBehind.CODE,
    }


@pytest.mark.parametrize("where", ["", "1_Custom/"])
def test_modules_whose_class_is_code_of_the_folder_are_refused(source, where):
    modules(source, "1_Custom", kind="my_pooling.Pooling")
    planned(source)  # the class of an installed package
    (source / where / "my_pooling.py").touch()
    with pytest.raises(CheckpointError, match=r"my_pooling\.Pooling.*my_pooling\.py"):
        planned(source)


def test_a_pickle_that_no_module_reads_is_refused(source):
    modules(source, "1_Dense")
    (source / "1_Dense" / "weights.pkl").touch()
    with pytest.raises(CheckpointError, match=r"weights\.pkl"):
        planned(source)


# Links.


def test_links_inside_the_folder_and_into_the_own_blobs_become_files(tmp_path, source, target):
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / ("0" * 40)
    modules(source, "1_Pooling")
    (source / "vocab.txt").write_text("[PAD]\n")
    for number, name in enumerate(sorted(files(source))):
        blob = repo / "blobs" / f"{number:040x}"
        shutil.copy(source / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    (snapshot / "LICENSE").symlink_to("vocab.txt")
    carried(snapshot, target)
    assert files(target) == {"vocab.txt", "LICENSE", "modules.json", "1_Pooling/config.json"}
    assert not any(path.is_symlink() for path in target.rglob("*"))


@pytest.mark.parametrize(
    "name", ["vocab.txt", "LICENSE", "modules.json", "1_Pooling", "1_Pooling/config.json", "1_Pooling/deep"]
)
def test_links_out_of_the_folder_are_refused(tmp_path, source, name):
    modules(source, "1_Pooling")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text("[]")
    path = source / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(outside if name in ("1_Pooling", "1_Pooling/deep") else outside / "secret.json")
    with pytest.raises(CheckpointError, match="link"):
        planned(source)


def test_a_head_outside_of_the_folder_stays_there(tmp_path, source):
    torch.save({"weight": torch.randn(4, 8)}, tmp_path / "head.pt")
    (source / "head.pt").symlink_to(tmp_path / "head.pt")
    assert planned(source).left_behind["head.pt"] is LeftBehind.LINK


def test_a_link_back_to_the_folder_is_refused(source):
    modules(source, "1_Pooling")
    shutil.rmtree(source / "1_Pooling")
    (source / "1_Pooling").symlink_to(".")
    with pytest.raises(CheckpointError, match="link"):
        planned(source)


# Damage and size.


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("vocab.txt", b"<!DOCTYPE html><html>", "HTML"),
        ("vocab.txt", b"", "empty"),
        ("tokenizer_config.json", b'{"a": 1', "JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "JSON"),
        ("tokenizer_config.json", b'{"a": NaN}', "NaN"),
        ("tokenizer_config.json", b'{"model_max_length": 1' + b"0" * 5000 + b"}", "JSON"),
        ("tokenizer_config.json", b'{1: 2}', "JSON"),
        ("tokenizer_config.json", b'{"a": 1, "a": 2}', "twice"),
        ("tokenizer_config.json", b'{"a": "\xff"}', "UTF-8"),
        ("modules.json", b'{"path": ""}', "modules"),
        ("modules.json", b'[{"path": 7}]', "modules"),
        ("modules.json", b'["1_Pooling"]', "modules"),
    ],
)  # fmt: skip
def test_damaged_files_get_a_sentence(source, name, content, facts):
    (source / name).write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        planned(source)
    assert str(source / name) in str(raised.value) and facts in str(raised.value)


def test_only_regular_files_of_a_sane_size_are_read(source):
    with open(source / "vocab.txt", "wb") as file:
        file.truncate(5_000_000_000)
    with pytest.raises(CheckpointError, match=r"vocab\.txt.*5,000,000,000"):
        planned(source)
    (source / "vocab.txt").unlink()
    os.mkfifo(source / "vocab.txt")
    with pytest.raises(CheckpointError, match="pipe"):
        planned(source)
    (source / "vocab.txt").unlink()
    (source / "vocab.txt").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="vocab"):
        planned(source)
    (source / "vocab.txt").unlink()
    (source / "vocab.txt").write_text("<s>\n<pad>\n")  # a vocabulary, not a page
    assert [file.name for file in planned(source).carried] == ["vocab.txt"]


def test_a_file_that_changes_meanwhile_is_refused(source, target):
    (source / "vocab.txt").write_text("a")
    found = planned(source)
    (source / "vocab.txt").write_text("ab")
    with pytest.raises(CheckpointError, match="changed"):
        carried_files.write(found, target)


# sentence-transformers itself.


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory):
    """Makes a sentence-transformers folder of a tiny BERT, a pooling, and further modules."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("base")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *string.ascii_lowercase,
        *(f"##{c}" for c in string.ascii_lowercase),
    ]
    (base / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast.from_pretrained(base, model_max_length=128).save_pretrained(base)
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512,
    )  # fmt: skip
    BertModel(config).save_pretrained(base)

    def make(*further, safe: bool = True) -> Path:
        encoder = Transformer(str(base), max_seq_length=100)
        folder = tmp_path_factory.mktemp("sentences")
        model = SentenceTransformer(modules=[encoder, Pooling(64, "mean"), *further], device="cpu")
        model.save_pretrained(str(folder), safe_serialization=safe)
        return folder

    return make


def embeddings(folder: Path) -> list:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    texts = ["a bc", "the quick brown fox"]
    if hasattr(model[-1], "sub_modules"):
        return [*model.encode(texts, prompt_name=None, task="query"), *model.encode(texts, task="document")]
    return [*model.encode(texts)]


def assert_loads_the_same(source: Path, target: Path) -> None:
    """The source's encoder with the carried files embeds as the source does."""
    found = carried(source, target)
    encoder = encoder_folder(source)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(encoder / name, target / name)
    assert any(change.before == "100" for change in found.changes)
    for one, other in zip(embeddings(source), embeddings(target), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("safe", [True, False])
def test_sentence_transformers_loads_nested_modules_with_weights(sentence_folder, target, safe):
    from sentence_transformers.models import Dense, LayerNorm, Normalize, Router

    def router():
        return Router.for_query_document([Dense(64, 8), Normalize()], [Dense(64, 8), LayerNorm(8)])

    source = sentence_folder(Dense(64, 64), router(), safe=safe)
    if not safe:  # transformers 5 saves the encoder as safetensors in any case
        assert list(source.rglob("*/pytorch_model.bin"))
    assert_loads_the_same(source, target)
    assert not list(target.rglob("*.bin"))


def test_sentence_transformers_loads_an_encoder_that_had_a_folder_of_its_own(sentence_folder, target):
    from sentence_transformers.models import Dense

    source = sentence_folder(Dense(64, 8))
    expected = numpy.array(embeddings(source))
    own = source / "0_BERT"
    own.mkdir()
    for path in list(source.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            path.rename(own / path.name)
    content = json.loads((source / "modules.json").read_text())
    content[0] |= {"path": "0_BERT", "type": "sentence_transformers.models.BERT"}
    (source / "modules.json").write_text(json.dumps(content))
    torch.save({"weight": torch.randn(4, 8)}, source / "head.pt")
    found = carried(source, target)
    assert {"tokenizer.json", "head.safetensors"} <= files(target)
    assert any(change.before == "100" for change in found.changes)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(own / name, target / name)
    assert (numpy.array(embeddings(target)) == expected).all()


def test_a_trained_folder_keeps_its_card_and_lengths(sentence_folder, target):
    source = sentence_folder()
    (source / "loss.png").write_bytes(b"PNG")
    found = carried(source, target, 512, keep_card=True)
    assert (target / "loss.png").is_file()
    assert found.changes == []
    assert (target / "README.md").read_bytes() == (source / "README.md").read_bytes()
    assert (target / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
