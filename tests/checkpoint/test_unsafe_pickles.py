"""Pickles that want to run code: one sentence that names what they would run, and nothing runs."""

import builtins
import contextlib
import ctypes
import encodings.cp437  # noqa: F401  what zipfile imports when it reads a name
import functools
import importlib
import io
import operator
import os
import pickle
import runpy
import subprocess
import sys
import tracemalloc

import numpy
import pytest
import torch
from checkpoint_files import Call, PersistentId, pickled, storage, tensor, torch_legacy, torch_zip

from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.restricted_pickle import MAX_OPCODES, load
from bsa_export.checkpoint.table import SkipReason
from bsa_export.errors import CheckpointError, UnsafePickleError

CODE = "open('executed', 'w').close()"
SHELL = "touch executed"


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    """STACK_GLOBAL, which takes dotted names."""
    return text(module) + text(name) + b"\x93"


SYSTEM = f"{os.system.__module__}.system"
CALLS = {
    "os.system": (Call(os.system, SHELL), SYSTEM),
    "os.popen": (Call(os.popen, SHELL), "os.popen"),
    "subprocess": (
        Call(subprocess.check_output, ["touch", "executed"]),
        "(subprocess|commands).check_output",
    ),  # the second one is its Python 2 name
    "eval": (Call(eval, CODE), "builtins.eval"),
    "exec": (Call(exec, CODE), "builtins.exec"),
    "open": (Call(open, "executed", "w"), "_?io.open"),
    "import": (Call(__import__, "this"), "builtins.__import__"),
    "importlib": (Call(importlib.import_module, "this"), "importlib.import_module"),
    "getattr": (Call(getattr, "text", "upper"), "builtins.getattr"),
    "runpy": (Call(runpy.run_path, "executed"), "runpy.run_path"),
    "ctypes": (Call(ctypes.CDLL, None), "ctypes.CDLL"),
    "pickle in a pickle": (Call(pickle.loads, pickle.dumps(Call(os.system, SHELL))), "_?pickle.loads"),
    "torch.load": (Call(torch.load, "executed"), "torch.serialization.load"),
    "torch.hub": (Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
    "torch storage bytes": (Call(torch.storage._load_from_bytes, b""), "torch.storage._load_from_bytes"),
    "numpy.load": (Call(numpy.load, "executed"), "numpy.load"),
    "functools.partial": (Call(functools.partial, os.system, SHELL), "functools.partial"),
    "operator": (Call(operator.attrgetter("system").__class__, "system"), "operator.attrgetter"),
    "exit": (Call(sys.exit, 3), "sys.exit"),
}
PLACES = {
    "beside the tensors": lambda evil: {"epoch": evil, "state_dict": {"w": tensor(storage())}},
    "as a tensor": lambda evil: {"w": evil},
    "in the optimizer": lambda evil: {"model": {"w": tensor(storage())}, "optimizer": {"state": [{"a": (1, [evil])}]}},
    "in a tensor's shape": lambda evil: {"w": tensor(storage(), 0, (evil,), (1,))},
    "as a storage class": lambda evil: {"w": tensor(PersistentId(("storage", evil, "0", "cpu", 6)))},
    "alone": lambda evil: evil,
}


def write(path, data: bytes, zipped: bool):
    return (
        torch_zip(path, data, {"0": bytes(24)})
        if zipped
        else torch_legacy(path, data, ["0"], (6).to_bytes(8, "little") + bytes(24))
    )


def refuse(path, names: str):
    """Open `path`, which must be refused in a sentence that holds one of `names`, with nothing executed or imported."""
    before = set(sys.modules)
    with pytest.raises(UnsafePickleError, match=rf"found ({names}), which could run code; nothing was executed"):
        open_checkpoint(path)
    assert set(sys.modules) == before
    assert not os.path.exists("executed")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_these_pickles_do_run_code_where_they_are_unpickled():
    pickle.loads(pickled(CALLS["exec"][0]))
    assert os.path.exists("executed")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_refused_by_name(tmp_path, call, zipped):
    evil, names = CALLS[call]
    refuse(write(tmp_path / "a.pt", pickled({"w": tensor(storage()), "x": evil}), zipped), names)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("place", PLACES)
def test_a_call_is_refused_wherever_it_lies(tmp_path, place, protocol, zipped):
    refuse(write(tmp_path / "a.pt", pickled(PLACES[place](Call(exec, CODE)), protocol), zipped), "builtins.exec")


@pytest.mark.parametrize("part", ["magic", "protocol", "system", "keys"])
def test_a_call_is_refused_in_every_pickle_of_a_legacy_file(tmp_path, part):
    parts = {
        "magic": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        "protocol": pickle.dumps(1001, 2),
        "system": pickle.dumps({"little_endian": True}, 2),
        "object": pickled({"w": tensor(storage())}),
        "keys": pickle.dumps(["0"], 2),
    }
    parts[part] = pickled(Call(exec, CODE))
    path = tmp_path / "a.pt"
    path.write_bytes(b"".join(parts.values()) + (6).to_bytes(8, "little") + bytes(24))
    refuse(path, "builtins.exec")


def test_a_call_is_refused_in_a_plain_pickle(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps(Call(os.system, SHELL), 2))
    refuse(path, SYSTEM)


OPCODES = {
    "REDUCE": (b"cos\nsystem\n(" + text(SHELL) + b"tR", "os.system"),
    "INST": (b"(" + text(SHELL) + b"ios\nsystem\n", "os.system"),
    "OBJ": (b"(cos\nsystem\n" + text(SHELL) + b"o", "os.system"),
    "NEWOBJ of a function": (b"cos\nsystem\n(" + text(SHELL) + b"t\x81", "os.system"),
    "NEWOBJ_EX of a function": (b"cos\nsystem\n(" + text(SHELL) + b"t}\x92", "os.system"),
    "REDUCE of a class of Python": (b"csubprocess\nPopen\n(" + text(SHELL) + b"tR", "subprocess.Popen"),
    "a function that was made look like a class": (
        named("my.project", "run") + b")\x810" + named("my.project", "run") + text(SHELL) + b"\x85R",
        "my.project.run",
    ),
    "getattr of a module": (
        named("builtins", "getattr") + named("os", "Path") + text("system") + b"\x86R",
        "builtins.getattr",
    ),
    "STACK_GLOBAL": (named("os", "system") + b"(" + text(SHELL) + b"tR", "os.system"),
    "STACK_GLOBAL from the memo": (
        text("system") + b"\x940" + text("os") + b"h\x00\x93" + text(SHELL) + b"\x85R",
        "os.system",
    ),
    "dotted from a training library": (
        named("transformers.trainer", "os.system") + text(SHELL) + b"\x85R",
        "transformers.trainer.os.system",
    ),
    "dotted from a harmless class": (named("argparse", "Namespace.__init__") + b")R", "argparse.Namespace.__init__"),
    "dotted from OrderedDict": (
        named("collections", "OrderedDict.__class__") + b")R",
        "collections.OrderedDict.__class__",
    ),
    "dotted module": (named("collections.OrderedDict", "fromkeys") + b")R", "collections.OrderedDict.fromkeys"),
    "a function of a training library": (
        named("transformers.utils.hub", "cached_file") + b")R",
        "transformers.utils.hub.cached_file",
    ),
    "a function of the user's own": (named("__main__", "build") + b")R", "__main__.build"),
    "a function among values": (named("torch.nn.functional", "gelu"), "torch.nn.functional.gelu"),
    "a function set as state": (
        named("my.project", "Config") + b")\x81}" + text("f") + named("my.project", "run") + b"sb",
        "my.project.run",
    ),
    "Python 2 names": (b"c__builtin__\neval\n(" + text(CODE) + b"tR", "builtins.eval"),
    "never called": (b"cos\nsystem\n", "os.system"),
    "control characters in the name": (named("os", "sys\x1b[2Jtem"), r"os.sys\\x1b\[2Jtem"),
    "BUILD with slots of OrderedDict": (
        named("collections", "OrderedDict") + b"N}" + text("clear") + named("os", "system") + b"s\x86b",
        "os.system",
    ),
}


@pytest.mark.parametrize("opcode", OPCODES)
def test_every_opcode_that_can_call_is_refused(tmp_path, opcode):
    evil, names = OPCODES[opcode]
    refuse(torch_zip(tmp_path / "a.pt", opcodes(b"}", text("w"), evil, b"s")), names)


@pytest.mark.parametrize("code", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x97", b"\x98"])
def test_opcodes_that_reach_outside_of_the_pickle_are_refused(tmp_path, code):
    path = torch_zip(tmp_path / "a.pt", opcodes(code))
    with pytest.raises(CheckpointError, match="has no place in a checkpoint"):
        open_checkpoint(path)


def test_a_harmless_class_is_not_called_either(tmp_path, monkeypatch):
    import argparse

    def fail(*_, **__):
        raise AssertionError("it was called")

    data = pickled({"args": argparse.Namespace(a=1), "state_dict": {"w": tensor(storage())}})
    path = torch_zip(tmp_path / "a.pt", data, {"0": bytes(24)})
    # In its place, not patched: Python does not give a class its inherited __new__ back.
    trap = type("Namespace", (), dict.fromkeys(("__init__", "__new__", "__setattr__", "__reduce_ex__"), fail))
    monkeypatch.setattr(argparse, "Namespace", trap)
    monkeypatch.setattr(builtins, "__import__", fail)
    try:
        skipped = open_checkpoint(path).skipped
    finally:
        monkeypatch.undo()
    assert [(entry.name, entry.why) for entry in skipped] == [("args", "an object of argparse.Namespace, not built")]


OBJECTS = {
    "NEWOBJ": named("my_project.train", "TrainConfig") + b")\x81}" + text("lr") + b"K\x01sb",
    "NEWOBJ of a name in lower case": named("my_project.train", "config") + b")\x81",
    "NEWOBJ_EX": named("my_project", "Config") + b")}\x92",
    "NEWOBJ of a class of Python": named("subprocess", "Popen") + b")\x81",
    "REDUCE, as of an enum": named("my_project", "Mode") + b"K\x01\x85R",
    "getattr, as of an enum in Python 3.11.0": named("builtins", "getattr")
    + named("my_project", "Mode")
    + text("FAST")
    + b"\x86R",
    "a class in a class": named("my_project", "Trainer.Config") + b")\x81",
    "copyreg, as of old protocols": b"ccopyreg\n_reconstructor\n(cmy_project\nconfig\nc__builtin__\nobject\nNtR",
    "INST": b"(imy_project\nConfig\n",
    "a class itself": named("my_project", "Config"),
    "a class of __main__": named("__main__", "Config") + b")\x81",
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_of_any_class_are_named_and_not_built(tmp_path, kind):
    before = set(sys.modules)
    data = opcodes(b"}", text("config"), OBJECTS[kind], b"s", text("n"), b"K\x01s")
    with pytest.raises(CheckpointError, match="found config .*(Config|config|Mode|Popen)") as caught:
        open_checkpoint(torch_zip(tmp_path / "a.pt", data))
    assert not isinstance(caught.value, UnsafePickleError)
    assert set(sys.modules) == before


def test_an_object_of_a_project_beside_the_state_dict_is_skipped(tmp_path, monkeypatch):
    (tmp_path / "my_project.py").write_text("class TrainConfig:\n    def __init__(self):\n        self.lr = 0.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_project

    torch.save({"model": {"w": torch.ones(2)}, "config": my_project.TrainConfig()}, tmp_path / "a.pt")
    del sys.modules["my_project"]
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert list(checkpoint.tensors) == ["w"]
    assert [(entry.name, entry.reason) for entry in checkpoint.skipped] == [("config", SkipReason.IN_THE_FILE)]
    assert "my_project" not in sys.modules


BOMBS = {
    "bytes of 2^62": opcodes(b"\x8e" + (2**62).to_bytes(8, "little")),
    "text of 4 GiB": opcodes(b"X\xff\xff\xff\xff"),
    "long of 2 GiB": opcodes(b"\x8b\xff\xff\xff\x7f"),
    "long without an end": b"\x80\x04" + b"N" * (MAX_OPCODES + 10) + b".",
    "marks without an end": b"\x80\x04" + b"(" * 100_000 + b".",
    "empty stack": opcodes(b"0000"),
    "memo that is not there": opcodes(b"h\x07"),
    "nothing at all": b"",
    "no end": b"\x80\x04}",
    "unknown opcode": b"\x80\x04\xff.",
    "digits without an end": b"\x80\x04I" + b"9" * 100_000 + b"\n.",
    "call of a number": opcodes(b"K\x01)R"),
    "dict with half a pair": opcodes(b"(K\x01d"),
    "dict of two values": opcodes(named("collections", "OrderedDict"), b"]]\x86R"),
    "dict of numbers": opcodes(named("collections", "OrderedDict"), b"](K\x01K\x02e\x85R"),
    "defaultdict of a number": opcodes(named("collections", "defaultdict"), b"NK\x01\x86R"),
    "stack global of numbers": opcodes(b"K\x01K\x02\x93"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_made_to_exhaust_is_refused(bomb):
    with pytest.raises(CheckpointError, match="its pickle cannot be read"):
        load(io.BytesIO(BOMBS[bomb]), "file", {}, id)


def test_dicts_made_of_pairs_keep_all_of_them():
    pairs = b"](" + text("a") + b"K\x01\x86" + text("b") + b"K\x02\x86e"
    ordered = opcodes(named("collections", "OrderedDict"), pairs, b"\x85R")
    default = opcodes(named("collections", "defaultdict"), b"N", pairs, b"\x86R")
    for data in (ordered, default):
        assert load(io.BytesIO(data), "file", {}, id) == {"a": 1, "b": 2}


CLAIMS = {
    "memo index of 4 GiB": b"Nr\xff\xff\xff\xff",
    "frame of 2^62": b"\x95" + (2**62).to_bytes(8, "little") + b"N",
    "bytes of 2^62": b"\x8e" + (2**62).to_bytes(8, "little"),
    "text of 4 GiB": b"X\xff\xff\xff\xff",
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_memory_is_not_taken_on_a_claim(claim):
    tracemalloc.start()
    with contextlib.suppress(CheckpointError):
        load(io.BytesIO(opcodes(CLAIMS[claim])), "file", {}, id)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_deep_nesting_is_no_danger():
    depth = 200_000
    assert isinstance(load(io.BytesIO(opcodes(b"N" + b"\x85" * depth)), "file", {}, id), tuple)
    nested_key = opcodes(b"}N" + b"\x85" * depth + b"Ns")
    assert len(load(io.BytesIO(nested_key), "file", {}, id)) == 1


def test_a_list_that_holds_itself_is_no_danger(tmp_path):
    value: list = []
    value.append(value)
    data = pickled({"loop": value, "state_dict": {"w": tensor(storage())}})
    assert list(open_checkpoint(torch_zip(tmp_path / "a.pt", data, {"0": bytes(24)})).tensors) == ["w"]


@pytest.mark.parametrize("name", ["float16", "FloatStorage"])
def test_a_name_that_is_no_function_is_not_called(tmp_path, name):
    data = opcodes(b"}", text("w"), named("torch", name), b")Rs")
    with pytest.raises(CheckpointError, match="not a function"):
        open_checkpoint(torch_zip(tmp_path / "a.pt", data))
