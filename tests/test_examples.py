"""The examples run and show what their first lines promise."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

from safetensors.torch import load_file  # noqa: E402
from sparse_folder import BLOCK, LONGEST, converted, dense_folder  # noqa: E402

import bsa_export  # noqa: E402

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


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


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.gpu), 3])
def test_train_deepspeed_saves_what_loads_and_converts(minilm, tmp_path, stage):
    """On the GPUs that there are, at most two; else on the CPU."""
    pytest.importorskip("deepspeed", exc_type=ImportError)
    gpus = torch.cuda.device_count()
    if not gpus and shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles its communication on a CPU with g++, which is not installed")
    source = dense_folder(tmp_path / "source", vocab_size=30522, pad_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, source)
    out, run = converted(source, tmp_path / "out", max_length=LONGEST, block=BLOCK), tmp_path / "run"
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": f"text {i} of a few words " * 9}) + "\n" for i in range(16)))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={min(max(gpus, 1), 2)}",
        EXAMPLES / "train_deepspeed.py", "--model", out, "--documents", documents, "--output_dir", run, "--bf16",
        f"--stage={stage}", "--save_steps=2", "--per_device_train_batch_size=2", "--report_to=none",
    ]  # fmt: skip
    command += [] if gpus else ["--use_cpu"]
    environment = os.environ | ({} if gpus else {"DS_ACCELERATOR": "cpu"})
    for options in (["--max_steps=2"], ["--max_steps=4", f"--resume_from_checkpoint={run / 'checkpoint-2'}"]):
        done = subprocess.run([*map(str, command), *options], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"fp32 weights of step {options[0][-1]}" in done.stdout
    trained, again = (load_file(run / name / "model.safetensors") for name in ("trained", "converted"))
    bsa_export.load(run / "trained")
    model = bsa_export.load(run / "converted", dtype=torch.bfloat16)
    words = "bert.embeddings.word_embeddings.weight"
    assert again[words].dtype == torch.float32 and trained[words].dtype == torch.bfloat16
    torch.testing.assert_close(model.state_dict()[words], trained[words], atol=0, rtol=0)


def test_late_chunking_finds_the_chunk_that_answers(run_example, minilm, chapters, tmp_path):
    pytest.importorskip("sentence_transformers")
    out = converted(minilm, tmp_path / "out", max_length=4096)
    document = tmp_path / "document.txt"
    document.write_text("\n".join(chapters[name].read_text() for name in ("customization", "debugger")))
    shown = run_example("late_chunking.py", out, document, "How do I set a breakpoint in the debugger?", "--size", 128)
    assert re.match(r"\d+ chunks of 128 tokens, 4096 of \d+ tokens read in one pass\n", shown)
    best = re.search(r"^0\.\d+  chunk \d+: (.*)", shown, re.MULTILINE)
    assert best is not None and re.search("break|debug|pdb", best[1], re.IGNORECASE)


@pytest.mark.parametrize("train", ["positions", "all"])
def test_train_mlm_changes_what_it_says(run_example, minilm, chapters, tmp_path, train):
    """With positions alone, everything but the new rows stays bit for bit; with all, the loss falls.

    What conversion.json says decides which rows are new. Weights in half precision are trained in float32. The loss of
    a step of two batches is their mean.
    """
    pytest.importorskip("accelerate")
    source = dense_folder(tmp_path / "source", vocab_size=30522, pad_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, source)
    out = converted(source, tmp_path / "out", max_length=LONGEST, block=BLOCK, dtype="fp16")
    documents = tmp_path / "docs.jsonl"
    documents.write_text("".join(json.dumps({"text": file.read_text()}) + "\n" for file in chapters.values()))
    options = {"model": out, "documents": documents, "output_dir": tmp_path / "trained", "train": train}
    options |= {"max_steps": 3, "learning_rate": 0.01, "weight_decay": 0.1, "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    options |= {"logging_steps": 1, "disable_tqdm": True}
    shown = run_example("train_mlm.py", *[f"--{name}={value}" for name, value in options.items()])
    losses = [float(number) for number in re.findall(r"loss (\d+\.\d+) before, (\d+\.\d+) after", shown)[0]]
    first_step = float(re.search(r"'loss': '?([\d.]+)", shown)[1])
    assert abs(first_step - losses[0]) < 0.2 * losses[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "trained"))
    assert before.keys() == after.keys()
    before = {name: value.to(after[name].dtype) for name, value in before.items()}
    assert all(value.dtype == torch.float32 for name, value in after.items() if not name.endswith("master_layout"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if train == "all":
        assert len(changed) > 10 and losses[1] < losses[0]
        return
    (name,) = changed
    assert name.endswith("position_embeddings.weight")
    assert torch.equal(before[name][:64], after[name][:64]) and not torch.equal(before[name], after[name])
    short = {"input_ids": torch.arange(1000, 1064)[None]}
    with torch.no_grad():
        models = (bsa_export.load(folder, dtype=torch.float32) for folder in (out, tmp_path / "trained"))
        one, other = (model(**short).logits for model in models)
    assert torch.equal(one, other)
