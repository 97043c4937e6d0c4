"""The numerical checks: clean models pass, broken backends and a broken verifier are found, on real kernels."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from converted_models import clean_cases
from safetensors.torch import load_file, save_file

from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.converted.check_lines import figures
from bsa_export.converted.checks import Check, Kind, Status
from bsa_export.converted.folder import open_folder
from bsa_export.ops import block_sparse_attention, torch_backend
from bsa_export.ops.deepspeed_source import VARIABLE
from bsa_export.verify import check_file, check_layout, tolerance
from bsa_export.verify.controls import backend_control, file_controls
from bsa_export.verify.drift import measure_drift
from bsa_export.verify.figures import drift_figure, error_figure
from bsa_export.verify.interchange import check_interchange
from bsa_export.verify.interpreted import HOW
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
from bsa_export.verify.run import BACKENDS, Verification, Wanted
from bsa_export.verify.run import run_checks as verify
from bsa_export.verify.weights import check_weights
from bsa_export.verify.whole_model import check_whole_model
from bsa_export.verify.worker import INTERPRETED, Job, Worker
from bsa_export.verify.worker import run as run_job

pytestmark = pytest.mark.slow

OPTIONS = [field.name for field in dataclasses.fields(clean_cases(1)[0])]


def describe(case) -> str:
    default = dataclasses.replace(clean_cases(1)[0], family="")
    changed = {name: getattr(case, name) for name in OPTIONS if getattr(case, name) != getattr(default, name)}
    return ",".join(str(value) for value in changed.values())


@pytest.mark.parametrize("case", clean_cases(14), ids=describe)
def test_a_clean_conversion_raises_no_alarm(case, converted):
    """Every check, in this process."""
    source, path = converted(**dataclasses.asdict(case))
    folder, ran = open_folder(path), []
    checks = [check_file(path), check_layout(path), check_weights(folder, source), *check_interchange(folder)]
    checks += check_outputs(folder, "cpu", ("torch",))
    checks += check_whole_model(folder, "cpu", open_checkpoint(source), ran)
    checks += [file_controls(folder), backend_control(folder, "cpu", "torch", "float32")]
    assert [(check.name, check.reason) for check in checks if not check.passed] == []
    assert measure_drift(ran[0]).status is Status.INFO


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
    _, model = check_whole_model(folder, "cpu", None)
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
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return open_folder(path)


@pytest.mark.parametrize("value, what", [(float("nan"), "NaN"), (float("inf"), "NaN|infinite values")])
def test_weights_that_are_no_numbers_fail(value, what, damaged):
    folder = edited(damaged()[1], "bert.encoder.layer.1.attention.self.key.weight", value)
    (check,) = check_outputs(folder, "cpu", ("torch",))
    assert check.failed
    assert re.fullmatch(f"layer 1: its weights lead to ({what})", check.reason)
    assert {row["layer"] for row in check.details if "ratio" in row} == {0, 2}
    assert check.figures["error"] <= 2
    (mark,) = (line for line in error_figure([check]).axes[0].lines if line.get_label() == "not finite")
    assert list(mark.get_xdata()) == [1]
    assert backend_control(folder, "cpu", "torch", "float32").status == "skipped"
    for model in check_whole_model(folder, "cpu", None):
        assert "the weights lead to values that are not finite" in model.reason


@pytest.mark.parametrize(("times", "status"), [(1, Status.PASSED), (99, Status.FAILED)])
def test_the_controls_of_a_backend_that_is_off_draw_again(times, status, folder, monkeypatch):
    """The bound is exceeded by luck now and then, by a backend that is off in every draw."""
    computed, calls = Call.computed, []

    def off(self, backend):
        calls.append(backend)
        found = computed(self, backend)
        return {name: x + 1e-3 * (len(calls) <= times) for name, x in found.items()}

    monkeypatch.setattr(Call, "computed", off)
    check = backend_control(folder, "cpu", "torch", "float32")
    assert check.status is status, check.reason
    assert ("off without any planted fault" in check.reason) == check.failed


def test_the_tensor_that_the_conversion_found_broken_is_named(damaged):
    _, path = damaged()
    name = "bert.encoder.layer.2.attention.self.query.bias"
    record = json.loads((path / "conversion.json").read_text())
    (path / "conversion.json").write_text(json.dumps(record | {"not_finite": {name: "NaN"}}))
    (check,) = check_outputs(edited(path, name, float("nan")), "cpu", ("torch",))
    assert check.reason == f"layer 2: its weights lead to NaN ({name} holds NaN, by conversion.json)"


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
    assert drift_figure(Check(Kind.DRIFT, Status.INFO, figures={"length": 64}, details=drift)).axes


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
    check = backend_control(folder, "cpu", "torch", "float32")
    assert check.failed and "a kept block dropped in one head" in check.reason
    run = Verification([check], finished=True)
    assert run.exit_code == 1 and "the verifier is broken" in run.sentence


def test_deepspeed_makes_the_same_random_layouts_and_takes_the_state_dict(converted):
    folder = open_folder(converted(mode="bigbird", seed=7, per_layer=True)[1])
    ours, theirs = check_interchange(folder)
    assert ours.passed, ours.reason
    if theirs.status == "skipped":
        pytest.skip(theirs.reason)
    assert theirs.passed, theirs.reason
    assert theirs.figures["layouts made by it"] == "equal"


def test_a_state_dict_that_does_not_fit_is_named(damaged):
    _, path = damaged()
    tensors = load_file(path / "model.safetensors")
    tensors["bert.encoder.layer.1.attention.self.rotary"] = torch.zeros(1)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for check in check_interchange(open_folder(path)):
        assert check.status == "skipped" or ("layer 1" in check.reason and "rotary" in check.reason)


@pytest.fixture
def started():
    """`started(job)` gives its worker, which ends with the test."""
    workers = []

    def start(*arguments, **options):
        workers.append(Worker(Job(*arguments, **options)))
        return workers[-1]

    yield start
    for worker in workers:
        worker.stop()


def test_both_kernels_run_through_the_interpreter(folder, started):
    workers = {name: started(name, folder.path, "cpu") for name in INTERPRETED}
    for name, worker in workers.items():
        (outputs,) = worker.wait(Kind.OUTPUTS)
        assert not outputs.failed, outputs.reason
        if outputs.status is Status.SKIPPED:
            continue
        assert outputs.figures["device"] == HOW and outputs.figures["layers"] == 3
        (control,) = worker.wait(Kind.CONTROLS)
        assert control.passed, control.reason
        assert worker.device
        assert outputs.figures["lengths"] == ([128, 127] if name == "triton" else [128])


def test_a_process_that_dies_is_skipped_and_takes_no_other_with_it(folder, started):
    dying, other = started("triton", folder.path, "cpu"), started("torch", folder.path, "cpu")
    dying._process.send_signal(signal.SIGSEGV)
    (outputs,), (control,) = dying.wait(Kind.OUTPUTS), dying.wait(Kind.CONTROLS)
    for check in (outputs, control):
        assert check.status is Status.SKIPPED and "SIGSEGV" in check.reason and check.part == "triton"
    assert [check.passed for kind in (Kind.OUTPUTS, Kind.CONTROLS) for check in other.wait(kind)] == [True, True]


def test_a_job_that_cannot_begin_is_skipped_with_its_reason(tmp_path):
    messages = []
    run_job(Job("torch", tmp_path, "cpu"), messages.append)
    checks = [check for message in messages for check in message.get("checks", [])]
    assert [(check.kind, check.part) for check in checks] == [(Kind.OUTPUTS, "torch"), (Kind.CONTROLS, "torch")]
    for check in checks:
        assert check.status is Status.SKIPPED and "config.json" in check.reason
        assert "Traceback" in check.details[0]["traceback"]


def raising(error, after=0):
    """A torch backend that raises after some calls."""
    attend, calls = torch_backend.attend, []

    def wrong(*arguments, **options):
        calls.append(1)
        if len(calls) > after:
            raise error
        return attend(*arguments, **options)

    return wrong


@pytest.mark.parametrize(
    "error",
    [TypeError("not a scalar index"), RuntimeError("CUDA error"), OSError(2, "no ptxas")],
    ids=["numpy", "driver", "compiler"],
)  # fmt: skip
@pytest.mark.parametrize("after", [0, 3])
def test_a_tool_that_cannot_run_is_skipped_whenever_it_stops(error, after, folder, monkeypatch):
    monkeypatch.setattr(torch_backend, "attend", raising(error, after))
    (check,) = check_outputs(folder, "cpu", ("torch",))
    assert check.status is Status.SKIPPED
    assert type(error).__name__ in check.reason and "Traceback" in check.details[0]["traceback"]
    assert ("after" in check.reason) == bool(after)
    assert [found.status for found in check_whole_model(folder, "cpu", None)] == [Status.SKIPPED] * 2


def test_wrong_numbers_before_a_tool_stops_are_a_failure(folder, monkeypatch):
    monkeypatch.setattr(torch_backend, "attend", broken("scale"))
    monkeypatch.setattr(torch_backend, "attend", raising(RuntimeError("stopped"), 3))
    (check,) = check_outputs(folder, "cpu", ("torch",))
    assert check.failed and "the bound is" in check.reason


def test_processes_have_the_environment_of_their_backend(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv(VARIABLE, raising=False)
    cpu = {name: Job(name, tmp_path, "cpu", deepspeed=tmp_path / "ds.tar.gz").environment() for name in BACKENDS}
    assert {name for name, found in cpu.items() if "TRITON_INTERPRET" in found} == {"triton", "deepspeed"}
    assert all(found[VARIABLE] == str(tmp_path / "ds.tar.gz") for found in cpu.values())
    gpu = Job("triton", tmp_path, "cuda").environment()
    assert "TRITON_INTERPRET" not in gpu and VARIABLE not in gpu
    odd = Job("torch", Path(os.fsdecode(b"/tmp/\xff")), "cpu")
    assert Job.from_json(odd.to_json()) == odd


def test_a_tensor_that_the_source_class_does_not_use_is_a_fault(converted, tmp_path):
    """Weights that the source's own class leaves out: its outputs are not those of the class."""
    source, path = converted()
    other = shutil.copytree(source, tmp_path / "source")
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"bert.encoder.LayerNorm.weight": torch.ones(64)}, other / "model.safetensors")
    kept, _ = check_whole_model(open_folder(path), "cpu", open_checkpoint(other))
    assert kept.failed and "bert.encoder.LayerNorm.weight" in kept.reason


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
