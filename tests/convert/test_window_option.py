"""`--window`: windows of a number of tokens, in place of the source's length."""

import numpy as np
import pytest
import torch
from tiny_models import LENGTH, config, convert, converted, inputs, record, refused, save, tensors, tiny

import bsa_export
from bsa_export.errors import SparsityError

WINDOW = 32  # tokens, half of what the source reads


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tiny("bert"), tmp_path_factory.mktemp("window") / "source")


def layout(folder):
    return next(tensor for name, tensor in tensors(folder).items() if name.endswith("master_layout"))[0].numpy()


def logits(model, length):
    batch = inputs(length)
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("mode", ["windowed", "local"])
def test_a_window_reaches_as_far_as_it_says(tmp_path, source, mode):
    out = tmp_path / "out"
    result = convert(source, out, "--max-length", 256, "--block", 16, "--mode", mode, "--window", WINDOW)
    assert result.exit_code == 0, result.output
    blocks = np.arange(16)
    near = abs(blocks[:, None] - blocks) <= 1  # half of the window to each side
    same = blocks[:, None] // 2 == blocks // 2  # aligned windows of two blocks
    assert np.array_equal(layout(out), near | same if mode == "windowed" else near)
    assert record(out)["options"]["window"] == WINDOW
    if mode == "windowed":
        assert "32 tokens of the 64 that the source reads" in result.stdout
        assert "up to 32 tokens; in longer ones, 62.5% of the blocks within 64 tokens are kept" in result.stdout


def test_outputs_are_the_sources_up_to_the_window(tmp_path, source):
    bsa_export.convert(source, tmp_path / "out", max_length=256, block=16, window=WINDOW)
    model, dense = bsa_export.load(tmp_path / "out"), tiny("bert")
    torch.testing.assert_close(logits(model, WINDOW), logits(dense, WINDOW), atol=2e-5, rtol=2e-5)
    assert (logits(model, LENGTH) - logits(dense, LENGTH)).abs().max() > 1e-2


def test_the_default_says_where_the_window_comes_from(tmp_path, source):
    shown = convert(source, "--dry-run", "--max-length", 256).stdout
    assert "64 tokens, what the source reads\n" in shown
    shown = convert(source, "--dry-run", "--max-length", LENGTH).stdout
    assert "so nothing is dropped; a smaller --window costs less" in shown
    assert "\nwindow " not in convert(source, "--dry-run", "--mode", "dense").stdout


def test_the_block_divides_the_window(tmp_path, source):
    assert convert(source, tmp_path / "one", "--max-length", 128, "--window", 32).exit_code == 0
    assert config(tmp_path / "one")["sparse_attention"]["block"] == 32
    bsa_export.convert(source, tmp_path / "out", max_length="1k", window="48")
    assert config(tmp_path / "out")["sparse_attention"]["num_local_blocks"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--window", 40, "--block", 16), "--window: expected a length in whole blocks of 16 tokens, found 40"),
     (("--window", 32, "--max-length", 8), "--window: expected at most the 8 tokens that the new model reads"),
     (("--window", 256, "--max-length", 128), "--window: expected at most the 128 tokens that the new model reads")],
)  # fmt: skip
def test_windows_that_cannot_be(tmp_path, source, options, words):
    assert words in refused(source, tmp_path / "out", *options)


@pytest.mark.parametrize(
    "options",
    [("--mode", "bigbird"), ("--num-local-blocks", 4), ("--mode", "local", "--num-sliding-window-blocks", 3)],
)
def test_options_that_do_not_go_together(tmp_path, source, options):
    result = convert(source, tmp_path / "out", "--window", 32, *options)
    assert result.exit_code == 2 and "--window" in result.stderr
    names = {"--mode": "mode", "--num-local-blocks": "num_local_blocks"}
    names["--num-sliding-window-blocks"] = "num_sliding_window_blocks"
    given = {names[name]: value for name, value in zip(options[::2], options[1::2], strict=True)}
    with pytest.raises(SparsityError, match="window"):
        bsa_export.convert(source, tmp_path / "out", window=32, **given)


def test_the_window_of_local_layers_stays(tmp_path):
    from support.more_families import random_model

    source = save(random_model("modernbert"), tmp_path / "source")
    out = converted(source, "--max-length", 256, "--block", 16, "--window", WINDOW)
    local, wide = (tensors(out)[f"model.layers.{i}.attn.sparse_self_attention.master_layout"][0] for i in (1, 0))
    assert local.sum() == 16 + 2 * 15 and wide.sum() == 16 * 2 + 2 * 7
