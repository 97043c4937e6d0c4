"""bsa-verify as a user has it: table, verdict, exit code, record and report."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from bsa_export.cli.verify import main
from bsa_export.errors import BsaError
from bsa_export.verify.checks import Check
from bsa_export.verify.run import VERIFICATION_RECORD, Verification, Wanted, verify

TORCH = ["--backend", "torch", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


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
    assert re.fullmatch(r"passed: 11 passed \(\d+\.\d s\)", lines[-1])
    record = recorded(folder)
    assert record["verdict"] == "passed"
    assert {check["status"] for check in record["checks"]} == {"passed"}
    assert set(record["checks"][0]) == {"name", "status", "reason", "figures"}
    assert set(record["files"]) == {"config.json", "conversion.json", "model.safetensors"}
    for name, digest in record["files"].items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert {"python", "bsa_export", "torch"} <= set(record["versions"])
    assert record["device"].startswith("CPU")
    assert not list(folder.glob(".*"))


def test_json_holds_every_comparison(damaged):
    _, folder = damaged()
    result = run(folder, *TORCH, "--json")
    content = json.loads(result.output)
    assert result.exit_code == 0 and content["verdict"] == "passed"
    weights = next(check for check in content["checks"] if check["name"] == "weights")
    assert weights["status"] == "skipped" and "--source" in weights["reason"]
    outputs = next(check for check in content["checks"] if check["name"] == "outputs: torch")
    assert {row["situation"] for row in outputs["details"]} >= {"one shorter than a block", "padded", "odd", "longest"}
    assert all(row["ratio"] <= row["bound"] for row in outputs["details"])


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
    assert "torch cannot be imported" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("incomplete: 2 passed, ")
    assert recorded(folder)["verdict"] == "incomplete"


def test_a_backend_that_is_required_may_not_be_skipped(damaged):
    _, folder = damaged(block=8, max_length=64)
    result = run(folder, "--device", "cpu", "--backend", "torch", "--require", "triton")
    assert result.exit_code == 1
    assert "it is required, and was skipped: " in result.output
    assert "not 8" in result.output  # the block that no kernel has
    assert run(folder, *TORCH).exit_code == 0


def test_a_source_that_is_not_there_is_a_sentence(converted):
    result = run(converted()[1], "--source", "/nowhere/model.bin")
    assert result.exit_code == 1
    assert result.output.startswith("Error: /nowhere/model.bin: expected a file, a folder, or a repository")


def test_an_interrupted_run_is_recorded_as_incomplete(damaged):
    _, folder = damaged()

    def interrupt(check: Check):
        if check.name == "layout":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(Wanted(folder, backends=("torch",)), interrupt)
    assert recorded(folder)["verdict"] == "incomplete"
    assert recorded(folder)["sentence"] == "incomplete: 2 passed; it was interrupted"


def test_a_record_that_cannot_be_written_is_a_sentence(damaged, monkeypatch):
    _, folder = damaged()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BsaError, match=r"verification.json: it cannot be written \(No space left on device\)"):
        verify(Wanted(folder, backends=("torch",)))
    assert not (folder / VERIFICATION_RECORD).exists() and not list(folder.glob(".*"))


def test_figures_that_json_has_no_number_for_are_text():
    found = Verification([Check("outputs: torch", "failed", "x", {"error": float("nan")})])
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
    from bsa_export.verify.drift import measure_drift
    from bsa_export.verify.folder import open_folder
    from bsa_export.verify.whole_model import EndToEnd, load_model

    folder = open_folder(tmp_path / "out")
    drift = measure_drift(EndToEnd(folder, load_model(folder, "cpu"), "cpu"), text)
    losses = {(row["attention"], row["window"]): row["loss"] for row in drift.details if "loss" in row}
    assert set(losses) == {("dense", 512), ("sparse", 512), ("sparse", 1024)}
    assert losses["sparse", 512] == pytest.approx(losses["dense", 512], abs=1e-4)
    assert all(0.3 < loss < 3 for loss in losses.values())


def test_a_model_that_cannot_read_a_text_has_no_loss(damaged, tmp_path):
    _, folder = damaged()
    (tmp_path / "text.txt").write_text("A text.")
    result = run(folder, *TORCH, "--text", tmp_path / "text.txt")
    assert result.exit_code == 0
    assert re.search(r"skipped  drift +.*: a text needs the model's tokenizer.json, found none", result.output)
