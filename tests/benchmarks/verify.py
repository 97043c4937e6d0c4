"""The time that bsa-verify needs: the whole command on a BERT-base at 4,096 tokens, and its reading as a ratio.

Not a test: `python tests/benchmarks/verify.py` on an idle machine. The model has random weights. Each round is a
process of its own, with everything that the command does: `--source`, `--report`, every backend that runs on the
machine. On a GPU the first run is reported separately, because Triton compiles its kernels into an empty cache. The
figures are medians with their range. CPU seconds include those of Triton's interpreter, which runs next to the command
where there is no GPU. The file and weights checks read the folder twice and the source once. Their rate is reported as
a ratio to plain reads of the same bytes from a warm page cache. If a run does not pass, nothing is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

GOALS = {"cuda": 25, "cpu": 60}
SIZES = {
    "base": {},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
READ = """
import sys
buffer = memoryview(bytearray(4 << 20))
for path in sys.argv[1:]:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
"""
CHECKS = """
import sys
from pathlib import Path
from bsa_export.verify import check_file
from bsa_export.converted.folder import open_folder
from bsa_export.verify.weights import check_weights
assert check_file(Path(sys.argv[1])).passed
assert check_weights(open_folder(Path(sys.argv[1])), Path(sys.argv[2])).passed
assert "torch" not in sys.modules
"""


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def make(work: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """A BERT with random weights of a trained model's size, and its conversion."""
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES[options.size]))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.04)
    model.save_pretrained(work / "source")
    length = ["--max-length", str(options.max_length)]
    subprocess.run([*command("convert"), work / "source", work / "out", *length], check=True, stdout=subprocess.DEVNULL)
    return work / "source", work / "out"


def command(name: str) -> list[str]:
    """What `bsa-convert` or `bsa-verify` starts, installed or not."""
    return [sys.executable, "-c", f"from bsa_export.cli.{name} import main; main()"]


def timed(command: list) -> tuple[float, float, str]:
    """Wall seconds, CPU seconds of all its processes, and output of a command that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ran.returncode:
        raise SystemExit(f"exit code {ran.returncode}: nothing is reported\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ran.stdout


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def main(argv=None) -> None:
    options = parse(argv)
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU used"
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, {gpu}, torch {torch.__version__},"
        f" transformers {transformers.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source, out = make(work, options)
        weights = [source / "model.safetensors", out / "model.safetensors", out / "model.safetensors"]
        nbytes = sum(path.stat().st_size for path in weights)
        reads, checks = [], []
        for _ in range(options.rounds + 1):
            reads.append(timed([sys.executable, "-c", READ, *weights])[0])
            checks.append(timed([sys.executable, "-c", CHECKS, out, source])[0])
        reads, checks = reads[1:], checks[1:]  # the first fills the page cache
        ratio = statistics.median(check / read for check, read in zip(checks, reads, strict=True))
        print(
            f"reading {nbytes / 1e9:.2f} GB: {spread(reads)}; file and weights checks: {spread(checks)}, {ratio:.1f} x"
        )
        walls, processor = [], []
        verify = [*command("verify"), out, "--source", source, "--device", options.device]
        verify += ["--report", work / "report", "--json"]
        if options.device == "cuda":
            os.environ["TRITON_CACHE_DIR"] = str(work / "triton")
            print(f"first run: {timed(verify)[0]:.1f} s", flush=True)
        for number in range(options.rounds):
            wall, seconds, output = timed(verify)
            walls.append(wall)
            processor.append(seconds)
            print(f"round {number + 1}: {wall:.1f} s", flush=True)
        result = json.loads(output)
        print(f"{result['sentence']}; of the last round:")
        for check in result["checks"]:
            print(f"  {check['seconds']:6.2f} s  {check['status']:<8} {check['name']}")
        goal = GOALS[options.device]
        verdict = "met" if statistics.median(walls) < goal else "missed"
        print(
            f"BERT-{options.size} at {options.max_length:,} tokens: "
            f"{spread(walls)}, {spread(processor)} of CPU; goal under {goal} s: {verdict}"
        )


if __name__ == "__main__":
    main()
