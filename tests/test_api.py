"""The Python API: what the package shows, that docs/api.md says the same, and that it does what the commands do."""

import subprocess
import sys
from pathlib import Path

import pytest

import bsa_export

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import make_api  # noqa: E402


def test_every_public_name_is_listed_and_documented():
    assert dir(bsa_export) == sorted(bsa_export.__all__)
    assert {*make_api.FUNCTIONS, *make_api.CLASSES, "__version__"} == set(bsa_export.__all__)
    for name in bsa_export.__all__:
        getattr(bsa_export, name)


def test_the_page_says_what_the_code_does():
    assert (ROOT / "docs" / "api.md").read_text() == make_api.page(), "run python docs/make_api.py"


@pytest.mark.slow
def test_convert_verify_load_and_back(minilm, tmp_path):
    import bsa_export as bsa

    done = bsa.convert(minilm, tmp_path / "out", max_length=1024)
    assert done.record.max_length == 1024
    run = bsa.verify(tmp_path / "out", source=minilm, device="cpu", backend=("torch",))
    run.raise_if_failed()
    assert bsa.load(tmp_path / "out").config.max_position_embeddings == 1024
    dense = bsa.to_dense(tmp_path / "out", tmp_path / "dense")
    assert dense.plan.max_length == 512


def test_importing_it_imports_nothing_heavy():
    code = "import sys, bsa_export; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
