"""What a path holds: every kind of file and folder a user may name."""

import json
import os
import tarfile

import pytest
import torch
from checkpoint_files import KINDS, same, save_as, save_sharded, small_state
from safetensors.torch import save_file

from bsa_export.checkpoint.dtypes import read
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.table import SkipReason, tied
from bsa_export.checkpoint.writer import write_weights
from bsa_export.errors import CheckpointError


@pytest.mark.parametrize("by", ["file", "folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_tensors(tmp_path, kind, by):
    state = small_state()
    path = save_as(kind, tmp_path, state)
    checkpoint = open_checkpoint(path if by == "file" else tmp_path)
    assert set(checkpoint.tensors) == set(state)
    assert all(same(checkpoint.tensors[name], tensor) for name, tensor in state.items())
    assert checkpoint.folder == tmp_path
    assert checkpoint.files == (sorted(tmp_path.glob("*-of-*")) or [path])


def test_every_kind_gives_the_same_bytes_out(tmp_path):
    outputs = set()
    for kind in KINDS:
        (folder := tmp_path / kind).mkdir()
        tensors = open_checkpoint(save_as(kind, folder, small_state())).tensors
        (out := tmp_path / f"{kind} out").mkdir()
        write_weights(out, dict(sorted(tensors.items())))
        outputs.add((out / "model.safetensors").read_bytes())
    assert len(outputs) == 1


def test_the_ending_does_not_matter(tmp_path):
    save_as("zip", tmp_path, small_state())
    os.rename(tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == set(small_state())


def test_real_antiberty_is_read_as_torch_reads_it(antiberty):
    checkpoint = open_checkpoint(antiberty)
    judge = torch.load(antiberty / "pytorch_model.bin", map_location="cpu", weights_only=True)
    assert b"cuda" in (antiberty / "pytorch_model.bin").read_bytes()[:100_000]
    assert list(checkpoint.tensors) == list(judge)
    assert all(same(checkpoint.tensors[name], tensor) for name, tensor in judge.items())
    assert tied(checkpoint.tensors) == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


def test_files_that_are_not_weights_are_passed_over(tmp_path):
    save_as("zip", tmp_path, small_state())
    for name in (
        "training_args.bin",
        "scheduler.pt",
        "optimizer.pt",
        "optimizer.bin",
        "rng_state_0.pth",
        "scaler.pt",
        "config.json",
        "spiece.model",
    ):
        (tmp_path / name).write_bytes(b"not read")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == [tmp_path / "pytorch_model.bin"]
    assert checkpoint.skipped == []


def test_safetensors_is_preferred_and_the_other_file_is_named(tmp_path):
    state = small_state()
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(state)
    assert [(entry.name, entry.reason) for entry in checkpoint.skipped] == [
        ("pytorch_model.bin", SkipReason.SAME_WEIGHTS)
    ]
    assert "model.safetensors is read instead" in checkpoint.skipped[0].why


def test_a_complete_index_is_preferred_to_a_single_file(tmp_path):
    save_file({"old": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_sharded(tmp_path, small_state(), "safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(small_state())
    assert [(entry.name, entry.reason) for entry in checkpoint.skipped] == [
        ("model.safetensors", SkipReason.SAME_WEIGHTS)
    ]
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert set(open_checkpoint(tmp_path).tensors) == {"old"}


def test_one_file_of_any_name_is_enough(tmp_path):
    torch.save(small_state(), tmp_path / "epoch_3.pth")
    assert open_checkpoint(tmp_path).files == [tmp_path / "epoch_3.pth"]
    torch.save(small_state(), tmp_path / "epoch_4.pth")
    with pytest.raises(CheckpointError, match="expected one checkpoint, found epoch_3.pth, epoch_4.pth"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("where", [".", "global_step10"])
@pytest.mark.parametrize(
    "shard",
    [
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
    ],
)
def test_a_shard_of_zero_alone_is_refused(tmp_path, where, shard):
    (tmp_path / where).mkdir(exist_ok=True)
    (tmp_path / where / shard).write_bytes(b"x")
    if where == ".":
        torch.save({"module": {}}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"found one shard of DeepSpeed ZeRO; name the folder"):
        open_checkpoint(tmp_path / where / shard)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


def test_weights_beside_zero_shards_are_read(tmp_path):
    (tmp_path / "global_step10").mkdir()
    (tmp_path / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    save_as("zip", tmp_path, small_state())
    assert set(open_checkpoint(tmp_path).tensors) == set(small_state())


def test_a_deepspeed_checkpoint_is_unwrapped(tmp_path):
    state = {f"module.{name}": tensor for name, tensor in small_state().items()}
    torch.save({"module": state, "dp_world_size": 2, "optimizer": None}, tmp_path / "mp_rank_00_model_states.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == list(small_state())
    assert [entry.name for entry in checkpoint.skipped] == ["dp_world_size", "optimizer"]


def test_wrappers_in_wrappers_are_removed_and_the_other_entries_are_listed(tmp_path):
    state = {"w": torch.zeros(2)}
    torch.save(
        {"loss": torch.ones(1), "model": {"state_dict": state, "config": {}}, "model_ema": state}, tmp_path / "a.pt"
    )
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert list(checkpoint.tensors) == ["w"]
    assert [(entry.name, entry.why) for entry in checkpoint.skipped] == [
        ("loss", "a tensor F32 [1] next to the state dict"),
        ("model_ema", "a dict with 1 entries"),
        ("model.config", "a dict with 0 entries"),
    ]


def test_what_torch_compile_puts_into_names_is_removed(tmp_path):
    torch.save({"_orig_mod.a": torch.zeros(1), "encoder._orig_mod.b": torch.zeros(1)}, tmp_path / "a.pt")
    assert list(open_checkpoint(tmp_path / "a.pt").tensors) == ["a", "encoder.b"]


def test_a_deepspeed_run_folder_is_told_which_file_to_name(tmp_path):
    for name in ("latest", "zero_to_fp32.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "global_step5").mkdir()
    with pytest.raises(CheckpointError, match="of a DeepSpeed run name the file mp_rank_00_model_states.pt below it"):
        open_checkpoint(tmp_path)


def test_a_prefix_is_removed_only_from_all_names(tmp_path):
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "a.pt")
    assert list(open_checkpoint(tmp_path / "a.pt").tensors) == ["module.a", "b"]


@pytest.mark.parametrize("length", [0x7B20, 0x7B0A, 0x1E7B], ids=hex)
def test_a_header_length_that_looks_like_JSON_is_no_index(tmp_path, length):
    """The first bytes of such a safetensors file are white space and a brace."""
    header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + b"x")
    assert read(open_checkpoint(path).tensors["w"]) == ord("x")


CONTENT = {
    "empty file": (b"", "found an empty file"),
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
        "found a Git LFS pointer; fetch the weights with git lfs pull",
    ),
    "HTML": (b"<!DOCTYPE html><html>", "found an HTML or XML page"),
    "HTML after blank lines": (b"\n\n  <html>", "found an HTML or XML page"),
    "gzip": (b"\x1f\x8b\x08\x00", "found a gzip archive"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "found an HDF5 file"),
    "GGUF": (b"GGUF\x03", "found a GGUF file"),
    "text": (b"hello", "found a file that starts with b'hello'"),
    "zeros": (bytes(100), "found a file that starts with"),
    "JSON": (b'{"model_type": "bert"}', "expected the index of a sharded checkpoint"),
    "JSON cut": (b'{"weight_map": {', "expected JSON"),
    "zip cut": (b"PK\x03\x04", "zip directory cannot be read"),
    "pickle cut": (b"\x80\x02", "pickle cannot be read"),
    "one byte": (b"\x80", "pickle cannot be read"),
}


@pytest.mark.parametrize("content", CONTENT)
def test_what_is_no_weight_file_is_described(tmp_path, content):
    data, match = CONTENT[content]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(data)
    for named in (path, tmp_path):
        with pytest.raises(CheckpointError, match=match) as caught:
            open_checkpoint(named)
        assert str(caught.value).startswith(f"{path}: ")


def test_a_folder_without_weights_is_described(tmp_path):
    with pytest.raises(CheckpointError, match="expected a folder with weights .*, found an empty folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    (tmp_path / "0_Transformer").mkdir()
    with pytest.raises(
        CheckpointError, match=r"found TensorFlow weights \(0_Transformer/, tf_model.h5\).*from_tf=True"
    ):
        open_checkpoint(tmp_path)


HOLDS = {
    "adapter_model.safetensors": "merge_and_unload",
    "__0_0.distcp": "dcp_to_torch",
    "flax_model.msgpack": "from_flax=True",
    "bert_model.ckpt.index": "convert_bert_original_tf_checkpoint",
    "onnx/model.onnx": "use the PyTorch weights",
    "checkpoint-500/model.safetensors": "name checkpoint-500/model.safetensors",
}


@pytest.mark.parametrize("name", HOLDS)
def test_a_folder_without_weights_is_described_with_the_next_step(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert name.partition("/")[0] in str(caught.value)
    assert HOLDS[name] in str(caught.value)


def test_heads_beside_the_weights_are_not_the_same_weights(tmp_path):
    torch.save(small_state(), tmp_path / "pytorch_model.bin")
    torch.save({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, tmp_path / "colbert_linear.pt")
    torch.save({f"module.{name}": tensor for name, tensor in small_state().items()}, tmp_path / "last.pt")
    (tmp_path / "broken.pt").write_bytes(b"x")
    assert {entry.name: entry.reason for entry in open_checkpoint(tmp_path).skipped} == {
        "broken.pt": SkipReason.UNREADABLE,
        "colbert_linear.pt": SkipReason.OTHER_WEIGHTS,
        "last.pt": SkipReason.SAME_WEIGHTS,
    }


@pytest.mark.parametrize("wrapper", ["net", "model_dict", "weights", "a.b"])
def test_one_entry_of_any_name_may_hold_the_tensors(tmp_path, wrapper):
    saved = {
        wrapper: small_state(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}},
        "callbacks": {"best": {"score": torch.tensor(1.0)}},
        "rng": torch.zeros(16, dtype=torch.uint8),
        "epoch": 3,
    }
    torch.save(saved, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert set(checkpoint.tensors) == set(small_state())
    assert [entry.name for entry in checkpoint.skipped] == ["optimizer", "callbacks", "rng", "epoch"]


def test_several_entries_that_may_be_the_model_are_listed(tmp_path):
    torch.save({"student": small_state(), "teacher": small_state()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="student with 9 tensors, teacher with 9 tensors"):
        open_checkpoint(tmp_path / "a.pt")


def test_entries_that_hold_each_other_have_an_end(tmp_path):
    one: dict = {"n": 1}
    one["other"] = {"model": one, "again": [one] * 5}
    torch.save(one, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="expected a state dict with tensors"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "wrapped",
    [
        "_fsdp_wrapped_module.encoder.layer.0.{}",
        "encoder.layer.0._checkpoint_wrapped_module.{}",
        "encoder._fsdp_wrapped_module.layer.0._fsdp_wrapped_module._checkpoint_wrapped_module.{}",
        "module._orig_mod.encoder.layer.0.{}",
        "_orig_mod.module.encoder.layer.0.{}",
        "_forward_module.module.encoder.layer.0.{}",
    ],
)
def test_names_of_wrappers_are_removed(tmp_path, wrapped):
    names = ["weight", "bias"]
    torch.save({wrapped.format(name): torch.zeros(1) for name in names}, tmp_path / "a.pt")
    assert list(open_checkpoint(tmp_path / "a.pt").tensors) == [f"encoder.layer.0.{name}" for name in names]


def test_an_averaged_model_is_read_as_the_model(tmp_path):
    torch.save(torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2)).state_dict(), tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert list(checkpoint.tensors) == ["weight", "bias"]
    assert [entry.name for entry in checkpoint.skipped] == ["n_averaged"]


def test_a_tar_archive_is_not_always_an_old_one(tmp_path):
    (tmp_path / "file").write_text("x")
    for name, found in (("model.tar", "a tar archive;"), ("old.tar", "torch before 0.1.10")):
        with tarfile.open(tmp_path / name, "w", format=tarfile.USTAR_FORMAT) as archive:
            archive.add(tmp_path / "file", "sys_info" if name == "old.tar" else "model.bin")
        with pytest.raises(CheckpointError, match=found):
            open_checkpoint(tmp_path / name)


def test_a_path_that_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing.bin: it cannot be read \(No such file or directory\)"):
        open_checkpoint(tmp_path / "nothing.bin")
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(CheckpointError, match="expected a file or a folder"):
        open_checkpoint(tmp_path / "pipe.bin")


def edit(index, change):
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, ending):
    index = save_sharded(tmp_path, small_state(), ending)
    text = index.read_text()

    edit(index, lambda names: names.update({"extra.weight": next(iter(names.values()))}))
    with pytest.raises(CheckpointError, match="lacks extra.weight; is the index of this checkpoint?"):
        open_checkpoint(index)

    for shard in ("../secret.bin", "/etc/passwd", "a/b.bin", "..", ""):
        edit(index, lambda names, shard=shard: names.update({"encoder.half": shard}))
        with pytest.raises(CheckpointError, match="plain file name|1 missing"):
            open_checkpoint(index)

    index.write_text(text.replace('"encoder.half"', '"encoder.bytes"', 1))
    with pytest.raises(CheckpointError, match="'encoder.bytes' is there twice"):
        open_checkpoint(index)

    index.write_text(text)
    edit(index, lambda names: names.pop("encoder.half"))
    checkpoint = open_checkpoint(index)
    assert "encoder.half" not in checkpoint.tensors
    assert [entry.name for entry in checkpoint.skipped] == ["encoder.half"]

    index.write_text(text)
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(CheckpointError, match=rf"expected 3 shards, found 1 missing: .*-00002-of-00003.{ending}"):
        open_checkpoint(tmp_path)


def test_a_single_shard_and_shards_without_their_index_are_refused(tmp_path):
    index = save_sharded(tmp_path, small_state(), "safetensors")
    with pytest.raises(CheckpointError, match="it is one shard of 3; name the index"):
        open_checkpoint(tmp_path / "model-00001-of-00003.safetensors")
    index.unlink()
    with pytest.raises(CheckpointError, match="expected one checkpoint, found model-00001-of-00003.safetensors"):
        open_checkpoint(tmp_path)


def test_a_file_that_changes_after_it_was_opened_is_noticed(tmp_path):
    path = save_as("zip", tmp_path, small_state())
    checkpoint = open_checkpoint(path)
    checkpoint.check_unchanged()
    assert read(checkpoint.tensors["encoder.scalar"]) == 3
    torch.save(small_state(), tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with pytest.raises(CheckpointError, match="it was changed while it was being read"):
        checkpoint.check_unchanged()
    path.unlink()
    with pytest.raises(CheckpointError, match="it was removed while it was being read"):
        checkpoint.check_unchanged()


def test_a_tensor_without_a_name_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({"a.weight": torch.zeros(2), 7: torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="name of each tensor"):
        open_checkpoint(path)
