"""A pull from olah, a server of the Hub's download side that others wrote: it serves plain git repositories."""

import contextlib
import os
import shutil
import socket
import subprocess
import time

import pytest
from commands import Commands
from hub_folders import digests

pytestmark = pytest.mark.slow

OLAH = os.environ.get("OLAH") or shutil.which("olah-cli")


@pytest.fixture
def olah(finished, tmp_path):
    """The address of an olah that has the model as alice/model, and the model's commit there."""
    if OLAH is None:
        pytest.skip("olah is not here: pip install olah in a venv of its own, and name its olah-cli in $OLAH")
    if shutil.which("git") is None:
        pytest.skip("git is not here")
    repo = shutil.copytree(finished, tmp_path / "mirrors" / "models" / "alice" / "model")
    git = ["git", "-C", str(repo), "-c", "user.name=alice", "-c", "user.email=alice@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "A model"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "olah.toml"
    basic = f'host = "127.0.0.1"\nport = {port}\nhf-scheme = "http"\nhf-netloc = "127.0.0.1:9"\n'
    basic += f'repos-path = "{tmp_path / "cache"}"\nmirrors-path = ["{tmp_path / "mirrors"}"]\n'
    config.write_text(f"[basic]\n{basic}[accessibility]\noffline = true\n")
    with subprocess.Popen(
        [OLAH, "-c", str(config)], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}", commit
        process.terminate()


def _wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, "olah ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise AssertionError("olah does not answer")


@pytest.mark.parametrize("revision", ["", "@v1", "@commit"])
def test_a_pull_from_olah(olah, finished, tmp_path, revision):
    url, commit = olah
    revision = revision.replace("commit", commit)
    with Commands(HF_ENDPOINT=url, HF_HOME=str(tmp_path / "home")) as bsa:
        ended = bsa.run("pull", f"alice/model{revision}", tmp_path / "out")
        assert (ended.code, ended.err) == (0, "")
        assert f"commit  {commit}\n" in ended.out
        (tmp_path / "out" / "pulled.json").unlink()
        assert digests(tmp_path / "out") == digests(finished)
        missing = bsa.run("pull", "alice/other", tmp_path / "other")
        assert missing.code == 1 and "alice/other: there is no such repository" in missing.err
