"""Tokenizer and sentence-transformers files: what is taken along, which lengths change, and that nothing else does."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from bsa_export.conversion import tokenizer_files as sidecars
from bsa_export.errors import CheckpointError, UnsafePickleError


@pytest.fixture(scope="module")
def written(minilm, tmp_path_factory):
    target = tmp_path_factory.mktemp("minilm-4096")
    return target, sidecars.write(minilm, target, 512, 4096)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_takes_the_tokenizer_and_the_modules_and_nothing_else(written):
    target, changed = written
    assert files(target) == set(changed) == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
        "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
    }  # fmt: skip


def test_says_what_changed(written):
    _, changed = written
    assert {name: how for name, how in changed.items() if how != "copied"} == {
        "tokenizer.json": "truncation 128 -> 4096, padding 128 -> longest of the batch",
        "tokenizer_config.json": "model_max_length 512 -> 4096",
        "sentence_bert_config.json": "max_seq_length 256 -> 4096",
    }


def test_changes_lengths_and_no_other_byte(minilm, written):
    target, changed = written
    for name in changed:
        before, after = (minilm / name).read_text(), (target / name).read_text()
        for old, new in {
            "tokenizer.json": [('"max_length":128', '"max_length":4096'), ('{"Fixed":128}', '"BatchLongest"')],
            "tokenizer_config.json": [('"model_max_length": 512', '"model_max_length": 4096')],
            "sentence_bert_config.json": [('"max_seq_length": 256', '"max_seq_length": 4096')],
        }.get(name, []):
            assert before.count(old) == 1
            before = before.replace(old, new)
        assert after == before, name


def test_the_tokenizer_alone_reads_long_texts_and_pads_to_the_longest(written):
    from tokenizers import Tokenizer

    target, _ = written
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    long, short = tokenizer.encode_batch(["word " * 5000, "word " * 3000])
    assert len(long.ids) == 4096
    assert sum(short.attention_mask) == 3002
    assert len(tokenizer.encode("word").ids) == 3


def test_transformers_reads_the_new_length(written):
    from transformers import AutoTokenizer, BertConfig

    target, _ = written
    BertConfig(max_position_embeddings=4096).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.model_max_length == 4096
    assert len(tokenizer("word " * 5000, truncation=True).input_ids) == 4096


def test_the_same_length_changes_nothing(minilm, tmp_path):
    changed = sidecars.write(minilm, tmp_path, 512, 512)
    assert set(changed.values()) == {"copied"}
    for name in changed:
        assert (tmp_path / name).read_bytes() == (minilm / name).read_bytes()


def test_a_folder_without_sidecars_gives_none(antiberty):
    assert sidecars.plan(antiberty, 512, 1024) == []


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("tokenizer_config.json", '{\n  "model_max_length": 512,\n  "a": 1\n}\n', '{\n  "model_max_length": 4096,\n  "a": 1\n}\n'),
        ("tokenizer_config.json", '{"max_len": 512}', '{"max_len": 4096}'),
        ("tokenizer_config.json", '{"model_max_length": 1000000000000000019884624838656}', '{"model_max_length": 4096}'),
        ("tokenizer_config.json", '{"do_lower_case": true}', '{"do_lower_case": true, "model_max_length": 4096}'),
        ("tokenizer_config.json", '{\n  "a": "{é}"\n}', '{\n  "a": "{é}",\n  "model_max_length": 4096\n}'),
        ("tokenizer_config.json", "{}", '{"model_max_length": 4096}'),
        ("tokenizer_config.json", '{"max_length": 512, "model_max_length": 512}', '{"max_length": 4096, "model_max_length": 4096}'),
        ("sentence_bert_config.json", '{"max_seq_length": null}', '{"max_seq_length": null}'),
        ("sentence_roberta_config.json", '{"max_seq_length": 128}', '{"max_seq_length": 4096}'),
        ("sentence_bert_config.json", '{"tokenizer_args": {"model_max_length": 512}}', '{"tokenizer_args": {"model_max_length": 4096}}'),
        ("tokenizer.json", '{"truncation": null, "padding": null}', '{"truncation": null, "padding": null}'),
        ("tokenizer.json", '{"padding": {"strategy": "BatchLongest"}}', '{"padding": {"strategy": "BatchLongest"}}'),
        ("special_tokens_map.json", '{"max_length": 512}', '{"max_length": 512}'),
    ],
)  # fmt: skip
def test_edits_in_place(source, tmp_path, name, before, after):
    (source / name).write_text(before, encoding="utf-8", newline="")
    sidecars.write(source, tmp_path, 512, 4096)
    assert (tmp_path / name).read_bytes().decode() == after


def test_links_become_files(source, tmp_path):
    (tmp_path / "blob").write_text('{"model_max_length": 512}')
    (source / "tokenizer_config.json").symlink_to(tmp_path / "blob")
    (source / "vocab.txt").symlink_to(tmp_path / "blob")
    target = tmp_path / "target"
    sidecars.write(source, target, 512, 1024)
    assert not any(path.is_symlink() for path in target.iterdir())
    assert (tmp_path / "blob").read_text() == '{"model_max_length": 512}'


@pytest.fixture
def dense_module(source):
    """A sentence-transformers folder with a Dense module whose weights are a pickle."""
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text("{}")
    (source / "2_Dense" / "training.py").write_text("")
    weights = {"linear.weight": torch.randn(4, 8), "linear.bias": torch.randn(4)}
    torch.save(weights, source / "2_Dense" / "pytorch_model.bin")
    return source, weights


def test_the_pickle_of_a_module_becomes_safetensors(dense_module, tmp_path):
    from safetensors.torch import load_file

    source, weights = dense_module
    target = tmp_path / "target"
    changed = sidecars.write(source, target, 512, 1024)
    assert files(target) == {"modules.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert changed["2_Dense/model.safetensors"] == "pytorch_model.bin as safetensors"
    loaded = load_file(target / "2_Dense" / "model.safetensors")
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_the_pickle_of_a_module_may_not_run_code(dense_module):
    source, _ = dense_module

    class Run:
        def __reduce__(self):
            return os.system, ("touch ran",)

    torch.save({"linear.weight": Run()}, source / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(UnsafePickleError):
        sidecars.plan(source, 512, 1024)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "expected tokenizer.json itself, found a Git LFS pointer; fetch the file with git lfs pull"),
        ("vocab.txt", b"<!DOCTYPE html><html>", "expected vocab.txt itself, found an HTML or XML page; download the file itself, not the page that shows it"),
        ("vocab.txt", b"", "expected vocab.txt itself, found an empty file; download it again"),
        ("tokenizer_config.json", b'{"a": 1', "expected JSON (Expecting ',' delimiter: line 1 column 8 (char 7)); download it again"),
        ("tokenizer_config.json", b"[" * 100_000, "expected JSON (maximum recursion depth exceeded"),
        ("tokenizer_config.json", b'{"a": "\xff"}', "expected JSON in UTF-8 (invalid start byte at byte 7)"),
        ("modules.json", b'{"path": ""}', "expected a list of modules, each with a path"),
        ("modules.json", b'[{"path": "../other"}]', "expected the paths of its modules to lie beside it, found ../other"),
        ("modules.json", b'[{"path": "/etc"}]', "expected the paths of its modules to lie beside it, found /etc"),
    ],
)  # fmt: skip
def test_damaged_files_get_a_sentence(source, tmp_path, name, content, message):
    (source / name).write_bytes(content)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(CheckpointError) as raised:
        sidecars.write(source, target, 512, 1024)
    assert f"{source / name}: {message}" in str(raised.value)
    assert files(target) == set()


def test_a_broken_link_gets_a_sentence(source):
    (source / "vocab.txt").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="expected a file, found a broken link"):
        sidecars.plan(source, 512, 1024)


def test_a_vocabulary_may_begin_with_a_bracket(source, tmp_path):
    (source / "vocab.txt").write_text("<s>\n<pad>\n")
    assert sidecars.write(source, tmp_path, 512, 1024) == {"vocab.txt": "copied"}


def test_sentence_transformers_loads_what_was_written(minilm, written):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    target, _ = written
    for name in ("config.json", "model.safetensors"):
        shutil.copy(minilm / name, target / name)
    model = sentence_transformers.SentenceTransformer(str(target), device="cpu")
    assert model.max_seq_length == 4096
    assert model.encode("a sentence").shape == (384,)
