"""Where DeepSpeed's sources are found: installed, in a folder, in a packed release; and archives that are not what they
say."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from bsa_export.ops import deepspeed_source
from bsa_export.ops.deepspeed_source import VARIABLE, find

FILES = {
    "deepspeed/ops/sparse_attention/__init__.py": b"",
    "deepspeed/ops/sparse_attention/matmul.py": b"raise SystemExit('never imported')\n",
    "deepspeed/ops/sparse_attention/softmax.py": b"\n",
    "deepspeed/ops/csrc/sparse_attention/utils.cpp": b"// C++\n",
    "deepspeed/__init__.py": b"raise SystemExit('never imported')\n",
    "setup.py": b"raise SystemExit('never run')\n",
}
NEEDED = sorted(name.removeprefix("deepspeed/") for name in FILES if "/ops/" in name)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    yield
    deepspeed_source._unpacked.cache_clear()


def sdist(
    path: Path, files: dict[str, bytes] = FILES, root: str = "deepspeed-0.19.6/", links: dict[str, str] | None = None
):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(root + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(root + name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


def wheel(path: Path, files: dict[str, bytes] = FILES):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def unpacked(folder: Path, files: dict[str, bytes] = FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("pack", [sdist, wheel], ids=["sdist", "wheel"])
def test_a_packed_release(pack, tmp_path):
    archive = pack(tmp_path / "deepspeed-0.19.6.archive")
    found = find(archive)
    assert isinstance(found, Path) and found.name == "deepspeed"
    assert read(found) == NEEDED
    assert found.parent.stat().st_mode & 0o077 == 0, "others can write into it"
    assert find(str(archive)) == found, "unpacked twice"


def test_the_folder_of_a_download(tmp_path):
    sdist(tmp_path / "deepspeed-0.19.6.tar.gz")
    assert isinstance(find(tmp_path), Path)
    sdist(tmp_path / "deepspeed-0.18.0.tar.gz")
    assert isinstance(find(tmp_path), str), "which one?"


@pytest.mark.parametrize("below", [".", "deepspeed-0.19.6"])
def test_an_unpacked_release(below, tmp_path):
    unpacked(tmp_path / below)
    assert find(tmp_path) == (tmp_path / below / "deepspeed").resolve()
    assert find(tmp_path / below / "deepspeed") == (tmp_path / below / "deepspeed").resolve()


def test_the_variable_names_it_and_an_argument_wins(tmp_path, monkeypatch):
    first, second = unpacked(tmp_path / "first"), unpacked(tmp_path / "second")
    monkeypatch.setenv(VARIABLE, str(first))
    assert find() == (first / "deepspeed").resolve()
    assert find(second) == (second / "deepspeed").resolve()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "absent"))
    assert "absent" in find(), "what the user named is not replaced by what is installed"


@pytest.mark.parametrize("kernels", [True, False], ids=["with kernels", "newer"])
def test_an_installed_one_is_found_and_not_imported(kernels, tmp_path):
    """Also where a stand-in without files is imported under that name."""
    unpacked(tmp_path, {name: content for name, content in FILES.items() if kernels or "sparse" not in name})
    program = (
        "import sys, types; sys.modules['deepspeed'] = types.ModuleType('deepspeed')\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from bsa_export.ops.deepspeed_source import find; print(find())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if kernels:
        assert done.stdout.strip() == str(tmp_path / "deepspeed")
    else:
        assert all(fact in done.stdout for fact in ("0.19.6", "pip install", "pip download", VARIABLE))


def test_what_was_unpacked_goes_with_the_process(tmp_path):
    archive = sdist(tmp_path / "deepspeed-0.19.6.tar.gz")
    program = f"from bsa_export.ops.deepspeed_source import find; print(find({str(archive)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("/deepspeed")
    assert not Path(done.stdout.strip()).parent.exists()


def bomb(path):
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(3 * 64):
            file.write(bytes(1 << 20))


MATMUL = "deepspeed/ops/sparse_attention/matmul.py"
HOSTILE = {
    "nothing": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("deepspeed"),
    "another tar": lambda path: sdist(path, {"README": b"x"}),
    "a bomb": bomb,
    "a cut sdist": lambda path: path.write_bytes(sdist(path).read_bytes()[:100]),
    "a cut wheel": lambda path: path.write_bytes(wheel(path).read_bytes()[:-40]),
    "a large member": lambda path: sdist(path, {MATMUL: bytes(2 << 20)}),
    "a large member of a wheel": lambda path: wheel(path, {MATMUL: bytes(2 << 20)}),
    "many members": lambda path: sdist(path, {f"deepspeed/ops/sparse_attention/m{i}.py": b"" for i in range(300)}),
    "a link": lambda path: sdist(path, {}, links={MATMUL: "/etc/passwd"}),
    "a path that climbs": lambda path: sdist(path, {"deepspeed/ops/sparse_attention/../../../../matmul.py": b""}),
    "an absolute path": lambda path: sdist(path, {MATMUL: b""}, root="/"),
    "a name with a line break": lambda path: sdist(path, {MATMUL + "\n": b""}),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "absent": lambda path: None,
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_release_is_a_sentence(make, tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed_source, "MAX_UNPACKED_BYTES", 128 << 20)
    make(tmp_path / "deepspeed.tar.gz")
    before = sorted(tmp_path.rglob("*"))
    reason = find(tmp_path / "deepspeed.tar.gz")
    assert isinstance(reason, str) and str(tmp_path) in reason and "\n" not in reason
    assert "pip download" in reason and "pip install" in reason
    assert sorted(tmp_path.rglob("*")) == before
