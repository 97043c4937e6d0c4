"""A trained model that transformers pushed to the Hub: what it leaves out, and how bsa-convert mends it."""

import subprocess
import sys
import textwrap

import pytest
from hub_server import WRITER
from test_push import on_hub, push

pytestmark = pytest.mark.slow

pytest.importorskip("transformers", minversion="5.0")


def test_what_push_to_hub_leaves_out_is_put_back(bsa_lfs, hub, model, tmp_path):
    push(bsa_lfs, model, repo="alice/long-bert")
    code = """
        import torch, transformers
        import bsa_export
        model = transformers.AutoModelForMaskedLM.from_pretrained("alice/long-bert")
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.bias.add_(1)
        model.push_to_hub("alice/trained")
    """
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
        env={"PATH": "/usr/bin:/bin"} | {"PYTHONPATH": ":".join(sys.path)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "conversion.json" not in on_hub(hub, "alice/trained")
    assert bsa_lfs.run("pull", "alice/trained", tmp_path / "pulled").code != 0

    out = tmp_path / "out"
    ended = bsa_lfs.run("convert", "alice/trained", out, "--trained-from", "alice/long-bert")
    assert ended.code == 0, ended.err
    assert "1 tensor changed" in ended.out
    assert push(bsa_lfs, out, "--unverified", repo="alice/trained").code == 0
    card = on_hub(hub, "alice/trained")["README.md"].decode()
    assert "base_model: alice/long-bert\n" in card and "license: mit\n" in card
    assert bsa_lfs.run("pull", "alice/trained", tmp_path / "pulled").code == 0
