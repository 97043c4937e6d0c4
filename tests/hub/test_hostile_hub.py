"""A Hub with false answers: the token stays with the endpoint, nothing is endless, a wrong answer is one sentence."""

import json
import time

import pytest
from hub_faults import Answer, Endless, Headers, Status
from hub_folders import digests
from hub_server import WRITER, HubServer

pytestmark = pytest.mark.slow


@pytest.fixture
def elsewhere(tmp_path):
    """Another origin, which notes each request that it gets."""
    with HubServer(tmp_path / "elsewhere") as server:
        yield server


def pull(bsa, tmp_path):
    ended = bsa.run("pull", "alice/model", tmp_path / "out")
    assert "Traceback" not in ended.err, ended.err
    assert not (tmp_path / "out").exists() or ended.code == 0
    return ended


@pytest.fixture
def published(hub, finished):
    """The model in a repository of the Hub."""
    files = {path.relative_to(finished).as_posix(): path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    return hub.make_repo("alice/model", files)


def leaked(server: HubServer) -> list:
    return [request for _, request, token, _ in server.log if token]


@pytest.mark.parametrize("request_", ["GET /api/models/alice/model/tree", "HEAD .*safetensors"])
@pytest.mark.parametrize("relation", ["next", "xet-auth"])
def test_the_token_stays_with_the_endpoint(bsa, hub, published, elsewhere, tmp_path, request_, relation):
    link = {"Link": f'<{elsewhere.url}/api/models/alice/model/tree/x>; rel="{relation}"', "X-Xet-Hash": "ab" * 32}
    hub.fault(request_, Headers(link), times=99)
    assert pull(bsa, tmp_path).code == 1 or not elsewhere.log
    assert not leaked(elsewhere)


def test_the_token_stays_when_storage_is_elsewhere(bsa_lfs, hub, published, elsewhere, tmp_path):
    hub.fault("HEAD .*safetensors", Headers({"Location": f"{elsewhere.url}/lfs/x"}), times=99)
    assert pull(bsa_lfs, tmp_path).code == 1
    assert elsewhere.log and not leaked(elsewhere)


def test_endless_pages(bsa_lfs, hub, published, tmp_path):
    page = f'<{hub.url}/api/models/alice/model/tree/main?recursive=True&cursor=x>; rel="next"'
    hub.fault("GET /api/models/alice/model/tree", Headers({"Link": page}), times=1_000_000)
    ended = pull(bsa_lfs, tmp_path)
    assert ended.code == 1 and "does not end" in ended.err
    assert len(hub.log) < 2000


@pytest.mark.parametrize(
    "request_", ["GET /api/models/alice/model/revision", "GET /api/models/alice/model/tree", "GET .*config.json"]
)
def test_endless_answers(bsa_lfs, hub, published, tmp_path, request_):
    hub.fault(request_, Endless(headers={"ETag": '"x"'}), times=99)
    before = hub.traffic
    started = time.monotonic()
    assert pull(bsa_lfs, tmp_path).code == 1
    assert hub.traffic - before < 400 << 20 and time.monotonic() - started < 60


@pytest.mark.parametrize("size", ["99999999999999", "151537"])
def test_a_file_larger_than_listed(bsa, hub, published, tmp_path, size):
    hub.fault("HEAD .*safetensors", Headers({"X-Linked-Size": size}), times=99)
    ended = pull(bsa, tmp_path)
    assert ended.code == 1 or digests(tmp_path / "out")


@pytest.mark.parametrize("header", [{"RateLimit": '"api";r=0;t=99999'}, {"Retry-After": "99999"}])
def test_waits_have_an_end(bsa_lfs, hub, published, tmp_path, header):
    hub.fault(".", Answer(b"{}", code=429, headers=header), times=999)
    started = time.monotonic()
    ended = pull(bsa_lfs, tmp_path)
    assert ended.code == 1 and "fewer requests" in ended.err
    assert time.monotonic() - started < 60


PORTAL = Answer(b"<html><body>Log in to the network</body></html>", "text/html; charset=utf-8")
STRANGE = [
    b"",
    b"[]",
    b"{}",
    b"null",
    b"7",
    b'"text"',
    b'{"sha": null}',
    b'{"id": 7, "sha": "../../x"}',
    b"[1]",
    b'[{"type": "file"}]',
]
STRANGE += [
    b'[{"type": "file", "path": "config.json", "oid": 5, "size": "x"}]',
    b'{"name": []}',
    b"\xff\xfe",
    b"[" * 100_000,
]


@pytest.mark.parametrize(
    "request_", ["/api/models/alice/model/revision", "/api/models/alice/model/tree", "HEAD ", "GET /alice"]
)
def test_a_login_page_instead_of_an_answer(bsa_lfs, hub, published, tmp_path, request_):
    hub.fault(request_, PORTAL, times=99)
    ended = pull(bsa_lfs, tmp_path)
    assert ended.code == 1 and ended.err.startswith("Error: ") and ended.err.count("\n") == 1


PULLING = ("/api/models/alice/model/revision", "/api/models/alice/model/tree")
PUSHING = ("whoami", "POST .*/preupload/", "POST .*/commit/")
CASES = [(request, content) for request in PULLING for content in STRANGE]
CASES += [(request, content) for request in PUSHING for content in (b"", b"[]", b"{}")]


@pytest.mark.parametrize(
    ("request_", "content"), CASES, ids=[f"{request[-9:]} {content[:9]}" for request, content in CASES]
)
def test_answers_that_are_none(bsa_lfs, hub, published, model, tmp_path, request_, content):
    hub.fault(request_, Answer(content), times=99)
    command = (
        ("pull", "alice/model", tmp_path / "out") if request_ in PULLING else ("push", model, "alice/new", "--yes")
    )
    ended = bsa_lfs.run(*command)
    assert ended.code == 1
    assert ended.err.startswith("Error: ") and ended.err.count("\n") == 1, ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("revision", ["../../x", "/x", "a/../b", ".x", "refs/../../x", "x\\..\\y"])
def test_a_revision_is_a_name(bsa_lfs, hub, published, tmp_path, revision):
    ended = bsa_lfs.run("pull", f"alice/model@{revision}", tmp_path / "out")
    assert ended.code == 2 and not hub.log


@pytest.mark.parametrize(
    "record", [b"[]", b"{}", b"{", b'{"files": 7}', b'{"files": {"../x": {"bytes": 1}}}', b"\xff"], ids=repr
)
def test_a_strange_conversion_record(bsa_lfs, hub, published, tmp_path, record):
    hub.make_repo("alice/model", {"conversion.json": record, "config.json": b"{}"})
    ended = pull(bsa_lfs, tmp_path)
    assert ended.code == 1 and "conversion.json" in ended.err and str(tmp_path) not in ended.err


@pytest.mark.parametrize("name", ["x.py", "pytorch_model.bin", "a.pkl", ".hidden"])
def test_a_record_that_asks_for_code(bsa_lfs, hub, published, finished, tmp_path, name):
    record = json.loads((finished / "conversion.json").read_text())
    record["files"][name] = {"bytes": 1}
    files = {path.name: path.read_bytes() for path in finished.iterdir()}
    hub.make_repo("alice/model", files | {name: b"x", "conversion.json": json.dumps(record).encode()})
    ended = pull(bsa_lfs, tmp_path)
    assert ended.code == 1 and name in ended.err


def test_a_refusal_of_odd_shape(bsa_lfs, hub, model):
    for content in (b"[1, 2]", b"<html>", b'{"errors": [7]}', b'{"error": "hf_' + b"x" * 100_000 + b'"}'):
        hub.fault("POST /api/validate-yaml", Answer(content, code=400))
        ended = bsa_lfs.run("push", model, "alice/model", "--yes")
        assert ended.code == 1 and len(ended.err) < 3000 and WRITER not in ended.err and "Traceback" not in ended.err


def test_a_server_error_page(bsa_lfs, hub, published, tmp_path):
    hub.fault("/api/models", Status(418, "a teapot\x1b[31m\nError: forged"), times=99)
    ended = pull(bsa_lfs, tmp_path)
    assert ended.code == 1 and "\x1b" not in ended.err and ended.err.count("\n") == 1
