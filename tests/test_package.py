"""The source archive and the wheel: complete, with the address of the project, and usable in a clean venv."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.tiny import dense_bert

from bsa_export.version import PROJECT_URL, __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")


def build(what: str, source: Path, folder: Path) -> Path:
    """Calls the build backend as pip does, with this environment's setuptools. `what` is `sdist` or `wheel`."""
    program = f"from setuptools import build_meta; print(build_meta.build_{what}({str(folder)!r}))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return folder / ran.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The source archive, and the wheel that is built from it."""
    place = tmp_path_factory.mktemp("archives")
    sdist = build("sdist", shutil.copytree(ROOT, place / "source", ignore=NOT_SOURCE), place)
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    return sdist, build("wheel", place / "unpacked" / f"bsa_export-{__version__}", place)


def source_files(*suffixes: str) -> set[str]:
    files = (path for path in (ROOT / "bsa_export").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files if path.name.endswith(suffixes)}


def test_the_wheel_holds_every_file_of_the_package_and_no_other(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == source_files(".py", ".jinja", "py.typed")
    assert "bsa_export/py.typed" in held


def test_the_source_archive_holds_what_builds_documents_and_tests(archives):
    with tarfile.open(archives[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "LICENSE", "setup.cfg", "setup.py", "pyproject.toml", "tests/conftest.py", "tests/run.sh"}
    assert wanted | source_files(".py", ".jinja", "py.typed") <= held
    assert any(name.startswith("docs/") for name in held) and "examples/quickstart.sh" in held


def test_metadata_names_the_project_and_links_are_absolute(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    assert any(url.endswith(PROJECT_URL) for url in metadata.get_all("Project-URL"))
    text = metadata.get_payload()
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'(?:src|href|srcset)="([^"\s]+)', text)
    assert targets and all(re.match(r"https?://|#", target) for target in targets), targets
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in core if re.match("torch|triton|deepspeed|transformers", line)]


@pytest.mark.slow
def test_the_wheel_converts_in_a_clean_venv(archives, tmp_path):
    """Installs from the package index, with nothing but what the core requires."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    bin = tmp_path / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", bin / "python", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "tests" / "constraints.txt", archives[1]], check=True, cwd=tmp_path)

    def run(*command: object) -> subprocess.CompletedProcess:
        return subprocess.run([bin / command[0], *command[1:]], capture_output=True, text=True, cwd=tmp_path)

    source = dense_bert(tmp_path / "source")
    converted = run("bsa-convert", source, "out", "--max-length", "256", "--block", "16")
    assert converted.returncode == 0, converted.stderr
    verified = run("bsa-verify", "out", "--source", source)
    assert verified.returncode == 3, verified.stdout + verified.stderr
    for name in ("bsa-push", "bsa-pull"):
        assert run(name, "--help").returncode == 0
    without_torch = run("python", "-c", "import bsa_export; bsa_export.load('out')")
    assert "needs torch, which is not installed; pip install" in without_torch.stderr.splitlines()[-1]
