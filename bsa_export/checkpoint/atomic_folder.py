"""A folder that appears whole or not at all."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import secrets
import shutil
import signal
import threading
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import FrameType

from bsa_export.errors import CheckpointError
from bsa_export.files import plain_error

# What a conversion leaves in its folder; only a folder that has it may be overwritten.
MARKER = "conversion.json"
_RENAME_EXCHANGE = 2  # linux/fs.h


class AtomicFolder(AbstractContextManager):
    """Write into a hidden folder that is renamed to `target` at the end: `with AtomicFolder("out") as staging: ...`.

    The staging folder is `.NAME.tmp-XXXXXXXX` beside `target`, locked (flock) while its process lives. After an
    exception, Ctrl-C, SIGTERM or SIGHUP it is removed. A process that was killed leaves it behind; the next run with
    the same target sees that nobody holds the lock, and removes it. What survives a loss of power is up to the file
    system: nothing is flushed, as `cp` does not.

    Args:
        target: the folder to make. Its parents are made. An empty folder in its place is replaced.
        overwrite: replace an earlier conversion in one step. A folder without MARKER is never replaced.

    Raises:
        CheckpointError: `target` is there and may not be replaced, the disk is full, or the place cannot be written.
    """

    def __init__(self, target: str | Path, *, overwrite: bool = False):
        self.target = Path(os.path.realpath(target))
        self.overwrite = overwrite
        self.made_parents: list[Path] = []
        self.staging: Path | None = None
        self.lock: int | None = None
        self.handlers: dict[signal.Signals, object] = {}
        self.interrupted: int | None = None

    def __enter__(self) -> Path:
        try:
            self.hold_signals()
            self.refuse_target()
            self.make_parents()
            self.remove_stale()
            self.make_staging()
            self.end_if_interrupted()
        except BaseException as error:
            self.clean()
            if isinstance(error, OSError):
                raise plain_error(error, self.target.parent, "no folder can be made in it") from error
            raise
        return self.staging

    def __exit__(self, kind, error, _):
        try:
            self.end_if_interrupted()
            if kind is None:
                self.put_in_place()
                self.made_parents.clear()
        except OSError as problem:
            raise plain_error(problem, self.target) from problem
        finally:
            self.clean()
        self.end_if_interrupted()
        if isinstance(error, OSError):
            raise plain_error(error, self.target) from error

    def hold_signals(self) -> None:
        """From here on Ctrl-C, SIGTERM and SIGHUP do not end the process between making the staging folder and removing it."""
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
                "the folder is made in one step, and cannot take the place of the current one or of a mounted one",
                where=self.target,
                hint="name a folder inside it",
            )
        if not any(self.target.iterdir()):
            return
        if not self.overwrite:
            raise CheckpointError(
                "it is there and not empty", where=self.target, hint="choose another folder or --overwrite"
            )
        if not (self.target / MARKER).is_file():
            raise CheckpointError(
                f"only an earlier conversion may be overwritten, and it holds no {MARKER}",
                where=self.target,
                hint="choose another folder",
            )

    def make_parents(self) -> None:
        missing = [parent for parent in self.target.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            self.made_parents.append(parent)

    def make_staging(self) -> None:
        """A new staging folder and the descriptor that holds its lock."""
        while True:
            self.staging = self.target.with_name(f".{self.target.name}.tmp-{secrets.token_hex(4)}")
            self.staging.mkdir()
            try:
                self.lock = _open_locked(self.staging)
            except (BlockingIOError, FileNotFoundError):
                continue  # another run took it for stale before it was locked
            if self.staging.exists():
                return
            os.close(self.lock)

    def remove_stale(self) -> None:
        """Remove the staging folders of this target that no process holds."""
        for stale in self.target.parent.glob(f".{glob.escape(self.target.name)}.tmp-????????"):
            try:
                lock = _open_locked(stale, without_locks=False)
            except OSError:
                continue
            shutil.rmtree(stale, ignore_errors=True)
            os.close(lock)

    def put_in_place(self) -> None:
        self.refuse_target()  # somebody else may have made it meanwhile
        if self.target.is_dir() and any(self.target.iterdir()):
            _exchange(self.staging, self.target)
        else:
            os.rename(self.staging, self.target)


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
    aside = one.with_name(one.name + "-old")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)
