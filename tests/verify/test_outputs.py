"""The numerical checks: clean models pass, broken backends and a broken verifier are told, on real kernels."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from converted_models import clean_cases

from bsa_export.converted.check_lines import figures
from bsa_export.converted.checks import Check
from bsa_export.converted.folder import open_folder
from bsa_export.ops import block_sparse_attention, torch_backend
from bsa_export.verify import interpreted as interpreter
from bsa_export.verify import tolerance
from bsa_export.verify.controls import backend_control, file_controls
from bsa_export.verify.interchange import check_interchange
from bsa_export.verify.outputs import (
    Call,
    Ledger,
    Situation,
    attend_rows,
    check_outputs,
    excerpt,
    padding,
    pick,
    situations,
)
from bsa_export.verify.report import drift_figure, error_figure
from bsa_export.verify.run import Wanted
from bsa_export.verify.run import run_checks as verify
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
    others = [check.name for check in run.checks if not check.passed]
    assert others == ["drift"], [check.reason for check in run.checks]


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


def test_the_longest_length_is_tried_and_the_sampling_told(damaged):
    """A model as long as its source, whose odd length is one less."""
    folder = open_folder(damaged(source_length=1024, max_length=1024)[1])
    found = {situation.name: situation.length for situation in situations(folder, "cpu")}
    assert (found["odd"], found["longest"]) == (1023, 1024)
    (check,) = check_outputs(folder, "cpu", ("torch",))
    assert check.figures["lengths"][-2:] == [1023, 1024]
    assert set(check.figures["sampled queries"]) == {"1,023", "1,024"}
    assert "plain PyTorch on 64 of 1,023 queries, 64 of 1,024 queries" in figures(check)


def edited(path, name, value):
    """Puts a value into the first element of a tensor."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return open_folder(path)


@pytest.mark.parametrize("value, what", [(float("nan"), "NaN"), (float("inf"), "NaN|infinite values")])
def test_weights_that_are_no_numbers_fail(value, what, damaged):
    folder = edited(damaged()[1], "bert.encoder.layer.1.attention.self.key.weight", value)
    (check,) = check_outputs(folder, "cpu", ("torch",))
    assert check.failed
    assert re.fullmatch(f"layer 1: its weights give ({what})", check.reason)
    assert {row["layer"] for row in check.details if "ratio" in row} == {0, 2}
    assert check.figures["error"] <= 2
    (mark,) = (line for line in error_figure([check]).axes[0].lines if line.get_label() == "not finite")
    assert list(mark.get_xdata()) == [1]
    assert backend_control(folder, "cpu", "torch", "float32").status == "skipped"
    for model in check_whole_model(folder, "cpu", None)[0]:
        assert "the weights give values that are not finite" in model.reason


def test_the_tensor_that_the_conversion_found_broken_is_named(damaged):
    _, path = damaged()
    name = "bert.encoder.layer.2.attention.self.query.bias"
    record = json.loads((path / "conversion.json").read_text())
    (path / "conversion.json").write_text(json.dumps(record | {"not_finite": {name: "NaN"}}))
    (check,) = check_outputs(edited(path, name, float("nan")), "cpu", ("torch",))
    assert check.reason == f"layer 2: its weights give NaN ({name} holds NaN, by conversion.json)"


def test_an_overflow_of_the_dtype_is_no_fault_and_told_layer_by_layer(folder):
    query = torch.zeros(1, 8, 16, 16)
    query[:, 4:] = 3e4
    inputs = {
        "query": query,
        "key": query,
        "value": query * 3,
        "layout": torch.ones(8, 1, 1, dtype=torch.uint8),
        "block": 16,
    }
    ledger, situation = Ledger("torch", "cpu", {}), Situation("odd", 16, (0, 1))
    ledger.enter(Call(inputs, torch.float16), [(head // 4, head % 4) for head in range(8)], situation, "float16")
    check = ledger.check([situation])
    assert check.passed and {row["layer"] for row in check.details} == {0}
    assert check.figures["not computed"] == {"odd, layer 1": "plain PyTorch overflows in float16"}


def test_what_is_not_finite_is_the_worst(folder, monkeypatch):
    """The fault is in the second layer, behind finite errors."""
    attend, calls = torch_backend.attend, []

    def wrong(*arguments, **options):
        calls.append(1)
        return attend(*arguments, **options) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(torch_backend, "attend", wrong)
    (check,) = check_outputs(folder, "cpu", ("torch",))
    assert math.isnan(check.figures["error"])
    (panel,) = error_figure([check]).axes
    assert math.isfinite(panel.get_ylim()[1])
    (mark,) = (line for line in panel.lines if line.get_label() == "not finite")
    assert list(mark.get_xdata()) == [1]


def test_a_backend_that_gives_nothing_but_nan_is_drawn(folder, monkeypatch):
    attend = torch_backend.attend
    monkeypatch.setattr(torch_backend, "attend", lambda *x, **y: attend(*x, **y) * float("nan"))
    (check,) = check_outputs(folder, "cpu", ("torch",))
    (panel,) = error_figure([check]).axes
    assert panel.get_ylim() == (0, pytest.approx(2.3))
    drift = [{"layer": 0, "cosine": math.nan, "least": math.nan}]
    drift += [{"attention": "dense", "window": 64, "loss": math.nan, "masked tokens": 1}]
    assert drift_figure(Check("drift", "told", "", {"length": 64}, drift)).axes


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
    assert run.verdict == "passed", [(check.name, check.reason) for check in run.checks if check.failed]


@pytest.mark.gpu
def test_a_real_model_passes_on_a_gpu(minilm, tmp_path):
    folder = tmp_path / "out"
    code = "from bsa_export.cli.convert import main; main()"
    subprocess.run([sys.executable, "-c", code, minilm, folder, "--max-length", "4096"], check=True)
    run = verify(Wanted(folder, minilm, device="cuda", require=("triton", "deepspeed")))
    assert run.verdict == "passed", [(check.name, check.reason) for check in run.checks if check.failed]
    assert json.loads((folder / "verification.json").read_text())["device"] == torch.cuda.get_device_name()
