"""Converting a BERT-large `.bin` (1.34 GB): whole processes, alternating with `cp` and `torch.load` + `save_file`.

Not a test: `python tests/benchmarks/convert.py` on an idle machine (about 8 GB of disk for `--memory-factor 4`, else
4 GB). Each round runs every way once, in turn, from a warm page cache; a figure is the median of the rounds with their
range, a ratio the median of the rounds' ratios. Peak memory is the process's largest resident set. The converted file
is compared with the source bit for bit first: if they differ, nothing is reported.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import BertConfig, BertModel

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
GOALS = {"ratio": 1.5, "MiB": 150, "help": 0.3}
# A process counts the memory of the one that started it as its own, so a small one has to start it.
LAUNCHER = """
import resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
USUAL_WAY = """
import sys, torch
from safetensors.torch import save_file
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True, mmap=sys.argv[3] == "mmap")
save_file(state, sys.argv[2], metadata={"format": "pt"})
"""


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=LARGE["num_hidden_layers"], help="fewer for a trial")
    parser.add_argument(
        "--memory-factor", type=int, default=4, help="peak memory again for a file so many times as large; 0: not"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for the files, on the disk to be measured; default: the temporary one"
    )
    return parser.parse_args(argv)


def machine_line() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (match := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = match[1]
    versions = ", ".join(f"{name} {version(name)}" for name in ("bsa_export", "torch", "safetensors"))
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {versions}"


def make_bert(folder: Path, layers: int) -> Path:
    """A BERT of that many layers with random weights, as `torch.save` writes it, and its config.json."""
    folder.mkdir()
    config = BertConfig(**LARGE | {"num_hidden_layers": layers}, architectures=["BertModel"])
    with torch.device("meta"):
        shapes = BertModel(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.empty(tensor.shape).uniform_(-0.1, 0.1, generator=generator)
        for name, tensor in shapes.items()
        if tensor.is_floating_point()
    }
    torch.save(state, folder / "pytorch_model.bin")
    config.save_pretrained(folder)
    return folder / "pytorch_model.bin"


def run(command: list[str]) -> tuple[float, float]:
    """Seconds of a whole process, and its peak memory in MiB (not below the 9 of a bare Python)."""
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    seconds, kib = done.stdout.split()
    return float(seconds), int(kib) / 1024


def ways(source: Path, work: Path) -> dict[str, list[str]]:
    """Name -> command; each writes below `work/target`."""
    target = work / "target"
    convert = str(Path(sys.executable).with_name("bsa-convert"))
    usual = [sys.executable, "-c", USUAL_WAY]
    return {
        "cp": ["cp", str(source), str(target / "copy.bin")],
        "bsa-convert": [convert, str(source), str(target / "converted"), "--max-length", "512"],
        "bsa-convert --max-length 4096": [convert, str(source), str(target / "longer"), "--max-length", "4096"],
        "torch.load(mmap=True) + save_file": [*usual, str(source), str(target / "m.safetensors"), "mmap"],
        "torch.load + save_file": [*usual, str(source), str(target / "u.safetensors"), ""],
    }  # fmt: skip


def fresh(work: Path) -> None:
    """An empty target folder, and no dirty pages of the last run that would slow the next."""
    shutil.rmtree(work / "target", ignore_errors=True)
    (work / "target").mkdir()
    os.sync()


def check(source: Path, converted: Path) -> int:
    """Exit unless every tensor of the source is in the converted file, bit for bit. Returns their number."""
    state = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    with safe_open(converted / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        wrong = [
            name for name, tensor in state.items() if name not in names or not same_bits(tensor, file.get_tensor(name))
        ]
    if wrong:
        sys.exit(f"{len(wrong)} tensors are missing or differ from the source, {wrong[0]} first: nothing is reported")
    return len(state)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def figure(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def row(name: str, runs: list[tuple[float, float]], ratios: str) -> str:
    return f"| {name} | {figure([seconds for seconds, _ in runs])} | {ratios} | {max(mib for _, mib in runs):.0f} |"


def main(argv=None) -> None:
    options = parse(argv)
    print(machine_line(), flush=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        source = make_bert(work / "large", options.layers)
        commands = ways(source, work)
        fresh(work)
        run(commands["bsa-convert"])
        count = check(source, work / "target" / "converted")
        print(
            f"{source.stat().st_size / 1e9:.2f} GB, {count} tensors, all bit-identical in the converted file; "
            f"{options.rounds} rounds\n"
        )

        results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                fresh(work)
                results[name].append(run(command))
        print("| | seconds: median (range) | x `cp` | peak MiB |\n|---|---|---|---|")
        base = [seconds for seconds, _ in results["cp"]]
        for name, runs in results.items():
            ratios = [seconds / cp for (seconds, _), cp in zip(runs, base, strict=True)]
            print(row(f"`{name}`", runs, figure(ratios)))
        helps = [run([commands["bsa-convert"][0], "--help"]) for _ in range(options.rounds)]
        print(row("`bsa-convert --help`", helps, ""), flush=True)

        if options.memory_factor:
            shutil.rmtree(work / "large")
            source = make_bert(work / "larger", options.layers * options.memory_factor)
            fresh(work)
            _, mib = run(ways(source, work)["bsa-convert"])
            print(f"| `bsa-convert` of {source.stat().st_size / 1e9:.2f} GB | | | {mib:.0f} |")
    print(
        f"\ngoals: bsa-convert at most {GOALS['ratio']} x cp and {GOALS['MiB']} MiB, --help at most {GOALS['help']} s"
    )


if __name__ == "__main__":
    main()
