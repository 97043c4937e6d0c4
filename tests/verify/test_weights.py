"""The weights check against real sources: clean conversions pass, planted faults are found, memory stays flat."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from planted import KINDS, planted, signature, without_digests
from safetensors.numpy import load_file, save_file

from bsa_export.bert.families import FAMILIES, written_name
from bsa_export.converted.folder import open_folder
from bsa_export.verify import check_file, check_layout, names
from bsa_export.verify.rules import bits_of, is_rounded
from bsa_export.verify.weights import check_weights, tiled_rows_fault

CLEAN = {
    "tiled": {},
    "interpolated": {"positions": "interpolate"},
    "interpolated, no multiple": {"positions": "interpolate", "max_length": 144},
    "shorter": {"max_length": 32},
    "fp16": {"dtype": "fp16"},
    "bf16, interpolated": {"dtype": "bf16", "positions": "interpolate"},
    "bf16 source": {"source_dtype": "bfloat16"},
    "fp64 source to fp32": {"source_dtype": "float64", "dtype": "fp32"},
    "fp16 source to fp32": {"source_dtype": "float16", "dtype": "fp32", "positions": "interpolate"},
    "shards": {"shard": 60_000},
    "roberta": {"family": "roberta", "positions": "interpolate"},
    "distilbert from a .bin": {"family": "distilbert", "format": "bin"},
    "electra": {"family": "electra", "dtype": "fp16"},
    "random layouts": {"mode": "bigbird", "seed": 3, "per_layer": True},
}


def check(folder, source):
    return check_weights(open_folder(folder), source)


@pytest.mark.parametrize("case", CLEAN)
def test_a_conversion_equals_its_source(case, converted):
    source, folder = converted(**CLEAN[case])
    found = check(folder, source)
    assert found.passed, found.reason
    assert found.figures["bytes"] == sum(row.nbytes for row in open_folder(folder).tensors.values())


def test_a_tied_tensor_is_compared_and_its_bytes_are_counted_once(converted, tmp_path):
    from bsa_export.conversion.convert import convert_source as convert
    from bsa_export.hub.source import Source

    source = shutil.copytree(converted()[0], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    words, decoder = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    save_file(tensors | {decoder: tensors[words].copy()}, source / "model.safetensors")
    convert(Source(source), tmp_path / "out")
    found = check(tmp_path / "out", source)
    assert found.passed and found.figures["tied"] >= 1
    assert found.figures["bytes"] == sum(row.nbytes for row in open_folder(tmp_path / "out").tensors.values())
    save_file(tensors | {decoder: tensors[words] + 1}, source / "model.safetensors")
    assert decoder in check(tmp_path / "out", source).reason or words in check(tmp_path / "out", source).reason


def edit_record(folder, **origin):
    path = folder / "conversion.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"source": record["source"] | origin}))


def test_another_model_is_one_fault(converted, tmp_path):
    """By its config.json, or without one next to the weights, by its tensors."""
    source, folder = converted()
    config = json.loads((source / "config.json").read_text())
    other = shutil.copytree(source, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    found = check(folder, other)
    place = other / "config.json"
    assert found.faults == [f"this is not the source: hidden_size is 32 in {place}, and 64 in conversion.json"]
    tensors = load_file(source / "model.safetensors")
    halves = {name: tensor[: len(tensor) // 2].copy() for name, tensor in tensors.items()}
    save_file(halves, other / "model.safetensors")
    (other / "config.json").unlink()
    (fault,) = check(folder, other).faults
    assert fault.startswith("this is not the source: ") and "of its" in fault


def test_the_same_architecture_with_other_weights_is_told_tensor_by_tensor(converted, damaged, tmp_path):
    source = shutil.copytree(converted()[0], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, source / "model.safetensors")
    _, folder = damaged()
    assert len(check(folder, source).faults) == len(tensors)
    edit_record(folder, repo="org/name", revision="a" * 40)
    hint = f"; the conversion was made of --source org/name@{'a' * 40}"
    hinted = check_weights(open_folder(folder), source, source_name="org/name")
    assert hinted.reason.endswith(f"{hint} (and {len(tensors) - 1} more)")
    for name in ("org/other", f"org/name@{'a' * 40}", None):
        assert hint not in check_weights(open_folder(folder), source, source_name=name).reason


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fault_is_found_with_the_source_and_by_digests(kind, damaged):
    """Beside a source, without any digest; and by digests, without the source."""
    source, folder = damaged(mode="bigbird", seed=1)
    bare = shutil.copytree(folder, folder.with_name("bare"))
    without_digests(bare)
    clean = signature(folder), signature(bare)
    assert check_file(folder).passed and check_file(bare).passed and check(bare, source).passed
    for seed in range(6):
        with planted(kind, folder, seed) as what:
            assert check_file(folder).failed, what
        with planted(kind, bare, seed) as what:
            faults = [check_file(bare), check_layout(bare)]
            if not any(found.failed for found in faults):
                assert check(bare, source).failed, what
    assert clean == (signature(folder), signature(bare))


def edited_record(folder, edit):
    record = json.loads((folder / "conversion.json").read_text())
    edit(record)
    (folder / "conversion.json").write_text(json.dumps(record))


KEY = "bert.encoder.layer.0.attention.self.key.weight"
POSITIONS = "bert.embeddings.position_embeddings.weight"
LIES = {
    "dropped": (lambda record: record["dropped"].update({KEY: "buffer"}), "lost: conversion.json drops it"),
    "renamed": (
        lambda record: record["renamed"].update({KEY: KEY.replace("key", "query")}),
        "conversion.json has it as",
    ),
    "changed": (
        lambda record: record["changed"].update({KEY: {"dtype": ["F32", "F16"]}}),
        "conversion.json says otherwise",
    ),
    "another method": (lambda record: record["options"].update({"positions": "interpolate"}), "two ways to extend it"),
    "another seed length": (lambda record: record["positions"].update({"source_rows": 32}), "expected source_rows 64"),
    "rounded": (lambda record: record["options"].update({"dtype": "fp16"}), "conversion.json says otherwise"),
    "renamed from nothing": (lambda record: record["renamed"].update(old=KEY), "the source has no such tensor"),
    "dropped from nothing": (lambda record: record["dropped"].update(old="buffer"), "the source has no such tensor"),
    "tied to nothing": (lambda record: record["tied"].update(old=KEY), "the source has no such tensor"),
    "added": (lambda record: record["added"].append(KEY), "conversion.json has it as added"),
    "tied": (lambda record: record["tied"].update({KEY: KEY}), "transformers does not tie the two"),
    "the dtype of the source": (
        lambda record: record["changed"][POSITIONS].update(dtype=["F16", "F32"]),
        "conversion.json says that it was F16",
    ),
    "sparse before": (lambda record: record.update(sparse_source=True), "sparse_source: expected False"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_record_that_lies_is_found(lie, damaged):
    source, folder = damaged()
    edit, sentence = LIES[lie]
    edited_record(folder, edit)
    found = check(folder, source)
    assert found.failed
    assert any(sentence in row["fault"] for row in found.details), found.details


def test_a_tensor_from_nowhere_is_found(damaged):
    source, folder = damaged()
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"extra": np.zeros(3, "f4")}, folder / "model.safetensors", metadata={"format": "pt"})
    assert check(folder, source).reason == "extra: nothing in the source implies this tensor"


def test_a_lost_tensor_is_found(damaged):
    source, folder = damaged()
    tensors = load_file(folder / "model.safetensors")
    del tensors["cls.predictions.transform.dense.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert check(folder, source).reason.startswith("cls.predictions.transform.dense.bias: lost")


def test_another_source_is_found(converted):
    _, folder = converted()
    other, _ = converted(seed=9)
    assert check(folder, other).failed


def test_a_source_without_config_json_says_that_it_is_not_compared(converted, tmp_path):
    source, folder = converted()
    assert "not compared" not in check(folder, source).figures
    shutil.copy(source / "model.safetensors", tmp_path)
    found = check(folder, tmp_path)
    assert found.passed and "--config" in found.figures["not compared"]


def test_another_config_of_the_source_is_found(converted, tmp_path):
    source, folder = converted()
    other = shutil.copytree(source, tmp_path / "source")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    reason = check(folder, other).reason
    assert reason.startswith("this is not the source: num_attention_heads is 8 in ") and ", and 4 in" in reason
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    assert "layer_norm_eps is 0.5, and in conversion.json 1e-12" in check(folder, other).reason


def test_tiled_rows_are_compared_with_each_other_without_the_source(damaged):
    _, folder = damaged(family="roberta")
    assert tiled_rows_fault(open_folder(folder)) is None
    name = "roberta.embeddings.position_embeddings.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][2 + 64 + 7, 5] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"{name}: row 73 " in tiled_rows_fault(open_folder(folder))


def test_the_judge_states_the_names_as_the_families_do():
    """Two statements of the same names, for all tensors of every family and what wrappers make of them."""
    modules = [name for pair in names.DISTILBERT_LAYER.items() for name in pair]
    inner = [
        f"{start}.{i}.{m}.weight" for start in ("encoder.layer", "transformer.layer") for i in (0, 11) for m in modules
    ]
    inner += ["embeddings.LayerNorm.gamma", "embeddings.word_embeddings.weight", "pooler.dense.bias"]
    heads = ["cls.predictions.bias", "lm_head.dense.weight", "classifier.bias", *names.DISTILBERT_HEAD]
    for family in FAMILIES.values():
        for wrapper in ("", "model.", "net.encoder."):
            prefix = f"{wrapper}{family.prefix}."
            for name in [*(prefix + name for name in inner), *(wrapper + name for name in heads)]:
                assert names.expected_name(family.name, prefix, name) == written_name(family, prefix, name), name
        for name in inner:
            assert names.expected_name(family.name, "", name) == written_name(family, "", name), name


def test_the_judge_states_the_ties_as_the_families_do():
    for family in FAMILIES.values():
        prefix = f"{family.written_prefix}."
        for name, holder in family.tied.items():
            holder = prefix + holder[1:] if holder.startswith(".") else holder
            assert names.tied_to(written_name(family, f"{family.prefix}.", name), prefix) == holder
    assert names.tied_to("classifier.weight", "bert.") is None


def test_equal_tensors_that_transformers_does_not_tie_are_both_needed(converted, tmp_path):
    """A head's tensor is left out, as if it stood for another one with the same bytes."""
    from bsa_export.conversion.convert import convert_source as convert
    from bsa_export.hub.source import Source

    source = shutil.copytree(converted()[0], tmp_path / "source")
    tensors, (one, other) = load_file(source / "model.safetensors"), ("cls.one", "cls.two")
    save_file(tensors | {one: np.ones(4, "f4"), other: np.ones(4, "f4")}, source / "model.safetensors")
    out = tmp_path / "out"
    convert(Source(source), out)
    assert check(out, source).passed
    written = load_file(out / "model.safetensors")
    del written[other]
    save_file(written, out / "model.safetensors", metadata={"format": "pt"})
    edited_record(out, lambda record: record["tied"].update({other: one}))
    assert check(out, source).reason.startswith(f"{other}: lost: conversion.json has {one} in its place")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_plain_formula_of_rounding_is_torchs_and_sees_one_bit(dtype):
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    exact = bits.view(torch.float32)
    exact = torch.cat([exact, exact.sign() * 2.0 ** (exact.abs().frac() * 40 - 20), torch.tensor([0.0, -0.0, 1.0])])
    rounded = exact.to(dtype)
    name = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    finite = (rounded.isfinite() | exact.isinf() | exact.isnan()).numpy()
    source, found = bits_of(exact.numpy(), "F32"), bits_of(rounded.view(torch.int16).numpy(), name)
    assert is_rounded(source, found, "F32", name)[finite].all()
    for bit in range(16):
        wrong = found ^ found.dtype.type(1 << bit)
        assert not is_rounded(source, wrong, "F32", name)[finite & exact.isfinite().numpy()].any(), bit


def test_memory_does_not_grow_with_the_model(tmp_path):
    """A model of about 200 MB, compared in a process of its own."""
    from converted_models import Case, make_source

    from bsa_export.conversion.convert import convert_source as convert
    from bsa_export.conversion.options import Options
    from bsa_export.hub.source import Source

    program = (
        "import resource, sys; from pathlib import Path; from bsa_export.converted.folder import open_folder\n"
        "from bsa_export.verify.weights import check_weights\n"
        "assert check_weights(open_folder(Path(sys.argv[1])), Path(sys.argv[2])).passed\n"
        "assert 'torch' not in sys.modules\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for copies in (1, 50):
        folder = tmp_path / str(copies)
        source = make_source(Case(), folder / "source")
        tensors = load_file(source / "model.safetensors")
        tensors |= {f"head.{i}": np.full(1 << 20, i, "f4") for i in range(copies)}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        convert(Source(source), folder / "out", Options(max_length=256))
        # A small process between: a child's first resident set is its parent's.
        launcher = "import subprocess, sys; print(subprocess.check_output(sys.argv[1:], text=True))"
        command = [sys.executable, "-c", launcher, sys.executable, "-c", program, str(folder / "out"), str(source)]
        peaks.append(int(subprocess.check_output(command, text=True)) / 1024)
    assert peaks[1] - peaks[0] < 30, peaks  # MiB
