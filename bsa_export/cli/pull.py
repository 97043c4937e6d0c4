"""bsa-pull: get a converted model from the Hugging Face Hub."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bsa_export.cli import command, repository


@command("bsa-pull")
@click.argument("repo", metavar="ORG/NAME[@REVISION]", callback=repository)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace an earlier conversion in FOLDER.")
def main(repo, folder, overwrite):
    """Get a converted model: ORG/NAME of the Hub, at a branch, tag or commit, becomes FOLDER.

    Sizes, hashes, file and layouts are checked first; nothing of the repository is executed. An interrupted pull goes on when
    it is run again.
    """
    from bsa_export import hub

    result = hub.pull(*repo, folder, overwrite=overwrite, progress=sys.stderr.isatty())
    click.echo(f"{folder}  {len(result.files)} files, {sum(result.files.values()):,} bytes")
    click.echo(f"commit  {result.commit}")
    click.echo(f'load    bsa_export.load("{folder}")')
