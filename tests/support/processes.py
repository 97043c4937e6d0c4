"""Child processes of tests. They react to Ctrl-C even if the parent of the tests ignores it (`nohup`, `&`)."""

import signal
import subprocess
from typing import Any


def react_to_ctrl_c() -> None:
    """Restores SIGINT's default in this process. As `preexec_fn` of a child: an ignored signal is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def popen(command: list[str], **options: Any) -> subprocess.Popen:
    """`subprocess.Popen` of a process in which Ctrl-C raises KeyboardInterrupt, whatever the parent ignores."""
    return subprocess.Popen(command, preexec_fn=react_to_ctrl_c, **options)
