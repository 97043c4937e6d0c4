"""Writes docs/cli.md from the `--help` of each command: `python docs/make_cli.py`. A test compares the two."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
START = """\
# Commands

Written by `python docs/make_cli.py` from the `--help` of each command. `python -m bsa_export convert ...` runs the same
commands where the scripts are not on the `PATH`.

Exit codes: 0 success, 1 an error, which is one sentence on stderr, 2 wrong usage, 130 Ctrl-C. `bsa-verify` has more.

## Shell completion

In `~/.bashrc`, for each command that you use:

```bash
eval "$(_BSA_CONVERT_COMPLETE=bash_source bsa-convert)"
eval "$(_BSA_VERIFY_COMPLETE=bash_source bsa-verify)"
```

For zsh, write `zsh_source`, in `~/.zshrc`. For fish, write
`_BSA_CONVERT_COMPLETE=fish_source bsa-convert > ~/.config/fish/completions/bsa-convert.fish`.
"""


def commands() -> list[str]:
    """The console scripts, in the order of setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(DOCS.parent / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].split("\n")
    return [line.split("=")[0].strip() for line in lines if line.strip()]


def cli_page() -> str:
    parts = [START]
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
