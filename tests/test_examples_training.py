"""The examples that fine-tune an embedder and a classifier learn what they say, on a tiny model."""

import json
import random
import re
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")

from sparse_folder import converted  # noqa: E402
from support.tiny import random_model  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

pytestmark = pytest.mark.slow

SOURCE_LENGTH, LENGTH = 512, 1024  # tokens
VOCABULARY = 30522
TEXTS = [text for text in topics.values() if 900 < len(text.split()) < 4000][:11]
QUIET = ["--report_to=none", "--save_strategy=no", "--use_cpu", "--disable_tqdm=True"]


def tiny_folder(minilm: Path, folder: Path, spread: float) -> Path:
    """A tiny random BERT with the tokenizer and the modules of MiniLM.

    Words differ by 1, all other matrices by `spread`: that small, the model learns in a few steps.
    """
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "hidden_dropout_prob": 0.0}

    def fill(parameter: torch.nn.Parameter, generator: torch.Generator) -> None:
        if parameter.ndim > 1:
            parameter.normal_(0, 1.0 if len(parameter) == VOCABULARY else spread, generator=generator)

    model = random_model("bert", "Model", length=SOURCE_LENGTH, fill=fill, pad_token_id=0, **sizes)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "modules.json", "sentence_bert_config.json"):
        shutil.copy(minilm / name, folder)
    shutil.copytree(minilm / "1_Pooling", folder / "1_Pooling")
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"word_embedding_dimension": 32}))
    return folder


@pytest.fixture
def train_embedder(run_example, minilm, tmp_path):
    """Trains the tiny model on documents, and returns its folder, the trained one and what the example prints."""
    pytest.importorskip("datasets")
    out = converted(tiny_folder(minilm, tmp_path / "source", 0.02), tmp_path / "out", max_length=LENGTH)

    def train(documents: list[dict], steps: int) -> tuple[Path, Path, str]:
        file, trained = tmp_path / "documents.jsonl", tmp_path / "trained"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        options = {"model": out, "documents": file, "output_dir": trained, "heldout": 3, "length": 700}
        options |= {"per_device_train_batch_size": 8, "learning_rate": 0.01, "max_steps": steps, "logging_steps": 1}
        return out, trained, run_example("train_embedder.py", *(f"--{k}={v}" for k, v in options.items()), *QUIET)

    return train


def test_train_embedder_learns_queries_and_saves_a_model_of_the_same_length(train_embedder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    documents = [{"text": text, "query": text[:100]} for text in TEXTS]
    out, trained, shown = train_embedder(documents, steps=8)
    assert f"{len(TEXTS) - 3} documents, 3 held out: MRR " in shown
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", shown)]
    assert len(losses) == 8 and losses[-1] < 0.5 * losses[0], losses
    before, after = (sentence_transformers.SentenceTransformer(str(folder)) for folder in (out, trained))
    assert after.max_seq_length == before.max_seq_length == LENGTH
    assert after[0].auto_model.config._attn_implementation == "block_sparse"


def test_train_embedder_asks_for_sentences_from_beyond_512_tokens(train_embedder):
    out, trained, _ = train_embedder([{"text": text} for text in TEXTS], steps=1)
    rows = [json.loads(line) for line in (trained / "heldout.jsonl").read_text().splitlines()]
    texts = {row["id"]: row["text"] for row in rows if row["kind"] == "document"}
    queries = [row for row in rows if row["kind"] == "query"]
    assert {row["document"] for row in queries} == texts.keys() and len(queries) == 3
    tokenizer = AutoTokenizer.from_pretrained(out)
    for row in queries:
        before, _, _ = texts[row["document"]].rpartition(row["query"])
        assert len(tokenizer(before, add_special_tokens=False, truncation=False)["input_ids"]) >= SOURCE_LENGTH


def test_train_embedder_does_not_train_on_a_text_that_it_holds_out(train_embedder):
    """Each text is there twice, with another query."""
    documents = [{"text": text, "query": text[start : start + 100]} for text in TEXTS for start in (0, 200)]
    _, trained, shown = train_embedder(documents, steps=1)
    rows = [json.loads(line) for line in (trained / "heldout.jsonl").read_text().splitlines()]
    heldout = {row["text"] for row in rows if row["kind"] == "document"}
    assert f"{2 * (len(TEXTS) - len(heldout))} documents, 3 held out: MRR " in shown


def test_train_embedder_needs_more_documents_than_it_holds_out(train_embedder):
    with pytest.raises(SystemExit, match="--heldout 3: found 3 .* 0 to train"):
        train_embedder([{"text": text} for text in TEXTS[:3]], steps=1)


def test_classify_long_needs_what_is_beyond_512_tokens(run_example, minilm, tmp_path):
    """Each book has words of its own; 512 tokens show those of another one."""
    pattern = {"mode": "bslongformer", "parameters": {"num_sliding_window_blocks": 9}}
    source = tiny_folder(minilm, tmp_path / "source", 0.2)
    out = converted(source, tmp_path / "out", max_length=1536, **pattern)
    draw = random.Random(0)
    words = {"Sea": ["ship", "wave", "sail"], "Farm": ["corn", "barn", "plough"], "Town": ["street", "shop", "wall"]}
    verses = [
        {"text": " ".join(draw.choices(some, k=60)), "book": book, "chapter": chapter}
        for book, some in words.items()
        for chapter in range(1, 61)
    ]
    file = tmp_path / "verses.jsonl"
    file.write_text("".join(json.dumps(verse) + "\n" for verse in verses))
    options = {"dense": source, "converted": out, "verses": file, "output_dir": tmp_path / "runs"}
    options |= {"length": 1500, "opening": 520, "books": 3, "train": 30, "test": 10}
    options |= {"per_device_train_batch_size": 10, "learning_rate": 1e-2, "num_train_epochs": 3}
    shown = run_example("classify_long.py", *(f"--{name}={value}" for name, value in options.items()), *QUIET)
    found = re.findall(r"(dense|converted), (\d+) of 1500 tokens: accuracy ([\d.]+), chance 0.333", shown)
    (_, dense_length, dense), (_, length, accuracy) = found
    assert (dense_length, length) == ("512", "1500")
    assert float(dense) < 0.6 < 0.8 < float(accuracy)
