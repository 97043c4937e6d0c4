"""A folder appears whole or not at all, whatever stops the process that writes it."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bsa_export.checkpoint import atomic_folder as folder
from bsa_export.checkpoint.atomic_folder import AtomicFolder
from bsa_export.errors import CheckpointError


def everything(path: Path) -> list[str]:
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


def earlier_conversion(path: Path) -> Path:
    path.mkdir()
    (path / "conversion.json").write_text('{"bsa_export": "0.1"}')
    (path / "old").write_text("old")
    return path


def test_the_folder_appears_at_the_end(tmp_path):
    with AtomicFolder(tmp_path / "a" / "b" / "out") as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("x")
        assert not (tmp_path / "a" / "b" / "out").exists()
    assert everything(tmp_path) == ["a", "a/b", "a/b/out", "a/b/out/sub", "a/b/out/sub/file"]


def test_it_has_the_rights_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        with AtomicFolder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(2)], ids=repr)
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), AtomicFolder(tmp_path / "a" / "out") as staging:
        (staging / "file").write_text("x")
        raise error
    assert everything(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["_open_locked", "os.rename", "shutil.rmtree"])
def test_a_signal_in_the_middle_of_making_or_cleaning_leaves_nothing(tmp_path, monkeypatch, number, moment):
    module, _, name = moment.rpartition(".")
    place = getattr(folder, module) if module else folder
    real = getattr(place, name)

    def interrupted(*arguments, **keywords):
        signal.raise_signal(number)
        return real(*arguments, **keywords)

    monkeypatch.setattr(place, name, interrupted)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit), AtomicFolder(tmp_path / "out"):
        pass
    assert everything(tmp_path) in ([], ["out"])
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("target", [".", ".."])
def test_the_current_folder_is_refused(tmp_path, monkeypatch, target):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="cannot replace the current directory.*; name a folder inside it"):
        AtomicFolder(target).__enter__()
    assert everything(tmp_path) == ["here"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="out: the disk is full"), AtomicFolder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert everything(tmp_path) == []


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with AtomicFolder(tmp_path / "out") as staging:
        (staging / "file").write_text("x")
    assert everything(tmp_path) == ["out", "out/file"]


def test_what_is_there_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="out: .*not empty.*--overwrite"):
        AtomicFolder(tmp_path / "out").__enter__()
    with pytest.raises(CheckpointError, match="only an earlier conversion may be overwritten.* no conversion.json"):
        AtomicFolder(tmp_path / "out", overwrite=True).__enter__()
    with pytest.raises(CheckpointError, match="expected a folder to write to, found a file"):
        AtomicFolder(tmp_path / "out" / "precious", overwrite=True).__enter__()
    with pytest.raises(CheckpointError, match=r"precious: no folder can be made in it \(Not a directory\)"):
        AtomicFolder(tmp_path / "out" / "precious" / "below").__enter__()
    assert everything(tmp_path) == ["out", "out/precious"]


def test_what_appears_meanwhile_is_not_lost(tmp_path):
    with pytest.raises(CheckpointError, match="not empty"), AtomicFolder(tmp_path / "out") as staging:
        (staging / "file").write_text("x")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
    assert everything(tmp_path) == ["out", "out/precious"]


@pytest.mark.parametrize("exchange", ["in one step", "in two"])
def test_an_earlier_conversion_is_overwritten(tmp_path, monkeypatch, exchange):
    if exchange == "in two":
        monkeypatch.setattr(folder.ctypes, "CDLL", lambda *_, **__: object())
    earlier_conversion(tmp_path / "out")
    with AtomicFolder(tmp_path / "out", overwrite=True) as staging:
        (staging / "file").write_text("x")
        assert (tmp_path / "out" / "old").read_text() == "old"
    assert everything(tmp_path) == ["out", "out/file"]


def test_a_failed_overwrite_keeps_the_earlier_conversion(tmp_path):
    earlier_conversion(tmp_path / "out")
    with pytest.raises(ValueError), AtomicFolder(tmp_path / "out", overwrite=True):
        raise ValueError
    assert everything(tmp_path) == ["out", "out/conversion.json", "out/old"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with AtomicFolder(tmp_path / "link") as staging:
        (staging / "file").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").exists()


def left_by_a_killed_process(target: Path) -> Path:
    """The staging folder that a process leaves which was killed while it wrote."""
    before = set(target.parent.iterdir())
    process = start(target)
    process.kill()
    process.wait(20)
    process.stdout.close()
    (stale,) = set(target.parent.iterdir()) - before
    return stale


def test_staging_folders_in_use_are_left_alone_and_stale_ones_are_removed(tmp_path):
    stale = left_by_a_killed_process(tmp_path / "out")
    other = left_by_a_killed_process(tmp_path / "other")
    with AtomicFolder(tmp_path / "out") as first:
        assert not stale.exists()
        with AtomicFolder(tmp_path / "out") as second:
            assert first != second
            assert first.exists()
            (second / "from").write_text("second")
        with pytest.raises(CheckpointError, match="not empty"):
            AtomicFolder(tmp_path / "out").__enter__()
        with suppress(FileNotFoundError):
            (tmp_path / "out" / "from").unlink()
        (first / "from").write_text("first")
    assert (tmp_path / "out" / "from").read_text() == "first"
    assert other.exists()


def test_folders_that_only_look_like_a_staging_folder_stay(tmp_path):
    (tmp_path / ".out.tmp-20241101").mkdir()  # a user's own
    (tmp_path / ".out.tmp-20241101" / "precious").write_text("x")
    (tmp_path / ".out.tmp-12345678").mkdir()
    shutil.copytree(left_by_a_killed_process(tmp_path / "out"), tmp_path / ".out.tmp-00000000")
    (left_by_a_killed_process(tmp_path / "out")).rename(tmp_path / ".out.tmp-11111111")
    with AtomicFolder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".out.tmp-00000000",
        ".out.tmp-11111111",
        ".out.tmp-12345678",
        ".out.tmp-20241101",
        "out",
    ]


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"converted": true}'])
def test_another_programs_conversion_json_is_no_reason_to_overwrite(tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "conversion.json").write_text(content)
    with pytest.raises(CheckpointError, match="only an earlier conversion may be overwritten"):
        AtomicFolder(tmp_path / "out", overwrite=True).__enter__()
    assert everything(tmp_path) == ["out", "out/conversion.json"]


def test_everything_is_flushed_before_an_earlier_conversion_is_replaced(tmp_path, monkeypatch):
    flushed = []

    def record(descriptor):
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "out" / "sub").exists()))

    monkeypatch.setattr(os, "fsync", record)
    earlier_conversion(tmp_path / "out")
    with AtomicFolder(tmp_path / "out", overwrite=True) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("x")
    before = {Path(path).name for path, there in flushed if not there}
    assert before == {"file", "sub", "out"}
    assert flushed[-1] == (str(tmp_path), True)


def test_a_link_with_the_name_of_a_stale_folder_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / ".out.tmp-0123abcd").symlink_to("precious")
    with AtomicFolder(tmp_path / "out"):
        pass
    assert (tmp_path / "precious" / "file").exists()


WRITER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may start with both ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from bsa_export.checkpoint.atomic_folder import AtomicFolder
with AtomicFolder(sys.argv[1], overwrite=True) as staging:
    for number in range(2000):
        (staging / str(number)).write_text("x" * 1000)
        if number == 0:
            print("started", flush=True)
    (staging / "conversion.json").write_text('{"bsa_export": "0.1"}')
"""


def start(target: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    process.stdout.readline()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path, number):
    process = start(tmp_path / "out")
    process.send_signal(number)
    assert process.wait(20) in (128 + number, 1, -number)
    process.stdout.close()
    assert everything(tmp_path) == []


def test_a_killed_process_leaves_no_target_and_the_next_run_removes_what_is_left(tmp_path):
    random.seed(0)
    for overwrite in (False, True):
        target = tmp_path / str(overwrite) / "out"
        target.parent.mkdir()
        if overwrite:
            earlier_conversion(target)
        for _ in range(4):
            process = start(target)
            time.sleep(random.uniform(0, 0.15))
            process.kill()
            process.wait(20)
            process.stdout.close()
            if target.exists():
                assert everything(target) in (
                    ["conversion.json", "old"],
                    sorted([*map(str, range(2000)), "conversion.json"]),
                )
        with AtomicFolder(target, overwrite=True) as staging:
            (staging / "conversion.json").write_text('{"bsa_export": "0.1"}')
        assert everything(target.parent) == ["out", "out/conversion.json"]
