"""Every request of a push and of a pull fails once, one in each run or all in one, and the result is the same."""

import shutil

import pytest
from hub_faults import Cut, LoseAnswer, Slow, Status
from hub_folders import digests

from bsa_export.hub.errors import FULL, status_of

pytestmark = pytest.mark.slow

PUSH_REQUESTS = {
    "whoami": "GET /api/whoami-v2",
    "info": "GET /api/models/alice/model($| )",
    "create": "POST /api/repos/create",
    "head": "GET /api/models/alice/model/revision/main",
    "card": "POST /api/validate-yaml",
    "preupload": "POST .*/preupload/",
    "xet token": "xet-write-token",
    "xorb": "POST /v1/xorbs/",
    "shard": "POST .*shards",
    "lfs batch": "POST .*objects/batch",
    "lfs object": "PUT /lfs/",
    "lfs verify": "POST /lfs/.*/verify",
    "commit": "POST .*/commit/",
    "tree": "GET .*/tree/",
}
PULL_REQUESTS = {
    "info": "GET /api/models/alice/model",
    "tree": "GET .*/tree/",
    "small file": "GET .*/resolve/.*/config.json",
    "metadata": "HEAD .*/resolve/.*/model.safetensors",
    "xet token": "xet-read-token",
    "reconstruction": "GET /v1/reconstructions",
    "xorb": "GET /xorbs/",
    "lfs object": "GET /lfs/",
}
# Trouble with one request a run, and with all of them in one run.
ONE, ALL = {"503": Status(503), "unanswered": LoseAnswer()}, {"500": Status(500), "dropped": Cut(0)}
TROUBLES = [pytest.param("503", marks=pytest.mark.slow), "unanswered", *ALL]
OF_XET = {"xet token", "xorb", "shard", "reconstruction"}
OF_LFS = {"lfs batch", "lfs object", "lfs verify", "metadata"}


def all_in_repository(hub, model) -> bool:
    files = hub.repos["alice/model"].head.files
    return {path: hub.content(file) for path, file in files.items() if path != ".gitattributes"} == {
        name: (model / name).read_bytes() for name in digests(model)
    }


def runs(requests: dict[str, str], bsa, trouble: str) -> list[list[str]]:
    """The requests to be troubled in each run."""
    patterns = [pattern for request, pattern in requests.items() if request not in (OF_LFS if bsa.xet else OF_XET)]
    return [patterns] if trouble in ALL else [[pattern] for pattern in patterns]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_pushes_survive(bsa, hub, hub_home, model, trouble):
    for patterns in runs(PUSH_REQUESTS, bsa, trouble):
        hub.repos.clear()
        hub.forget_objects()
        shutil.rmtree(hub_home, ignore_errors=True)
        for pattern in patterns:
            hub.fault(pattern, (ONE | ALL)[trouble])
        ended = bsa.run("push", model, "alice/model", "--yes")
        assert ended.code == 0, (patterns, ended.err)
        assert not any(fault[3] for fault in hub.faults), f"not all was asked for of {patterns}"
        assert len(hub.repos["alice/model"].commits) == 2, f"two commits after trouble with {patterns}"
        hub.come_up()
    assert all_in_repository(hub, model)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_pulls_survive(bsa, hub, hub_home, model, tmp_path, trouble):
    assert bsa.run("push", model, "alice/model", "--yes").code == 0
    for patterns in runs(PULL_REQUESTS, bsa, trouble):
        shutil.rmtree(hub_home, ignore_errors=True)
        for pattern in patterns:
            hub.fault(pattern, (ONE | ALL)[trouble])
        ended = bsa.run("pull", "alice/model", tmp_path / "out")
        assert ended.code == 0, (patterns, ended.err)
        assert not any(fault[3] for fault in hub.faults), f"not all was asked for of {patterns}"
        (tmp_path / "out" / "pulled.json").unlink()
        assert digests(tmp_path / "out") == digests(model), patterns
        shutil.rmtree(tmp_path / "out")
        hub.come_up()


@pytest.mark.parametrize("request_", ["small file", "lfs object", "reconstruction", "xorb"])
def test_a_download_that_breaks_in_the_middle(bsa, hub, hub_home, model, tmp_path, request_):
    if request_ in (OF_LFS if bsa.xet else OF_XET):
        return
    assert bsa.run("push", model, "alice/model", "--yes").code == 0
    shutil.rmtree(hub_home, ignore_errors=True)
    hub.fault(PULL_REQUESTS[request_], Cut(300))
    assert bsa.run("pull", "alice/model", tmp_path / "out").code == 0
    (tmp_path / "out" / "pulled.json").unlink()
    assert digests(tmp_path / "out") == digests(model)


def test_an_unanswered_pull_request_is_not_opened_twice(bsa, hub, model):
    repo = hub.make_repo("bob/model")
    hub.fault("POST .*/commit/", LoseAnswer())
    ended = bsa.run("push", model, "bob/model", "--yes", "--create-pr")
    assert ended.code == 0
    assert [ref for ref in repo.refs if "pr" in ref] == ["refs/pr/1"]
    assert repo.at("refs/pr/1").id in ended.out and "discussions/1" in ended.out


def test_a_commit_that_fails_again_and_again(bsa, hub, model):
    hub.fault("POST .*/commit/", Status(503), times=4)
    assert bsa.run("push", model, "alice/model", "--yes").code == 0
    assert all_in_repository(hub, model)


def test_a_slow_hub(bsa, hub, model, tmp_path):
    hub.fault(".", Slow(0.05), times=10**6)
    assert bsa.run("push", model, "alice/model", "--yes").code == 0
    assert bsa.run("pull", "alice/model", tmp_path / "out").code == 0


def test_what_the_hub_lists_after_the_upload_is_compared(bsa, hub, model):
    """A Hub that lists another sha256 than the folder's does not pass for a push that went well."""

    hub.listed_sha256 = "0" * 64
    ended = bsa.run("push", model, "alice/model", "--yes")
    assert ended.code == 1
    assert "alice/model: expected layout.png of " in ended.err
    assert f"sha256 {'0' * 64}; push again" in ended.err


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Network error: Request error: HTTP status client error (404 Not Found), domain: http://127.0.0.1:1/v1", 404),
        ("HTTP status server error (503 Service Unavailable) for url (http://127.0.0.1)", 503),
        ("Network error: error sending request for url (http://127.0.0.1:500/)", None),
    ],
)
def test_the_status_in_the_words_of_hf_xet(text, status):
    assert status_of(ConnectionError(text)) == status


def test_words_that_mean_no_room():
    assert FULL.search("Storage limit reached") and not FULL.search("you lack the scope repo.write")
