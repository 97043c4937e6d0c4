"""The numerical checks: clean models pass, broken backends and a broken verifier are told, on real kernels."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from converted_models import clean_cases

from bsa_export.ops import block_sparse_attention, tolerance, torch_backend
from bsa_export.verify import interpreter
from bsa_export.verify.controls import backend_control, file_controls
from bsa_export.verify.folder import open_folder
from bsa_export.verify.interchange import check_interchange
from bsa_export.verify.outputs import attend_rows, check_outputs, excerpt, padding, pick, situations
from bsa_export.verify.run import Wanted, verify
from bsa_export.verify.whole_model import check_whole_model

OPTIONS = [field.name for field in dataclasses.fields(clean_cases(1)[0])]


def describe(case) -> str:
    default = dataclasses.replace(clean_cases(1)[0], family="")
    changed = {name: getattr(case, name) for name in OPTIONS if getattr(case, name) != getattr(default, name)}
    return ",".join(str(value) for value in changed.values())


@pytest.mark.parametrize("case", clean_cases(20), ids=describe)
def test_a_clean_conversion_raises_no_alarm(case, damaged):
    source, folder = damaged(**dataclasses.asdict(case))
    run = verify(Wanted(folder, source, backends=("torch",)))
    assert run.verdict == "passed", [check.reason for check in run.checks if not check.passed]
    assert all(check.passed for check in run.checks), [check.reason for check in run.checks]


@pytest.fixture
def folder(damaged):
    return open_folder(damaged(mode="bigbird", seed=2, parameters=(("different_layout_per_head", True),))[1])


def test_situations_are_the_lengths_that_break_kernels(folder):
    found = {situation.name: situation for situation in situations(folder, "cpu")}
    assert found["one shorter than a block"].length == 15
    assert found["odd"].length % 2 == 1
    assert found["padded"].batch == 2 and found["padded"].gradients
    assert found["longest"].length == folder.longest == 256


def test_a_sparse_layout_stays_sparse_in_an_excerpt(folder):
    layout = torch.tensor([[abs(i - j) < 2 for j in range(64)] for i in range(64)]).to(torch.uint8)[None]
    part = excerpt(layout, pick(64, 4))
    assert part.shape == (1, 4, 4) and 0 < part.float().mean() < 1
    assert part.any(-1).all()
    assert pick(3, 8) == (0, 1, 2) and pick(64, 3) == (0, 1, 63)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_some_rows_of_plain_pytorch_are_those_of_reference(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 50, 16, generator=generator).to(dtype) for _ in range(3))
    layout = (torch.rand(3, 4, 4, generator=generator) < 0.5) | torch.eye(4, dtype=torch.bool)
    rows = torch.tensor([0, 7, 16, 33, 49])
    for mask in (None, padding(50, torch.device("cpu"))):
        inputs = {"query": query, "key": key, "value": value, "layout": layout, "block": 16, "key_padding_mask": mask}
        whole = block_sparse_attention(**inputs, backend="reference")
        some = attend_rows(rows, **inputs)
        torch.testing.assert_close(some, whole[:, :, rows], rtol=0, atol=2e-3 if dtype == torch.float16 else 1e-6)


def broken(how):
    """A torch backend with one fault."""
    attend = torch_backend.attend

    def wrong(query, key, value, layout, block, *, scale, **masks):
        if how == "scale":
            return attend(query, key, value, layout, block, scale=1.01 * scale, **masks)
        if how == "block":
            layout = layout.clone()
            head, row = (layout.sum(-1) > 1).nonzero()[-1] if (layout.sum(-1) > 1).any() else (0, 0)
            layout[head, row, layout[head, row].nonzero()[0]] = int(layout[head, row].sum() == 1)
            return attend(query, key, value, layout, block, scale=scale, **masks)
        if how == "padding":
            return attend(query, key, value, layout, block, scale=scale, **masks | {"key_padding_mask": None})
        output = attend(query, key, value, layout, block, scale=scale, **masks)
        if how == "NaN":
            output = output.clone()
            output[0, 1, -1] = float("nan")
        return output

    return wrong


@pytest.mark.parametrize("how", ["scale", "block", "padding", "NaN"])
def test_a_wrong_backend_fails_and_says_where(how, folder, monkeypatch):
    monkeypatch.setattr(torch_backend, "attend", broken(how))
    (check,) = check_outputs(folder, "cpu", ("torch",))
    assert check.failed
    faults = [row["fault"] for row in check.details if "fault" in row]
    assert any(fault.startswith("layer 0, head ") and "the bound is" in fault for fault in faults), faults
    if how == "NaN":
        assert all(", head 1," in fault for fault in faults if "gradient" not in fault)
    (_, model), _ = check_whole_model(folder, "cpu", None)
    assert model.failed or how == "padding"  # that comparison has one text, unpadded


def test_a_fault_in_a_gradient_is_found(folder, monkeypatch):
    real = torch_backend.torch_attention_backward
    monkeypatch.setattr(torch_backend, "torch_attention_backward", lambda *x: (*real(*x)[:2], 1.01 * real(*x)[2]))
    (check,) = check_outputs(folder, "cpu", ("torch",))
    assert "gradient of value" in check.reason


def test_controls_find_what_is_planted(folder):
    for check in (file_controls(folder), backend_control(folder, "cpu", "torch", "float32")):
        assert check.passed, check.reason
        assert check.figures["planted"] == check.figures["found"] >= 4


def test_a_verifier_that_finds_nothing_says_that_it_is_broken(folder, monkeypatch):
    monkeypatch.setattr(tolerance, "FACTOR", float("inf"))
    run = verify(Wanted(folder.path, backends=("torch",)))
    assert run.verdict == "failed" and run.exit_code == 1
    assert "the verifier is broken" in run.sentence
    (failed,) = (check for check in run.checks if check.failed)
    assert failed.name == "controls: torch"
    assert failed.reason.startswith("the verifier is broken: it did not find a kept block dropped in one head")


def test_deepspeed_makes_the_same_random_layouts_and_takes_the_state_dict(converted):
    folder = open_folder(converted(mode="bigbird", seed=7, per_layer=True)[1])
    ours, theirs = check_interchange(folder)
    assert ours.passed, ours.reason
    if theirs.status == "skipped":
        pytest.skip(theirs.reason)
    assert theirs.passed, theirs.reason
    assert theirs.figures["layouts made by it"] == "equal"


def test_a_state_dict_that_does_not_fit_is_named(damaged):
    from safetensors.torch import load_file, save_file

    _, path = damaged()
    tensors = load_file(path / "model.safetensors")
    tensors["bert.encoder.layer.1.attention.self.rotary"] = torch.zeros(1)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for check in check_interchange(open_folder(path)):
        assert check.status == "skipped" or ("layer 1" in check.reason and "rotary" in check.reason)


def test_both_kernels_run_through_the_interpreter(folder):
    process = interpreter.start(folder.path, interpreter.BACKENDS)
    checks = {check.name: check for check in interpreter.finish(process, interpreter.BACKENDS)}
    triton = checks["outputs: triton"]
    if triton.status == "skipped":
        pytest.skip(triton.reason)
    assert triton.passed, triton.reason
    assert triton.figures["device"] == "Triton's interpreter on the CPU"
    assert triton.figures["layers"] == 3 and triton.figures["lengths"] == [128, 127]
    for name in ("outputs: deepspeed", "controls: triton", "controls: deepspeed"):
        if name in checks:
            assert checks[name].passed or checks[name].status == "skipped", checks[name].reason


def test_an_interpreter_that_dies_is_a_failure(tmp_path):
    process = interpreter.start(tmp_path, ("triton",))
    (check,) = interpreter.finish(process, ("triton",))
    assert check.failed
    assert "died" in check.reason and "config.json" in check.reason


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [{}, {"mode": "fixed", "dtype": "bf16"}, {"block": 64, "max_length": 512, "mode": "bigbird"}],
    ids=["windowed", "fixed", "bigbird"],
)
def test_every_backend_passes_on_a_gpu(case, damaged):
    source, path = damaged(**case)
    run = verify(Wanted(path, source, device="cuda", require=("triton",)))
    assert run.verdict == "passed", [check.reason for check in run.checks if check.failed]


@pytest.mark.gpu
def test_a_real_model_passes_on_a_gpu(minilm, tmp_path):
    folder = tmp_path / "out"
    subprocess.run(
        [sys.executable.replace("python", "bsa-convert"), minilm, folder, "--max-length", "4096"], check=True
    )
    run = verify(Wanted(folder, minilm, device="cuda", require=("triton", "deepspeed")))
    assert run.verdict == "passed", [check.reason for check in run.checks if check.failed]
    assert json.loads((folder / "verification.json").read_text())["device"] == torch.cuda.get_device_name()
