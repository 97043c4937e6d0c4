"""Unsuitable input ends an example with one sentence that says what is wrong and where."""

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

from sparse_folder import sparse_folder  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
inputs = runpy.run_path(str(EXAMPLES / "inputs.py"))


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (None, ["No such file"]),
        (b"", ["JSON lines", "none"]),
        (b"\n\n", ["JSON lines", "none"]),
        (b'{"text": "a"}\n{"text": "b', ["line 2", "JSON"]),
        (b'{"text": "a"}\n\n{"txt": "b"}\n', ["line 3", '"text"', "str"]),
        (b'{"text": null}\n', ["line 1", '"text"', "str"]),
        (b'["text"]\n', ["line 1", "object"]),
        (b'{"text": "\xff"}\n', ["utf-8"]),
    ],
)
def test_json_lines_says_what_is_wrong(tmp_path, content, facts):
    file = tmp_path / "docs.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        inputs["json_lines"](str(file), text=str)
    assert not [fact for fact in [str(file), *facts] if fact not in ended.value.code]


@pytest.mark.parametrize(("content", "fact"), [(None, "No such file"), (b" \n", "none"), (b"\xff", "utf-8")])
def test_document_says_what_is_wrong(tmp_path, content, fact):
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match=fact):
        inputs["document"](str(file))


@pytest.mark.parametrize("name", ["fill_mask_long.py", "long_document_embedding.py"])
def test_without_arguments_the_docstring_is_shown(run_example, name):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(SystemExit, match=f"python examples/{name} out/"):
        run_example(name)


def test_fill_mask_long_needs_a_masked_lm(run_example, tmp_path):
    (tmp_path / "text.txt").write_text("a word")
    out = sparse_folder(tmp_path, class_name="BertModel")
    with pytest.raises(SystemExit, match="expected a masked LM, found BertModel"):
        run_example("fill_mask_long.py", out, tmp_path / "text.txt", "word")


def test_documents_are_different_texts(tmp_path):
    (tmp_path / "docs.jsonl").write_text(
        "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate("aba"))
    )
    assert inputs["documents"](str(tmp_path / "docs.jsonl"), least=2) == ["a", "b"]
    with pytest.raises(SystemExit, match="at least 3 different texts, found 2"):
        inputs["documents"](str(tmp_path / "docs.jsonl"), least=3)


def test_json_lines_leaves_out_blank_lines(tmp_path):
    (tmp_path / "docs.jsonl").write_text('{"text": "a"}\n\n{"text": "b", "query": "q"}\n  \n')
    rows = inputs["json_lines"](str(tmp_path / "docs.jsonl"), text=str)
    assert rows == [{"text": "a"}, {"text": "b", "query": "q"}]


def test_a_model_that_is_not_a_whole_conversion_is_refused(tmp_path):
    out = sparse_folder(tmp_path)
    assert inputs["converted_folder"](str(out), recorded=True).source_length == 64
    for folder, fact in ((tmp_path / "source", "sparse_attention"), (tmp_path / "nosuch", "nosuch")):
        with pytest.raises(SystemExit, match=fact):
            inputs["converted_folder"](str(folder))
    (out / "conversion.json").unlink()
    assert inputs["converted_folder"](str(out)).longest == 128
    with pytest.raises(SystemExit, match="--trained-from"):
        inputs["converted_folder"](str(out), recorded=True)


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(SystemExit, match="mask token"):
        inputs["masking_tokenizer"](str(tmp_path))


DOCUMENT, QUERY = ({"kind": "document", "id": 1, "text": "a b"}, {"kind": "query", "query": "a?", "document": 1})


@pytest.mark.parametrize(
    ("rows", "fact"),
    [
        (None, "No such file"),
        ([], "found 0 documents"),
        ([DOCUMENT], "found 1 documents and no query"),
        ([DOCUMENT, {"kind": "document", "id": 2}, QUERY], "lacks 'text'"),
        ([DOCUMENT, QUERY, QUERY | {"document": 7}], "document 7, which is not there"),
        ([DOCUMENT, "half a line"], "JSON lines"),
    ],
)
def test_the_benchmark_of_long_documents_says_what_is_wrong_with_its_file(tmp_path, rows, fact):
    pytest.importorskip("sentence_transformers")
    qmsum = runpy.run_path(str(EXAMPLES.parent / "tests" / "benchmarks" / "long_documents.py"))["qmsum"]
    file = tmp_path / "qmsum.jsonl"
    if rows is not None:
        file.write_text("\n\n".join(row[:4] if isinstance(row, str) else json.dumps(row) for row in rows))
    with pytest.raises(SystemExit, match=fact):
        qmsum(file, None)


def test_the_benchmark_of_long_documents_reads_the_first_documents_and_their_queries(tmp_path):
    pytest.importorskip("sentence_transformers")
    qmsum = runpy.run_path(str(EXAMPLES.parent / "tests" / "benchmarks" / "long_documents.py"))["qmsum"]
    rows = [DOCUMENT | {"id": 2, "text": "c"}, QUERY, DOCUMENT, QUERY | {"query": "c?", "document": 2}]
    (tmp_path / "qmsum.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts, queries, right = qmsum(tmp_path / "qmsum.jsonl", None)
    assert (texts, queries, right.tolist()) == (["c", "a b"], ["a?", "c?"], [1, 0])
    texts, queries, right = qmsum(tmp_path / "qmsum.jsonl", 1)
    assert (texts, queries, right.tolist()) == (["c"], ["c?"], [0])
