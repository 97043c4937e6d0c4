"""Writes docs/cli.md from what each command says to `--help`: `python docs/make_cli.py`. A test holds the file to it."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent


def commands() -> list[str]:
    """The console scripts, in the order of setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(DOCS.parent / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].split("\n")
    return [line.split("=")[0].strip() for line in lines if line.strip()]


def cli_page() -> str:
    parts = ["# Commands\n\nMade from `--help` by `python docs/make_cli.py`.\n"]
    for command in commands():
        shown = subprocess.run(
            [Path(sys.executable).parent / command, "--help"],
            env=os.environ | {"COLUMNS": "100"},
            capture_output=True,
            text=True,
            check=True,
        )
        parts.append(f"## {command}\n\n```text\n{shown.stdout.strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (DOCS / "cli.md").write_text(cli_page())
