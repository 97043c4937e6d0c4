"""bsa-push and bsa-pull as processes that start at once: a process with everything imported forks for each command.

Waits between attempts are a hundred times shorter than they are for people.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a command ended: its exit code (minus a signal's number), and what it printed."""

    code: int
    out: str
    err: str


class Commands(contextlib.AbstractContextManager):
    """Runs commands with an environment that huggingface_hub reads when it is imported.

    Args:
        env: added to this process's environment, less what it says of the Hub.
    """

    def __init__(self, **env: str):
        others = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
        shorter = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms", "HF_HUB_DISABLE_TELEMETRY": "1"} | _one_certificate()
        self.xet = "HF_HUB_DISABLE_XET" not in env
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, env=others | shorter | env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def start(self, name: str, *arguments: object, env: dict[str, str | None] | None = None) -> int:
        """Starts `bsa-NAME ARGUMENTS` and returns its process id; `wait` has to follow."""
        self.files = [Path(tempfile.mkstemp()[1]) for _ in range(2)]
        asked = {
            "name": name,
            "arguments": list(map(str, arguments)),
            "env": env or {},
            "files": list(map(str, self.files)),
        }
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> Ended:
        code = int(self.process.stdout.readline())
        texts = [file.read_text() for file in self.files]
        for file in self.files:
            file.unlink()
        return Ended(code, *texts)

    def run(self, name: str, *arguments: object, env: dict[str, str | None] | None = None) -> Ended:
        self.start(name, *arguments, env=env)
        return self.wait()


def _one_certificate() -> dict[str, str]:
    """Lets clients load one certificate before their first request: all of them take as long as a small push."""
    bundle = ssl.get_default_verify_paths().cafile
    if bundle is None:
        return {}
    end = "-----END CERTIFICATE-----"
    file = Path(tempfile.gettempdir()) / "bsa_export_tests_one_certificate.pem"
    file.write_text(Path(bundle).read_text().partition(end)[0] + end + "\n")
    return {"SSL_CERT_FILE": str(file)}


def _serve() -> None:
    import time

    # hf_xet and huggingface_hub are not in the package's own start-up, but are most of the time of a small push.
    with contextlib.suppress(ImportError):
        import hf_xet  # noqa: F401
    import yaml  # noqa: F401
    from huggingface_hub import CommitOperationAdd, HfApi, repocard_data, snapshot_download  # noqa: F401

    from bsa_export import hub  # noqa: F401
    from bsa_export.cli import convert, pull, push

    sleep = time.sleep
    time.sleep = lambda seconds: sleep(seconds / 100)
    mains: dict[str, Callable] = {"convert": convert.main, "push": push.main, "pull": pull.main}
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(mains[asked["name"]], **asked)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(main: Callable, name: str, arguments: list[str], env: dict[str, str | None], files: list[str]) -> None:
    """Ends as the command would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for key, value in env.items():
        os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_TRUNC), number)
    main.main(arguments, prog_name=f"bsa-{name}")


if __name__ == "__main__":
    _serve()
