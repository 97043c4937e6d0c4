"""How every command starts and ends: exit codes, and what it prints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from bsa_export import __version__
from bsa_export.cli import COMMANDS, command
from bsa_export.errors import BsaError
from bsa_export.version import install_hint

PROGRAM = """
import sys, time
import click
from bsa_export.cli import command
from bsa_export.errors import BsaError

@command("bsa-try")
@click.argument("what")
def main(what):
    "Try something."
    if what == "wait":
        click.echo("waiting")
        time.sleep(60)
    if what == "ask":
        click.echo("waiting")
        click.confirm("sure", abort=True)
    if what == "print":
        for number in range(100_000):
            click.echo(number)
    if what == "bug":
        raise ValueError("a bug")
    if what == "refuse":
        raise BsaError("expected this", found="that", where="here", hint="do so")
main()
"""


def start(*arguments: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def ended(*arguments: str) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_refusal_is_one_sentence_on_stderr():
    assert ended("refuse") == (1, "", "Error: here: expected this, found that; do so\n")


def test_a_bug_keeps_its_traceback():
    code, _, err = ended("bug")
    assert code == 1
    assert err.startswith("Traceback") and err.endswith("ValueError: a bug\n")


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("--nonsense", "a")])
def test_wrong_usage_is_2(arguments):
    code, out, err = ended(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Usage:") and "Error: " in err


@pytest.mark.parametrize("what", ["wait", "ask"])
def test_ctrl_c_is_130_and_quiet(what):
    process = start(what)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "Error" not in err


def test_an_unanswered_question_is_1():
    process = start("ask")
    _, err = process.communicate("", timeout=60)
    assert process.returncode == 1
    assert "Aborted!" in err


def test_a_reader_that_goes_away_is_no_error():
    process = start("print")
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(option):
    code, out, err = ended(option)
    assert (code, err) == (0, "")
    assert "Try something." in out and "--version" in out


def test_version():
    assert ended("--version") == (0, f"bsa-try {__version__}\n", "")


def test_the_cause_of_a_refusal_is_kept_for_callers():
    @command("bsa-try")
    def main():
        raise BsaError("no")

    result = CliRunner().invoke(main, standalone_mode=False)
    assert isinstance(result.exception.__cause__, BsaError)


@pytest.mark.parametrize("name", COMMANDS)
def test_python_m_is_the_same_command(name):
    def help_of(*start: str) -> str:
        ran = subprocess.run([*start, "--help"], capture_output=True, text=True, check=True)
        return ran.stdout.partition("\n")[2]  # without the line that names the program

    assert help_of(sys.executable, "-m", "bsa_export", name) == help_of(
        str(Path(sys.executable).parent / f"bsa-{name}")
    )


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--version"], 0), ([], 2), (["no-command"], 2)])
def test_python_m_without_a_command(arguments, code):
    ran = subprocess.run([sys.executable, "-m", "bsa_export", *arguments], capture_output=True, text=True)
    assert ran.returncode == code and "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("library", "arguments"),
    [
        ("click", ["convert", "--help"]),  # imported by every command
        ("huggingface_hub", ["pull", "me/model", "out"]),  # imported by the callback of an argument
        ("numpy", ["convert", "source", "out"]),  # imported by the command itself
    ],
)
def test_ctrl_c_during_an_import_is_130_and_quiet(library, arguments, tmp_path):
    (tmp_path / f"{library}.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "bsa_export", *arguments],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "")


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_without_a_library_the_python_api_says_what_to_install(library, tmp_path):
    """In a process that does not find the library, as after `pip install .`."""
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {library!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import bsa_export
try:
    bsa_export.load({str(tmp_path)!r})
except bsa_export.errors.BsaError as error:
    print(isinstance(error, ImportError), error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(f"True bsa_export.load needs {library}")
    assert install_hint("run") in ran.stdout
