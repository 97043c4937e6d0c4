"""Folders that change while they are pushed, and pull requests that are there already."""

import os

import pytest
from hub_faults import First
from hub_folders import mark_verified
from test_push import in_folder, on_hub, push


def flip_a_bit(file):
    with open(file, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read()[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))


CHANGED = "it changed while it was being pushed; nothing was published; verify and push again"


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
def test_a_folder_that_changes_before_the_upload(bsa, hub, model, name):
    """Between the plan, which is shown, and the answer of who is asked."""
    hub.fault("GET /api/whoami", First(lambda: flip_a_bit(model / name)))
    ended = push(bsa, model)
    assert ended.code == 1 and f"{name}: {CHANGED}" in ended.err
    assert not hub.repos


@pytest.mark.parametrize("request_", ["preupload/", "xet-write-token|objects/batch", "xorbs|PUT /lfs/"])
def test_weights_that_change_while_they_go_up(bsa, hub, model, request_):
    hub.forget_objects()
    hub.make_repo("alice/model")
    hub.fault(request_, First(lambda: flip_a_bit(model / "model.safetensors")))
    ended = push(bsa, model)
    assert ended.code == 1 and f"model.safetensors: {CHANGED}" in ended.err
    assert on_hub(hub) == {}


def test_a_folder_that_changes_after_it_went_up(bsa, hub, model):
    """What was verified is what is published, whatever becomes of the folder meanwhile."""
    before = (model / "vocab.txt").read_bytes()
    hub.fault("POST .*/commit/", First(lambda: (model / "vocab.txt").write_text("later\n")))
    assert push(bsa, model).code == 0
    assert on_hub(hub)["vocab.txt"] == before


def test_a_pull_request_is_not_opened_twice(bsa, hub, model):
    repo = hub.make_repo("bob/model")
    first = push(bsa, model, "--create-pr", repo="bob/model")
    again = push(bsa, model, "--create-pr", repo="bob/model")
    assert (first.code, again.code) == (0, 0)
    assert list(repo.proposals) == [1]
    assert again.out.startswith("bob/model (public, existing), pull request 1, which is open, as alice\n")
    assert f"Already up to date: {hub.url}/bob/model/discussions/1\n" in again.out
    assert again.out.endswith('load    bsa_export.load("bob/model@refs/pr/1")\n')


def test_another_model_or_a_closed_pull_request_means_a_new_one(bsa_lfs, hub, model):
    repo = hub.make_repo("bob/model")
    push(bsa_lfs, model, "--create-pr", repo="bob/model")
    repo.proposals[1]["status"] = "closed"
    push(bsa_lfs, model, "--create-pr", repo="bob/model")
    (model / "vocab.txt").write_text("another\n")
    mark_verified(model)
    ended = push(bsa_lfs, model, "--create-pr", repo="bob/model")
    assert f"Pushed to {hub.url}/bob/model/discussions/3\n" in ended.out
    assert on_hub(hub, "bob/model", "refs/pr/3") == in_folder(model)
