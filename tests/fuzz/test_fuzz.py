"""2,000 cases, always the same: `tests/fuzz/run.py` runs more."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_no_case_is_a_finding():
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--cases", "2000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.startswith("2,000 cases")
