"""1 MB of input takes at most 5 seconds and 500 MB, whatever is in it: read, or refused in one short sentence."""

import multiprocessing
import resource
import struct
import time
from pathlib import Path

import pytest
from checkpoint_files import safetensors_bytes, torch_legacy, torch_zip

from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.errors import BsaError

pytestmark = pytest.mark.slow

LIST = b"(" + b"K\x01" * 200_000 + b"l\x94"
PAIRS = b"(" + b"K\x01K\x02\x86" * 100_000 + b"l\x94"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ"
REBUILD = STORAGE + b"q\x000(h\x00K\x00)))tq\x010ctorch._utils\n_rebuild_tensor_v2\nq\x020"
FAR = 2**61 - 1  # ints that differ by this have the same hash


def shared(link: bytes) -> bytes:
    """100 containers, each of which holds the one before twice."""
    return b"".join(link.replace(b"#", b"h" + bytes([number])) for number in range(100))


PICKLES = {
    "one list in thousands of sizes": LIST + b"(" + b"ctorch\nSize\nh\x00\x85R" * 20_000 + b"l.",
    "one list in thousands of dicts": PAIRS + b"(" + b"ccollections\nOrderedDict\nh\x00\x85R" * 15_000 + b"l.",
    "int keys that collide": b"}("
    + b"".join(b"\x8a\x0b" + (number * FAR).to_bytes(11, "little") + b"N" for number in range(70_000))
    + b"u.",
    "tensors without elements": REBUILD
    + b"}("
    + b"".join(b"\x8c\x05%05dh\x02h\x01R" % n for n in range(80_000))
    + b"u.",
    "nested tuples as a storage": b"N\x94" + shared(b"##\x86\x94") + b"Q.",
    "nested dicts": b"}\x94" + shared(b"}(\x8c\x01a#\x8c\x01b#u\x94") + b"\x85.",
    "a dict that holds itself": b"}\x94\x8c\x05modelh\x00s.",
    "many dicts that hold one dict": b"}("
    + b"".join(b"\x8c\x06%06d}" % n for n in range(30_000))
    + b"u\x940}("
    + b"".join(b"\x8c\x06%06d}\x8c\x01xh\x00s" % n for n in range(30_000))
    + b"u.",
    "a name of nearly 1 MB": b"}X" + struct.pack("<I", 900_000) + b"\x1b" * 900_000 + b"K\x01s.",
    "one tuple as thousands of keys": b"(" + b"K\x01" * 200_000 + b"t\x94}(" + b"h\x00N" * 190_000 + b"u.",
    "marks": b"(" * 1_000_000 + b".",
}
HEADERS: dict[str, object] = {
    "one name many times": b"{" + b",".join([b'"a":{}'] * 140_000) + b"}",
    "a number of many digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 900_000 + b'],"data_offsets":[0,0]}}',
    "tensors without elements": {
        f"{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(17_000)
    },
}


def attempt(path: Path, connection) -> None:
    """Opens `path` in a process of its own, and sends the seconds, the MiB and the sentence."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    try:
        open_checkpoint(path)
        said = ""
    except BsaError as error:
        said = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    connection.send((time.process_time() - started, grown / 1024, said))


def check(path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(path, theirs))
    process.start()
    assert ours.poll(60), "it did not end"
    seconds, grown, said = ours.recv()
    process.join()
    assert seconds < 5
    assert grown < 500
    assert len(said) < 3000
    assert said.isprintable()


@pytest.mark.parametrize("what", PICKLES)
def test_pickles(tmp_path, what):
    data = b"\x80\x04" + PICKLES[what]
    assert len(data) < 1_100_000
    check(torch_zip(tmp_path / "a.pt", data, {"0": bytes(24)}))


def test_the_older_format_which_is_read_twice(tmp_path):
    data = b"\x80\x04" + PICKLES["tensors without elements"]
    check(torch_legacy(tmp_path / "a.pt", data, ["0"], (6).to_bytes(8, "little") + bytes(24)))


@pytest.mark.parametrize("what", HEADERS)
def test_safetensors_headers(tmp_path, what):
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(HEADERS[what]))
    check(tmp_path / "a.safetensors")
