"""Whatever is wrong with what is given: one sentence, exit 1, nothing written, nothing run. Wrong usage exits 2."""

import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import convert, save, tiny

from bsa_export.checkpoint.safetensors_file import read_safetensors


@pytest.fixture
def source(tmp_path) -> Path:
    return save(tiny("bert"), tmp_path / "source")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def everything(folder: Path) -> dict[str, object]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(tmp_path, *arguments, options=()) -> str:
    """The sentence, after which everything is as it was."""
    before = everything(tmp_path)
    result = convert(*arguments, tmp_path / "out", *options)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == "" and result.stderr.startswith("Error: "), result.output
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 1200
    assert everything(tmp_path) == before
    return result.stderr.removeprefix("Error: ").rstrip("\n")


def as_pickle(source: Path, zipped: bool = True, state=None) -> Path:
    """The folder with a `.bin` instead of its safetensors."""
    state = state or dict(tiny("bert").state_dict())
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return source / "pytorch_model.bin"


def places(path: Path, count: int) -> list[int]:
    """Where to cut a file: its borders, and random places, most of them near its ends."""
    size, draw = path.stat().st_size, random.Random(0)
    near = [draw.randrange(min(4000, size)) for _ in range(count)]
    return sorted({0, 1, 7, 8, 9, size // 2, size - 1, *near[::2], *(size - each for each in near[1::2] if each)})


@pytest.mark.parametrize("form", ["safetensors", "zip", "old pickle"])
def test_a_truncated_file(tmp_path, source, form):
    path = source / "model.safetensors" if form == "safetensors" else as_pickle(source, form == "zip")
    whole = path.read_bytes()
    for size in places(path, 24):
        path.write_bytes(whole[:size])
        text = refused(tmp_path, source)
        assert path.name in text


@pytest.mark.parametrize("form", ["safetensors", "zip", "old pickle"])
def test_a_padded_file(tmp_path, source, form):
    """A safetensors file is all its header says. What torch ignores behind a pickle does not hurt."""
    path = source / "model.safetensors" if form == "safetensors" else as_pickle(source, form == "zip")
    path.write_bytes(path.read_bytes() + bytes(100))
    if form == "safetensors":
        assert "expected" in refused(tmp_path, source) and "bytes" in refused(tmp_path, source)
    else:
        assert convert(source, tmp_path / "out").exit_code in (0, 1)


def with_header(path: Path, edit) -> None:
    """Writes a safetensors file again with its header edited, as an object or as text."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    edited = edit(json.loads(data[8 : 8 + length]))
    text = edited if isinstance(edited, bytes) else json.dumps(edited).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def with_row(header: dict, **fields) -> dict:
    return header | {NAME: header[NAME] | fields}


def twice(header: dict, name: str) -> bytes:
    return (json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}').encode()


def moved(row: dict, count: int) -> dict:
    return row | {"data_offsets": [offset + count for offset in row["data_offsets"]]}


NAME = "bert.encoder.layer.0.attention.self.query.weight"
HEADERS = {
    "a length beyond the file": (lambda header: with_row(header, data_offsets=[0, 1 << 40]), "its range is"),
    "a range too short": (lambda header: with_row(header, data_offsets=[0, 8]), "its range is 0 to 8"),
    "overlapping ranges": (lambda header: header | {NAME: moved(header[NAME], -64)}, "overlaps the tensor before it"),
    "the range of another": (lambda header: header | {NAME: header[NAME.replace("0", "1")]}, "hole|overlaps"),
    "a hole": (lambda header: {name: row for name, row in header.items() if name != NAME}, "hole|expected .* bytes"),
    "a duplicate name": (lambda header: twice(header, NAME), "is there twice"),
    "an unknown dtype": (lambda header: with_row(header, dtype="F4"), "has the dtype F4"),
    "a negative shape": (lambda header: with_row(header, shape=[-32, -32]), "is damaged: its shape"),
    "a shape as text": (lambda header: with_row(header, shape="32x32"), "is damaged: its shape"),
    "no JSON": (lambda header: b"{" + b"x" * 100, "header is damaged"),
    "a list": (lambda header: b"[1, 2]  ", "starts with|header"),
    "deep nesting": (lambda header: b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}", "header is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies(tmp_path, source, kind):
    edit, told = HEADERS[kind]
    with_header(source / "model.safetensors", edit)
    text = refused(tmp_path, source)
    assert re.search(told, text), text


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_length_that_lies(tmp_path, source, length):
    path = source / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(tmp_path, source)


def test_damaged_bytes_never_show_a_traceback(tmp_path, source):
    """Random bytes of header, directory and pickle: a refusal, or a conversion of what still makes sense."""
    draw = random.Random(0)
    paths = [source / "model.safetensors"]
    for form, zipped in (("zip", True), ("old", False)):
        (tmp_path / form).mkdir()
        (tmp_path / form / "config.json").write_bytes((source / "config.json").read_bytes())
        torch.save(dict(tiny("bert").state_dict()), tmp_path / form / "m.bin", _use_new_zipfile_serialization=zipped)
        paths.append(tmp_path / form / "m.bin")
    for path in paths:
        whole = path.read_bytes()
        for round_ in range(40):
            damaged = bytearray(whole)
            for _ in range(draw.choice([1, 1, 8])):
                near_start = draw.random() < 0.6
                place = draw.randrange(min(6000, len(damaged)))
                damaged[place if near_start else -1 - place] = draw.randrange(256)
            path.write_bytes(damaged)
            result = convert(path, tmp_path / f"{path.parent.name}{round_}", "--json")
            assert result.exit_code in (0, 1) and isinstance(result.exception, SystemExit | None), result.exception
            assert result.exit_code == 0 or result.stderr.count("\n") == 1


SHAPES = {
    "hidden_size": (48, "hidden_size 48 but the tensors 32: is this config.json from the same model?"),
    "vocab_size": (100, "expected [100, 32] from config.json, found [99, 32]"),
    "intermediate_size": (64, "is this config.json from the same model?"),
    "num_hidden_layers": (3, "found no bert.encoder.layer.2."),
    "max_position_embeddings": (128, "expected [128, 32] from config.json, found [64, 32]"),
    "type_vocab_size": (1, "expected [1, 32] from config.json, found [2, 32]"),
}


@pytest.mark.parametrize("field", SHAPES)
def test_a_config_of_another_model(tmp_path, source, field):
    value, told = SHAPES[field]
    fields = json.loads((source / "config.json").read_text()) | {field: value}
    (source / "config.json").write_text(json.dumps(fields))
    assert told in refused(tmp_path, source)


def test_layers_that_the_config_does_not_have(tmp_path, source):
    fields = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    (source / "config.json").write_text(json.dumps(fields))
    text = refused(tmp_path, source)
    assert (
        "expected tensors of 1 layers, which is num_hidden_layers of config.json, found bert.encoder.layer.1." in text
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "expected JSON"),
        ("{", "expected JSON"),
        ("[]", "expected a JSON object, found list"),
        ("<!DOCTYPE html>", "expected JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "expected JSON"),
        (b"\xff\xfe{", "config.json"),
        ("[" * 200000, "expected JSON"),
        ('{"model_type": ["bert"]}', "expected a model_type of a BERT family"),
    ],
)
def test_a_config_that_is_none(tmp_path, source, content, told):
    (source / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert told in refused(tmp_path, source)


def test_missing_shards(tmp_path, source):
    state = dict(tiny("bert").state_dict())
    (source / "model.safetensors").unlink()
    names = list(state)
    weight_map = {}
    for number, part in enumerate((names[::3], names[1::3], names[2::3]), 1):
        shard = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: state[name].clone() for name in part}, source / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (source / "model-00002-of-00003.safetensors").rename(tmp_path / "away")
    assert "model-00002-of-00003.safetensors" in refused(tmp_path, source)
    assert "it is one shard of 3" in refused(tmp_path, source / "model-00001-of-00003.safetensors")
    (source / "model-00002-of-00003.safetensors").write_bytes(
        (source / "model-00001-of-00003.safetensors").read_bytes()
    )
    assert "lacks" in refused(tmp_path, source)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "plain file name" in refused(tmp_path, index)
    index.write_text(json.dumps({"weight_map": {"a": "a" * 300}}))
    assert "1 missing" in refused(tmp_path, index)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><html><title>Sign in</title></html>", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer; fetch the weights"),
        (b"", "an empty file"),
        (b"\x1f\x8b\x08" + bytes(600), "a gzip archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "an HDF5 file (Keras)"),
        (b"GGUF" + bytes(600), "a GGUF file"),
        (b'{"error": "Repository not found"}', "weight_map"),
        (os.urandom(4096), "expected"),
    ],
    ids=["HTML", "LFS", "empty", "gzip", "HDF5", "GGUF", "JSON", "noise"],
)  # fmt: skip
def test_what_is_no_weights(tmp_path, source, name, content, told):
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(content)
    assert told in refused(tmp_path, source)
    assert told in refused(tmp_path, source / name)


class RunsCode:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class OfTheirOwn:
    """A class of user code: it is never imported."""


EVIL = {
    "os.system": (lambda: RunsCode(os.system, "touch executed"), f"{os.system.__module__}.system"),
    "builtins.eval": (lambda: RunsCode(eval, "open('executed', 'w')"), "builtins.eval"),
    "builtins.exec": (lambda: RunsCode(exec, "open('executed', 'w')"), "builtins.exec"),
    "subprocess": (lambda: RunsCode(subprocess.check_call, ["touch", "executed"]), "check_call"),
    "a function of theirs": (lambda: RunsCode(refused, "x"), "test_bad_input.refused"),
}


@pytest.mark.parametrize(
    "form", ["zip", "old pickle", "plain pickle", "training_args.bin", "a pickle named safetensors"]
)
@pytest.mark.parametrize("kind", EVIL)
def test_a_pickle_that_wants_to_run_code(tmp_path, source, kind, form):
    make, told = EVIL[kind]
    state = dict(tiny("bert").state_dict())
    if form == "training_args.bin":  # never opened
        torch.save({"args": make()}, source / form)
        assert convert(source, tmp_path / "out").exit_code == 0
    else:
        path = as_pickle(source, form != "old pickle", state | {"extra": make()})
        if form == "plain pickle":
            path.write_bytes(pickle.dumps({"w": make()}))
        if form == "a pickle named safetensors":
            path = path.rename(source / "model.safetensors")
        text = refused(tmp_path, source)
        assert f"{told}, which could run code; nothing was executed" in text or form == "plain pickle"
        assert told in text or "expected a file of torch.save" in text
    assert not (tmp_path / "executed").exists()


def test_an_object_of_their_own_class_does_not_hurt(tmp_path, source):
    as_pickle(source, state=dict(tiny("bert").state_dict()) | {"extra": OfTheirOwn()})
    assert convert(source, tmp_path / "out").exit_code == 0


def test_a_zip_of_something_else(tmp_path, source):
    (source / "model.safetensors").unlink()
    with zipfile.ZipFile(source / "pytorch_model.bin", "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert "expected the zip archive of torch.save" in refused(tmp_path, source)


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({}, "expected a state dict"),
        ([1, 2], "expected a state dict"),
        ({"epoch": 3}, "expected a state dict with tensors"),
        ({"a": torch.ones(3)}, "expected a checkpoint of a BERT family"),
        (torch.ones(3), "expected a state dict"),
    ],
    ids=["empty", "list", "no tensor", "no BERT", "a tensor"],
)
def test_a_pickle_of_something_else(tmp_path, source, saved, told):
    (source / "model.safetensors").unlink()
    torch.save(saved, source / "pytorch_model.bin")
    assert told in refused(tmp_path, source)


def test_a_folder_of_zero_shards(tmp_path, source):
    (source / "model.safetensors").unlink()
    (source / "global_step5").mkdir()
    for rank in range(2):
        torch.save(
            {"optimizer_state_dict": {}}, source / "global_step5" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    assert "ZeRO" in refused(tmp_path, source)
    assert "ZeRO" in refused(tmp_path, source / "global_step5")


def test_folders_without_one_checkpoint(tmp_path, source):
    save_file({"a": torch.ones(1)}, source / "b.safetensors")
    (source / "model.safetensors").rename(source / "a.safetensors")
    assert "expected one checkpoint, found a.safetensors, b.safetensors; name the file" in refused(tmp_path, source)
    (tmp_path / "empty").mkdir()
    assert "found an empty folder" in refused(tmp_path, tmp_path / "empty")


@pytest.mark.parametrize("name", ["nowhere.bin", "./no/such/folder", "./nowhere", "/nowhere"])
def test_a_source_that_is_not_there(tmp_path, name):
    assert "no such file or folder" in refused(tmp_path, name)


def test_values_of_the_wrong_dtype(tmp_path, source):
    state = dict(tiny("bert").state_dict())
    state[NAME] = state[NAME].to(torch.int8)
    as_pickle(source, state=state)
    assert f"{NAME}: expected F64 or F32 or F16 or BF16 from config.json, found I8" in refused(tmp_path, source)


SPARSITY = {
    "no JSON": ("{", "expected JSON"),
    "a list": ("[]", 'expected a "sparse_attention" section'),
    "no section": ('{"fp16": {}}', 'expected a "sparse_attention" section'),
    "an unknown mode": ('{"mode": "butterfly"}', "expected one of windowed, dense, fixed"),
    "an unknown key": ('{"mode": "fixed", "blocks": 16}', "'blocks'"),
    "a wrong type": ('{"mode": "fixed", "block": "16"}', "fixed: block: expected an integer of at least 1, found '16'"),
    "another number of heads": ('{"mode": "fixed", "num_heads": 8}', "num_heads: expected 4, found 8"),
    "custom without a file": ('{"mode": "custom", "block": 16}', "name it with --layout"),
}


@pytest.mark.parametrize("kind", SPARSITY)
def test_a_sparsity_file_that_is_none(tmp_path, source, kind):
    content, told = SPARSITY[kind]
    (tmp_path / "ds.json").write_text(content)
    assert told in refused(tmp_path, source, options=("--sparsity", tmp_path / "ds.json"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--mode", "fixed", "--block", 16, "--num-global-blocks", 3), "num_global_blocks: expected a divisor"),
        (("--mode", "bigbird", "--max-length", 64), "num_sliding_window_blocks: expected at most"),
        (("--mode", "custom"), "custom needs a layout file"),
        (("--max-length", 100), "expected a length in whole blocks of 64 tokens, found 100; choose 64 or 128"),
        (("--max-length", 16, "--block", 64), "choose 64"),
    ],
)  # fmt: skip
def test_sparsity_that_cannot_be(tmp_path, source, options, told):
    assert told in refused(tmp_path, source, options=options)


def test_places_that_cannot_be_written(tmp_path, source):
    (tmp_path / "file").write_text("")
    result = convert(source, tmp_path / "file")
    assert result.exit_code == 1 and "expected a folder to write to, found a file" in result.stderr
    result = convert(source, tmp_path / "file" / "out")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    result = convert(source, "/proc/out")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "/proc" in result.stderr


def test_a_disk_that_fills_up(tmp_path, source):
    """A limit on file sizes stops the write as a full disk does."""
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    script += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    script += "sys.argv = ['bsa-convert', 'source', 'out']; from bsa_export.cli.convert import main; main()"
    before = everything(tmp_path)
    ran = subprocess.run([sys.executable, "-B", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1
    assert "the file is larger than this system allows" in ran.stderr
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["source"],
        ["source", "out", "more"],
        ["source", "out", "--nonsense"],
        ["source", "out", "--mode", "butterfly"],
        ["source", "out", "--max-length", "0"],
        ["source", "out", "--max-length", "4x"],
        ["source", "out", "--block", "-1"],
        ["source", "out", "--positions", "rotate"],
        ["source", "out", "--dtype", "int8"],
        ["source", "out", "--max-shard-size", "5 apples"],
        ["source", "out", "--layout", "nowhere.npy"],
        ["source", "out", "--config", "nowhere.json"],
        ["source", "out", "--sparsity", "nowhere.json"],
        ["source", "out", "--global-block-indices", "0;5", "--mode", "bslongformer"],
        ["source", "out", "--num-random-blocks", "3"],
        ["source", "out", "--mode", "dense", "--num-local-blocks", "3"],
        ["source", "out", "--sparsity", "source/config.json", "--mode", "fixed"],
        ["source", "out", "--sparsity", "source/config.json", "--block", "16"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(tmp_path, source, arguments):
    before = everything(tmp_path)
    result = convert(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("Usage: ") and "Error: " in result.stderr and "Traceback" not in result.stderr
    assert everything(tmp_path) == before


def test_the_written_file_is_what_was_meant(source, tmp_path):
    """A control: the same source undamaged converts, so that the tests above fail for their own reasons."""
    assert convert(source, tmp_path / "out").exit_code == 0
    rows, _ = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert NAME in rows
