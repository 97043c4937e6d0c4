"""A small converted model, a Hub for each test, and commands that talk to it with and without hf_xet."""

import shutil
from pathlib import Path

import pytest
from commands import Commands
from hub_folders import converted, mark_verified
from hub_server import WRITER, HubServer
from support.tiny import dense_bert


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A conversion that was verified, in one file of weights. Not to be written to: `model` is a copy."""
    place = tmp_path_factory.mktemp("finished")
    return mark_verified(converted(dense_bert(place / "dense"), place / "model"))


@pytest.fixture(scope="session")
def sharded(finished) -> Path:
    """The same in shards."""
    return mark_verified(converted(finished.parent / "dense", finished.parent / "sharded", shards=True))


@pytest.fixture
def model(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "model")


@pytest.fixture(scope="session")
def _a_hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def hub(_a_hub):
    """An empty Hub without faults."""
    _a_hub.come_up()
    _a_hub.repos.clear()
    _a_hub.log.clear()
    _a_hub.multipart = None
    return _a_hub


@pytest.fixture(scope="session")
def hub_home(tmp_path_factory) -> Path:
    """$HF_HOME of the commands."""
    return tmp_path_factory.mktemp("home")


def _commands(server, home: Path, xet: bool) -> Commands:
    env = {} if xet else {"HF_HUB_DISABLE_XET": "1"}
    return Commands(HF_ENDPOINT=server.url, HF_TOKEN=WRITER, HF_HOME=str(home), **env)


@pytest.fixture(scope="session")
def _with_xet(_a_hub, hub_home):
    pytest.importorskip("hf_xet", reason="hf_xet is not installed")
    with _commands(_a_hub, hub_home, xet=True) as commands:
        yield commands


@pytest.fixture(scope="session")
def _without_xet(_a_hub, hub_home):
    with _commands(_a_hub, hub_home, xet=False) as commands:
        yield commands


@pytest.fixture(params=["xet", "lfs"])
def bsa(request, hub_home) -> Commands:
    """Runs the commands, once with hf_xet and once without it, with an empty cache."""
    shutil.rmtree(hub_home, ignore_errors=True)
    return request.getfixturevalue("_with_xet" if request.param == "xet" else "_without_xet")


@pytest.fixture
def bsa_lfs(_without_xet, hub_home) -> Commands:
    """Runs the commands without hf_xet, for what does not depend on it, with an empty cache."""
    shutil.rmtree(hub_home, ignore_errors=True)
    return _without_xet
