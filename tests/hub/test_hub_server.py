"""The test Hub itself: what it stores, what it refuses, and the faults that it makes."""

import hashlib
import http.client
import json
from urllib.parse import urlsplit

import pytest
from hub_faults import Answer, Corrupt, Cut, Gone, Headers, Status
from hub_repos import Repo, small_file
from hub_server import OTHER, WRITER


def ask(url: str, method: str, path: str, body: bytes = b"", token: str | None = None):
    """One request. Returns status, headers and body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def commit(hub, *lines: dict, token: str | None = WRITER, repo: str = "alice/m", query: str = ""):
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    return ask(hub.url, "POST", f"/api/models/{repo}/commit/main{query}", body, token)


HEADER = {"key": "header", "value": {"summary": "a file"}}


def test_a_commit_has_its_parents_files_and_moves_the_branch():
    repo = Repo("a/b", private=False)
    first = repo.commit("refs/heads/main", {"x": small_file(b"1")}, "first")
    second = repo.commit("refs/heads/main", {"x": small_file(b"2")}, "second")
    assert (second.parent, repo.head, repo.at("main")) == (first.id, second, second)
    assert repo.at(first.id).files["x"].content == b"1"
    assert repo.at("no such") is None


def test_commits_build_on_the_parent_that_they_name(hub):
    repo = hub.make_repo("alice/m")
    file = {"key": "file", "value": {"path": "a.txt", "content": "aGk="}}
    assert commit(hub, HEADER, file)[0] == 200
    assert repo.head.files["a.txt"].content == b"hi"
    stale = {"key": "header", "value": {"summary": "x", "parentCommit": "0" * 40}}
    assert commit(hub, stale, file)[0] == 412
    assert commit(hub, HEADER, {"key": "deletedFile", "value": {"path": "none"}})[0] == 404


def test_who_may_do_what(hub):
    hub.make_repo("alice/m", {"a": b"1"}, private=True)
    assert [ask(hub.url, "GET", "/api/models/alice/m", token=token)[0] for token in (WRITER, OTHER, None)] == [
        200,
        404,
        401,
    ]
    assert commit(hub, HEADER, token=OTHER)[0] == 404
    hub.make_repo("alice/open", {"a": b"1"})
    assert commit(hub, HEADER, token=OTHER, repo="alice/open")[0] == 403
    assert commit(hub, HEADER, token=OTHER, repo="alice/open", query="?create_pr=1")[0] == 200
    assert "refs/pr/1" in hub.repos["alice/open"].refs


def test_large_files_are_refused_before_their_bytes_came(hub):
    hub.make_repo("alice/m")
    content = b"x" * 1000
    oid = hashlib.sha256(content).hexdigest()
    line = {"key": "lfsFile", "value": {"path": "w", "oid": oid, "size": len(content)}}
    assert commit(hub, HEADER, line)[0] == 400
    assert ask(hub.storage_url, "PUT", f"/lfs/{oid}", b"other")[0] == 400
    assert ask(hub.storage_url, "PUT", f"/lfs/{oid}", content)[0] == 200
    assert commit(hub, HEADER, line)[0] == 200


@pytest.mark.parametrize(
    ("fault", "expected"),
    [(Status(503), (503, None)), (Answer(b"page", "text/html"), (200, b"page")), (Headers({"X": "1"}), (200, None))],
)
def test_faults_skip_and_end(hub, fault, expected):
    hub.make_repo("alice/m", {"a": b"1"})
    hub.fault("GET /api/models/alice/m", fault, skip=1, times=1)
    answers = [ask(hub.url, "GET", "/api/models/alice/m") for _ in range(3)]
    assert [status for status, *_ in answers] == [200, expected[0], 200]
    assert expected[1] in (None, answers[1][2])
    assert answers[1] != answers[0] == answers[2] or isinstance(fault, Headers)


def test_connections_that_break(hub):
    hub.make_repo("alice/m", {"a": b"content"})
    hub.fault("GET .*/resolve/", Corrupt(0))
    assert ask(hub.url, "GET", "/alice/m/resolve/main/a")[2] == b"bontent"
    hub.fault("GET .*/resolve/", Cut(3))
    with pytest.raises(http.client.IncompleteRead) as error:
        ask(hub.url, "GET", "/alice/m/resolve/main/a")
    assert error.value.partial == b"con"
    hub.go_down_after(10)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(hub.url, "GET", "/alice/m/resolve/main/a")
    with pytest.raises(Gone):
        hub.meter(1)
    hub.come_up()
    assert ask(hub.url, "GET", "/alice/m/resolve/main/a")[2] == b"content"
