"""The examples run and show what their first lines promise."""

import re
import runpy
import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

from sparse_folder import BLOCK, LONGEST, converted, dense_folder  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def run_example(monkeypatch, capsys):
    """Runs an example in this process, where torch and transformers are imported, and returns what it prints."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads wait for each other on a busy machine

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def chapters(tmp_path_factory):
    """Chapters of Python's reference manual, which comes with Python: topic -> a file of 1,500 words or more."""
    folder = tmp_path_factory.mktemp("chapters")
    files = {name: folder / f"{name}.txt" for name in ("attribute-access", "customization", "debugger", "typesmapping")}
    for name, file in files.items():
        file.write_text(topics[name], encoding="utf-8")
    return files


def test_long_document_embedding_finds_a_neighbour_for_each_chapter(run_example, minilm, chapters, tmp_path):
    pytest.importorskip("sentence_transformers")
    out = converted(minilm, tmp_path / "out", max_length=1024)
    shown = run_example("long_document_embedding.py", out, *chapters.values())
    line = re.compile(r"(\S+)\.txt: (\d+) of (\d+) tokens; nearest (\S+)\.txt \(0\.\d+\)")
    found = {match[1]: match.groups()[1:] for match in line.finditer(shown)}
    assert list(found) == list(chapters)
    assert all(512 < int(read) == min(int(tokens), 1024) for read, tokens, _ in found.values())
    assert found["attribute-access"][2] == "customization"


def test_long_document_embedding_of_one_chapter_has_no_neighbour(run_example, minilm, chapters, tmp_path):
    pytest.importorskip("sentence_transformers")
    out = converted(minilm, tmp_path / "out", max_length=1024)
    shown = run_example("long_document_embedding.py", out, chapters["debugger"])
    assert re.fullmatch(r"debugger\.txt: 1024 of \d+ tokens\n", shown)


def test_fill_mask_long_counts_the_texts_own_tokens_before_the_gap(run_example, minilm, tmp_path):
    """On a small random model with the vocabulary of MiniLM, where each of these words is one token."""
    source = dense_folder(tmp_path / "source", vocab_size=30522, pad_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, source)
    out = converted(source, tmp_path / "out", max_length=LONGEST, block=BLOCK)
    (tmp_path / "text.txt").write_text("one two three four five six seven")
    shown = run_example("fill_mask_long.py", out, tmp_path / "text.txt", "six")
    assert shown.startswith("9 tokens read, 5 of them before the gap\n")


@pytest.mark.slow
def test_fill_mask_long_guesses_a_word_far_into_the_text(run_example, english_mlm, chapters, tmp_path):
    out = converted(english_mlm, tmp_path / "out", max_length=1024)
    shown = run_example("fill_mask_long.py", out, chapters["typesmapping"], "the")
    read, before = map(int, re.match(r"(\d+) tokens read, (\d+) of them before the gap", shown).groups())
    assert 512 < before < read <= 1024
    assert shown.count("%") == 5
    assert "<- what stood there" in shown


def test_own_model_learns(run_example):
    shown = run_example("own_model.py", 30)
    losses = [float(loss) for loss in re.findall(r"([\d.]+) nats", shown)]
    assert "of the score blocks are computed" in shown
    assert losses[-1] < 0.7 * losses[0]
