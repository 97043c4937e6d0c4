"""What a conversion makes: the same bytes from every form of a source, its bits, its outputs, and files that follow."""

import argparse
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    LENGTH,
    config,
    convert,
    converted,
    inputs,
    record,
    refused,
    same_bits,
    save,
    save_tensors,
    tensors,
    tiny,
)

import bsa_export
from bsa_export.converted.card import metadata
from bsa_export.converted.folder import open_folder
from bsa_export.converted.integrity import check_file
from bsa_export.sparsity.configs import BigBirdSparsityConfig, windowed_for
from bsa_export.sparsity.layouts import make_layouts
from bsa_export.verify.weights import check_weights

LAYOUT = "encoder.layer.{}.attention.self.sparse_self_attention.master_layout"


def sharded(folder, state, ending):
    """Two shards and their index, as transformers names them."""
    stem = {"bin": "pytorch_model", "safetensors": "model"}[ending]
    names = list(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-{number:05d}-of-00002.{ending}"
        content = {name: state[name].clone() for name in part}
        save_file(content, folder / shard) if ending == "safetensors" else torch.save(content, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


VARIANTS = {
    "zip": lambda folder, state: torch.save(state, folder / "pytorch_model.bin"),
    "zip, .pt": lambda folder, state: torch.save(state, folder / "epoch3.pt"),
    "zip, protocol 5": lambda folder, state: torch.save(state, folder / "pytorch_model.bin", pickle_protocol=5),
    "old pickle": lambda folder, state: torch.save(
        state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "safetensors": lambda folder, state: save_file(
        {name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors"
    ),
    "sharded bin": lambda folder, state: sharded(folder, state, "bin"),
    "sharded safetensors": lambda folder, state: sharded(folder, state, "safetensors"),
    "state_dict": lambda folder, state: torch.save({"epoch": 3, "state_dict": state}, folder / "best.ckpt"),
    "model": lambda folder, state: torch.save(
        {"model": state, "args": argparse.Namespace(lr=1e-4)}, folder / "pytorch_model.bin"
    ),
    "module (DeepSpeed)": lambda folder, state: torch.save(
        {"module": state, "dp_world_size": 2, "ds_config": {"zero": 0}}, folder / "mp_rank_00_model_states.pt"
    ),
    "DataParallel": lambda folder, state: torch.save(
        {f"module.{name}": tensor for name, tensor in state.items()}, folder / "pytorch_model.bin"
    ),
    "parameters": lambda folder, state: torch.save(
        {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}, folder / "pytorch_model.bin"
    ),
    "transposed": lambda folder, state: torch.save(
        {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in state.items()},
        folder / "pytorch_model.bin",
    ),
}


def bytes_of(out):
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_every_form_of_a_model_gives_the_same_bytes(tmp_path, family):
    model = tiny(family)
    state = model.state_dict()
    found = {}
    for name, write in VARIANTS.items():
        source = tmp_path / name
        source.mkdir()
        write(source, state)
        (source / "config.json").write_text(json.dumps(model.config.to_dict()))
        # What training leaves next to the weights is not weights.
        for other in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"lr": 1.0}, source / other)
        assert convert(source, tmp_path / f"{name} out", "--max-length", 4 * LENGTH).exit_code == 0
        found[name] = bytes_of(tmp_path / f"{name} out")
    assert {name for name in found if found[name] != found["zip"]} == set()


@pytest.mark.parametrize("name", ["minilm", "antiberty", "english_mlm"])
def test_real_models_in_every_form_give_the_same_bytes(tmp_path, request, name):
    folder = request.getfixturevalue(name)
    first = converted_file(folder, tmp_path / "first")
    state = (
        load_file(folder / "model.safetensors")
        if (folder / "model.safetensors").is_file()
        else torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    )
    for form in ("old pickle", "sharded safetensors"):
        source = tmp_path / form
        source.mkdir()
        VARIANTS[form](source, state)
        (source / "config.json").write_text((folder / "config.json").read_text())
        assert converted_file(source, tmp_path / f"{form} out") == first


def converted_file(source, target):
    assert convert(source, target, "--max-length", 4096).exit_code == 0
    return bytes_of(target)


@pytest.mark.parametrize("name", ["minilm", "antiberty", "english_mlm"])
def test_copied_tensors_of_real_models_are_bit_identical(tmp_path, request, name):
    folder, out = request.getfixturevalue(name), tmp_path / "out"
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir() if file.is_file()}
    assert convert(folder, out, "--max-length", 4096).exit_code == 0
    pickle = folder / "pytorch_model.bin"
    source = (
        torch.load(pickle, map_location="cpu", weights_only=True)
        if pickle.is_file()
        else load_file(folder / "model.safetensors")
    )
    told, after = record(out), tensors(out)
    left_out = {*told["dropped"], *told["tied"]}
    assert all(name.endswith("_ids") for name in told["dropped"])
    assert all(same_bits(source[name], source[holder]) for name, holder in told["tied"].items())
    positions = [name for name in source if name.endswith("position_embeddings.weight")]
    assert list(told["changed"]) == positions
    for each in set(source) - left_out - set(positions):
        assert same_bits(after[each], source[each]), each
    assert same_bits(after[positions[0]], source[positions[0]].repeat(8, 1))
    assert set(after) == (set(source) - left_out) | set(told["added"])
    assert {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir() if file.is_file()
    } == before


SHORT = (512, 300)


def auto_class(name):
    return transformers.AutoModel if name == "minilm" else transformers.AutoModelForMaskedLM


def some_outputs(model, lengths):
    """What a model says of random texts, float64 `[tokens, outputs]` for each length."""
    words = min(model.config.vocab_size, 30000)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, words, (1, length), generator=generator) for length in lengths]
    with torch.inference_mode():
        return [model(text)[0][0].double() for text in texts]


def distance(found, exact):
    return (found - exact).square().mean().sqrt()


@pytest.fixture(scope="module")
def dense_outputs(request):
    """`dense_outputs(name)`: of a real model, what it says in float64, and how far from that float32 is."""
    made = {}

    def get(name):
        if name not in made:
            folder = request.getfixturevalue(name)
            exact, found = (
                some_outputs(auto_class(name).from_pretrained(folder, dtype=dtype), SHORT)
                for dtype in (torch.float64, torch.float32)
            )
            made[name] = exact, [distance(one, other) for one, other in zip(found, exact, strict=True)]
        return made[name]

    return get


@pytest.mark.parametrize("options", [("--mode", "dense"), ("--max-length", 4096)], ids=["dense", "default at 4,096"])
@pytest.mark.parametrize("name", ["minilm", "antiberty", "english_mlm"])
def test_outputs_up_to_the_original_length_are_the_dense_models(tmp_path, request, dense_outputs, name, options):
    """In float32, at most twice the distance of the dense model itself, both from float64."""
    assert convert(request.getfixturevalue(name), tmp_path / "out", *options).exit_code == 0
    model = auto_class(name).from_pretrained(tmp_path / "out", attn_implementation="block_sparse", dtype=torch.float32)
    exact, allowed = dense_outputs(name)
    for found, judge, error in zip(some_outputs(model, SHORT), exact, allowed, strict=True):
        assert distance(found, judge) <= 2 * error


def test_beyond_the_original_length_it_is_the_dense_model_under_the_mask(tmp_path):
    """Written down for tokens: two see each other in one window of 64, or 2 blocks apart at most."""
    source = tiny("bert")
    out = converted(save(source, tmp_path / "source"), "--max-length", 256, "--block", 16)
    model = bsa_export.load(out)
    batch = inputs(250)
    place = torch.arange(250)
    near = (place[:, None] // 16 - place // 16).abs() <= 2
    kept = (place[:, None] // 64 == place // 64) | near
    judge = transformers.BertForMaskedLM.from_pretrained(out, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = judge(batch["input_ids"], attention_mask=kept & batch["attention_mask"].bool()[:, None, None]).logits
        found = model(**batch).logits.double()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=2e-5)


# dtype


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("choice", ["fp32", "fp16", "bf16", "keep"])
def test_dtypes_round_as_torch_does(tmp_path, source_dtype, choice):
    model = tiny("bert").to(source_dtype)
    state = dict(model.state_dict()) | {"steps": torch.tensor(7), "flags": torch.tensor([True, False])}
    source = save_tensors(tmp_path / "source", state, model.config.to_dict() | {"architectures": ["BertForMaskedLM"]})
    out = converted(source, "--dtype", choice, "--max-length", LENGTH)
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "keep": source_dtype}[choice]
    after, told = tensors(out), record(out)
    for name, tensor in state.items():
        if name not in told["tied"]:
            assert same_bits(after[name], tensor.to(wanted) if tensor.is_floating_point() else tensor), name
    assert all(tensor.dtype == torch.uint8 for name, tensor in after.items() if name.endswith("master_layout"))
    assert bool(told["changed"]) == (wanted != source_dtype)
    if choice != "keep":
        assert (config(out).get("dtype") or config(out).get("torch_dtype")) == str(wanted).removeprefix("torch.")
        assert bsa_export.load(out).dtype == wanted


def test_a_value_that_overflows_fp16_is_told_with_its_name(tmp_path):
    model = tiny("bert")
    state = dict(model.state_dict())
    state["bert.encoder.layer.1.output.dense.weight"] = state["bert.encoder.layer.1.output.dense.weight"].clone()
    state["bert.encoder.layer.1.output.dense.weight"][3, 5] = -70000
    source = save_tensors(tmp_path / "source", state, model.config.to_dict())
    told = "bert.encoder.layer.1.output.dense.weight: -70000 is too large for F16; choose another --dtype"
    assert refused(source, tmp_path / "out", "--dtype", "fp16") == f"{told} (bf16 has the range of fp32)"
    assert not list(tmp_path.glob("*out*"))
    assert convert(source, tmp_path / "out", "--dtype", "bf16").exit_code == 0


# Sparsity


@pytest.mark.parametrize(
    ("options", "n", "block"),
    [
        ((), 8, 64),
        (("--max-length", 64), 1, 64),
        (("--max-length", "1k"), 16, 64),
        (("--max-length", "1,024"), 16, 64),
        (("--max-length", 48), 3, 16),
        (("--max-length", 96), 3, 32),
        (("--max-length", 1008), 63, 16),
        (("--max-length", 192, "--block", 48), 4, 48),
        (("--max-length", 7, "--block", 1), 7, 1),
        (("--max-length", 65536, "--block", 128), 512, 128),
    ],
    ids=str,
)
def test_any_length_of_whole_blocks(tmp_path, options, n, block):
    out = converted(save(tiny("bert"), tmp_path / "source"), *options)
    judge = make_layouts(windowed_for(LENGTH, 4, block), n * block, 2)[0]
    for layer in range(2):
        assert np.array_equal(tensors(out)["bert." + LAYOUT.format(layer)].numpy(), judge)
    assert config(out)["max_position_embeddings"] == n * block
    assert config(out)["sparse_attention"]["block"] == block


def test_a_length_that_is_no_multiple_of_the_block(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")
    assert (
        refused(source, tmp_path / "out", "--max-length", 1000, "--block", 64)
        == "--max-length: expected a length in whole blocks of 64 tokens, found 1,000; choose 960 or 1,024"
    )


MODES = {
    "windowed": ("--num-local-blocks", 2, "--num-sliding-window-blocks", 5),
    "dense": (),
    "fixed": ("--num-local-blocks", 4, "--num-global-blocks", 2, "--horizontal-global-attention",
              "--different-layout-per-head", "--num-different-global-patterns", 2),
    "variable": ("--local-window-blocks", "2,4", "--global-block-indices", "0,3", "--global-block-end-indices", "1,5",
                 "--num-random-blocks", 1),
    "bigbird": ("--num-random-blocks", 2, "--num-sliding-window-blocks", 3, "--num-global-blocks", 1, "--seed", 4),
    "bslongformer": ("--num-sliding-window-blocks", 3, "--global-block-indices", "0,9"),
    "local": ("--num-sliding-window-blocks", 5, "--attention", "unidirectional"),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_takes_its_parameters_and_runs(tmp_path, mode):
    source = save(tiny("bert"), tmp_path / "source")
    out = converted(source, "--mode", mode, "--block", 16, "--max-length", 256, *MODES[mode])
    section = config(out)["sparse_attention"]
    given = [str(option).removeprefix("--").replace("-", "_") for option in MODES[mode] if str(option).startswith("--")]
    assert set(given) - {"seed"} <= set(section) and section["num_heads"] == 4 and section["block"] == 16
    assert record(out)["sparsity"]["mode"] == mode and record(out)["seed"] == (4 if mode == "bigbird" else 0)
    layouts = [tensors(out)["bert." + LAYOUT.format(layer)] for layer in range(2)]
    assert torch.equal(*layouts) and layouts[0].shape == (4, 16, 16)
    with torch.no_grad():
        assert bsa_export.load(out)(**inputs(200)).logits.isfinite().all()


def test_random_blocks_follow_the_seed_and_layers_may_differ(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")

    def layouts(*options):
        target = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert convert(source, target, "--mode", "bigbird", "--block", 16, "--max-length", 512, *options).exit_code == 0
        return [tensors(target)["bert." + LAYOUT.format(layer)] for layer in range(2)]

    same, again, other = layouts("--seed", 1), layouts("--seed", 1), layouts("--seed", 2)
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], again[0]) and not torch.equal(same[0], other[0])
    each = layouts("--seed", 1, "--different-layout-per-layer")
    assert torch.equal(each[0], same[0]) and not torch.equal(each[0], each[1])
    judge = make_layouts(BigBirdSparsityConfig(4, 16), 512, 2, 1, different_layout_per_layer=True)
    assert all(np.array_equal(layout.numpy(), expected) for layout, expected in zip(each, judge, strict=True))
    assert "layers differ only in random blocks" in refused(source, tmp_path / "x", "--different-layout-per-layer")


@pytest.mark.parametrize(
    "form", ["one .npy", "a .npy of layers", "one .safetensors", "a .safetensors of layers", "int64"]
)
def test_custom_layouts_from_a_file(tmp_path, form):
    source = save(tiny("bert"), tmp_path / "source")
    rng = np.random.default_rng(0)
    layers = [(rng.random((4, 8, 8)) < 0.4) | np.eye(8, dtype=bool) for _ in range(2)]
    if "of layers" not in form:
        layers[1] = layers[0]
    file = tmp_path / ("layout.npy" if "npy" in form else "layout.safetensors")
    each = [torch.from_numpy(layer.astype(np.int64 if form == "int64" else np.uint8)) for layer in layers]
    match form:
        case "one .npy":
            np.save(file, layers[0])
        case "a .npy of layers":
            np.save(file, np.stack(layers).astype(np.int32))
        case "one .safetensors" | "int64":
            save_file({"layout": each[0]}, file)
        case "a .safetensors of layers":
            save_file({f"layer.{i}": layout for i, layout in enumerate(each)}, file)
    out = converted(source, "--layout", file, "--block", 16, "--max-length", 128)
    for i, layer in enumerate(layers):
        assert np.array_equal(tensors(out)["bert." + LAYOUT.format(i)].numpy(), layer.astype(np.uint8))
    assert config(out)["sparse_config_cls"] == "bsa_export.sparsity:CustomSparsityConfig"
    assert record(out)["sparsity"]["mode"] == "custom" and record(out)["options"]["layout"] == file.name
    # A converted folder is such a file as well.
    again = ("--layout", out / "model.safetensors", "--block", 16, "--max-length", 128)
    assert convert(source, tmp_path / "b", *again).exit_code == 0
    assert bytes_of(tmp_path / "b") == bytes_of(out)


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (np.ones((4, 7, 7), np.uint8), "expected a layout [4, 8, 8] or [1, 8, 8], found [4, 7, 7]"),
        (np.ones((3, 8, 8), np.uint8), "expected a layout [4, 8, 8] or [1, 8, 8], found [3, 8, 8]"),
        (np.triu(np.ones((4, 8, 8), np.uint8), 1), "head 0, row 7: keeps no block"),
        (2 * np.ones((4, 8, 8), np.uint8), "expected only 0 and 1, found 2 in column 0"),
        (np.ones((4, 8, 8), np.float32), "expected integers or booleans, found float32"),
        (np.ones((5, 4, 8, 8), np.uint8), "expected one layout, or one for each of 2 layers, found 5"),
    ],
)  # fmt: skip
def test_custom_layouts_that_cannot_be(tmp_path, layout, told):
    np.save(tmp_path / "layout.npy", layout)
    source = save(tiny("bert"), tmp_path / "source")
    assert told in refused(
        source, tmp_path / "out", "--layout", tmp_path / "layout.npy", "--block", 16, "--max-length", 128
    )


# What is written next to the weights, and what is said


def test_the_files_of_a_sentence_transformer_follow(tmp_path, minilm):
    out = tmp_path / "out"
    assert convert(minilm, out, "--max-length", 4096).exit_code == 0
    assert transformers.AutoTokenizer.from_pretrained(out).model_max_length == 4096
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] == 4096
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "README.md", "config.json", "conversion.json", "model.safetensors", "modules.json", "1_Pooling/config.json",
        "sentence_bert_config.json", "config_sentence_transformers.json", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json", "vocab.txt", "layout.png",
    }  # fmt: skip
    card = metadata(out / "README.md")
    assert card["license"] == "apache-2.0" and "sentence-transformers" in card["tags"]
    before, after = config(minilm), config(out)
    assert {name for name in before if before[name] != after[name]} == {"max_position_embeddings"}
    assert set(after) - set(before) == {"sparse_config_cls", "sparse_attention", "attn_implementation"}
    assert after["attn_implementation"] == "block_sparse"


def test_the_record_says_what_was_done(tmp_path):
    out = converted(save(tiny("roberta"), tmp_path / "source"), "--max-length", 256, "--positions", "interpolate")
    told = record(out)
    assert told["source"]["path"] == "source" and told["source"]["repo"] is None
    assert told["source"]["files"] == {
        "model.safetensors": {
            "bytes": (tmp_path / "source" / "model.safetensors").stat().st_size,
            "sha256": None,
            "checksum": None,
        }
    }
    assert (told["family"], told["source_length"], told["max_length"]) == ("roberta", 64, 256)
    assert told["positions"] == {"method": "interpolate", "reserved": 2, "source_rows": 66, "rows": 258}
    assert set(told["files"]) == {path.name for path in out.iterdir()} - {"conversion.json", "README.md", "layout.png"}
    for name, file in told["files"].items():
        assert file["bytes"] == (out / name).stat().st_size
    assert told["options"]["max_length"] == 256 and told["bsa_export"] == bsa_export.__version__


def test_what_is_left_out_is_recorded_verified_and_restored(tmp_path):
    """One of two encoders, a tensor that BERT lacks, and fields that block-sparse attention does not allow."""
    model = tiny("bert")
    state = {f"query.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"document.{name}": tensor for name, tensor in model.bert.state_dict(prefix="bert.").items()}
    state["query.bert.embeddings.rank_embeddings.weight"] = torch.ones(3, 32)
    fields = {"output_attentions": True, "auto_map": {"AutoModel": "their.Model"}, "attn_implementation": "eager"}
    source = save_tensors(tmp_path / "source", state, model.config.to_dict() | fields)
    out = converted(source, "--prefix", "query.bert", "--ignore-tensors", "*.rank_*", "--max-length", 256)
    kinds = [note["kind"] for note in record(out)["notes"]]
    assert kinds == ["ignored tensors", "other encoder", "config field", "config field"]
    assert {name.split(".")[0] for name in tensors(out)} == {"bert", "cls"}
    assert config(out)["attn_implementation"] == "block_sparse" and not {"output_attentions", "auto_map"} & set(
        config(out)
    )
    assert check_file(out).passed and check_weights(open_folder(out), source).passed
    assert "outputs are those of the source" not in (out / "README.md").read_text()
    with torch.no_grad():
        assert bsa_export.load(out)(**inputs()).logits.isfinite().all()
    assert convert(out, tmp_path / "dense", "--to-dense").exit_code == 0
    assert config(tmp_path / "dense") == config(source)


def test_shards_hold_the_same_tensors(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")
    whole = tensors(converted(source, "--max-length", 256))
    assert convert(source, tmp_path / "sharded", "--max-length", 256, "--max-shard-size", "40KB").exit_code == 0
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "sharded" / "model.safetensors").exists()
    assert all(same_bits(tensor, whole[name]) for name, tensor in tensors(tmp_path / "sharded").items())
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    assert bsa_export.load(tmp_path / "sharded") is not None


def test_a_file_alone_needs_its_config(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")
    (source / "config.json").rename(tmp_path / "else.json")
    text = refused(source / "model.safetensors", tmp_path / "out")
    assert "expected the model's config.json" in text and "--config" in text
    assert convert(source / "model.safetensors", tmp_path / "out", "--config", tmp_path / "else.json").exit_code == 0


def test_a_link_into_a_cache_is_read_where_it_lies(tmp_path):
    """The Hub's cache holds links to blobs without names; config.json is next to the link."""
    source = save(tiny("bert"), tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    (source / "model.safetensors").rename(tmp_path / "blobs" / "0123")
    (source / "model.safetensors").symlink_to(tmp_path / "blobs" / "0123")
    assert convert(source / "model.safetensors", tmp_path / "out").exit_code == 0


def test_a_dry_run_says_everything_and_writes_nothing(tmp_path):
    source = save(tiny("distilbert"), tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    result = convert(source, tmp_path / "out", "--dry-run", "--max-length", 512)
    assert result.exit_code == 0 and sorted(tmp_path.rglob("*")) == before
    for fact in ("distilbert, 2 layers of 4 heads", "64 -> 512 tokens, positions tiled", "density", "GFLOP dense",
                 "distilbert.embeddings.LayerNorm.bias -> bert.embeddings.LayerNorm.bias",
                 "nothing: this is a dry run"):  # fmt: skip
        assert fact in result.stdout
    without_target = convert(source, "--dry-run", "--max-length", 512, "--json")
    content = json.loads(without_target.stdout)
    assert content["tensors"]["bert.embeddings.position_embeddings.weight"]["shape"] == [512, 32]
    assert content["attention_flops"]["sparse"] < content["attention_flops"]["dense"]
    out = tensors(converted(source, "--max-length", 512))
    assert {name: row["shape"] for name, row in content["tensors"].items()} == {
        name: list(tensor.shape) for name, tensor in out.items()
    }


def test_json_is_for_programs(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")
    result = convert(source, tmp_path / "out", "--json")
    content = json.loads(result.stdout)
    assert content["seconds"] > 0 and record(tmp_path / "out").items() <= content.items() and result.stderr == ""
    dry = json.loads(convert(source, "--dry-run", "--json").stdout)
    assert dry.keys() <= content.keys() and dry["needs_training"] is content["needs_training"] is False


def facts(*arguments):
    result = convert(*arguments)
    assert result.exit_code == 0, result.output
    lines = [line.split("  ", 1) for line in result.stdout.splitlines() if not line.startswith(" ")]
    return {label.strip(): value.strip() for label, value in lines}


def test_facts_of_the_default(tmp_path):
    source = save(tiny("bert", length=128), tmp_path / "source")
    told = facts(source, tmp_path / "a")
    assert "128 -> 1,024 tokens" in told["length"]
    assert "128 tokens" in told["short inputs"] and told["short inputs"].startswith("same outputs")
    assert "127 tokens" in told["reach"] and told["training"] == "not needed"
    assert told["tensors"] == "41 copied, 1 changed, 2 added"
    told = facts(source, tmp_path / "b", "--max-length", 128)
    assert told["length"].startswith("128 tokens") and "reach" not in told


def test_quiet_and_verbose(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")
    quiet = convert(source, tmp_path / "a", "-q").stdout
    assert quiet.count("\n") == 1 and str(tmp_path / "a") in quiet
    name = "bert.embeddings.position_embeddings.weight"
    assert name in convert(source, tmp_path / "b", "-v").stdout and name not in convert(source, tmp_path / "c").stdout
    assert convert(source, tmp_path / "d", "-v", "-q").exit_code == 2


@pytest.mark.parametrize(
    ("options", "short", "reach", "training"),
    [
        (("--mode", "dense"), "same outputs", "1,023 tokens away; position embeddings repeat", "needed"),
        (("--mode", "fixed", "--num-local-blocks", 8), "same outputs", "up to 127 tokens", "needed"),
        (("--mode", "bigbird"), "outputs differ", "up to 1,023 through global or random", "needed"),
        (("--mode", "bslongformer"), "outputs differ", "up to 1,023 through global or random", "needed"),
        (("--mode", "local", "--num-sliding-window-blocks", 17), "same outputs", "143 tokens away; position",
         "needed"),
        (("--mode", "windowed", "--num-sliding-window-blocks", 3), "same outputs", "no two visible tokens",
         "not needed"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_every_mode_says_what_it_means(tmp_path, options, short, reach, training):
    source = save(tiny("bert", length=128), tmp_path / "source")
    told = facts(source, tmp_path / "out", "--max-length", 1024, "--block", 16, *options)
    assert told["short inputs"].startswith(short) and reach in told["reach"] and told["training"].startswith(training)
    assert "%" in told["density"]


def test_interpolated_positions_are_nobodys_own(tmp_path):
    source = save(tiny("bert", length=128), tmp_path / "source")
    told = facts(source, tmp_path / "out", "--max-length", 1024, "--positions", "interpolate")
    assert told["short inputs"].startswith("outputs differ") and "interpolated" in told["short inputs"]
    assert "127 tokens" in told["reach"] and told["training"].startswith("needed")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "interpolated" in card and "outputs are those of the source" not in card


@pytest.mark.parametrize(
    ("source_length", "max_length", "block"),
    [
        (96, 960, 32),
        (400, 3200, 16),
        (128, 1024, 64),
        (100, 1024, 64),
        (128, None, 64),
        (100, None, 32),
        (7, None, 16),
        (4096, None, 64),
    ],
)
def test_the_default_block_divides_both_lengths_if_one_does(tmp_path, source_length, max_length, block):
    source = save(tiny("bert", length=source_length), tmp_path / "source")
    told = facts(source, tmp_path / "out", *(() if max_length is None else ("--max-length", max_length)))
    reads = {128: 1024, 100: 800, 7: 64, 4096: 4096}[source_length] if max_length is None else max_length
    assert config(tmp_path / "out")["max_position_embeddings"] == reads
    assert config(tmp_path / "out")["sparse_attention"]["block"] == block
    assert (told["training"] == "not needed") == (source_length % block == 0)


def test_what_is_not_read_is_listed(tmp_path):
    source = save_tensors(tmp_path / "source", {}, tiny("bert").config.to_dict())
    torch.save({"model": tiny("bert").state_dict(), "epoch": 3, "best": 0.5}, source / "pytorch_model.bin")
    torch.save({}, source / "other.bin")
    shown = facts(source, tmp_path / "out")
    assert "other.bin" in shown["note"] and "epoch" in shown["skipped"]
    assert set(record(tmp_path / "out")["skipped"]) == {"epoch", "best"}


@pytest.mark.parametrize(
    ("picture", "words"), [("layout.txt", "ending in .png"), ("absent/layout.png", "no such folder")]
)
def test_a_picture_that_cannot_be_drawn_is_told_before_converting(tmp_path, picture, words):
    source = save(tiny("bert"), tmp_path / "source")
    assert words in refused(source, tmp_path / "out", "--plot", tmp_path / picture)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_dry_run_refuses_the_target_that_the_run_would(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")
    out = converted(source)
    assert "not empty" in refused(source, out, "--dry-run")


def test_an_earlier_conversion_is_replaced_only_when_asked(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")
    out = converted(source)
    (out / "verification.json").write_text("{}")
    text = refused(source, out, "--max-length", 256)
    assert "--overwrite" in text and config(out)["max_position_embeddings"] == 512
    assert convert(source, out, "--max-length", 256, "--overwrite").exit_code == 0
    assert config(out)["max_position_embeddings"] == 256 and not (out / "verification.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert "only an earlier conversion may be overwritten" in refused(source, tmp_path / "mine", "--overwrite")


@pytest.mark.parametrize("target", ["the source", "its parent"])
def test_the_source_is_never_replaced(tmp_path, target):
    source = converted(save(tiny("bert"), tmp_path / "source"))
    (tmp_path / "conversion.json").write_bytes((source / "conversion.json").read_bytes())
    text = refused(source, source if target == "the source" else tmp_path, "--overwrite")
    assert "the target would replace the source" in text
    assert (source / "model.safetensors").is_file()


def test_weights_that_are_links_into_the_target_are_never_replaced(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")
    out = converted(source, "--max-length", LENGTH)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(out / "model.safetensors")
    before = bytes_of(out)
    assert "the target would replace the source" in refused(source, out, "--overwrite", "--dtype", "fp16")
    assert bytes_of(out) == before


def test_names_that_are_no_text_convert(tmp_path):
    source = save(tiny("bert"), tmp_path / "source").rename(tmp_path / os.fsdecode(b"mod\xe8le"))
    ran = subprocess.run(
        [Path(sys.executable).with_name("bsa-convert"), source, os.fsdecode(b"sorti\xe8")],
        cwd=tmp_path,
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert record(tmp_path / os.fsdecode(b"sorti\xe8"))["source"]["path"] == "mod?le"


def test_a_mistyped_local_path_is_told_beside_the_hubs_answer(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    told = refused("checkpoints/best", "out")
    assert told.startswith("no such file or folder, and as a repository: ")


@pytest.mark.parametrize("length", [64 * 16385, 10**9])
def test_a_length_of_too_many_blocks_is_a_sentence(tmp_path, length):
    source = save(tiny("bert"), tmp_path / "source")
    assert "expected at most 1,048,576 tokens in blocks of 64" in refused(
        source, "--dry-run", "--max-length", length // 64 * 64, "--block", 64
    )


def test_a_picture_of_the_layout_before_converting(tmp_path):
    source = save(tiny("bert"), tmp_path / "source")
    assert convert(source, "--dry-run", "--max-length", 512, "--plot", tmp_path / "layout.png").exit_code == 0
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")


def test_nan_weights_are_copied_and_told(tmp_path):
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
        model.bert.encoder.layer[1].output.dense.bias[0] = float("inf")
    source = save(model, tmp_path / "source")
    told = facts(source, tmp_path / "out")
    assert told["warning"].startswith("bert.encoder.layer.0.output.dense.weight holds NaN values, and 1 more tensors")
    assert record(tmp_path / "out")["not_finite"] == {
        "bert.encoder.layer.0.output.dense.weight": "NaN",
        "bert.encoder.layer.1.output.dense.bias": "infinite",
    }


def test_the_file_is_safetensors_for_everyone(tmp_path):
    out = converted(save(tiny("bert"), tmp_path / "source"))
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--list-families"], ["SOURCE", "out", "--max-length", "512"], ["SOURCE", "--dry-run"]]
)
def test_nothing_heavy_is_imported(tmp_path, arguments):
    """Neither torch nor triton nor deepspeed nor transformers, by name or by accident."""
    source = save(tiny("bert"), tmp_path / "source")
    arguments = [str(source) if argument == "SOURCE" else argument for argument in arguments]
    script = f"""
import sys
sys.argv = ["bsa-convert", *{arguments!r}]
from bsa_export.cli.convert import main
main(standalone_mode=False)
heavy = {{"torch", "triton", "deepspeed", "transformers", "matplotlib"}} & set(sys.modules)
print("imported:", *sorted(heavy))
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "imported:"


SLOW = """
import time
from bsa_export.cli.progress import Progress
with Progress() as progress:
    update = progress.begin(unit="B")
    for done in range(14):
        time.sleep(0.1)
        if update:
            update(done * 10**8, 14 * 10**8)
print("done")
"""


def test_a_person_who_waits_sees_a_bar():
    shown = b""

    def read(terminal):
        nonlocal shown
        shown += (piece := os.read(terminal, 4096))
        return piece

    assert pty.spawn([sys.executable, "-c", SLOW], read) == 0
    assert b"/1.40G" in shown and b"%|" in shown and shown.endswith(b"done\r\n")


def test_a_program_that_waits_sees_none():
    ran = subprocess.run([sys.executable, "-c", SLOW], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("done\n", "")


def test_the_console_script_is_installed():
    ran = subprocess.run([Path(sys.executable).with_name("bsa-convert"), "--version"], capture_output=True, text=True)
    assert ran.stdout.startswith("bsa-convert ")
