"""Files of torch.save, judged by torch.load."""

import argparse
import pickle
import tarfile
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from checkpoint_files import PersistentId, pickled, same, small_state, storage, tensor, torch_legacy, torch_zip

from bsa_export.checkpoint.dtypes import read
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import FileRange, StridedRange, tied
from bsa_export.checkpoint.writer import write_safetensors
from bsa_export.errors import CheckpointError

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
SIX = torch.arange(6, dtype=torch.float32).numpy().tobytes()


def save(path, value, zipped, **options):
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return path


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_is_read_as_torch_reads_it(tmp_path, zipped, protocol):
    state = small_state()
    path = save(tmp_path / "pytorch_model.bin", state, zipped, pickle_protocol=protocol)
    table = open_checkpoint(path).tensors
    judge = torch.load(path, weights_only=False)  # the restricted one knows protocol 2 only
    assert list(table) == list(judge)
    assert all(same(table[name], judge[name]) for name in judge)


@FORMATS
@pytest.mark.parametrize("dtype", ["uint16", "float8_e4m3fn", "float8_e5m2", "complex64", "int8", "int16"])
def test_dtypes_that_torch_stores_in_other_ways(tmp_path, zipped, dtype):
    value = torch.arange(6).to(getattr(torch, dtype)).reshape(2, 3)
    path = save(tmp_path / "a.pt", {"w": value, "v": value[1:]}, zipped)
    table = open_checkpoint(path).tensors
    assert same(table["w"], value)
    assert same(table["v"], value[1:])


VIEWS = {
    "transpose": lambda base: base.t(),
    "row slice": lambda base: base[2:5],
    "column slice": lambda base: base[:, 1:3],
    "every other row": lambda base: base[::2],
    "one element": lambda base: base[3, 2],
    "permuted": lambda base: base.reshape(2, 4, 3).permute(2, 0, 1),
    "expanded": lambda base: base[:1].expand(5, 3),
    "expanded ids": lambda base: base[:, 0].expand(1, -1),
    "overlapping windows": lambda base: base.reshape(-1).unfold(0, 4, 2),
    "empty slice": lambda base: base[:0],
    "parameter": lambda base: torch.nn.Parameter(base.t()),
}


@FORMATS
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_gives_the_elements_of_the_view(tmp_path, zipped, view):
    base = torch.randn(8, 3)
    path = save(tmp_path / "views.bin", {"base": base, "view": VIEWS[view](base)}, zipped)
    table = open_checkpoint(path).tensors
    judge = torch.load(path, weights_only=True)
    assert same(table["base"], judge["base"])
    assert same(table["view"], judge["view"])


@FORMATS
def test_tied_weights_have_equal_rows(tmp_path, zipped):
    base = torch.randn(4, 3)
    state = {
        "a": base,
        "other": base.clone(),
        "b": base,
        "view": base[:2],
        "transposed": base.t(),
        "again": base.t(),
        "none": base[:0],
        "nil": base[:0],
    }
    table = open_checkpoint(save(tmp_path / "tied.bin", state, zipped)).tensors
    assert tied(table) == {"b": "a", "again": "transposed"}
    assert isinstance(table["a"].data, FileRange)
    assert isinstance(table["transposed"].data, StridedRange)


@FORMATS
def test_parameters_with_attributes_are_their_data(tmp_path, zipped):
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.partition_dim = 0
    tensor = torch.randn(3)
    tensor.note = "x"
    table = open_checkpoint(save(tmp_path / "a.bin", {"parameter": parameter, "tensor": tensor}, zipped)).tensors
    assert same(table["parameter"], parameter)
    assert same(table["tensor"], tensor)


@FORMATS
def test_files_saved_on_cuda(tmp_path, zipped, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    state = small_state()
    path = save(tmp_path / "cuda.bin", state, zipped)
    monkeypatch.undo()
    assert b"cuda:0" in path.read_bytes()
    table = open_checkpoint(path).tensors
    assert all(same(table[name], value) for name, value in state.items())


def test_a_legacy_view_of_a_storage_starts_where_the_view_starts(tmp_path):
    view = storage(torch.FloatStorage, "0", 6, ("1", 2, 4))
    data = pickled(
        OrderedDict(whole=tensor(storage(torch.FloatStorage, "0", 6, None)), part=tensor(view, 1, (3,), (1,)))
    )
    path = torch_legacy(tmp_path / "old.bin", data, ["0"], (6).to_bytes(8, "little") + SIX)
    judge = torch.load(path, weights_only=False)  # weights_only refuses views
    table = open_checkpoint(path).tensors
    assert judge["part"].tolist() == [3, 4, 5]
    assert all(same(table[name], judge[name]) for name in judge)


def test_the_order_of_names_is_that_of_the_file(tmp_path):
    state = OrderedDict((name, torch.zeros(1)) for name in ["zebra", "apple", "monkey"])
    state._metadata = {"": {"version": 1}}
    assert list(open_checkpoint(save(tmp_path / "a.bin", state, True)).tensors) == ["zebra", "apple", "monkey"]


@FORMATS
def test_harmless_objects_beside_the_tensors_are_listed_and_not_built(tmp_path, zipped):
    beside = {
        "args": argparse.Namespace(lr=1e-3, nested=argparse.Namespace()),
        "epoch": 3,
        "best": None,
        "history": defaultdict(list, loss=[1.0]),
        "model_shape": torch.Size([2, 3]),
        "device": torch.device("cuda", 0),
        "dtype": torch.float16,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "seen": {1, 2},
        "torch": torch.__version__,
        "rng": np.random.default_rng(0),
    }
    path = save(tmp_path / "checkpoint.pt", beside | {"model": small_state()}, zipped)
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.tensors) == list(small_state())
    skipped = {entry.name: entry.why for entry in checkpoint.skipped}
    assert list(skipped) == list(beside)
    assert skipped["args"] == "an object of argparse.Namespace, not built"
    assert skipped["optimizer"] == "a dict with 2 entries"


def test_objects_of_training_libraries_are_not_built(tmp_path, antiberty):
    with pytest.raises(
        CheckpointError,
        match=r"expected a state dict, found an object of transformers.training_args.TrainingArguments, not built",
    ):
        open_checkpoint(antiberty / "training_args.bin")


def test_numpy_arrays_beside_the_tensors_are_not_built(tmp_path):
    numpy = pytest.importorskip("numpy")
    beside = {"rng": numpy.arange(3), "loss": numpy.float32(1), "where": tmp_path}
    checkpoint = open_checkpoint(save(tmp_path / "a.pt", beside | {"state_dict": {"w": torch.zeros(2)}}, True))
    assert list(checkpoint.tensors) == ["w"]
    assert [entry.name for entry in checkpoint.skipped] == ["rng", "loss", "where"]


def test_a_whole_pickled_model_is_explained(tmp_path):
    path = save(tmp_path / "model.pt", torch.nn.Linear(2, 2), True)
    with pytest.raises(
        CheckpointError,
        match=r"expected a state dict, found an object of torch.nn.modules.linear.Linear.*save model.state_dict\(\)",
    ):
        open_checkpoint(path)


def test_torchscript_is_explained(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(
        CheckpointError, match=r"expected a state dict, found a TorchScript archive; save torch.jit.load"
    ):
        open_checkpoint(tmp_path / "script.pt")


def test_the_tar_format_is_explained(tmp_path):
    (tmp_path / "storages").write_bytes(b"x")
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.add(tmp_path / "storages", "storages")
    with pytest.raises(CheckpointError, match="found a tar archive"):
        open_checkpoint(tmp_path / "old.pt")


UNUSUAL = {
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "complex128": lambda: torch.ones(2, dtype=torch.complex128),
    "float8_e8m0fnu": lambda: torch.ones(2).to(torch.float8_e8m0fnu),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_elements_are_refused(tmp_path, kind):
    path = save(tmp_path / "a.pt", {"w": UNUSUAL[kind]()}, True)
    with pytest.raises(CheckpointError, match="a tensor is stored"):
        open_checkpoint(path)


def test_big_endian_files_are_refused(tmp_path):
    data = pickled({"w": tensor(storage())})
    zipped = torch_zip(tmp_path / "a.pt", data, {"0": SIX}, byteorder=b"big")
    legacy = torch_legacy(tmp_path / "b.pt", data, ["0"], (6).to_bytes(8, "little") + SIX, little_endian=False)
    for path in (zipped, legacy):
        with pytest.raises(CheckpointError, match="expected little-endian tensors"):
            open_checkpoint(path)


LIES = {
    "more elements than the storage": tensor(storage(), 0, (7,), (1,)),
    "offset beyond the storage": tensor(storage(), 6, (1,), (1,)),
    "offset before the storage": tensor(storage(), -1, (2,), (1,)),
    "negative stride": tensor(storage(), 5, (2,), (-1,)),
    "giant stride": tensor(storage(), 0, (2,), (2**61,)),
    "giant shape": tensor(storage(), 0, (2**40, 2**40), (0, 0)),
    "expanded to fill a disk": tensor(storage(), 0, (2**30,), (0,)),
    "negative size": tensor(storage(), 0, (-2,), (1,)),
    "size beyond 64 bits": tensor(storage(), 0, (2**80, 0), (1, 1)),
    "shape of floats": tensor(storage(), 0, (2.0,), (1,)),
    "shape is no tuple": tensor(storage(), 0, 6, (1,)),
    "fewer strides than sizes": tensor(storage(), 0, (2, 3), (1,)),
    "33 dimensions": tensor(storage(), 0, (1,) * 33, (1,) * 33),
    "more elements in the id than in the file": tensor(storage(numel=7)),
    "fewer elements in the id than in the file": tensor(storage(numel=5), 0, (5,), (1,)),
    "negative element count": tensor(storage(numel=-6)),
    "giant element count": tensor(storage(numel=2**62)),
    "another dtype than in the file": tensor(storage(torch.DoubleStorage)),
    "a storage that is not there": tensor(storage(key="1")),
    "a storage outside of data/": tensor(storage(key="../version")),
    "an id that is a string": tensor(PersistentId("storage")),
    "an id with too little in it": tensor(PersistentId(("storage", torch.FloatStorage, "0"))),
    "a storage that is a number": tensor(17),
    "a key that is a number": tensor(storage(key=0)),
    "two dtypes for one storage": [tensor(storage()), tensor(storage(torch.IntStorage))],
    "no arguments": PersistentId(("storage", None, "0", "cpu", 6)),
}


@FORMATS
@pytest.mark.parametrize("lie", LIES)
def test_a_pickle_that_lies_about_its_tensors_is_refused(tmp_path, zipped, lie):
    value = {"w": LIES[lie]} if not isinstance(LIES[lie], list) else dict(enumerate(LIES[lie]))
    data = pickled(value)
    if zipped:
        path = torch_zip(tmp_path / "lie.pt", data, {"0": SIX})
    else:
        path = torch_legacy(tmp_path / "lie.pt", data, ["0"], (6).to_bytes(8, "little") + SIX)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_the_honest_version_of_those_pickles_is_read(tmp_path):
    zipped = torch_zip(tmp_path / "a.pt", pickled({"w": tensor(storage())}), {"0": SIX})
    data = pickled({"w": tensor(storage(torch.FloatStorage, "0", 6, None))})
    legacy = torch_legacy(tmp_path / "b.pt", data, ["0"], (6).to_bytes(8, "little") + SIX)
    for path in (zipped, legacy):
        assert same(open_checkpoint(path).tensors["w"], torch.load(path, weights_only=True)["w"])


def test_legacy_storages_that_do_not_fit_are_refused(tmp_path):
    data = pickled({"w": tensor(storage())})
    count = (6).to_bytes(8, "little")
    for keys, tail, match in [
        (["0"], count + SIX[:-1], "it is truncated"),
        (["0"], count[:5], "it is truncated"),
        (["0"], (7).to_bytes(8, "little") + SIX + b"1234", "expected 6 elements in storage '0', found 7"),
        (["0", "9"], count + SIX, "storage '9' belongs to no tensor"),
        (["0", "0"], count + SIX + count + SIX, "list of storages is damaged"),
        ([], count + SIX, "expected storage '0', which is not in the file"),
        ([0], count + SIX, "list of storages is damaged"),
    ]:
        path = torch_legacy(tmp_path / "a.pt", data, keys, tail)
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(path)


def test_zip_entries_that_torch_would_not_write_are_refused(tmp_path):
    data = pickled({"w": tensor(storage())})
    path = torch_zip(tmp_path / "a.pt", data, {"0": SIX})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("archive/data/0", SIX)
    with pytest.raises(CheckpointError, match="'archive/data/0' is there twice"):
        open_checkpoint(path)

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", SIX * 100)
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        open_checkpoint(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", b"<x/>")
    with pytest.raises(CheckpointError, match="expected the zip archive of torch.save, with one data.pkl"):
        open_checkpoint(path)


def test_a_zip_entry_that_covers_another_is_refused(tmp_path):
    path = torch_zip(tmp_path / "a.pt", pickled({"w": tensor(storage())}), {"0": SIX})
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"archive/data/0") - 46  # its place in the directory
    assert raw[entry : entry + 4] == b"PK\x01\x02"
    raw[entry + 20 : entry + 28] = (24 + 4000).to_bytes(4, "little") * 2
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="reaches beyond its place|contradicts the directory"):
        open_checkpoint(path)


@pytest.mark.parametrize("saved", [b"text", 3, [torch.zeros(1)], {"epoch": 1}, {"net": {"w": 1}}, {}], ids=repr)
def test_what_is_no_state_dict_is_described(tmp_path, saved):
    path = save(tmp_path / "a.pt", saved, True)
    with pytest.raises(CheckpointError, match="expected a state dict.*found"):
        open_checkpoint(path)


def test_a_plain_pickle_is_explained(tmp_path):
    (tmp_path / "a.bin").write_bytes(pickle.dumps({"w": 1}, 2))
    with pytest.raises(CheckpointError, match="expected a file of torch.save, found another pickle"):
        open_checkpoint(tmp_path / "a.bin")


def test_a_name_that_is_no_text_is_refused(tmp_path):
    path = save(tmp_path / "a.pt", {"bad \ud800 name": torch.zeros(1)}, True)
    with pytest.raises(CheckpointError, match=r"bad \\ud800 name.* is not valid text"):
        open_checkpoint(path)


def flip(path, needle: bytes, at: int = 0) -> None:
    """Changes one bit of the first `needle` in a file."""
    content = bytearray(path.read_bytes())
    content[content.index(needle) + at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_by_the_archives_own_checksum(tmp_path):
    torch.save({"w": torch.arange(50_000.0), "v": torch.ones(3)}, path := tmp_path / "a.pt")
    flip(path, torch.arange(40_000.0, 40_003.0).numpy().tobytes())
    tensors = open_checkpoint(path).tensors
    for attempt in (lambda: write_safetensors(tmp_path / "out", tensors), lambda: read(tensors["w"])):
        with pytest.raises(CheckpointError, match="a.pt: .*CRC-32"):
            attempt()
    assert read(tensors["v"]).tolist() == [1, 1, 1]


def test_a_flipped_bit_in_the_pickle_is_found(tmp_path):
    torch.save({"weight": torch.ones(3)}, path := tmp_path / "a.pt")
    flip(path, b"weight")
    with pytest.raises(CheckpointError, match="a.pt: .*CRC-32"):
        open_checkpoint(path)


def test_an_archive_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(open_checkpoint(tmp_path / "a.pt").tensors["w"]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("field", [6, 8, 14, 30], ids=["flags", "method", "CRC-32", "name"])
def test_a_local_header_that_contradicts_the_directory_is_refused(tmp_path, field):
    path = torch_zip(tmp_path / "a.pt", pickled({"w": tensor(storage())}), {"0": SIX})
    flip(path, b"PK\x03\x04", field)
    with pytest.raises(CheckpointError, match="contradicts the directory"):
        open_checkpoint(path)


@pytest.mark.parametrize("copies", [1, 1000])
def test_what_is_written_is_in_proportion_to_the_file(tmp_path, copies):
    rows = {f"w{n}": tensor(storage(), 0, (2**28 // copies, 6 + n % 2), (0, 0)) for n in range(copies)}
    path = torch_zip(tmp_path / "a.pt", pickled(rows), {"0": SIX})
    with pytest.raises(CheckpointError, match="repeat the elements"):
        open_checkpoint(path)
