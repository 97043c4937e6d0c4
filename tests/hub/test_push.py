"""What bsa-push puts on the Hub, what it leaves out, refuses, replaces and keeps."""

import contextlib
import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
import textwrap

import pytest
from hub_faults import Status
from hub_folders import converted, digests, forget_file, mark_verified, record_file
from hub_server import READER, WRITER

from bsa_export.converted import card as model_card


def on_hub(hub, repo_id="alice/model", revision="main") -> dict[str, bytes]:
    """The files of a repository, less what the Hub itself put there."""
    files = hub.repos[repo_id].at(revision).files
    return {path: hub.content(file) for path, file in files.items() if path != ".gitattributes"}


def in_folder(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in digests(folder)}


def push(bsa, folder, *options, repo="alice/model", **kwargs):
    return bsa.run("push", folder, repo, "--yes", *options, **kwargs)


def test_everything_arrives_in_one_commit(bsa, hub, model):
    ended = push(bsa, model, "--message", "A longer BERT")
    assert (ended.code, ended.err) == (0, "")
    assert on_hub(hub) == in_folder(model)
    repo = hub.repos["alice/model"]
    assert (repo.head.title, len(repo.commits)) == ("A longer BERT", 2)
    assert f"Pushed to {hub.url}/alice/model\n" in ended.out
    assert f"commit  {repo.head.id}\n" in ended.out
    assert ended.out.endswith('load    bsa_export.load("alice/model")\n')


def test_shards_arrive(bsa, hub, sharded):
    assert push(bsa, sharded).code == 0
    assert on_hub(hub) == in_folder(sharded)
    assert sum(name.endswith(".safetensors") for name in on_hub(hub)) > 2


def test_large_files_in_parts(bsa_lfs, hub, model):
    hub.multipart = 10_000
    assert push(bsa_lfs, model).code == 0
    assert on_hub(hub) == in_folder(model)


def test_pushing_twice_changes_nothing(bsa, hub, model):
    first = push(bsa, model)
    before = hub.repos["alice/model"].head.id
    second = push(bsa, model)
    assert second.code == first.code == 0
    assert hub.repos["alice/model"].head.id == before
    assert "0 files, 0 bytes to upload." in second.out
    assert f"Already up to date: {hub.url}/alice/model" in second.out


def test_only_what_changed_goes_up(bsa, hub, model):
    push(bsa, model)
    (model / "vocab.txt").write_text("another\n")
    mark_verified(model)
    hub.log.clear()
    ended = push(bsa, model)
    assert ended.code == 0
    assert on_hub(hub) == in_folder(model)
    sent = [path for origin, path, *_ in hub.log if origin == "storage" and path.startswith(("PUT", "POST"))]
    assert not [path for path in sent if path != "POST /v1/telemetry"]  # hf_xet's own, at its own times


def test_the_plan_is_shown_first(bsa_lfs, hub, model):
    (model / "training_args.bin").write_bytes(b"x")
    shown = bsa_lfs.run("push", model, "alice/model", "--dry-run", "--private")
    assert shown.code == 0
    assert shown.out.startswith("alice/model (private, new), branch main, as alice\n")
    assert f"{(model / 'model.safetensors').stat().st_size:,} bytes\n" in shown.out
    assert "7 files, " in shown.out
    assert "training_args.bin" in shown.out.partition("Left out")[2]
    assert not hub.repos
    others = [request for _, request, *_ in hub.log if not request.startswith(("GET", "HEAD"))]
    assert others == ["POST /api/validate-yaml"]


def test_nobody_to_ask(bsa_lfs, hub, model):
    ended = bsa_lfs.run("push", model, "alice/model")
    assert ended.code == 1
    assert "add --yes" in ended.err
    assert not hub.repos


def test_only_what_belongs_to_the_model_goes_up(bsa_lfs, hub, model):
    extras = [
        "training_args.bin",
        "optimizer.pt",
        "pytorch_model.bin",
        ".env",
        ".git/config",
    ]
    extras += [
        "checkpoint-5/model.safetensors",
        "run.py",
        "pulled.json",
        "model-00001-of-00002.safetensors",
        "events.log",
    ]
    extras += ["tokenizer.json", "1_Pooling/config.json"]  # of a model, but not of this conversion
    belongs = ["LICENSE", "figure.png"]
    for name in [*extras, *belongs]:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"{}")
    ended = push(bsa_lfs, model)
    assert ended.code == 0 and "tokenizer.json" in ended.out.partition("Left out")[2]
    names = set(on_hub(hub))
    assert not names & set(extras)
    assert set(belongs) <= names


def test_recorded_files_travel_at_any_depth(bsa_lfs, hub, model, tmp_path):
    record_file(model, "2_Head/a/b/c/weights of x.json", b"{}")
    mark_verified(model)
    assert push(bsa_lfs, model).code == 0
    assert bsa_lfs.run("pull", "alice/model", tmp_path / "pulled").code == 0
    assert (tmp_path / "pulled/2_Head/a/b/c/weights of x.json").read_bytes() == b"{}"
    shutil.rmtree(model / "2_Head")
    forget_file(model, "2_Head/a/b/c/weights of x.json")
    mark_verified(model)
    assert push(bsa_lfs, model).code == 0  # what the conversion there had and this one has not goes
    assert not [name for name in on_hub(hub) if name.startswith("2_Head")]


@pytest.mark.parametrize("name", ["run.py", "2_Head/pytorch_model.bin", ".hidden/x.json", "a/*.json"])
def test_a_record_cannot_publish_code_or_hidden_files(bsa_lfs, hub, model, name):
    record_file(model, name, b"{}")
    ended = push(bsa_lfs, mark_verified(model))
    assert ended.code == 1 and name in ended.err and not hub.log


# --- what is refused


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "verification.json").unlink(), "bsa-verify has not run on it"),
        (lambda folder: mark_verified(folder, "failed"), "it failed bsa-verify (outputs: torch)"),
        (lambda folder: mark_verified(folder, "incomplete"), "(verdict incomplete)"),
        (lambda folder: (folder / "vocab.txt").write_text("x"), "vocab.txt changed since bsa-verify ran"),
        (lambda folder: (folder / "vocab.txt").unlink(), None),
        (lambda folder: mark_verified(folder, files={}), "bsa-verify did not see its config.json"),
        (lambda folder: (folder / "verification.json").write_text("[]"), "its record of the verification"),
    ],
    ids=["never", "failed", "incomplete", "changed", "gone", "other files", "damaged"],
)  # fmt: skip
def test_what_is_not_verified_is_refused_unless_asked_for(bsa_lfs, hub, model, change, reason):
    change(model)
    before = in_folder(model)
    refused = push(bsa_lfs, model)
    assert (refused.code, hub.repos, in_folder(model)) == (1, {}, before)
    if reason is None:
        assert "expected the files of its conversion.json, found no vocab.txt; convert again" in refused.err
        return
    assert f"Error: {model}: " in refused.err and reason in refused.err
    assert refused.err.endswith(f"run bsa-verify {model}, or push it with --unverified, which its card will say\n")

    taken = push(bsa_lfs, model, "--unverified")
    assert taken.code == 0
    assert "Not verified: " in taken.out and reason in taken.out
    card = on_hub(hub)["README.md"].decode()
    assert "**Not verified.** Published with `--unverified`: " in card and model_card.PASSED_MARK not in card
    assert "verification.json" not in on_hub(hub)


def test_the_card_shows_the_verification(bsa_lfs, hub, model):
    push(bsa_lfs, model)
    card = on_hub(hub)["README.md"].decode()
    assert "`bsa-verify` on cpu: **passed**." in card
    assert "| outputs: torch | passed | error 0.5 x plain PyTorch's, limit 2 |" in card
    assert 'bsa_export.load("alice/model")' in card
    assert model_card.metadata(model / "README.md") == {
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "fill-mask",
        "tags": ["bsa_export", "block-sparse-attention", "long-context", "bert"],
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "conversion.json").unlink(), "found no conversion.json"),
        (lambda folder: (folder / "conversion.json").write_text("{"), "conversion.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "found no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"), "complete?"),
    ],
    ids=["no folder", "no record", "damaged record", "no weights", "damaged weights"],
)  # fmt: skip
def test_what_is_no_finished_conversion_is_refused_even_unverified(bsa_lfs, hub, model, damage, message):
    damage(model)
    ended = push(bsa_lfs, model, "--unverified")
    assert ended.code == 1
    assert message in ended.err and "Traceback" not in ended.err
    assert not hub.repos and not hub.log


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: [", "README.md: expected a mapping in YAML"),
        ("tags: sparse", "README.md: expected a list of texts as tags in its metadata, found 'sparse'"),
        ("pipeline_tag: [a]", "README.md: expected text as pipeline_tag in its metadata, found list"),
    ],
)
def test_a_card_that_the_hub_would_refuse_stops_a_push_before_it_begins(bsa_lfs, hub, model, metadata, message):
    (model / "README.md").write_text(f"---\n{metadata}\n---\n# Mine\n")
    ended = push(bsa_lfs, model)
    assert ended.code == 1
    assert message in ended.err
    assert not hub.log


def test_a_card_that_only_the_hub_refuses_stops_a_push_before_a_repository_is_made(bsa, hub, model):
    hub.fault("POST /api/validate-yaml", Status(400, '"license" must be one of [...]'))
    ended = push(bsa, model)
    assert ended.code == 1
    message = 'README.md: the Hub refuses its metadata ("license" must be one of [...]); edit the lines between'
    assert message in ended.err
    assert not [request for origin, request, *_ in hub.log if origin == "storage"]
    assert not hub.repos


def test_a_hub_that_checks_no_cards(bsa_lfs, hub, model):
    hub.fault("POST /api/validate-yaml", Status(404))
    assert push(bsa_lfs, model).code == 0


def test_a_file_of_the_model_that_the_verification_did_not_see(bsa_lfs, hub, model):
    record_file(model, "tokenizer.json", b"{}")
    files = json.loads((model / "verification.json").read_text())["files"]
    mark_verified(model, files={name: digest for name, digest in digests(model).items() if name in files})
    ended = push(bsa_lfs, model)
    assert ended.code == 1 and "bsa-verify did not see its tokenizer.json" in ended.err


@pytest.mark.parametrize(("section", "command"), [({"mode": "dense"}, "whole again"), (None, "converts a dense BERT")])
def test_a_folder_without_a_record_is_shown_the_command(bsa_lfs, hub, tmp_path, section, command):
    (tmp_path / "trained").mkdir()
    config = {"model_type": "bert"} | ({"sparse_attention": section} if section else {})
    (tmp_path / "trained" / "config.json").write_text(json.dumps(config))
    ended = push(bsa_lfs, tmp_path / "trained")
    assert ended.code == 1 and f"bsa-convert {tmp_path / 'trained'} OUT" in ended.err and command in ended.err


def test_a_verification_that_was_pulled_is_none_of_ones_own(bsa_lfs, hub, model, tmp_path):
    assert push(bsa_lfs, model).code == 0
    assert bsa_lfs.run("pull", "alice/model", tmp_path / "pulled").code == 0
    ended = push(bsa_lfs, tmp_path / "pulled", repo="alice/again")
    reason = "bsa-verify has not run on it here: its verification.json was pulled from alice/model; run bsa-verify"
    assert ended.code == 1 and reason in ended.err
    mark_verified(tmp_path / "pulled", seconds=1.0)
    assert push(bsa_lfs, tmp_path / "pulled", repo="alice/again").code == 0


# --- the card, and files of others


def test_an_edited_card_is_kept(bsa_lfs, hub, model):
    card = "---\nlicense: mit\n---\n# My own words\n"
    (model / "README.md").write_text(card)
    ended = push(bsa_lfs, model)
    assert "The model card is your own and is kept unchanged." in ended.out
    assert on_hub(hub)["README.md"].decode() == (model / "README.md").read_text() == card


def test_a_card_that_was_edited_on_the_hub_is_kept(bsa_lfs, hub, model):
    push(bsa_lfs, model)
    repo = hub.repos["alice/model"]
    edited = hub.stored(on_hub(hub)["README.md"].replace(b"## Limits", b"## What to know"))
    repo.commit("refs/heads/main", repo.head.files | {"README.md": edited}, "Edit")
    local = (model / "README.md").read_text()
    ended = push(bsa_lfs, model)
    assert ended.code == 0 and "kept unchanged" in ended.out
    assert b"## What to know" in on_hub(hub)["README.md"]
    assert (model / "README.md").read_text() == local


def test_the_metadata_that_the_hub_starts_a_card_with_is_no_card(bsa_lfs, hub, model):
    hub.make_repo("alice/model", {"README.md": b"---\nlicense: mit\n---\n"})
    assert push(bsa_lfs, model).code == 0
    assert on_hub(hub) == in_folder(model)


def test_files_of_an_earlier_model_go_and_those_of_people_stay(bsa, hub, model, sharded):
    mine = {"LICENSE": b"mine", "eval/results.json": b"{}", "pytorch_model.bin": b"old", "handler.py": b"pass"}
    repo = hub.make_repo("alice/model", mine)
    assert push(bsa, sharded).code == 0
    ended = push(bsa, model)
    assert ended.code == 0
    assert "model-00001-of-" in ended.out and "removed: file of an earlier model" in ended.out
    assert on_hub(hub) == in_folder(model) | mine
    assert repo is hub.repos["alice/model"]


CLAIM = f"# Mine\n\n`bsa-verify`: **passed**. {model_card.PASSED_MARK}\n"
HONEST = f"---\ntags: [{model_card.UNVERIFIED_TAG}]\n---\n# Mine\n"


@pytest.mark.parametrize(
    ("card", "fact"),
    [
        (CLAIM, "says that bsa-verify passed"),
        (f"{HONEST}{CLAIM}", "says that bsa-verify passed"),
        ("# Mine\n", "the tag unverified"),
        (HONEST, None),
    ],
    ids=["passed", "both", "nothing", "honest"],
)
@pytest.mark.parametrize("place", ["folder", "Hub"])
def test_a_card_of_ones_own_does_not_praise_what_is_not_verified(bsa_lfs, hub, model, card, fact, place):
    mark_verified(model, "failed")
    if place == "folder":
        (model / "README.md").write_text(card)
    else:
        hub.make_repo("alice/model", {"README.md": card.encode()})
    ended = push(bsa_lfs, model, "--unverified")
    if fact is None:
        assert ended.code == 0 and on_hub(hub)["README.md"].decode() == card
        return
    assert ended.code == 1
    assert "README.md: " in ended.err and fact in ended.err and "delete the card" in ended.err
    assert "model.safetensors" not in (on_hub(hub) if hub.repos else {})


# --- where it goes


def test_a_private_repository(bsa_lfs, hub, model):
    assert push(bsa_lfs, model, "--private").code == 0
    assert hub.repos["alice/model"].private
    again = push(bsa_lfs, model)
    assert again.out.startswith("alice/model (private, existing)") and hub.repos["alice/model"].private


def test_a_public_repository_does_not_become_private(bsa_lfs, hub, model):
    hub.make_repo("alice/model")
    ended = push(bsa_lfs, model, "--private")
    assert ended.code == 1
    assert "alice/model: it is public, and a push does not change that; make it private at" in ended.err
    assert on_hub(hub) == {}


def test_a_branch_is_made_from_main(bsa, hub, model):
    hub.make_repo("alice/model", {"notes.txt": b"n"})
    ended = push(bsa, model, "--revision", "longer")
    assert "branch longer (new)" in ended.out
    assert ended.out.endswith('load    bsa_export.load("alice/model@longer")\n')
    assert on_hub(hub, revision="longer") == in_folder(model) | {"notes.txt": b"n"}
    assert on_hub(hub) == {"notes.txt": b"n"}


def test_a_branch_of_a_new_repository(bsa_lfs, hub, model):
    assert push(bsa_lfs, model, "--revision", "longer").code == 0
    assert on_hub(hub, revision="longer") == in_folder(model)
    assert on_hub(hub) == {}


def test_an_organisation(bsa_lfs, hub, model):
    assert push(bsa_lfs, model, repo="alices-lab/model").code == 0
    assert on_hub(hub, "alices-lab/model") == in_folder(model)


def test_a_pull_request_to_a_foreign_repository(bsa, hub, model):
    hub.make_repo("bob/model", {"notes.txt": b"n"})
    ended = push(bsa, model, "--create-pr", repo="bob/model")
    assert (ended.code, ended.err) == (0, "")
    assert f"Pushed to {hub.url}/bob/model/discussions/1\n" in ended.out
    assert ended.out.endswith('load    bsa_export.load("bob/model@refs/pr/1")\n')
    assert on_hub(hub, "bob/model", "refs/pr/1") == in_folder(model) | {"notes.txt": b"n"}
    assert on_hub(hub, "bob/model") == {"notes.txt": b"n"}


@pytest.mark.parametrize("repo", ["model", "a/b/c", "alice/model@dev", "alice/..", "../model", "alice/model.bin"])
def test_what_is_no_repository_is_wrong_usage(bsa_lfs, hub, model, repo):
    ended = push(bsa_lfs, model, repo=repo)
    assert ended.code == 2
    assert ended.err.startswith("Usage: bsa-push")


@pytest.mark.parametrize(
    "branch",
    ["two words", "", "-x", "refs/pr/1", "refs/heads/dev", "a" * 40, "a..b", "a~1", "a:b", "x.lock", "a//b", "a/", "@"],
)
def test_what_is_no_branch_is_wrong_usage(bsa_lfs, hub, model, branch):
    ended = push(bsa_lfs, model, f"--revision={branch}")
    assert ended.code == 2
    assert f"Invalid value for --revision: expected the name of a branch, found {branch!r}" in ended.err
    assert not hub.log


@pytest.mark.parametrize("branch", ["v1.0", "feature/long-4096", "abc1234"])
def test_names_of_branches(bsa_lfs, hub, model, branch):
    assert push(bsa_lfs, model, "--revision", branch, "--dry-run").code == 0


def test_a_read_only_folder(bsa_lfs, hub, model):
    for path in model.iterdir():
        path.chmod(0o444)
    assert push(bsa_lfs, model).code == 0
    assert set(on_hub(hub)) == set(in_folder(model))


def test_a_file_system_that_is_read_only(hub, model, tmp_path):
    program = """
        import errno, os, pathlib
        def refuse(self, data):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        pathlib.Path.write_bytes = refuse
        from bsa_export.cli.push import main
        main()
    """
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", textwrap.dedent(program), str(model), "alice/model", "--yes"]
    before = (model / "README.md").read_bytes()
    ended = subprocess.run(command, env=env | {"HF_HUB_DISABLE_XET": "1"}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith('load    bsa_export.load("alice/model")\n')
    assert ended.stderr.startswith(f"Warning: {model}: ") and "Read-only file system" in ended.stderr
    assert (model / "README.md").read_bytes() == before != on_hub(hub)["README.md"]


def test_the_records_are_those_of_the_conversion(bsa_lfs, hub, model, finished):
    push(bsa_lfs, model)
    assert json.loads(on_hub(hub)["conversion.json"]) == json.loads((finished / "conversion.json").read_text())


def test_who_may_only_read_can_propose(bsa_lfs, hub, model):
    """A token that may only read is refused with that reason, though the Hub lets it open pull requests."""
    ended = push(bsa_lfs, model, env={"HF_TOKEN": READER})
    assert "the token of alice may only read" in ended.err


def test_a_conversion_of_a_conversion(bsa_lfs, hub, tmp_path, finished):
    """`converted` here is the real converter, so the whole way is walked once: dense, converted, pushed, compared."""
    folder = mark_verified(converted(finished.parent / "dense", tmp_path / "longer", length=512))
    assert push(bsa_lfs, folder).code == 0
    assert on_hub(hub) == in_folder(folder)


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_person_is_asked_and_shown_progress(hub, model, tmp_path, answer):
    hub.forget_objects()
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", "from bsa_export.cli.push import main; main()", str(model), "alice/model"]
    with subprocess.Popen(command, env=env | {"HF_HUB_DISABLE_XET": "1"}, stdin=end, stdout=end, stderr=end) as process:
        os.close(end)
        os.write(terminal, answer.encode() + b"\n")
        shown = b""
        with contextlib.suppress(OSError):  # the terminal is gone when the process is
            while piece := os.read(terminal, 4096):
                shown += piece
    os.close(terminal)
    assert b"Push this? [y/N]: " in shown
    assert process.returncode == (0 if answer == "y" else 1)
    assert ("alice/model" in hub.repos) == (answer == "y")
    assert (b"100%" in shown) == (answer == "y"), shown
