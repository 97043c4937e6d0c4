"""Pushing a converted BERT-base (450 MB) to a Hub on loopback: whole processes of `bsa-push` and `hf upload`, in turn.

Not a test: `python tests/benchmarks/push.py` on an idle machine (2 GB of disk). Every run starts with an empty Hub
(tests/hub/hub_server.py in a process of its own) and an empty HF_HOME, with hf_xet and without it. bsa-push also checks
the folder against verification.json before, and the repository against the folder afterwards. A figure is the median of
the rounds with their range, a ratio the median of the rounds' ratios. After each run the repository's files are
compared with the folder's by sha256: if they differ, nothing is reported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYERS, HIDDEN, WORDS, POSITIONS = 12, 768, 30522, 512
GOAL = 1.3
SERVER = Path(__file__).resolve().parent.parent / "hub" / "hub_server.py"
BIN = Path(sys.executable).parent


def make_dense(folder: Path, layers: int) -> Path:
    """A BERT-base with random weights."""
    random = np.random.default_rng(0)
    shapes = {"word_embeddings": WORDS, "position_embeddings": POSITIONS, "token_type_embeddings": 2}
    weights = {f"embeddings.{name}.weight": (rows, HIDDEN) for name, rows in shapes.items()}
    linears = {"pooler.dense": (HIDDEN, HIDDEN)}
    norms = ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{number}" for number in range(layers)):
        parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        linears |= {f"{layer}.{part}": (HIDDEN, HIDDEN) for part in parts}
        linears |= {f"{layer}.intermediate.dense": (4 * HIDDEN, HIDDEN), f"{layer}.output.dense": (HIDDEN, 4 * HIDDEN)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name, shape in linears.items():
        weights |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        weights |= {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}
    folder.mkdir()
    save_file(
        {name: random.random(shape, np.float32) - 0.5 for name, shape in weights.items()}, folder / "model.safetensors"
    )
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": HIDDEN, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 12, "intermediate_size": 4 * HIDDEN, "vocab_size": WORDS, "type_vocab_size": 2}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
    return folder


def make_converted(folder: Path, layers: int) -> Path:
    """The folder that is pushed, with the record of a verification."""
    dense = make_dense(folder / "dense", layers)
    converted = folder / "converted"
    subprocess.run(
        [BIN / "bsa-convert", dense, converted, "--max-length", "4096"], check=True, stdout=subprocess.DEVNULL
    )
    record = {"verdict": "passed", "files": digests(converted), "checks": [], "device": "cpu", "versions": {}}
    (converted / "verification.json").write_text(json.dumps(record))
    return converted


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def push(command: list, folder: Path, work: Path, xet: bool) -> float:
    """Seconds of a whole process that pushes to an empty Hub. Exits if the repository is not the folder then."""
    with tempfile.TemporaryDirectory(dir=work) as place:
        server = subprocess.Popen([sys.executable, SERVER, f"{place}/hub"], stdout=subprocess.PIPE, text=True)
        try:
            given = dict(pair.split("=", 1) for pair in server.stdout.readline().split())
            env = os.environ | given | {"HF_HOME": f"{place}/home"} | ({} if xet else {"HF_HUB_DISABLE_XET": "1"})
            started = time.perf_counter()
            subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
            check(given["HF_ENDPOINT"], folder)
        finally:
            server.terminate()
            server.wait()
    os.sync()
    return seconds


def check(url: str, folder: Path) -> None:
    with urllib.request.urlopen(f"{url}/api/models/alice/model/tree/main?recursive=true") as answer:
        listed = {entry["path"]: entry for entry in json.load(answer) if entry["type"] == "file"}
    for path in folder.iterdir():
        entry = listed.get(path.name, {})
        content = path.read_bytes()
        expected = hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if entry.get("lfs", {}).get("oid", entry.get("oid")) not in expected:
            sys.exit(f"{path.name} did not arrive as it is: nothing is reported")


def figure(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def machine_line() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    names = ("bsa_export", "huggingface_hub", "hf_xet")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    processor = match[1] if match else platform.machine()
    return f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a trial")
    parser.add_argument("--work", type=Path, help="folder for the files; default: the temporary one")
    options = parser.parse_args()
    print(machine_line(), flush=True)
    with tempfile.TemporaryDirectory(dir=options.work) as place:
        work = Path(place)
        folder = make_converted(work, options.layers)
        size = sum(path.stat().st_size for path in folder.iterdir())
        commands = {
            "hf upload": [BIN / "hf", "upload", "alice/model", folder, "."],
            "bsa-push": [BIN / "bsa-push", folder, "alice/model", "--yes"],
        }
        push(commands["bsa-push"], folder, work, xet=True)  # completes the card, which all later runs upload
        print(f"{size / 1e6:.0f} MB, {options.rounds} rounds; goal: bsa-push at most {GOAL} x hf upload\n")
        print("| | `hf upload`, s | `bsa-push`, s | ratio |\n|---|---|---|---|", flush=True)
        for xet in (True, False):
            seconds: dict[str, list[float]] = {name: [] for name in commands}
            for _ in range(options.rounds):
                for name, command in commands.items():
                    seconds[name].append(push(command, folder, work, xet))
            ratios = [ours / theirs for theirs, ours in zip(*seconds.values(), strict=True)]
            cells = [figure(values) for values in (*seconds.values(), ratios)]
            print(f"| {'hf_xet' if xet else 'LFS'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
