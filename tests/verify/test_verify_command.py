"""bsa-verify as a user has it: table, verdict, exit code, record and report."""

import hashlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

import bsa_export
from bsa_export.cli.verify import main
from bsa_export.converted.checks import Check, Kind, Status
from bsa_export.converted.names import VERIFICATION_RECORD
from bsa_export.converted.records import Verdict, VerificationRecord
from bsa_export.errors import BsaError
from bsa_export.verify.report import render
from bsa_export.verify.run import Verification, Wanted
from bsa_export.verify.run import run_checks as verify
from bsa_export.verify.worker import Job
from bsa_export.version import install_hint

pytestmark = pytest.mark.slow

TORCH = ["--backend", "torch", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class Instant:
    """A worker whose checks have all passed already: for tests of what becomes of checks."""

    device = "none"

    def __init__(self, job: Job):
        self.job = job

    def wait(self, kind: Kind, progress=None) -> list[Check]:
        part = dict(self.job.stages())[kind]
        status = Status.INFO if kind is Kind.DRIFT else Status.PASSED
        return [Check(kind, status, part, numerical=kind is Kind.OUTPUTS)]

    def stop(self) -> None:
        pass


@pytest.fixture
def instant(monkeypatch):
    monkeypatch.setattr("bsa_export.verify.run.Worker", Instant)


def recorded(folder: Path) -> dict:
    return json.loads((folder / VERIFICATION_RECORD).read_text())


def damage(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def test_a_right_folder_passes_and_is_recorded(damaged):
    source, folder = damaged()
    result = run(folder, "--source", source, *TORCH)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [re.split(r"\s{2,}", line)[:2] for line in lines[:3]] == [
        ["passed", "file"],
        ["passed", "layout"],
        ["passed", "weights"],
    ]
    assert re.fullmatch(r"passed: \d+ passed(, 1 skipped)? \(\d+\.\d s\)", lines[-1])
    record = recorded(folder)
    assert record["verdict"] == "passed"
    kinds = [check["kind"] for check in record["checks"]]
    assert list(dict.fromkeys(kinds)) == [str(kind) for kind in Kind]
    assert {check["status"] for check in record["checks"] if check["kind"] != "drift"} <= {"passed", "skipped"}
    assert next(check["status"] for check in record["checks"] if check["kind"] == "drift") == "info"
    assert set(record["checks"][0]) == {"name", "kind", "part", "status", "reason", "figures"}
    whole = [check["figures"] for check in record["checks"] if check["kind"] == "whole model"]
    assert [figures["backend"] for figures in whole] == ["torch", "torch"]
    assert whole[0]["compared tokens"] == whole[0]["length"] + 2 * whole[0]["length"] // 3
    assert set(record["files"]) == {"config.json", "conversion.json", "model.safetensors"}
    for name, digest in record["files"].items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert {"python", "bsa_export", "torch"} <= set(record["versions"])
    assert record["device"].startswith("CPU")
    assert not list(folder.glob(".*"))


def test_json_holds_every_comparison(damaged, tmp_path):
    """Also why a model without a tokenizer has no loss."""
    _, folder = damaged()
    (tmp_path / "text.txt").write_text("A text.")
    result = run(folder, *TORCH, "--json", "--text", tmp_path / "text.txt")
    content = json.loads(result.stdout)
    assert result.exit_code == 0 and content["verdict"] == "passed"
    checks = {check["name"]: check for check in content["checks"]}
    assert checks["weights"]["status"] == "skipped" and "--source" in checks["weights"]["reason"]
    outputs = checks["outputs: torch"]
    assert {row["situation"] for row in outputs["details"]} >= {"one shorter than a block", "padded", "odd", "longest"}
    assert all(row["ratio"] <= row["bound"] for row in outputs["details"])
    figures = checks["drift"]["figures"]
    assert "cosine of the last hidden states" in figures and "tokenizer.json" in figures["no loss"]


def test_a_damaged_folder_fails_and_is_recorded(damaged):
    source, folder = damaged()
    damage(folder)
    result = run(folder, "--source", source, *TORCH)
    assert result.exit_code == 1
    assert "model.safetensors: its checksum is not the one in conversion.json" in result.output
    assert result.output.splitlines()[-1].startswith("failed: ")
    assert recorded(folder)["verdict"] == "failed"


def test_a_folder_that_cannot_be_opened_fails_and_is_recorded(damaged):
    _, folder = damaged()
    (folder / "model.safetensors").write_bytes(b"")
    result = run(folder, *TORCH)
    assert result.exit_code == 1
    assert "an empty file" in result.output and "the folder cannot be opened" in result.output
    assert recorded(folder)["verdict"] == "failed"


def test_what_is_no_converted_folder_fails_and_stays_as_it_is(converted, tmp_path):
    source = shutil.copytree(converted()[0], tmp_path / "source")
    result = run(source, *TORCH)
    assert result.exit_code == 1
    assert "bsa-convert makes one" in result.output
    assert not (source / VERIFICATION_RECORD).exists()


@pytest.mark.parametrize("arguments", [(), ("absent",), (".", "--backend", "fpga"), (".", "--text", "absent")])
def test_wrong_usage_is_2(arguments):
    assert run(*arguments).exit_code == 2


def test_a_gpu_that_is_not_there_is_wrong_usage(converted, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(converted()[1], "--device", "cuda")
    assert result.exit_code == 2
    assert "no CUDA GPU" in result.output


def test_without_torch_nothing_can_be_compared_and_that_is_3(damaged):
    _, folder = damaged()
    program = "import sys; sys.modules['torch'] = None; from bsa_export.cli.verify import main; main()"
    ran = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True)
    assert ran.returncode == 3, ran.stderr
    assert install_hint("verify") in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("incomplete: 2 passed, ")
    assert recorded(folder)["verdict"] == "incomplete"


def test_a_backend_that_is_required_may_not_be_skipped(damaged):
    """Every kernel refuses blocks of 8; the verdict of a run without it stays."""
    _, folder = damaged(block=8, max_length=64)
    assert run(folder, *TORCH).exit_code == 0
    result = run(folder, "--device", "cpu", "--backend", "torch", "--require", "triton")
    assert result.exit_code == 1
    assert "it is required, and was skipped: " in result.output
    assert recorded(folder)["verdict"] == "passed" and recorded(folder)["later"]["verdict"] == "failed"


def passed(*parts: str, comparisons: int = 1) -> list[Check]:
    figures = {"comparisons": comparisons}
    return [Check(Kind.OUTPUTS, Status.PASSED, part, figures=figures, numerical=True) for part in parts]


SKIPPED = Check(Kind.OUTPUTS, Status.SKIPPED, "triton", "not here")
WRONG = Check(Kind.OUTPUTS, Status.FAILED, "triton", "wrong numbers")


@pytest.mark.parametrize(
    ("checks", "replaces"),
    [
        (passed("torch", "triton", comparisons=9), True),
        (passed("torch", "triton", "deepspeed", comparisons=10), True),
        (passed("torch", "triton", comparisons=8), False),
        (passed("torch", comparisons=9), False),
        ([*passed("torch", comparisons=9), SKIPPED], False),
        ([*passed("torch", comparisons=9), WRONG], True),
    ],
    ids=["the same", "more", "fewer comparisons", "fewer checks", "skipped", "wrong"],
)
def test_a_run_that_compares_less_does_not_replace_a_better_one(checks, replaces):
    earlier = VerificationRecord(Verdict.PASSED, passed("torch", "triton", comparisons=9), {})
    assert Verification(checks, finished=True).replaces(earlier) is replaces
    required = Verification([*passed("torch"), replace(SKIPPED, status=Status.FAILED)], finished=True)
    required.required = {"triton"}
    assert not required.replaces(earlier)


def test_a_better_verdict_of_the_same_files_is_kept_until_a_file_changes(damaged, instant):
    _, folder = damaged()
    assert run(folder, "--device", "cpu").exit_code == 0
    first = recorded(folder)
    result = run(folder, *TORCH)
    assert result.exit_code == 0 and first["finished"] in result.output
    later = recorded(folder).pop("later")
    assert recorded(folder)["checks"] == first["checks"] and later["verdict"] == "passed"
    assert run(folder, "--device", "cpu").exit_code == 0  # as much as the first
    assert "later" not in recorded(folder)
    record = folder / "conversion.json"
    record.write_text(record.read_text() + " ")
    assert run(folder, *TORCH).exit_code == 0
    names = {check["name"] for check in recorded(folder)["checks"]}
    assert "outputs: torch" in names and "outputs: triton" not in names


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("/nowhere/model.bin", "/nowhere/model.bin: no such file or folder"),
        ("text.txt", "expected"),
        ("empty", "expected a folder with weights"),
    ],
)
def test_a_source_that_is_none_is_wrong_usage_and_changes_nothing(damaged, tmp_path, source, sentence):
    _, folder = damaged()
    (folder / VERIFICATION_RECORD).write_text("of an earlier run")
    (tmp_path / "text.txt").write_text("no weights")
    (tmp_path / "empty").mkdir()
    result = run(folder, "--source", tmp_path / source)
    assert result.exit_code == 2
    assert "Invalid value for --source: " in result.output and sentence in result.output
    assert (folder / VERIFICATION_RECORD).read_text() == "of an earlier run"
    with pytest.raises(BsaError):
        verify(Wanted(folder, tmp_path / source))
    assert (folder / VERIFICATION_RECORD).read_text() == "of an earlier run"


def test_a_report_in_the_folder_is_wrong_usage(damaged):
    _, folder = damaged()
    card = (folder / "layout.png").read_bytes()
    for place in (folder, folder / "report", folder / ".." / folder.name):
        result = run(folder, *TORCH, "--report", place)
        assert result.exit_code == 2
    assert (folder / "layout.png").read_bytes() == card and not (folder / VERIFICATION_RECORD).exists()


@pytest.mark.parametrize("name, content", [("a.jsonl", "no JSON"), ("a.jsonl", '{"words": "x"}'), ("a.txt", " \n")])
def test_a_text_that_is_none_is_wrong_usage(damaged, tmp_path, name, content):
    _, folder = damaged()
    (tmp_path / name).write_text(content)
    result = run(folder, *TORCH, "--text", tmp_path / name)
    assert result.exit_code == 2
    assert "Invalid value for --text: " in result.output and "expected" in result.output
    assert not (folder / VERIFICATION_RECORD).exists()


def test_an_interrupted_run_is_recorded_as_incomplete(damaged):
    _, folder = damaged()

    def interrupt(check: Check):
        if check.name == "layout":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(Wanted(folder, backends=("torch",)), interrupt)
    assert recorded(folder)["verdict"] == "incomplete"
    assert [check["kind"] for check in recorded(folder)["checks"]] == ["file", "layout"]


def test_a_run_that_is_killed_leaves_no_older_verdict(damaged, instant):
    _, folder = damaged()
    (folder / VERIFICATION_RECORD).write_text('{"verdict": "passed", "checks": [], "files": {}}')
    seen = []
    verify(Wanted(folder, backends=("torch",)), lambda check: seen.append(recorded(folder)))
    assert {record["verdict"] for record in seen} == {"incomplete"}
    assert recorded(folder)["verdict"] == "passed"


@pytest.mark.parametrize("broken", [False, True])
def test_a_record_that_cannot_be_written_takes_nothing_else_away(damaged, monkeypatch, tmp_path, broken, instant):
    _, folder = damaged()
    if broken:
        damage(folder)
    write = Path.write_bytes

    def read_only(path, data):
        if path.parent == folder:
            raise OSError(30, "Read-only file system")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", read_only)
    result = run(folder, *TORCH, "--json", "--report", tmp_path / "report")
    assert result.exit_code == int(broken)
    assert json.loads(result.stdout)["verdict"] == ("failed" if broken else "passed")
    assert (tmp_path / "report" / "report.html").exists()
    assert result.stderr.startswith(
        f"Warning: {folder / VERIFICATION_RECORD}: it cannot be written (Read-only file system)"
    )
    assert not (folder / VERIFICATION_RECORD).exists() and not list(folder.glob(".*"))


def test_the_verdict_comes_before_the_report(damaged, monkeypatch, tmp_path, instant):
    def cannot(*_):
        raise BsaError("it cannot be written", where="report")

    monkeypatch.setattr("bsa_export.verify.report.write_report", cannot)
    result = run(damaged()[1], *TORCH, "--report", tmp_path / "report")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("passed: ")
    assert result.stderr == "Error: report: it cannot be written\n"


def test_every_file_of_the_model_is_recorded_and_others_are_named(damaged, instant):
    """Files that came after the conversion are not the model's; those of a tokenizer or a module are named."""
    _, folder = damaged()
    for name in ("tokenizer.json", "LICENSE", "notes.txt"):
        (folder / name).write_text("{}")
    result = run(folder, *TORCH)
    assert result.exit_code == 0
    assert set(recorded(folder)["files"]) == {"config.json", "conversion.json", "model.safetensors"}
    (line,) = (line for line in result.output.splitlines() if line.startswith("skipped  weights"))
    assert "tokenizer.json" in line and "LICENSE" not in line and "notes.txt" not in line


def test_figures_that_json_has_no_number_for_are_text():
    found = Verification([replace(WRONG, figures={"error": float("nan")})])
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["checks"][0]["figures"] == {"error": "nan"}


class Page(HTMLParser):
    """What a page refers to, and whether its tags close."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_page_and_pictures(damaged, tmp_path):
    import matplotlib.image

    source, folder = damaged(mode="bigbird")
    damage(folder)
    result = run(folder, "--source", source, *TORCH, "--report", tmp_path / "report")
    assert result.exit_code == 1
    there = {path.name for path in (tmp_path / "report").iterdir()}
    assert there == {"report.html", "layout.png", "errors.png", "drift.png"}
    text = (tmp_path / "report" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.sources) == 3 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "its checksum is not the one in conversion.json" in text
    for name in ("layout.png", "errors.png", "drift.png"):
        image = matplotlib.image.imread(tmp_path / "report" / name)
        assert image.shape[0] > 300 and image.shape[1] > 800 and image.std() > 0.05


def test_a_text_gives_losses(english_mlm, tmp_path):
    text = tmp_path / "text.jsonl"
    lines = (english_mlm / "heldout.jsonl").read_text().splitlines()[:1]
    text.write_text(json.dumps({"text": json.loads(lines[0])["text"][:6000]}))
    subprocess.run(
        [Path(sys.executable).parent / "bsa-convert", english_mlm, tmp_path / "out", "--max-length", "1024"], check=True
    )
    from bsa_export.converted.folder import open_folder
    from bsa_export.verify.drift import measure_drift
    from bsa_export.verify.whole_model import EndToEnd, load_model

    folder = open_folder(tmp_path / "out")
    drift = measure_drift(EndToEnd(folder, load_model(folder, "cpu"), "cpu"), text)
    losses = {(row["attention"], row["window"]): row["loss"] for row in drift.details if "loss" in row}
    assert set(losses) == {("dense", 512), ("sparse", 512), ("sparse", 1024)}
    assert losses["sparse", 512] == pytest.approx(losses["dense", 512], abs=1e-4)
    assert all(0.3 < loss < 3 for loss in losses.values())


def test_a_text_is_cut_on_a_cpu_and_that_is_told(damaged, monkeypatch, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    from bsa_export.converted.folder import open_folder
    from bsa_export.verify import drift
    from bsa_export.verify.whole_model import EndToEnd, load_model

    _, path = damaged()
    words = {word: number for number, word in enumerate(["[CLS]", "[SEP]", "[MASK]", "[UNK]", "a"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a " * 300)
    folder = open_folder(path)
    runs = EndToEnd(folder, load_model(folder, "cpu"), "cpu")
    assert drift.measure_drift(runs, tmp_path / "text.txt").figures["text"] == "all of its 300 tokens"
    monkeypatch.setattr(drift, "CPU_TOKENS", 200)
    figures = drift.measure_drift(runs, tmp_path / "text.txt").figures
    assert figures["text"] == "the first 200 tokens, the limit on a CPU"


def test_a_drift_is_no_check_that_passes():
    info = Check(Kind.DRIFT, Status.INFO, figures={"least": float("nan")})
    found = Verification([Check(Kind.FILE, Status.PASSED), info], finished=True)
    assert found.verdict is Verdict.INCOMPLETE and "1 passed" in found.sentence


def test_the_report_names_the_source_and_tells_what_is_drawn(tmp_path):
    """A snapshot of the Hub is stored in a folder named by its commit."""
    wanted = Wanted(tmp_path, source=tmp_path / ("0" * 40), source_name="org/name@v1")
    for distinct, told in ((24, "each distinct head keeps"), (30, "each of the first 24 of 30 distinct heads keeps")):
        checks = [Check(Kind.LAYOUT, Status.PASSED, figures={"density": 0.5, "distinct": distinct})]
        page = render(wanted, Verification(checks), {"layout.png": b""})
        assert "<td>org/name@v1</td>" in page
        assert page.count(told) == 2 and f'alt="Layouts: Which blocks of the score matrix {told}' in page


def test_text_from_files_is_inert_in_the_report(tmp_path):
    fault = "<script>alert(1)</script>\x1b[2J"
    checks = [Check(Kind.FILE, Status.FAILED, reason=fault), Check(Kind.LAYOUT, Status.SKIPPED, reason=fault)]
    page = render(Wanted(tmp_path, source_name="<b>x"), Verification(checks, {"<i>.json": "0"}), {})
    assert "<script>" not in page and "\x1b" not in page and "<b>" not in page and "<i>" not in page
    assert Page(page).open == []


def test_the_api_has_the_options_and_the_verdict(damaged, instant, tmp_path):
    source, folder = damaged()
    found = bsa_export.verify(folder, source=source, device="cpu", report=tmp_path / "report")
    found.raise_if_failed()
    assert found.verdict is Verdict.PASSED and (tmp_path / "report/report.html").exists()
    options = {parameter.name for parameter in main.params} - {"folder", "as_json", "help", "version", "backends"}
    assert options | {"backend"} <= set(inspect.signature(bsa_export.verify).parameters)
    damage(folder)
    with pytest.raises(BsaError, match="checksum"):
        bsa_export.verify(folder, device="cpu").raise_if_failed()
    for wrong in ({"backend": ["fpga"]}, {"device": "tpu"}, {"report": folder}, {"text": tmp_path / "none.txt"}):
        with pytest.raises(BsaError):
            bsa_export.verify(folder, **wrong)
