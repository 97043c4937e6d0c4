"""What a user types as a source: places on the Hub, mistyped paths, repositories without readable weights."""

import json
from pathlib import Path

import pytest

from bsa_export.errors import CheckpointError
from bsa_export.hub.source import HubPath, find_source, parse_hub_path


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("bert-base-uncased", HubPath("bert-base-uncased")),
        ("bert-base-uncased@v1", HubPath("bert-base-uncased", "v1")),
        ("org/name", HubPath("org/name")),
        ("org/name@refs/pr/1", HubPath("org/name", "refs/pr/1")),
        ("org/name/sub/folder@v1", HubPath("org/name", "v1", "sub/folder")),
        ("https://huggingface.co/org/name", HubPath("org/name")),
        ("https://huggingface.co/bert-base-uncased/", HubPath("bert-base-uncased")),
        ("https://huggingface.co/org/name/tree/v1", HubPath("org/name", "v1")),
        ("https://huggingface.co/org/name/tree/main/sub?x=1", HubPath("org/name", "main", "sub")),
        ("https://hf.co/org/name/blob/main/sub/w.bin", HubPath("org/name", "main", "sub/w.bin")),
        ("huggingface.co/org/name", HubPath("org/name")),
        *(
            (text, None)
            for text in ("", "w.bin", "org/name@", "org/../name", "org/name/../x", "org//name", "org/name/.git",
             "a b/c",
                         "https://example.com/org/name", "org/name@../x", "/org/name", "model.safetensors")
        ),
    ],
)  # fmt: skip
def test_places_on_the_hub(text, place):
    assert parse_hub_path(text) == place


@pytest.mark.parametrize(
    ("text", "near"),
    [("modle", "model"), ("./modle", "model"), ("runs/best_modle", "best_model"), ("runs/x/best", None), ("/nowhere",
     None)],
)  # fmt: skip
def test_a_mistyped_path_says_what_is_near(tmp_path, monkeypatch, text, near):
    (tmp_path / "model").mkdir()
    (tmp_path / "runs" / "best_model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if text == "runs/best_modle":  # a repository as well
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Exception, match="no such file or folder") as caught:
        find_source(text)
    assert (near is None and "did you mean" not in str(caught.value)) or near in str(caught.value)
    assert isinstance(caught.value, CheckpointError) or text == "runs/best_modle"


def files(folder: Path, into: str = "") -> dict[str, bytes]:
    return {f"{into}{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_and_a_file_of_a_repository_are_converted(bsa_lfs, hub, finished, tmp_path):
    dense = finished.parent / "dense"
    odd = files(dense)
    odd["epoch=3-step=100.ckpt"] = odd.pop("model.safetensors")
    hub.make_repo("alice/runs", files(dense, "best/") | odd | {"notes/x.txt": b"x"})
    whole = bsa_lfs.run("convert", dense, tmp_path / "whole")
    assert whole.code == 0, whole.err
    for number, text in enumerate(("alice/runs/best", "alice/runs", "alice/runs/best/model.safetensors@main")):
        ended = bsa_lfs.run("convert", text, tmp_path / f"out{number}")
        assert ended.code == 0, ended.err
        made, expected = tmp_path / f"out{number}" / "model.safetensors", tmp_path / "whole" / "model.safetensors"
        assert made.read_bytes() == expected.read_bytes()
        record = json.loads((tmp_path / f"out{number}" / "conversion.json").read_text())
        assert record["source"]["repo"] == "alice/runs" and (tmp_path / f"out{number}" / "vocab.txt").is_file()


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"tf_model.h5": b"x"}, "from_tf=True"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "merge_and_unload"),
        ({"onnx/model.onnx": b"x"}, "ONNX"),
        ({"sub/pytorch_model.bin": b"x"}, "alice/runs/sub/pytorch_model.bin"),
        ({"notes.txt": b"x"}, "notes.txt"),
    ],
)
def test_a_repository_without_weights_says_what_it_holds(bsa_lfs, hub, tmp_path, held, words):
    hub.make_repo("alice/runs", held | {"config.json": b"{}"})
    ended = bsa_lfs.run("convert", "alice/runs", tmp_path / "out")
    assert ended.code == 1 and words in ended.err and ended.err.count("\n") == 1, ended.err


def test_errors_name_the_repository_and_not_the_cache(bsa_lfs, hub, finished, tmp_path):
    broken = files(finished.parent / "dense") | {"config.json": b'{"model_type": "gpt2"}'}
    hub.make_repo("alice/gpt", broken)
    hub.make_repo("alice/cut", broken | {"model.safetensors": b"{}", "config.json": b"{"})
    for repo in ("alice/gpt", "alice/cut"):
        ended = bsa_lfs.run("convert", repo, tmp_path / "out")
        assert ended.code == 1 and "snapshots" not in ended.err, ended.err
