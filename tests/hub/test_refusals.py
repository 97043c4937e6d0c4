"""What the Hub or the network refuses: one sentence with the next step, exit 1, nothing changed, never the token."""

import errno
import re
import socket

import pytest
from commands import Commands
from hub_faults import First, Redirect, Status
from hub_folders import digests
from hub_server import OTHER, READER, WRITER, HubServer

from bsa_export.hub.errors import sentence

TOKEN = re.compile(r"hf_\w+_\w+")


def push(bsa, folder, *options, repo="alice/model", **kwargs):
    return bsa.run("push", folder, repo, "--yes", *options, **kwargs)


def pull(bsa, folder, repo="alice/model", **kwargs):
    return bsa.run("pull", repo, folder, **kwargs)


def refused(ended, *parts) -> None:
    assert ended.code == 1, ended
    line = ended.err.splitlines()[-1]
    assert line.startswith("Error: ")
    for part in parts:
        assert part in line
    assert "Traceback" not in ended.err
    assert not TOKEN.search(ended.out + ended.err)


@pytest.fixture
def published(bsa, hub, model):
    assert push(bsa, model).code == 0
    return model


def test_no_token(bsa_lfs, hub, model):
    ended = push(bsa_lfs, model, env={"HF_TOKEN": None})
    refused(ended, "pushing needs a token of the Hub, and none is set; run hf auth login, or set HF_TOKEN", hub.url)
    assert not hub.log


@pytest.mark.parametrize("token", ["hf_alice_writes hf_alice_writes", "hf_alice_wrïtes", "hf_alice\twrites"])
def test_a_token_that_no_header_can_carry(bsa_lfs, hub, model, tmp_path, token):
    """The HTTP clients would refuse it, and show it."""
    for ended in (
        push(bsa_lfs, model, env={"HF_TOKEN": token}),
        pull(bsa_lfs, tmp_path / "out", env={"HF_TOKEN": token}),
    ):
        refused(ended, "the token of the Hub holds a character that no token has")
        assert token not in ended.err
    assert not hub.log


def test_a_token_that_was_revoked(bsa_lfs, hub, model, tmp_path):
    hub.make_repo("alice/model")
    refused(
        push(bsa_lfs, model, env={"HF_TOKEN": "hf_gone_away"}), "the Hub does not accept this token", "/settings/tokens"
    )
    refused(pull(bsa_lfs, tmp_path / "out", env={"HF_TOKEN": "hf_gone_away"}), "the Hub does not accept this token")


def test_a_token_that_may_only_read(bsa_lfs, hub, model):
    refused(
        push(bsa_lfs, model, env={"HF_TOKEN": READER}), "the token of alice may only read; make one with write access"
    )
    assert not hub.repos


@pytest.mark.parametrize("repo", ["bob/model", "library/model"], ids=["another user", "an organisation that one reads"])
def test_a_foreign_namespace(bsa_lfs, hub, model, repo):
    ended = push(bsa_lfs, model, repo=repo)
    refused(ended, f"{repo}: alice may not write in the namespace", "only in alice, alices-lab; push to alice/model")
    assert not hub.repos


@pytest.mark.parametrize("endpoint", ["POST /api/repos/create", "POST .*/preupload/", "POST .*/commit/"])
def test_a_fine_grained_token_without_the_right(bsa, hub, model, endpoint):
    """What such a token may do is only known when it is refused."""
    hub.fault(endpoint, Status(403, "you lack the scope repo.write on alice/model"), times=9)
    before = digests(model)
    ended = push(bsa, model)
    refused(
        ended,
        "alice/model: this token may not write there (you lack the scope repo.write on alice/model); give it write",
    )
    assert digests(model) == before


def test_a_server_that_repeats_the_token(bsa_lfs, hub, model):
    hub.fault("POST .*/commit/", Status(403, f"token {WRITER} lacks the scope"))
    refused(push(bsa_lfs, model), "(token ... lacks the scope)")


@pytest.mark.parametrize("padding", [0, 270, 285])
def test_tokens_of_other_kinds_in_long_answers(bsa_lfs, hub, model, padding):
    """The whole of a token, of this user or another, also where the words are cut."""
    hub.users["hf_oauth_alice.writes-it"] = hub.users[WRITER]
    said = "x" * padding + " hf_oauth_bob.reads-more and hf_oauth_alice.writes-it"
    hub.fault("POST .*/commit/", Status(403, said))
    ended = push(bsa_lfs, model, env={"HF_TOKEN": "hf_oauth_alice.writes-it"})
    assert ended.code == 1 and "this token may not write there (" in ended.err
    assert not re.search(r"hf_|reads-more|writes-it", ended.err)


def test_a_token_that_begins_otherwise(bsa_lfs, hub, model):
    hub.users["api_org_hf_x.y"] = hub.users[WRITER]
    hub.fault("POST .*/commit/", Status(403, "no: api_org_hf_x.y"))
    assert "there (no: ...);" in push(bsa_lfs, model, env={"HF_TOKEN": "api_org_hf_x.y"}).err


def test_a_password_in_the_address_of_the_hub(model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://bob:secret@hub.example")
    told = str(sentence(ConnectionError("refused"), "alice/model", "main", pushing=True))
    assert "https://hub.example cannot be reached" in told and "secret" not in told
    env = {"HF_ENDPOINT": "http://bob:secret@hub.invalid", "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "home")}
    with Commands(**env) as bsa:
        ended = push(bsa, model)
    assert ended.code == 1 and "secret" not in ended.err


def test_no_room_left(bsa, hub, model):
    message = (
        "Private repository storage limit reached, please upgrade your plan to increase your private storage limit."
    )
    for endpoint in ("xet-write-token|objects/batch", "POST .*/commit/"):
        hub.come_up()
        hub.fault(endpoint, Status(403, message), times=9)
        refused(push(bsa, model), "alice/model: the Hub has no storage left", "see what fills alice's storage at")


def test_no_such_repository(bsa_lfs, hub, tmp_path):
    refused(
        pull(bsa_lfs, tmp_path / "out"),
        "alice/model: there is no such repository that this token may see",
    )
    refused(
        pull(bsa_lfs, tmp_path / "out", env={"HF_TOKEN": None}),
        "alice/model: there is no such repository, or it is private and no token is set",
    )
    assert not list(tmp_path.iterdir())


def test_a_private_repository_of_others(bsa, hub, published, tmp_path):
    hub.repos["alice/model"].private = True
    refused(
        pull(bsa, tmp_path / "out", env={"HF_TOKEN": OTHER}),
        "no such repository that this token may see",
        "give you access",
    )
    refused(pull(bsa, tmp_path / "out", env={"HF_TOKEN": None}), "it is private and no token is set")
    assert pull(bsa, tmp_path / "out", env={"HF_TOKEN": READER}).code == 0


def test_a_pull_request_to_no_repository(bsa_lfs, hub, model):
    refused(
        push(bsa_lfs, model, "--create-pr", repo="bob/model"), "bob/model: there is no such repository to open a pull"
    )


def test_a_gated_repository(bsa, hub, published, tmp_path):
    hub.repos["alice/model"].gated = True
    for token in (OTHER, None):
        ended = pull(bsa, tmp_path / "out", env={"HF_TOKEN": token})
        refused(ended, "alice/model: it is gated: its owners decide who may read it; ask for access at", "/alice/model")
    assert not (tmp_path / "out").exists()


def test_a_disabled_repository(bsa_lfs, hub, tmp_path):
    hub.make_repo("alice/model")
    hub.fault("GET /api/models", Status(403, "Access to this resource is disabled."))
    refused(pull(bsa_lfs, tmp_path / "out"), "alice/model: the Hub has disabled it")


def test_no_such_revision(bsa, hub, published, tmp_path):
    ended = pull(bsa, tmp_path / "out", repo="alice/model@v2")
    refused(ended, "alice/model: it has no revision v2")


def test_a_branch_that_goes_away_meanwhile(bsa, hub, model):
    repo = hub.make_repo("alice/model")
    repo.refs["refs/heads/dev"] = repo.head.id
    hub.fault("POST .*/commit/dev", First(lambda: repo.refs.pop("refs/heads/dev")))
    refused(push(bsa, model, "--revision", "dev"), "alice/model: it has no revision dev")


def test_a_repository_that_was_renamed(bsa_lfs, hub, model):
    hub.make_repo("alice/renamed")
    hub.fault("GET /api/models/alice/model", Redirect("/api/models/alice/renamed"), times=9)
    refused(push(bsa_lfs, model), "alice/model: it is called alice/renamed now; push there")


def test_somebody_else_commits_meanwhile(bsa, hub, model):
    repo = hub.make_repo("alice/model")
    other = {"other.txt": hub.stored(b"theirs")}
    hub.fault("POST .*/commit/", First(lambda: repo.commit("refs/heads/main", repo.head.files | other, "theirs")))
    before = digests(model)
    refused(
        push(bsa, model),
        "alice/model: somebody else committed to main in the meantime; look at",
        "/commits/main, then push again",
    )
    assert (repo.head.title, digests(model)) == ("theirs", before)
    assert push(bsa, model).code == 0
    assert {"other.txt", "model.safetensors"} <= repo.head.files.keys()


def test_somebody_else_makes_it_public_meanwhile(bsa_lfs, hub, model):
    hub.fault("POST /api/repos/create", First(lambda: hub.make_repo("alice/model", private=False)))
    refused(push(bsa_lfs, model, "--private"), "alice/model: it was made by somebody else meanwhile, and is public")
    assert "model.safetensors" not in hub.repos["alice/model"].head.files


def test_too_many_requests(bsa, hub, model):
    hub.fault(".", Status(429, "slow down"), skip=4, times=10**6)
    refused(push(bsa, model), "the Hub asks for fewer requests; wait some minutes")


@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_hub_in_trouble(bsa, hub, published, tmp_path, command):
    hub.fault(".", Status(503), times=10**6)
    ended = push(bsa, published) if command == "push" else pull(bsa, tmp_path / "out")
    refused(ended, "alice/model: the Hub has a problem (HTTP 503); wait, then run the same command again")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("xet", ["0", "1"])
def test_no_network(hub, model, tmp_path, xet):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        home = str(tmp_path / "home")
        with Commands(HF_ENDPOINT=url, HF_TOKEN=WRITER, HF_HOME=home, HF_HUB_DISABLE_XET=xet) as bsa:
            for ended in (push(bsa, model), pull(bsa, tmp_path / "out")):
                refused(
                    ended,
                    f"alice/model: {url} cannot be reached, or the connection broke (Connection refused)",
                )
    assert not (tmp_path / "out").exists()


def test_no_such_host(model, tmp_path):
    env = {"HF_ENDPOINT": "http://hub.invalid", "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "home")}
    with Commands(**env) as bsa:
        refused(push(bsa, model), "alice/model: http://hub.invalid cannot be reached, or the connection broke (")


def test_a_proxy_that_is_not_there(hub, model, tmp_path):
    """Proxies are taken from the environment, as huggingface_hub does."""
    proxy = {"http_proxy": "http://user:pass@127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    with Commands(HF_ENDPOINT="http://hub.example", HF_TOKEN=WRITER, HF_HOME=str(tmp_path / "home"), **proxy) as bsa:
        ended = push(bsa, model)
    refused(ended, "cannot be reached, or the connection broke (")
    assert "pass" not in ended.err


def test_offline(hub, model, tmp_path):
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    with Commands(**env) as bsa:
        refused(push(bsa, model), "nothing can be pushed while HF_HUB_OFFLINE is set; unset it")
        refused(
            pull(bsa, tmp_path / "out"), "alice/model@main: it is not in the cache, and HF_HUB_OFFLINE is set; unset it"
        )
    assert not hub.log


def test_a_stored_login(hub, model, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(WRITER)
    with Commands(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home")) as bsa:
        assert push(bsa, model).code == 0


@pytest.mark.parametrize(
    "what", ["GET /alice/model/resolve/", "/api/models/alice/model/tree/"], ids=["files", "the API"]
)
def test_the_token_reaches_no_other_origin(bsa, hub, published, tmp_path, what):
    with HubServer(tmp_path / "elsewhere", host="127.0.0.3") as elsewhere:
        hub.fault(what, Redirect(f"{elsewhere.url}/stolen"), times=10**6)
        assert pull(bsa, tmp_path / "out").code == 1
        assert elsewhere.log
        assert {token for _, _, token, _ in elsewhere.log} == {None}
    hub.come_up()
    assert pull(bsa, tmp_path / "out").code == 0
    seen = {(origin, token) for origin, _, token, _ in hub.log}
    assert {token for origin, token in seen if origin == "hub"} == {WRITER}
    storage = {token for origin, token in seen if origin == "storage"}
    assert storage and storage <= {None, "xet-read", "xet-write"}


def test_a_cache_that_cannot_be_written(hub, model, tmp_path):
    hub.make_repo("alice/model", {name: (model / name).read_bytes() for name in digests(model)})
    (tmp_path / "cache").write_text("a file")
    with Commands(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_CACHE=str(tmp_path / "cache")) as bsa:
        refused(pull(bsa, tmp_path / "out"), "it cannot be read or written (Not a directory)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/cache/blobs"),
            "/cache/blobs: it cannot be read or written",
        ),
        (ValueError("a bug"), None),
    ],
)
def test_errors_of_the_disk(error, message):
    told = sentence(error, "alice/model", "main", pushing=False)
    assert told is None if message is None else message in str(told)
