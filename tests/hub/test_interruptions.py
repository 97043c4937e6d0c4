"""Pushes and pulls stopped at a random byte: no part of a model is ever visible, and the next run completes it.

Half of them with hf_xet. The process is killed, interrupted (Ctrl-C), or cut off from the network, once or for good.
Each way is tried once; `-m slow` runs more, at random moments.
"""

import contextlib
import hashlib
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from hub_folders import digests

from bsa_export.converted import card as model_card

pytestmark = pytest.mark.slow

WAYS = ("kill", "ctrl-c", "cut once", "down")
# Each way once, and the long form: 10 runs at random moments, with and without hf_xet.
SEEDS = [
    pytest.param(0, WAYS, id="each way"),
    *(pytest.param(seed, None, id=str(seed), marks=pytest.mark.slow) for seed in range(1)),
]
RUNS = 10


def ways(seed, chosen):
    """The ways of a test's runs, each with its own random numbers."""
    for run in range(RUNS if chosen is None else len(chosen)):
        rng = random.Random(f"{seed} {run}")
        yield (rng.choice(WAYS) if chosen is None else chosen[run]), rng


@pytest.fixture(scope="module")
def published(sharded, tmp_path_factory) -> Path:
    """The sharded model with its card as a push completes it."""
    folder = shutil.copytree(sharded, tmp_path_factory.mktemp("published") / "model")
    model_card.write(folder, "alice/model")
    return folder


@pytest.fixture(scope="module")
def traffic() -> dict:
    """Bytes of a whole push or pull: (command, with hf_xet) -> bytes, measured once."""
    return {}


def in_repository(hub) -> dict[str, str]:
    """The files of the repository -> sha256."""
    repo = hub.repos.get("alice/model")
    listed = {path: file for path, file in repo.head.files.items() if path != ".gitattributes"} if repo else {}
    assert all(file.sha256 is None or hub.holds(file) for file in listed.values()), "bytes are missing in the storage"
    return {path: file.sha256 or hashlib.sha256(file.content).hexdigest() for path, file in listed.items()}


def in_folder(folder) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name != "pulled.json"}


def interrupted(hub, bsa, way, rng, budget, *command):
    """Runs a command that is stopped after so many bytes. Returns how it ended."""
    if way == "cut once":
        hub.fault(".", _cut(rng), skip=rng.randrange(12), times=1)
    elif way == "down":
        hub.go_down_after(rng.randrange(budget))
    pid = bsa.start(*command)
    if way in ("kill", "ctrl-c"):
        hub.go_down_after(
            rng.randrange(budget), lambda: _signal(pid, signal.SIGKILL if way == "kill" else signal.SIGINT)
        )
    ended = bsa.wait()
    assert "Traceback" not in ended.err, ended.err
    hub.come_up()
    return ended


def _cut(rng):
    from hub_faults import Cut, LoseAnswer

    return rng.choice([Cut(0), Cut(rng.randrange(1, 100_000)), LoseAnswer()])


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def measured(hub, bsa, traffic, *command) -> int:
    """Bytes that a whole run of the command takes."""
    key = (command[0], bsa.xet)
    if key not in traffic:
        before = hub.traffic
        assert bsa.run(*command).code == 0
        traffic[key] = hub.traffic - before
    return traffic[key]


@pytest.mark.parametrize(("seed", "chosen"), SEEDS)
def test_pushes(bsa, hub, hub_home, published, tmp_path, traffic, seed, chosen):
    model = shutil.copytree(published, tmp_path / "model")
    push = ("push", model, "alice/model", "--yes")
    hub.forget_objects()
    budget = measured(hub, bsa, traffic, *push)
    whole = in_folder(model)
    codes = set()
    for way, rng in ways(seed, chosen):
        hub.repos.clear()
        hub.forget_objects()
        shutil.rmtree(hub_home, ignore_errors=True)  # where hf_xet remembers what storage has
        ended = interrupted(hub, bsa, way, rng, budget, *push)
        codes.add(ended.code)
        there = in_repository(hub)
        assert there in ({}, whole), "a part of the model was published"
        if ended.code == 0:
            assert there == whole
        again = bsa.run(*push)
        assert again.code == 0, again.err
        assert in_repository(hub) == in_folder(model) == whole
        assert len(hub.repos["alice/model"].commits) == 2, "the same files were committed twice"
    assert codes != {0}, "nothing was interrupted"


@pytest.mark.parametrize(("seed", "chosen"), SEEDS)
def test_pulls(bsa, hub, hub_home, finished, tmp_path, traffic, seed, chosen):
    model = shutil.copytree(finished, tmp_path / "model")
    assert bsa.run("push", model, "alice/model", "--yes").code == 0
    pull = ("pull", "alice/model", tmp_path / "out")
    budget = measured(hub, bsa, traffic, *pull)
    whole = in_folder(model)
    codes = set()
    for way, rng in ways(seed, chosen):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(hub_home, ignore_errors=True)
        ended = interrupted(hub, bsa, way, rng, budget, *pull)
        codes.add(ended.code)
        if ended.code == 0:
            assert in_folder(tmp_path / "out") == whole
            continue
        # A killed process may leave its hidden staging folder, which the next one removes.
        assert not (tmp_path / "out").exists()
        again = bsa.run(*pull)
        assert again.code == 0, again.err
        assert in_folder(tmp_path / "out") == whole
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert codes != {0}, "nothing was interrupted"
