"""compute-sanitizer finds nothing in the fused kernels: no access out of bounds, no race in shared memory, no barrier
missed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).with_name("sanitize.py")


@pytest.mark.gpu
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer_finds_nothing(tool):
    path = os.pathsep.join(filter(None, [str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH")]))
    # torch's cache of memory would hide accesses out of bounds
    environment = os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=_kernel", "--error-exitcode", "9"]
    ran = subprocess.run([*command, sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "ran " in ran.stdout and re.search("SUMMARY: 0 (errors|hazards)", ran.stdout), ran.stdout[-4000:]
