"""Names: what is a revision, what may travel, and which files of a dense repository a checkpoint needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bsa_export.converted.names import SAFE_NAME, is_runnable, of_conversion, of_people
from bsa_export.hub.names import LARGEST_HEAD, of_checkpoint, parse_repo


@pytest.mark.parametrize("revision", ["main", "v1.0", "feature/long-4096", "refs/pr/1", "0" * 40])
def test_revisions(revision):
    assert parse_repo(f"org/name@{revision}") == ("org/name", revision)


@pytest.mark.parametrize(
    "revision", ["../../x", "/x", "a/../b", ".x", "a/.b", "a//b", "x\\y", "a\0b", "x.lock", "a b", "-x", "x/"]
)
def test_what_is_no_revision(revision):
    assert parse_repo(f"org/name@{revision}") is None


@pytest.mark.parametrize(
    "name", ["config.json", "1_Pooling/config.json", "2_Head/a/b/c/d/e/x y (1).json", "größe.txt", "_x/a+b=c@d,e.txt"]
)
def test_safe_names(name):
    assert SAFE_NAME.fullmatch(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/x",
        "../x",
        "a/../x",
        "a/./x",
        ".x",
        "a/.x",
        "a//x",
        "a\\x",
        "*.json",
        "[a]",
        "a\nb",
        "x/",
        "a" * 300,
        "/".join("abcdefghijkl"),
    ],
)
def test_names_that_do_not_travel(name):
    assert not SAFE_NAME.fullmatch(name)


def test_code_and_pickles_are_runnable():
    assert all(map(is_runnable, ["x.py", "a/b.PKL", "pytorch_model.bin", "x.pt", "a.h5", "a.npz"]))
    assert not any(map(is_runnable, ["x.json", "model.safetensors", "vocab.txt", "README.md"]))


def test_what_belongs_to_whom():
    recorded = {"vocab.txt", "2_Head/a/weights.json"}
    assert all(of_conversion(name, recorded) for name in (*recorded, "config.json", "conversion.json"))
    assert not of_conversion("tokenizer.json", recorded)
    assert all(map(of_people, ["README.md", "LICENSE", "NOTICE.txt", "a.png"]))
    assert not any(map(of_people, ["a/README.md", ".png", "x.json"]))


FILES = {
    "model.safetensors": 500 << 20, "pytorch_model.bin": 500 << 20, "tf_model.h5": 500 << 20, "config.json": 1,
    "modules.json": 1, "vocab.txt": 1, "README.md": 1, "LICENSE": 1, "run.py": 1, "training_args.bin": 1, "notes.md": 1,
    "colbert_linear.pt": 2 << 20, "another.bin": LARGEST_HEAD + 1, "onnx/model.onnx": 500 << 20,
    "1_Pooling/config.json": 1, "2_Own/config.json": 1, "2_Own/inner/deep/model.safetensors": 1,
    "2_Own/inner/deep/pytorch_model.bin": 1, "2_Own/inner/pytorch_model.bin": 1, "2_Own/code.py": 1,
    "2_Own/model.onnx": 1,
    "Other/config.json": 1,
}  # fmt: skip


def test_what_a_dense_checkpoint_needs():
    assert of_checkpoint(FILES, ["", "1_Pooling", "2_Own"]) == sorted(
        ["model.safetensors", "config.json", "modules.json", "vocab.txt", "README.md", "LICENSE", "colbert_linear.pt"]
        + [
            "1_Pooling/config.json",
            "2_Own/config.json",
            "2_Own/inner/deep/model.safetensors",
            "2_Own/inner/pytorch_model.bin",
        ]
    )


def test_modules_at_any_depth_are_fetched(hub, tmp_path):
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "own"}, {"idx": 2, "path": "../up"}, {"idx": 3}, 7]
    files = {"config.json": b"{}", "model.safetensors": b"x", "modules.json": json.dumps(modules).encode()}
    files |= {"own/a/b/c/weights.json": b"{}", "own/x.txt": b"1", "elsewhere/x.txt": b"1"}
    hub.make_repo("alice/dense", files)
    program = "from bsa_export import hub; print(hub.fetch('alice/dense').folder)"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == files.keys() - {"elsewhere/x.txt"}
