"""Finds the source files of DeepSpeed's sparse attention: in a file or folder that the user names, or in an installed
deepspeed.

The last release that has them is 0.19.6. Nothing of deepspeed is imported here, and no newer deepspeed has to be
replaced.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import zipfile
import zlib
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

LAST_RELEASE = "0.19.6"
VARIABLE = "BSA_DEEPSPEED"
RELEASES = f"deepspeed 0.16 to {LAST_RELEASE}"
TWO_WAYS = (
    f'pip install "deepspeed=={LAST_RELEASE}"; or, next to any other version, '
    f'pip download --no-deps "deepspeed=={LAST_RELEASE}" and set {VARIABLE} to the file that this leaves '
    "(bsa-verify: --deepspeed FILE)"
)

# What a release is allowed to hold: deepspeed-0.19.6.tar.gz has 2 MB, and 10 MB unpacked; its largest file that is read
# has 50 kB.
MAX_ARCHIVE_BYTES = 256 << 20
MAX_UNPACKED_BYTES = 256 << 20
MAX_FILE_BYTES = 1 << 20
MAX_FILES = 200

# Members of a release, `deepspeed-0.19.6/deepspeed/...` in an sdist and `deepspeed/...` in a wheel.
_MEMBER = re.compile(
    r"(?:[\w.+-]+/)?deepspeed/(ops/(?:sparse_attention/(?:\w+/)*\w+\.(?:py|tr)|csrc/sparse_attention/\w+\.cpp))",
    re.ASCII,
)
_ARCHIVE = re.compile(r"deepspeed-[\w.+-]+(\.tar\.gz|\.tgz|\.whl|\.zip)", re.ASCII)


class _Unusable(Exception):
    """An archive that cannot be read, or holds something else; the text says which."""


def find(path: Path | str | None = None) -> Path | str:
    """The folder of a package `deepspeed` that has `ops/sparse_attention/matmul.py`, or a sentence that says why there
    is none.

    Args:
        path: a release as a file (.tar.gz, .whl), the folder that one was unpacked to, or a folder `deepspeed`; None is
            $BSA_DEEPSPEED, and where that is not set the installed deepspeed.
    """
    if path is None and os.environ.get(VARIABLE):
        path = os.environ[VARIABLE]
    if path is None:
        return _installed()
    path = Path(path).expanduser()
    try:
        return _in_folder(path) if path.is_dir() else _in_archive(path)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    except _Unusable as error:
        return f"{path}: {error}; to get one: {TWO_WAYS}"


def helper_source(folder: Path) -> Path:
    """The C++ file next to the kernels, which packs kept blocks into squares."""
    return folder / "ops/csrc/sparse_attention/utils.cpp"


def _has_kernels(folder: Path) -> bool:
    return (folder / "ops/sparse_attention/matmul.py").is_file()


def _installed() -> Path | str:
    # sys.path first: `sys.modules` may hold a stand-in (deepspeed_compat), which has no files.
    folders = _package_folders()
    for folder in folders:
        if _has_kernels(folder):
            return folder
    if not folders:
        return f"deepspeed is not installed; {RELEASES} has the kernels: {TWO_WAYS}"
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        version = f"in {folders[0]}"
    return f"deepspeed {version} has no sparse attention; {RELEASES} has the kernels: {TWO_WAYS}"


def _package_folders() -> list[Path]:
    spec = PathFinder.find_spec("deepspeed")
    if spec is None:
        try:
            spec = find_spec("deepspeed")  # also what is installed in editable mode
        except ValueError:  # a module that somebody put together without a spec
            spec = None
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]


def _in_folder(path: Path) -> Path:
    """The package `deepspeed` in a folder: the folder is the package, holds it (an unpacked release, site-packages), or
    holds the file of a release."""
    for folder in (path, path / "deepspeed", *sorted(path.glob("deepspeed-*/deepspeed"))):
        if _has_kernels(folder):
            return folder.resolve()
    archives = sorted(file for file in path.iterdir() if _ARCHIVE.fullmatch(file.name) and file.is_file())
    if len(archives) == 1:
        return _in_archive(archives[0])
    raise _Unusable(f"expected {RELEASES}, found a folder without deepspeed/ops/sparse_attention/matmul.py")


def _in_archive(path: Path) -> Path:
    if not path.exists():
        raise _Unusable("no such file or folder")
    if not path.is_file():
        raise _Unusable("expected a file or a folder, found a device or a pipe")
    status = path.stat()
    if status.st_size > MAX_ARCHIVE_BYTES:
        raise _Unusable(f"expected at most {MAX_ARCHIVE_BYTES:,} bytes, found {status.st_size:,}")
    return Path(_unpacked(path.resolve(), status.st_size, status.st_mtime_ns).name) / "deepspeed"


@cache
def _unpacked(path: Path, size: int, changed: int) -> TemporaryDirectory[str]:
    """A private folder with the needed files of a release; it is removed when the process ends."""
    try:
        files = _read_zip(path) if zipfile.is_zipfile(path) else _read_tar(path)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, EOFError, ValueError) as error:
        raise _Unusable(f"expected a release of deepspeed as .tar.gz or .whl ({error})") from None
    except RuntimeError:  # a compression that zipfile lacks (NotImplementedError), or a password
        raise _Unusable("its compression or encryption is not supported") from None
    if "ops/sparse_attention/matmul.py" not in files:
        raise _Unusable(f"expected {RELEASES}, found no deepspeed/ops/sparse_attention/matmul.py in it")
    folder = TemporaryDirectory(prefix="bsa_export_deepspeed_")
    for name, content in files.items():
        target = Path(folder.name, "deepspeed", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return folder


def _read_tar(path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    with (
        gzip.open(path) as unpacked,
        io.BufferedReader(_Bounded(unpacked)) as bounded,
        tarfile.open(fileobj=bounded, mode="r|") as archive,
    ):
        for member in archive:
            name = _wanted(member.name, member.size, files) if member.isreg() else None
            content = archive.extractfile(member) if name else None
            if name and content:
                files[name] = content.read()
    return files


def _read_zip(path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = None if member.is_dir() else _wanted(member.filename, member.file_size, files)
            if name:
                with archive.open(member) as file:
                    files[name] = file.read(MAX_FILE_BYTES)
    return files


def _wanted(member: str, size: int, known: dict[str, bytes]) -> str | None:
    """The path below `deepspeed/` of a member that is needed, or None."""
    match = _MEMBER.fullmatch(member)
    if match is None:
        return None
    if size > MAX_FILE_BYTES or len(known) >= MAX_FILES:
        raise _Unusable(f"expected at most {MAX_FILES} files of {MAX_FILE_BYTES:,} bytes, found more in it")
    return match[1]


class _Bounded(io.RawIOBase):
    """A stream that ends with an error after `MAX_UNPACKED_BYTES`, whatever a small file would unpack to."""

    def __init__(self, source: gzip.GzipFile):
        self._source = source
        self._left = MAX_UNPACKED_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        content = self._source.read(min(len(view), self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise _Unusable(f"it unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
        view[: len(content)] = content
        return len(content)
