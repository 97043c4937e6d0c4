"""A folder that appears whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
import signal
import threading
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from bsa_export.errors import CheckpointError
from bsa_export.files import MAX_JSON_BYTES, plain_error, read_bytes, read_json

# What a conversion leaves in its folder; only a folder that has it may be overwritten.
RECORD = "conversion.json"
# What every staging folder holds from its first moment; only a folder that has it, as its own, is ever removed.
MARKER = ".bsa-export-staging"
_RENAME_EXCHANGE = 2  # linux/fs.h


class AtomicFolder(AbstractContextManager):
    """Write into a hidden folder that is renamed to `target` at the end: `with AtomicFolder("out") as folder: ...`.

    The staging folder is `.NAME.tmp-XXXXXXXX` next to `target`. It holds MARKER and `NAME`, the folder to write into,
    and is locked (flock) while its process lives. An exception, Ctrl-C, SIGTERM or SIGHUP removes it. A process
    that was killed leaves it behind; the next run with the same target sees that nobody holds the lock, and removes it.
    A folder of such a name without a MARKER that names it (its name and inode) is somebody else's and stays.

    Power loss is not covered for a new folder, as with `cp`: the system writes to the disk later, and what it had not
    written may be missing or empty. To wait for the disk (fsync) takes half as long as `cp` on a fast one. Before an
    earlier conversion is replaced everything is flushed, so that the one or the other is whole.

    Args:
        target: the folder to make. Its parents are made. An empty folder in its place is replaced.
        overwrite: replace an earlier conversion in one step. A folder without the RECORD of one is never replaced.

    Raises:
        CheckpointError: `target` is there and may not be replaced, the disk is full, or the place cannot be written.
    """

    def __init__(self, target: str | Path, *, overwrite: bool = False):
        self.target = Path(os.path.realpath(target))
        self.overwrite = overwrite
        self.made_parents: list[Path] = []
        self.staging: Path | None = None
        self.lock: int | None = None
        self.handlers: dict[signal.Signals, Any] = {}
        self.interrupted: int | None = None

    def __enter__(self) -> Path:
        try:
            self.hold_signals()
            self.refuse_target()
            self.make_parents()
            self.remove_stale()
            self.staging = self.make_staging()
            content = self.staging / self.target.name
            content.mkdir()
            self.end_if_interrupted()
        except BaseException as error:
            self.clean()
            if isinstance(error, OSError):
                raise plain_error(error, self.target.parent, "no folder can be made in it") from error
            raise
        return content

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.end_if_interrupted()
            if kind is None and self.staging is not None:
                self.put_in_place(self.staging / self.target.name)
                self.made_parents.clear()
        except OSError as problem:
            raise plain_error(problem, self.target) from problem
        finally:
            self.clean()
        self.end_if_interrupted()
        if isinstance(error, OSError):
            raise plain_error(error, self.target) from error

    def hold_signals(self) -> None:
        """From here on a signal does not end the process between making the staging folder and removing it."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):  # nohup ignores SIGHUP: so be it
                self.handlers[number] = handler
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ends the work with an exception; in the middle of `__enter__` or `__exit__` only remembers to."""
        self.interrupted = number
        own = (AtomicFolder.__enter__.__code__, AtomicFolder.__exit__.__code__)
        while frame is not None:
            if frame.f_code in own:
                return
            frame = frame.f_back
        self.end_if_interrupted()

    def end_if_interrupted(self) -> None:
        """Raises what a signal that came stands for, once."""
        number, self.interrupted = self.interrupted, None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number is not None:
            raise SystemExit(128 + number)

    def clean(self) -> None:
        """Removes what was made and is not in place, and gives the signals back."""
        if self.staging is not None:
            shutil.rmtree(self.staging, ignore_errors=True)
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None
        for parent in reversed(self.made_parents):
            with suppress(OSError):
                parent.rmdir()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def refuse_target(self) -> None:
        """Raise CheckpointError when `target` may not be made or replaced."""
        if not os.path.lexists(self.target):
            return
        if not self.target.is_dir():
            raise CheckpointError(
                "expected a folder to write to", found="a file", where=self.target, hint="choose another name"
            )
        if os.path.ismount(self.target) or self.target in (Path.cwd(), *Path.cwd().parents):
            raise CheckpointError(
                "the folder appears in one step, so it cannot replace the current directory or a mount point",
                where=self.target,
                hint="name a folder inside it",
            )
        if not any(self.target.iterdir()):
            return
        if not self.overwrite:
            raise CheckpointError(
                "it exists and is not empty", where=self.target, hint="choose another folder or --overwrite"
            )
        if not _is_conversion(self.target):
            raise CheckpointError(
                f"only an earlier conversion may be overwritten, and it has no {RECORD} of one",
                where=self.target,
                hint="choose another folder",
            )

    def make_parents(self) -> None:
        missing = [parent for parent in self.target.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            self.made_parents.append(parent)

    def make_staging(self) -> Path:
        """A new staging folder with its MARKER; `self.lock` holds its lock."""
        while True:
            staging = self.target.with_name(f".{self.target.name}.tmp-{secrets.token_hex(4)}")
            staging.mkdir()
            self.staging = staging  # from here on `clean` removes it
            (staging / MARKER).write_text(_marker(staging), "utf-8", "surrogateescape")
            try:
                self.lock = _open_locked(staging)
            except (BlockingIOError, FileNotFoundError):
                continue  # another run took it for stale before it was locked
            if (staging / MARKER).exists():
                return staging
            os.close(self.lock)
            self.lock = None

    def remove_stale(self) -> None:
        """Remove the staging folders of this target that no process holds."""
        for stale in self.target.parent.glob(f".{glob.escape(self.target.name)}.tmp-????????"):
            try:
                lock = _open_locked(stale, without_locks=False)
            except OSError:
                continue
            if _is_marked(stale):
                shutil.rmtree(stale, ignore_errors=True)
            os.close(lock)

    def put_in_place(self, content: Path) -> None:
        """Rename `content` to the target."""
        self.refuse_target()  # somebody else may have made it meanwhile
        if self.target.is_dir() and any(self.target.iterdir()):
            _flush(content)
            _exchange(content, self.target)
            _flush_entry(self.target.parent)
        else:
            os.rename(content, self.target)


def _marker(staging: Path) -> str:
    """What MARKER holds: a copy of the folder, or one that was renamed, is not the folder that it names."""
    return f"{staging.name} {os.stat(staging).st_ino}\n"


def _is_marked(staging: Path) -> bool:
    try:
        return read_bytes(staging / MARKER, 1000) == _marker(staging).encode("utf-8", "surrogateescape")
    except (OSError, CheckpointError):
        return False


def _is_conversion(folder: Path) -> bool:
    """Whether RECORD is there and one of ours: other programs may have a file of that name."""
    try:
        record = read_json(folder / RECORD, MAX_JSON_BYTES)
    except (OSError, CheckpointError):
        return False
    return isinstance(record, dict) and isinstance(record.get("bsa_export"), str)


def _flush(folder: Path) -> None:
    """Have the system write every file below `folder`, and their names, to the disk. Raises OSError."""
    for path, folders, files in os.walk(folder):
        for name in (*files, *folders, "."):
            _flush_entry(Path(path, name))


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot flush folders
            raise
    finally:
        os.close(descriptor)


def _open_locked(folder: Path, *, without_locks: bool = True) -> int:
    """A descriptor of `folder` that holds its lock. Raises BlockingIOError when another process does.

    A file system may have no locks for folders (NFS): then it is opened only if `without_locks`, and nobody removes
    what a killed process left.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError) or not without_locks:
            os.close(descriptor)
            raise
    return descriptor


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step. Where the system cannot, in two: then for a moment neither is at `other`."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        here = ctypes.c_int(-100)  # AT_FDCWD
        if renameat2(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
            return
    except (AttributeError, OSError):
        pass
    # Not in the staging folder: whoever is killed between the two steps keeps the old folder.
    aside = other.with_name(f".{other.name}.before-{secrets.token_hex(4)}")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)
