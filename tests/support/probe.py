"""Converts, verifies, loads, pushes and pulls a small model: `python probe.py FOLDER BACKEND,BACKEND`.

Prints one line of JSON: the outcome of each step, and the versions. BACKENDs are those whose outputs must pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.tiny import dense_bert  # noqa: E402

OK, NEEDS_RUN = "ok", "needs [run]"
LIBRARIES = (
    "numpy",
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "huggingface-hub",
    "safetensors",
    "click",
    "msgspec",
)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"TRITON_INTERPRET": "1"}
    words = [sys.executable, "-m", "bsa_export", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=env)


def last_line(ran: subprocess.CompletedProcess[str]) -> str:
    return (ran.stderr or ran.stdout or "nothing printed").strip().splitlines()[-1]


def convert(source: Path, out: Path) -> str:
    ran = command("convert", source, out, "--max-length", 256, "--block", 16)
    return OK if ran.returncode == 0 else last_line(ran)


def verify(source: Path, out: Path, backends: list[str]) -> str:
    """With backends: exit code 0, and the outputs of each passed. Without: 3, and file, layout and weights passed."""
    ran = command("verify", out, "--source", source, "--json")
    if ran.returncode not in (0, 1, 3):
        return last_line(ran)
    status = {check["name"]: check["status"] for check in json.loads(ran.stdout)["checks"]}
    wanted = ["file", "layout", "weights", *(f"outputs: {backend}" for backend in backends)]
    wrong = [f"{name} {status.get(name)}" for name in wanted if status.get(name) != "passed"]
    wrong += [f"{name} failed" for name, found in status.items() if found == "failed"]
    if not wrong and ran.returncode != (0 if backends else 3):
        wrong.append(f"exit code {ran.returncode}")
    return ", ".join(dict.fromkeys(wrong)) or OK


def load(source: Path, out: Path) -> str:
    """Short inputs have the dense model's outputs, long ones are read."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        ran = subprocess.run(
            [sys.executable, "-c", "import sys, bsa_export; bsa_export.load(sys.argv[1])", out],
            capture_output=True,
            text=True,
        )
        return NEEDS_RUN if "is not installed; pip install" in last_line(ran) else last_line(ran)
    import torch
    from transformers import AutoModelForMaskedLM

    import bsa_export

    dense, sparse = AutoModelForMaskedLM.from_pretrained(source).eval(), bsa_export.load(out)
    ids = torch.randint(5, 300, (2, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = dense(ids[:, :64]).logits, sparse(ids[:, :64]).logits
        long = sparse(ids).logits
    error = float((expected - found).abs().max() / expected.abs().max())
    if error > 1e-4 or not bool(long.isfinite().all()) or float(long.std()) == 0:
        return f"outputs differ by {error:.1e}"
    return OK


def push_and_pull(out: Path, back: Path, verified: bool) -> str:
    pushed = command("push", out, "alice/model", "--yes", *([] if verified else ["--unverified"]))
    if pushed.returncode:
        return f"push: {last_line(pushed)}"
    pulled = command("pull", "alice/model", back)
    if pulled.returncode:
        return f"pull: {last_line(pulled)}"
    one, other = (hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() for folder in (out, back))
    return OK if one == other else "weights differ"


def attempt(step, *arguments) -> str:
    try:
        return step(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def main(folder: Path, backends: list[str]) -> None:
    folder.mkdir()
    source, out = dense_bert(folder / "source"), folder / "out"
    steps = {
        "convert": attempt(convert, source, out),
        "verify": attempt(verify, source, out, backends),
        "load": attempt(load, source, out),
        "push, pull": attempt(push_and_pull, out, folder / "back", bool(backends)),
    }
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    print(json.dumps({"steps": steps, "versions": versions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [name for name in sys.argv[2].split(",") if name])
