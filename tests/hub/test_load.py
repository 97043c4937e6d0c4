"""`bsa_export.load` of a repository by its name."""

import os
import subprocess
import sys
import textwrap

import pytest
from hub_folders import digests
from hub_server import READER
from safetensors.numpy import load, save

pytestmark = pytest.mark.slow

pytest.importorskip("transformers", minversion="5.0")


def test_a_model_is_loaded_by_its_name_and_revision(hub, finished, tmp_path):
    files = {name: (finished / name).read_bytes() for name in digests(finished)}
    repo = hub.make_repo("alice/model", files)
    first = repo.head
    trained = load(files["model.safetensors"])
    trained["cls.predictions.bias"] += 1
    kept = {name: file for name, file in first.files.items() if name != "conversion.json"}
    weights = hub.stored(save(trained, {"format": "pt"}))
    repo.commit("refs/heads/main", kept | {"model.safetensors": weights}, "trained on")
    repo.commit("refs/heads/stale", first.files | {"model.safetensors": weights}, "trained on, with the old record")
    code = f"""
        import torch, bsa_export
        from bsa_export.errors import HubError
        named = bsa_export.load("alice/model@{first.id}", dtype=torch.float32)
        folder = bsa_export.load({str(finished)!r}, dtype=torch.float32)
        ids = torch.arange(100)[None]
        print(type(named).__name__, torch.equal(named(ids).logits, folder(ids).logits))
        changed = bsa_export.load("alice/model").state_dict()
        print(*(name for name, tensor in named.state_dict().items() if not torch.equal(tensor, changed[name])))
        for name in ("alice/model@stale", "alice/model@stale", "alice/nothing"):
            try:
                bsa_export.load(name)
            except HubError as error:
                print(error)
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": READER, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr
    same, changed, stale, stale_in_cache, refused = done.stdout.splitlines()
    assert same == "BertForMaskedLM True"
    assert changed == "cls.predictions.bias cls.predictions.decoder.bias"  # tied
    assert stale.startswith("alice/model: it fails the file check: model.safetensors: its checksum is not the one in")
    assert stale_in_cache == stale
    assert refused.startswith("alice/nothing: ")
