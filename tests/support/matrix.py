"""Tries the package in venvs with many versions, and writes docs/compatibility.md. `tests/matrix.sh` starts it."""

from __future__ import annotations

import argparse
import configparser
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "hub"))

from hub_server import WRITER, HubServer  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"
PROBE = Path(__file__).with_name("probe.py")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
STEPS = ("convert", "verify", "load", "push, pull")
SHOWN = ("numpy", "torch", "triton", "transformers", "deepspeed")


@dataclass(frozen=True)
class Row:
    """One installation.

    Attributes:
        name: what is special about it.
        libraries: requirements next to the package's own core.
        python: such as 3.11.
        torch: whether the shared torch is visible.
        backends: what bsa-verify must pass; empty where nothing can be computed.
    """

    name: str
    libraries: tuple[str, ...]
    python: str
    torch: bool = False
    backends: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of a row: the probe's steps, each `ok` or what went wrong, and the versions that were installed."""

    row: Row
    steps: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(self.steps.get(step) in ("ok", "needs [run]") for step in STEPS)


def requirements(section: str, key: str) -> list[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return [line.split(";")[0].strip() for line in setup[section][key].strip().splitlines()]


def lowest(lines: Sequence[str]) -> tuple[str, ...]:
    """The lower bound of each requirement, as a pin."""
    return tuple(re.sub(r">=([\w.]+).*", r"==\1", line) for line in lines if ">=" in line)


def find_python(version: str) -> str | None:
    """An interpreter of that version: on PATH, or in pyenv's folder."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [sys.executable, shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        program = "import sys; print('%d.%d' % sys.version_info[:2])"
        found = subprocess.run([candidate, "-c", program], capture_output=True, text=True)
        if found.stdout.strip() == version:
            return str(candidate)
    return None


class Matrix:
    """The installations, in a folder of their own.

    Args:
        folder: temporary.
        torch_base: a venv whose torch the rows with torch see. None: no row has torch.
    """

    def __init__(self, folder: Path, torch_base: Path | None):
        self.folder, self.torch_base = folder, torch_base
        self.wheel = self._build()

    def _build(self) -> Path:
        """The package's wheel, from a copy: setuptools packs what an earlier build left."""
        ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
        copy = shutil.copytree(ROOT, self.folder / "source", ignore=ignored)
        subprocess.run([*PIP, "wheel", "-q", "--no-deps", "-w", self.folder, copy], check=True)
        return next(self.folder.glob("bsa_export-*.whl"))

    def install(self, row: Row, venv: Path) -> str | None:
        """Makes the row's venv. Returns what pip said if it fails."""
        subprocess.run([find_python(row.python), "-m", "venv", "--without-pip", venv], check=True)
        if row.torch:
            (site,) = venv.glob("lib/python*/site-packages")
            (base,) = self.torch_base.glob("lib/python*/site-packages")
            (site / "torch.pth").write_text(f"{base.resolve()}\n")
        install = [*PIP, "--python", venv / "bin" / "python", "install", "-q", "--upgrade"]
        env = os.environ | {"DS_BUILD_OPS": "0"}
        done = subprocess.run([*install, self.wheel, *row.libraries], capture_output=True, text=True, env=env)
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return None if done.returncode == 0 else (errors or ["pip failed"])[-1].removeprefix("ERROR: ")

    def run(self, row: Row) -> Outcome:
        """Installs a row and runs the probe in it, against a Hub of its own."""
        start, outcome = time.monotonic(), Outcome(row)
        place = self.folder / re.sub(r"\W+", "-", f"{row.python} {row.name}")
        place.mkdir()
        failed = self.install(row, place / "venv")
        if failed:
            outcome.steps = {"install": failed}
        else:
            with HubServer(place / "hub") as hub:
                others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
                env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(place / "home")}
                command = [place / "venv" / "bin" / "python", PROBE, place / "work", ",".join(row.backends)]
                ran = subprocess.run(command, env=others | env, cwd=place, capture_output=True, text=True)
            last = (ran.stdout.splitlines() or [""])[-1]
            if last.startswith("{"):
                found = json.loads(last)
                outcome.steps, outcome.versions = found["steps"], found["versions"]
            else:
                outcome.steps = {"probe": (ran.stderr.splitlines() or ["no output"])[-1]}
        outcome.seconds = time.monotonic() - start
        shutil.rmtree(place, ignore_errors=True)
        return outcome


def core_rows(pythons: Sequence[str]) -> Iterator[Row]:
    core = requirements("options", "install_requires")
    yield Row("core, lowest", lowest(core), pythons[0])
    for python in pythons:
        yield Row("core, newest", (), python)


def torch_rows(python: str) -> Iterator[Row]:
    """Rows with the shared torch, from the lowest versions to the newest."""
    run = [line for line in requirements("options.extras_require", "run") if not line.startswith("torch")]
    transformers = next(line for line in run if line.startswith("transformers"))
    both = ("torch", "triton")
    core = [line for line in requirements("options", "install_requires") if not line.startswith("huggingface-hub")]
    yield Row("run, lowest", lowest([*core, *run]), python, True, both)  # transformers needs a newer huggingface-hub
    yield Row("run, newest", ("triton", transformers, "numpy"), python, True, both)
    yield Row("triton 3.6, numpy 2.4", ("triton==3.6.0", transformers, "numpy==2.4.*"), python, True, ("torch",))
    for deepspeed in ("deepspeed==0.16.0", "deepspeed==0.19.6"):
        yield Row(deepspeed, ("triton", transformers, "numpy", deepspeed), python, True, (*both, "deepspeed"))
    yield Row("deepspeed, newest", ("triton", transformers, "numpy", "deepspeed"), python, True, both)


def torch_base(spec: str) -> Path:
    """A venv with that torch, kept in .venv-matrix for the next time."""
    venv = ROOT / ".venv-matrix"
    if not (venv / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    subprocess.run([*PIP, "--python", venv / "bin" / "python", "install", "-q", spec], check=True)
    return venv


def page(outcomes: list[Outcome], absent: list[str]) -> str:
    """docs/compatibility.md."""
    today = datetime.date.today().isoformat()
    lines = [
        "# Compatibility",
        "",
        f"Written by `bash tests/matrix.sh` on {today}, on {platform.system()} {platform.machine()} without a GPU.",
        "Each row is a venv in which a small model was converted, verified, loaded and compared with the dense model,",
        "pushed to a test Hub and pulled from it.",
        "",
        "| installation | Python | " + " | ".join(SHOWN) + " | " + " | ".join(STEPS) + " |",
        "|" + "---|" * (2 + len(SHOWN) + len(STEPS)),
    ]
    for outcome in outcomes:
        versions = [outcome.versions.get(name, "") for name in SHOWN]
        steps = [outcome.steps.get(step, "") for step in STEPS]
        if not outcome.versions:
            steps = [f"{name}: {text}" for name, text in outcome.steps.items()] + [""] * (len(STEPS) - 1)
        cells = [outcome.row.name, outcome.versions.get("python", outcome.row.python), *versions, *steps]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    lines += [
        "",
        "`needs [run]`: the step needs torch and transformers.",
    ]
    if absent:
        lines += ["", f"Not tried, as they were not on the machine: Python {', '.join(absent)}."]
    bounds = [*requirements("options", "install_requires"), *requirements("options.extras_require", "run")]
    lines += ["", "Bounds in `setup.cfg`: " + ", ".join(f"`{line}`" for line in bounds) + "."]
    lines += ["", "The table has one version of torch; `tests/matrix.sh --torch SPEC` tries another one."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/matrix.sh", description=__doc__)
    parser.add_argument("--reduced", action="store_true", help="lowest core on the oldest Python, newest of everything")
    parser.add_argument("--no-torch", action="store_true", help="rows without torch only")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds TEXT; nothing is written")
    pin = next(line for line in (ROOT / "tests" / "constraints.txt").read_text().split() if line.startswith("torch=="))
    parser.add_argument("--torch", default=pin, metavar="SPEC", help="what pip installs as torch (%(default)s)")
    chosen = parser.parse_args()
    found = [version for version in PYTHONS if find_python(version)]
    absent = [version for version in PYTHONS if version not in found]
    here = ".".join(platform.python_version_tuple()[:2])
    rows = [*core_rows(found), *([] if chosen.no_torch else torch_rows(here))]
    if chosen.reduced:
        rows = [row for row in rows if row.name in ("core, lowest", "run, newest")]
    rows = [row for row in rows if chosen.only in row.name]
    with tempfile.TemporaryDirectory() as folder:
        base = None
        if any(row.torch for row in rows):
            installed = ROOT / ".venv-test"
            base = installed if chosen.reduced and installed.is_dir() else torch_base(chosen.torch)
        matrix, outcomes = Matrix(Path(folder), base), []
        for row in rows:
            outcomes.append(outcome := matrix.run(row))
            steps = ", ".join(f"{name}: {text}" for name, text in outcome.steps.items())
            verdict = "passed" if outcome.passed else "FAILED"
            print(f"{verdict}  {row.python:5} {row.name:24} {outcome.seconds:5.0f} s  {steps}", flush=True)
    if absent:
        print(f"not tried: Python {', '.join(absent)} (not on this machine)")
    if not (chosen.reduced or chosen.no_torch or chosen.only):
        PAGE.write_text(page(outcomes, absent))
        print(f"written: {PAGE.relative_to(ROOT)}")
    return int(not all(outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
