"""What all tests share: Ctrl-C, the GPU mark, Triton's interpreter where no GPU is, real models, how examples run."""

import os
import runpy
import signal
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import settings

CACHE = Path(__file__).resolve().parent.parent / ".cache"
EXAMPLES = CACHE.parent / "examples"

# Under `nohup` and `&` in a script, SIGINT is ignored, and child processes inherit that.
# A test that interrupts one would wait in vain.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton's interpreter multiplies with numpy. numpy's OpenBLAS for processors with AVX2 rounds a product and its
# transpose differently, which no GPU does. Set before numpy is imported.
os.environ.setdefault("OPENBLAS_CORETYPE", "Nehalem")

# Test processes share the cores. Before torch is imported.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# How long an example takes depends on what else runs.
settings.register_profile("any pace", deadline=None)
settings.load_profile("any pace")


def _has_gpu() -> bool:
    if not Path("/dev/nvidiactl").exists():  # saves the import of torch
        return False
    import torch

    return torch.cuda.is_available()


if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _has_gpu():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _model_folder(path: Path, how: str) -> Path:
    if not path.is_dir():
        pytest.skip(f"{path.name} is not here: {how}")
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: BERT 6 x 384, no prefix, safetensors, a sentence-transformers folder."""
    return _model_folder(CACHE / "minilm", "tests/material.sh fetches it")


@pytest.fixture(scope="session")
def antiberty() -> Path:
    """AntiBERTy: BERT 8 x 512 with a masked-LM head, zip `.bin` saved on CUDA, three extra heads."""
    return _model_folder(CACHE / "antiberty", "tests/material.sh fetches it")


@pytest.fixture(scope="session")
def english_mlm() -> Path:
    """An English masked LM with 512 positions and held-out documents, in the folder that $BSA_ENGLISH_MLM names."""
    return _model_folder(
        Path(os.environ.get("BSA_ENGLISH_MLM", "english-mlm-512")), "$BSA_ENGLISH_MLM names its folder"
    )


@pytest.fixture
def run_example(monkeypatch, capsys):
    """Runs an example in this process, where torch and transformers are imported, and returns what it prints."""
    import torch

    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for the script that it runs
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads wait for each other on a busy machine

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def chapters(tmp_path_factory) -> dict[str, Path]:
    """Chapters of Python's reference manual, which comes with Python: topic -> a file of 1,500 words or more."""
    folder = tmp_path_factory.mktemp("chapters")
    files = {name: folder / f"{name}.txt" for name in ("attribute-access", "customization", "debugger", "typesmapping")}
    for name, file in files.items():
        file.write_text(topics[name], encoding="utf-8")
    return files
