"""Files that are written, judged by the safetensors library and by transformers' own shards."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import same, save_as, small_state
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file

from bsa_export.checkpoint import checksum, writer
from bsa_export.checkpoint.checksum import file_checksum
from bsa_export.checkpoint.dtypes import cast, read
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.safetensors_file import read_safetensors
from bsa_export.checkpoint.table import Computed, FileRange, Tensor
from bsa_export.checkpoint.writer import parse_size, write_safetensors, write_weights
from bsa_export.errors import CheckpointError


def many_views() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return small_state() | {
        "base": base,
        "transposed": base.t(),
        "column": base[:, 2],
        "rows": base[1:3],
        "repeated": base[:1].expand(3, 6),
    }


@pytest.fixture
def table(tmp_path) -> dict[str, Tensor]:
    torch.save(many_views(), tmp_path / "views.pt")
    return open_checkpoint(tmp_path / "views.pt").tensors


def check(path: Path, judge: dict[str, torch.Tensor], record: writer.FileRecord):
    """The safetensors library reads the same tensors, aligned, and the record is that of the file."""
    loaded = load_file(path)
    assert set(loaded) == set(judge)
    rows, _ = read_safetensors(path)
    for name, tensor in judge.items():
        assert same(rows[name], tensor)
        assert torch.equal(
            loaded[name].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        )
        assert rows[name].data.offset % tensor.element_size() == 0
    assert (record.bytes, record.checksum) == (path.stat().st_size, file_checksum(path))


def test_views_and_computed_tensors_are_written(tmp_path, table):
    layout = np.eye(3, dtype=np.uint8)
    table["layout"] = Tensor(
        "U8", (3, 3), Computed(lambda: iter([layout[:1].tobytes(), b"", memoryview(layout[1:]), np.empty(0)]))
    )
    progress = []
    record = write_safetensors(tmp_path / "out.safetensors", table, {"a": "ü"}, lambda *both: progress.append(both))
    check(tmp_path / "out.safetensors", many_views() | {"layout": torch.eye(3, dtype=torch.uint8)}, record)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "ü"}
    assert progress == sorted(progress)
    assert progress[-1] == (sum(row.nbytes for row in table.values()),) * 2


def test_real_minilm_is_written_byte_for_byte(tmp_path, minilm):
    records = write_weights(tmp_path, open_checkpoint(minilm).tensors)
    assert (tmp_path / "model.safetensors").read_bytes() == (minilm / "model.safetensors").read_bytes()
    check(tmp_path / "model.safetensors", load_file(minilm / "model.safetensors"), records["model.safetensors"])


def test_real_antiberty_is_written_as_torch_reads_it(tmp_path, antiberty):
    records = write_weights(tmp_path, open_checkpoint(antiberty).tensors)
    judge = torch.load(antiberty / "pytorch_model.bin", map_location="cpu", weights_only=True)
    check(tmp_path / "model.safetensors", judge, records["model.safetensors"])


@pytest.mark.parametrize("side", [1, 2, 3])
def test_a_buffer_of_any_size_gives_the_same(tmp_path, table, monkeypatch, side):
    monkeypatch.setattr(writer, "PIECE_BYTES", 8 * side**2)
    monkeypatch.setattr(checksum, "PIECE_BYTES", 8 * side**2)
    monkeypatch.setattr(checksum, "SIDE", side)
    table["computed"] = Tensor("F32", (3,), Computed(lambda: iter([bytes(7), bytes(5)])))
    record = write_safetensors(tmp_path / "out.safetensors", table)
    check(tmp_path / "out.safetensors", many_views() | {"computed": torch.zeros(3)}, record)


@pytest.mark.parametrize("size", [120, 250, 400, 10_000])
def test_shards_are_those_of_huggingface_hub(tmp_path, table, size):
    records = write_weights(tmp_path, table, max_shard_size=size)
    plan = split_torch_state_dict_into_shards(
        {name: tensor.clone() for name, tensor in many_views().items()}, max_shard_size=size
    )
    assert {name for name in records if name.endswith(".safetensors")} == set(plan.filename_to_tensors)
    for shard, names in plan.filename_to_tensors.items():
        check(tmp_path / shard, {name: many_views()[name] for name in names}, records[shard])
    if plan.is_sharded:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == plan.tensor_to_filename
        assert index["metadata"]["total_size"] == sum(row.nbytes for row in table.values())
    assert set(records) == {path.name for path in tmp_path.iterdir()} - {"views.pt"}
    (tmp_path / "views.pt").unlink()
    assert all(same(open_checkpoint(tmp_path).tensors[name], tensor) for name, tensor in many_views().items())


def test_a_tensor_larger_than_a_shard_is_alone(tmp_path, table):
    records = write_weights(tmp_path, table, max_shard_size=1)
    assert len(records) == len(table) + 1


def test_values_that_are_not_finite_are_reported_by_name(tmp_path):
    state = {
        "a": torch.tensor([1.0, float("nan")]),
        "b": torch.tensor([float("inf")]).half(),
        "c": torch.ones(3),
        "d": torch.tensor([-1]),
    }
    state["e"] = torch.tensor([float("inf"), float("nan")]).bfloat16()
    torch.save(state, tmp_path / "a.pt")
    record = write_safetensors(tmp_path / "out.safetensors", open_checkpoint(tmp_path / "a.pt").tensors)
    assert record.not_finite == {"a": "NaN", "b": "infinite", "e": "NaN"}


def test_a_value_that_overflows_stops_the_write_with_its_name(tmp_path):
    torch.save({"layer.weight": torch.tensor([1.0, 1e6])}, tmp_path / "a.pt")
    rows = {name: cast(name, row, "F16") for name, row in open_checkpoint(tmp_path / "a.pt").tensors.items()}
    with pytest.raises(CheckpointError, match=r"^layer.weight: 1e\+06 is too large for F16; choose another --dtype"):
        write_safetensors(tmp_path / "out.safetensors", rows)


def test_a_source_that_becomes_shorter_is_noticed(tmp_path, table):
    (tmp_path / "views.pt").write_bytes((tmp_path / "views.pt").read_bytes()[:1500])
    with pytest.raises(CheckpointError, match="views.pt: it became shorter while it was being (copied|read)"):
        write_safetensors(tmp_path / "out.safetensors", table)


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, table):
    def touch(done, total):
        with open(tmp_path / "views.pt", "r+b") as file:
            file.write(b"PK")

    with pytest.raises(CheckpointError, match="views.pt: it was changed while it was being copied"):
        write_safetensors(tmp_path / "out.safetensors", table, progress=touch)


def test_a_source_that_is_rewritten_with_its_old_time_is_noticed(tmp_path, table):
    path = tmp_path / "views.pt"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns

    def touch(done, total):
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=times)

    with pytest.raises(CheckpointError, match="views.pt: it was changed while it was being copied"):
        write_safetensors(tmp_path / "out.safetensors", table, progress=touch)


def test_reads_that_return_less_go_on(tmp_path, table, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: real(file, [buffers[0][:7]], offset))
    record = write_safetensors(tmp_path / "out.safetensors", table)
    monkeypatch.undo()
    check(tmp_path / "out.safetensors", many_views(), record)


def test_a_read_error_is_blamed_on_the_source(tmp_path, table, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="views.pt: it cannot be read .Input/output error"):
        write_safetensors(tmp_path / "out.safetensors", table)


def test_a_source_that_is_gone_is_one_sentence(tmp_path, table):
    (tmp_path / "views.pt").unlink()
    with pytest.raises(CheckpointError, match=r"views.pt: it cannot be read or written \(No such file or directory\)"):
        write_safetensors(tmp_path / "out.safetensors", table)


def test_computed_bytes_of_the_wrong_length_are_noticed(tmp_path):
    rows = {"layout": Tensor("U8", (3,), Computed(lambda: iter([b"12"])))}
    with pytest.raises(CheckpointError, match="^layout: expected 3 computed bytes, found 2"):
        write_safetensors(tmp_path / "out.safetensors", rows)


def test_a_name_that_safetensors_reserves_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="^__metadata__: safetensors has no tensor of this name"):
        write_safetensors(
            tmp_path / "out.safetensors", {"__metadata__": Tensor("U8", (0,), Computed(lambda: iter([])))}
        )


def test_nothing_at_all_is_a_file_too(tmp_path):
    write_safetensors(tmp_path / "out.safetensors", {})
    assert load_file(tmp_path / "out.safetensors") == {}


def test_a_full_disk_is_one_sentence(tmp_path, table, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(CheckpointError, match="out.safetensors: the disk is full; .*free some space"):
        write_safetensors(tmp_path / "out.safetensors", table)


def test_a_limit_on_file_sizes_is_one_sentence(tmp_path, table):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1200, before[1]))
    try:
        with pytest.raises(CheckpointError, match="the file is larger than this system allows"):
            write_safetensors(tmp_path / "out.safetensors", table)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("side", [1, 256])
def test_what_fails_beside_the_writing_is_not_lost(tmp_path, table, monkeypatch, side):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(writer, "not_finite", fail)
    monkeypatch.setattr(writer, "PIECE_BYTES", 8 * side**2)
    monkeypatch.setattr(checksum, "PIECE_BYTES", 8 * side**2)
    monkeypatch.setattr(checksum, "SIDE", side)
    with pytest.raises(RuntimeError, match="broken"):
        write_safetensors(tmp_path / "out.safetensors", table)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Writes 512 MiB in a process that may use 64 MiB more than it starts with."""
    with open(tmp_path / "source", "wb") as file:
        file.truncate(512 << 20)
    script = f"""
from pathlib import Path
from bsa_export.checkpoint.table import FileRange, Tensor
from bsa_export.checkpoint.writer import write_safetensors
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before = peak()
rows = {{"w": Tensor("F32", (8192, 16384), FileRange(Path({str(tmp_path / "source")!r}), 0, 512 << 20))}}
write_safetensors(Path({str(tmp_path / "out")!r}), rows)
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    (tmp_path / "out").unlink()
    assert grown < 64 << 10


def test_the_written_file_reads_back(tmp_path, table):
    write_safetensors(tmp_path / "out.safetensors", table)
    rows, _ = read_safetensors(tmp_path / "out.safetensors")
    assert all(isinstance(row.data, FileRange) for row in rows.values())
    assert np.array_equal(read(rows["transposed"]), read(table["transposed"]))


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2 << 30), ("1.5 kb", 1500), ("1000", 1000), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 apples", "1e9", "5GBB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="expected a size such as 5GB or 500MB, found"):
        parse_size(text)


def test_saved_kinds_are_untouched(tmp_path):
    path = save_as("zip", tmp_path, small_state())
    before = path.read_bytes(), path.stat().st_mtime_ns
    (tmp_path / "out").mkdir()
    write_weights(tmp_path / "out", open_checkpoint(path).tensors)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
