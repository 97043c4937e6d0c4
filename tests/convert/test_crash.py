"""Conversions killed at random moments: never an `out/` that looks whole, the source untouched, the next run works."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import save, tiny

pytestmark = pytest.mark.slow

CONVERT = Path(sys.executable).with_name("bsa-convert")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def start(source: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [CONVERT, source, out, "--overwrite", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Large enough that most of a run is writing."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 8000}
    return save(tiny("bert", **sizes), tmp_path_factory.mktemp("source") / "bert")


def converted(source: Path, out: Path, *options: str) -> tuple[dict[str, bytes], float]:
    """What a run that nobody kills leaves, and how long it takes."""
    started = time.perf_counter()
    process = start(source, out, *options)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return contents(out), time.perf_counter() - started


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("earlier", [False, True], ids=["no out/", "an earlier out/"])
def test_killed_at_random_moments(tmp_path, source, number, earlier):
    draw = random.Random(int(number) + earlier)
    before = contents(source)
    wholes, seconds = {}, 0
    for length in ("256", "512"):
        wholes[length], seconds = converted(source, tmp_path / length / "out", "--max-length", length)
    out, old, done = tmp_path / "place" / "out", None, 0
    if earlier:
        old, _ = converted(source, out, "--max-length", "512")
    for round_ in range(4):
        length = "512" if old == wholes["256"] else "256"
        process = start(source, out, "--max-length", length)
        time.sleep(draw.uniform(0.2, 1.0 if round_ else 0.6) * seconds)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors or process.returncode == -signal.SIGINT  # while Python itself was starting
        found = contents(out) if out.exists() else None
        assert found in (old, wholes[length])
        if number != signal.SIGKILL and out.parent.exists():
            assert [path.name for path in out.parent.iterdir()] in ([], ["out"])
        done += found != old
        old = found
        if not earlier and found:
            shutil.rmtree(out)
            old = None
    assert done < 4
    assert converted(source, out, "--max-length", "512")[0] == wholes["512"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert contents(source) == before
