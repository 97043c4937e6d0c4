"""The commands, one file each. Only here is click imported.

What every command does alike stands in `command`: help, version, and how it ends.

| ends with | exit code | says |
|---|---|---|
| nothing wrong | 0 | |
| `BsaError` | 1 | `Error: ` and its sentence, on stderr |
| wrong usage, found by click | 2 | usage and the reason, on stderr |
| Ctrl-C, also at a question | 130 | nothing |
| the reader of its output went away (`bsa-convert ... | head -1`) | 1 | nothing |
| any other exception | 1 | its traceback |
"""

from __future__ import annotations

from collections.abc import Callable

import click

from bsa_export.errors import BsaError
from bsa_export.version import __version__

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class _Command(click.Command):
    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except BsaError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except click.Abort as abort:  # from a question: Ctrl-C, or no input left to answer it
            if isinstance(abort.__context__, KeyboardInterrupt):
                ctx.exit(INTERRUPTED)
            raise


def command(name: str, **attributes) -> Callable[[Callable], click.Command]:
    """Makes the function below it the command `name`, with -h, --help and --version, ending as the module's table says.

    `main` is what setup.cfg names as the console script. Print with `click.echo`, which flushes: what is left in a buffer at the
    end cannot be told quietly that nobody reads it. A command that finds a fault without an error ends with `ctx.exit(1)`.

        @command("bsa-push")
        @click.argument("folder", type=click.Path(path_type=Path))
        def main(folder: Path):
            '''Publish a converted model.'''

    Args:
        name: as typed in a shell.
        attributes: of `click.Command`, such as `epilog`.
    """

    def decorate(function: Callable) -> click.Command:
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
        made = click.command(name, cls=_Command, context_settings=settings, **attributes)(function)
        return click.version_option(__version__, prog_name=name, message="%(prog)s %(version)s")(made)

    return decorate


def repository(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, str | None]:
    """The callback of an argument that is `org/name` or `org/name@revision`: both parts."""
    from bsa_export.hub import parse_repo

    named = parse_repo(value)
    if named is None:
        raise click.BadParameter(f"expected org/name or org/name@revision, found {value!r}")
    return named
