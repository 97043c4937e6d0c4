"""How every command ends: exit codes, and what it says."""

import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from bsa_export import __version__
from bsa_export.cli import command
from bsa_export.errors import BsaError

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
