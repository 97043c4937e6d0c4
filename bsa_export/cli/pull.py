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
def main(repo: tuple[str, str | None], folder: Path, overwrite: bool) -> None:
    """Download a converted model from the Hugging Face Hub into FOLDER.

    REVISION is a branch, tag or commit. Sizes, hashes, weight files and layouts are checked before FOLDER appears.
    Nothing in the repository is executed. To continue an interrupted pull, run it again.
    """
    from bsa_export import hub

    repo_id, revision = repo
    result = hub.pull(repo_id, folder, revision=revision, overwrite=overwrite, progress=sys.stderr.isatty())
    click.echo(f"{folder}  {len(result.files)} files, {sum(result.files.values()):,} bytes")
    click.echo(f"commit  {result.commit}")
    click.echo(f'load    bsa_export.load("{folder}")')
