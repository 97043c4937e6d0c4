"""The commands, one file each. Only here is click imported.

`command` holds what all commands share: help, version, and how they end.

| ends with | exit code | prints |
|---|---|---|
| nothing wrong | 0 | |
| `BsaError` | 1 | `Error: ` and its sentence, on stderr |
| wrong usage, found by click | 2 | usage and the reason, on stderr |
| Ctrl-C, also at a question and during imports | 130 | nothing |
| the reader of its output is gone (`bsa-convert ... | head -1`) | 1 | nothing |
| any other exception | 1 | its traceback |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from bsa_export.errors import BsaError
from bsa_export.version import __version__

INTERRUPTED = 130  # 128 + SIGINT, as in shells
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
COMMANDS = ("convert", "verify", "push", "pull")


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns what a command raises into what click exits with, as the module's table says."""
    try:
        yield
    except BsaError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise click.exceptions.Exit(INTERRUPTED) from None
    except click.Abort as abort:  # from a question: Ctrl-C, or no input left to answer it
        if isinstance(abort.__context__, KeyboardInterrupt):
            raise click.exceptions.Exit(INTERRUPTED) from None
        raise


class _Command(click.Command):
    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _exit_codes():  # callbacks of parameters run here
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _exit_codes():
            return super().invoke(ctx)


class _Commands(click.Group):
    """All commands as one, each imported when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return import_module(f"bsa_export.cli.{name}").main if name in COMMANDS else None


@click.group(cls=_Commands, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="bsa_export", message="%(prog)s %(version)s")
def main() -> None:
    """Convert BERT checkpoints to block-sparse attention, verify and publish them.

    Each command is also installed under its own name: bsa-convert, bsa-verify, bsa-push and bsa-pull.
    """


def command(name: str, **attributes: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Returns a decorator that makes a function the command `name`, with -h, --help and --version.

    The command ends as the module's table says. Print with `click.echo`, which flushes: if the reader of the
    output is gone, only a flush inside the command finds it. A command that finds a fault without an error ends
    with `ctx.exit(1)`.

        @command("bsa-push")
        @click.argument("folder", type=click.Path(path_type=Path))
        def main(folder: Path) -> None:
            '''Publish a converted model.'''

    Args:
        name: the command as typed in a shell.
        attributes: arguments of `click.Command`, such as `epilog`.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        made = click.command(name, cls=_Command, context_settings=SETTINGS, **attributes)(function)
        return click.version_option(__version__, prog_name=name, message="%(prog)s %(version)s")(made)

    return decorate


def repository(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, str | None]:
    """Returns both parts of an argument that is `org/name` or `org/name@revision`. A callback for click."""
    from bsa_export.hub import parse_repo

    named = parse_repo(value)
    if named is None:
        raise click.BadParameter(f"expected org/name or org/name@revision, found {value!r}")
    return named
