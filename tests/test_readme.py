"""README and docs: links have a target, commands print what is shown, and docs/cli.md is what `--help` prints."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
sys.path.insert(0, str(ROOT / "docs"))

import make_cli  # noqa: E402


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def sessions(page: Path) -> list[tuple[str, str]]:
    """Each `$ command` in the console blocks of a page, and the output shown below it."""
    return [
        (command, output)
        for block in fences(page, "console")
        for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    ]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_figures(text: str) -> str:
    """The output with all times equal, and all runs of spaces."""
    return re.sub(r"[ \t]+", " ", re.sub(r"\d+(\.\d+)? m?s\b", "0 s", text)).strip()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, minilm):
    """A folder as a reader has it, with the real model in it."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "minilm").symlink_to(minilm)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_a_target(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_it_compiles(page):
    for block in fences(page, "python"):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_that_it_names_exist(page):
    for script in re.findall(r"`(?:bash|python) ([\w./]+\.(?:sh|py))", page.read_text()):
        assert (ROOT / script).is_file(), f"{page.name} names {script}"


@pytest.mark.parametrize("command", make_cli.commands())
def test_readme_shows_each_command(command):
    assert re.search(rf"^(\$ )?{command} ", PAGES[0].read_text(), re.MULTILINE)


def test_pasted_output_is_what_the_commands_print(workplace):
    shown = sessions(PAGES[0])
    assert shown
    for command, pasted in shown:
        ran = subprocess.run(
            shlex.split(command),
            cwd=workplace,
            env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert ran.returncode == 0, f"$ {command}\n{ran.stdout}"
        assert without_figures(ran.stdout) == without_figures(pasted), f"$ {command}"


def test_the_command_page_is_what_help_says():
    assert (ROOT / "docs" / "cli.md").read_text() == make_cli.cli_page(), "run python docs/make_cli.py"


@pytest.mark.slow
def test_quickstart_verifies_every_backend_in_an_installed_environment(minilm, tmp_path):
    ran = subprocess.run(
        ["bash", str(ROOT / "examples" / "quickstart.sh"), str(tmp_path / "out")],
        env=os.environ | {"VENV": sys.prefix},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for backend in ("torch", "triton", "deepspeed"):
        assert re.search(rf"^passed +outputs: {backend} ", ran.stdout, re.MULTILINE), ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("passed: ")


@pytest.mark.parametrize("script", [*ROOT.glob("*/*.sh"), ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
