"""The backend `deepspeed`: where its kernels come from, what it keeps between calls, and what it refuses beyond the
sweep."""

import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from attention_cases import Case, make_inputs

import bsa_export.deepspeed_compat  # noqa: F401  its stand-in for an absent deepspeed is not to be mistaken for one
from bsa_export.errors import AttentionError
from bsa_export.ops import backends, block_sparse_attention, deepspeed_backend, deepspeed_kernels, deepspeed_source
from bsa_export.verify.tolerance import in_half, judge

deepspeed_attention = partial(block_sparse_attention, backend="deepspeed")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = Case(pattern="random", blocks=3, heads=2, batch=1, head_dim=16)
TINY = Case(pattern="one", blocks=2, heads=1, batch=1, head_dim=16)


@pytest.fixture
def package() -> Path:
    """The installed deepspeed's folder."""
    folder = deepspeed_source.find()
    if isinstance(folder, str):
        pytest.skip(folder)
    return folder


@pytest.fixture
def only(package, tmp_path, monkeypatch):
    """Makes a folder the only place where modules are found, and forgets the kernels that were read before."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(deepspeed_backend, "_cache", deepspeed_backend._Cache())
    deepspeed_kernels._loaded.cache_clear()
    yield tmp_path
    deepspeed_kernels._loaded.cache_clear()


def _passes(inputs: dict) -> bool:
    return all(errors.passed for errors in judge(deepspeed_attention, inputs, in_half).values())


def test_deepspeed_is_not_imported_nothing_is_patched_and_no_file_is_left(package):
    code = """
    import os, sys
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch, triton, triton.language as tl, triton._C.libtriton as libtriton
    before = {module: dict(vars(module)) for module in (triton, tl, libtriton, torch.autograd)}
    from bsa_export.ops import backends, deepspeed_kernels
    assert backends()["deepspeed"] is None
    operators = deepspeed_kernels.operators()
    q = torch.ones(1, 1, 16, 16, dtype=torch.float16, device="cuda" if torch.cuda.is_available() else "cpu")
    operators.MatMul(torch.ones(1, 1, 1, dtype=torch.long), 16, "sdd", trans_b=True)(q, q)
    for module, names in before.items():
        assert not [name for name, value in names.items() if getattr(module, name) is not value]
    assert not hasattr(libtriton, "superblock")
    assert not [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]
    print(deepspeed_kernels._folder().name)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).exists()


def test_older_releases_have_another_loop(package, tmp_path, monkeypatch):
    """deepspeed 0.16 and 0.17 read the steps behind the `else` where later ones read them in it."""
    shutil.copytree(package / "ops/sparse_attention", tmp_path / "ops/sparse_attention")
    file = tmp_path / "ops/sparse_attention/matmul.py"
    source = file.read_text(encoding="utf-8")
    found = re.search(r"            pinc \+= 2\n(.*?)        pa \+= inc_a\n", source, re.DOTALL)[1]
    is_later = found.startswith(" " * 12)
    other = textwrap.indent(textwrap.dedent(found), " " * (8 if is_later else 12))
    file.write_text(source.replace(found, other), encoding="utf-8")
    operators = deepspeed_kernels.load(tmp_path)
    monkeypatch.setattr(deepspeed_kernels, "operators", lambda: operators)
    monkeypatch.setattr(deepspeed_backend, "_cache", deepspeed_backend._Cache())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert _passes(make_inputs(TINY, seed=0, device=device))


def test_absent_is_a_reason(only):
    reason = backends()["deepspeed"]
    assert "not installed" in reason and "pip download" in reason
    with pytest.raises(AttentionError, match="backend deepspeed: .* not installed"):
        deepspeed_attention(**_call())


def test_newer_is_a_reason(only):
    (only / "deepspeed/ops").mkdir(parents=True)
    (only / "deepspeed/__init__.py").write_text("raise RuntimeError('imported')")
    (only / "deepspeed-0.19.8.dist-info").mkdir()
    (only / "deepspeed-0.19.8.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.8\n"
    )
    reason = backends()["deepspeed"]
    assert "0.19.8" in reason and "0.19.6" in reason and "pip download" in reason


def test_source_that_nobody_knows_is_a_reason(only):
    folder = only / "deepspeed/ops/sparse_attention"
    folder.mkdir(parents=True)
    (only / "deepspeed/__init__.py").touch()
    (folder / "matmul.py").write_text("class Product: pass")
    (folder / "softmax.py").write_text("class Softmax: pass")
    reason = backends()["deepspeed"]
    assert str(folder.parents[1]) in reason and "0.19.6" in reason and "_sparse_matmul" in reason


def _call(**changed) -> dict:
    inputs = make_inputs(SMALL, seed=0, device="cpu")
    inputs.pop("grad_output")
    return inputs | changed


REFUSED = {
    "block": (dict(block=24, layout=torch.ones(1, 2, 2, dtype=torch.bool)), "blocks 16, 32, 64, 128, not 24"),
    "head_dim": (dict.fromkeys(("query", "key", "value"), torch.ones(1, 2, 48, 24).half()), "multiple of 16, not 24"),
    "empty head": (dict(layout=torch.eye(3).long() * torch.tensor([1, 0])[:, None, None]), "kept block in every head"),
    "lowest": (dict(rpe=torch.full((48, 48), -65536.0)), "casts rpe to float16"),
    "mask a head": (dict(attn_mask=torch.ones(2, 48, 48).bool()), r"not \[2, 48, 48\]"),
    "learned": (dict(rpe=torch.zeros(48, 48, requires_grad=True)), "rpe requires a gradient, which only the reference"),
    "size": (
        dict.fromkeys(("query", "key", "value"), torch.ones(1, 1, 16, 16).half().expand(2**23, 1, 16, 16))
        | dict(layout=torch.ones(1, 1, 1).bool()),
        "count elements in 32 bits, and 2147483648 are to be addressed",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_in_a_sentence(package, changed, said):
    with pytest.raises(AttentionError, match=f"^backend deepspeed: .*{said}"):
        deepspeed_attention(**_call(**changed))


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_of_one_length_are_not_mixed_up(package, device):
    """Another layout, the same one written to, and the same blocks in another dtype."""
    first = make_inputs(TINY, seed=0, device=device)
    other = first | {"layout": torch.ones_like(first["layout"])}
    assert not torch.equal(first["layout"], other["layout"])
    assert _passes(first) and _passes(other)
    other["layout"].copy_(first["layout"])
    assert _passes(other)
    assert _passes(other | {"layout": first["layout"].bool()})


def test_what_is_kept_between_calls_is_bounded(package, monkeypatch):
    monkeypatch.setattr(deepspeed_backend, "MOST_OPERATORS", 2)
    cache = deepspeed_backend._Cache()
    layouts = [torch.eye(n)[None].long() for n in (1, 2, 3)]
    found = [cache.get(layout, 1, 16, torch.device("cpu")) for layout in layouts]
    assert len(cache._by_content) == len(cache._by_tensor) == 2
    assert cache.get(layouts[2], 1, 16, torch.device("cpu")) is found[2]
    assert cache.get(layouts[2].bool(), 1, 16, torch.device("cpu")) is found[2]
    assert cache.get(layouts[2], 1, 32, torch.device("cpu")) is not found[2]
    assert cache.get(layouts[0], 1, 16, torch.device("cpu")) is not found[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", ["query", "key", "value"])
def test_gradients_are_there_one_by_one(package, wanted, device):
    inputs = make_inputs(TINY, seed=0, device=device)
    grad_output = inputs.pop("grad_output")
    gradients = []
    for others in (True, False):
        leaves = {
            name: inputs[name].clone().requires_grad_(others or name == wanted) for name in ("query", "key", "value")
        }
        output = deepspeed_attention(**inputs | leaves)
        gradients += torch.autograd.grad(output, leaves[wanted], grad_output)
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("device", DEVICES)
def test_masks_may_lie_in_any_strides(package, device):
    inputs = make_inputs(TINY, seed=0, device=device)
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(32, 1, generator=generator).to(device)
    inputs["key_padding_mask"] = torch.randn(32, 3, generator=generator).to(device)[:, :1].mT  # [1, 32], steps of 3
    inputs["attn_mask"] = (torch.randn(32, 32, generator=generator) < 1).to(device).mT
    inputs["rpe"] = columns.expand(32, 32)
    assert _passes(inputs)
    assert _passes(inputs | {"rpe": columns, "attn_mask": inputs["attn_mask"][None, None, :1]})


@pytest.mark.slow  # compiles C++
@pytest.mark.parametrize("device", DEVICES)
def test_packed_tables_change_the_work_and_not_the_result(package, device, monkeypatch):
    monkeypatch.setattr(deepspeed_backend, "_cache", deepspeed_backend._Cache())
    inputs = make_inputs(replace(TINY, pattern="all"), seed=0, device=device)
    inputs.pop("grad_output")
    expected = deepspeed_attention(**inputs)
    with deepspeed_backend.packed_tables():
        assert torch.equal(deepspeed_attention(**inputs), expected)
    tables = [table for o in deepspeed_backend._cache._by_content.values() for table in o.scores.lut_cache.values()]
    assert [table[3] for table in tables] == [[1], [2]]  # widths of the squares, in blocks


def test_packed_tables_say_why_they_cannot_be_made(only):
    deepspeed_kernels.sdd_segment.cache_clear()
    with (
        pytest.raises(AttentionError, match="^backend deepspeed: deepspeed is not installed"),
        deepspeed_backend.packed_tables(),
    ):
        pass
