"""Real models, converted by bsa-convert and run by stock classes."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from sparse_folder import assert_as_good_as_dense, converted, layouts_in, masked_by_layouts, outputs  # noqa: E402

import bsa_export  # noqa: E402
from bsa_export.hf.stored_layout import StoredLayout  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def long_minilm(minilm, tmp_path_factory):
    return converted(minilm, tmp_path_factory.mktemp("minilm") / "out", max_length=16384)


@pytest.fixture(scope="module")
def long_english(english_mlm, tmp_path_factory):
    return converted(english_mlm, tmp_path_factory.mktemp("english") / "out", max_length=4096, dtype="fp32")


@pytest.fixture(scope="module")
def long_antiberty(antiberty, tmp_path_factory):
    out = tmp_path_factory.mktemp("antiberty") / "out"
    return converted(antiberty, out, max_length=1024, mode="bigbird", block=32)


def random_inputs(lengths, vocab):
    ids = torch.randint(5, vocab, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("name, vocab", [("long_minilm", 30522), ("long_antiberty", 25), ("long_english", 30522)])
def test_it_agrees_with_its_dense_class_under_the_same_mask(name, vocab, request):
    folder, inputs = request.getfixturevalue(name), random_inputs([600, 101], vocab)
    model = bsa_export.load(folder)
    found = outputs(model, inputs)
    block = next(module.block for module in model.modules() if isinstance(module, StoredLayout))

    def dense(dtype):
        other = type(model).from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        return outputs(masked_by_layouts(other, layouts_in(folder), block, inputs["attention_mask"]), inputs)

    exact = dense(torch.float64)
    assert_as_good_as_dense(found, exact, dense(torch.float32))
    plain = outputs(type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa"), inputs)
    assert (found - plain).abs().max() > 100 * (found - exact).abs().max()


def test_up_to_the_sources_length_the_default_layout_changes_nothing(minilm, long_minilm):
    inputs = random_inputs([512, 200], 30522)
    source = transformers.AutoModel.from_pretrained
    exact, dense = (outputs(source(minilm, dtype=dtype), inputs) for dtype in (torch.float64, torch.float32))
    assert_as_good_as_dense(outputs(bsa_export.load(long_minilm), inputs), exact, dense)


def test_sentence_transformers_reads_past_512_tokens(minilm, long_minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    dense = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    sparse = sentence_transformers.SentenceTransformer(
        str(long_minilm), device="cpu", model_kwargs={"attn_implementation": "block_sparse"}
    )
    texts = ["The quick brown fox.", "A layout is data.", "Reading a book costs no more a token than a sentence." * 3]
    assert abs(dense.encode(texts) - sparse.encode(texts)).max() < 1e-5
    story = "It was the best of times, it was the worst of times. " * 60
    ends = [story + ending for ending in ("The king died.", "Compile with -O2 and link statically.")]
    assert abs(dense.encode(ends)[0] - dense.encode(ends)[1]).max() == 0  # the dense model never gets there
    assert abs(sparse.encode(ends)[0] - sparse.encode(ends)[1]).max() > 1e-3


def test_the_fill_mask_pipeline_guesses_as_the_dense_model_does(english_mlm, long_english):
    text = "In the beginning God created the [MASK] and the earth."
    guesses = []
    for model in (
        transformers.AutoModelForMaskedLM.from_pretrained(english_mlm, dtype=torch.float32),
        bsa_export.load(long_english),
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(english_mlm)
        found = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)(text)
        guesses.append({guess["token_str"]: guess["score"] for guess in found})
    assert guesses[1] == pytest.approx(guesses[0], abs=1e-5)
    assert "heaven" in guesses[0]


def test_a_16384_token_document_fits_into_4_gib_on_two_cores(long_minilm):
    code = f"""
        import json, re, torch, bsa_export
        torch.set_num_threads(2)
        model = bsa_export.load({str(long_minilm)!r})
        with torch.inference_mode():
            out = model(torch.randint(1000, 30000, (1, 16384))).last_hidden_state
        peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
        print(json.dumps({{"shape": out.shape, "finite": bool(out.isfinite().all()), "gib": int(peak) / 2**20}}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["shape"], found["finite"]) == ([1, 16384, 384], True)
    assert found["gib"] < 4
