"""bsa-push: publish a converted model on the Hugging Face Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bsa_export.cli import command, repository
from bsa_export.errors import BsaError
from bsa_export.text import printable, some

if TYPE_CHECKING:
    from bsa_export.hub import Plan


@command("bsa-push")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME", callback=repository)
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option(
    "--revision", metavar="BRANCH", help="Commit to this branch. A new branch starts at main.  [default: main]"
)
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@click.option(
    "--unverified", is_flag=True, help="Publish a folder that has not passed bsa-verify. The model card says so."
)
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, and stop.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask for confirmation.")
def main(
    folder: Path,
    repo: tuple[str, str | None],
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    unverified: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Publish a converted model on the Hugging Face Hub.

    FOLDER was made by bsa-convert and has passed bsa-verify. The files are shown before anything is uploaded. To
    continue an interrupted push, run it again. The token comes from HF_TOKEN or from hf auth login.
    """
    from bsa_export import hub

    repo_id, at = repo
    if at is not None:
        raise click.BadParameter(f"name the branch with --revision {at}", param_hint="ORG/NAME")
    if revision is not None and not hub.is_branch(revision):
        raise click.BadParameter(f"expected the name of a branch, found {revision!r}", param_hint="--revision")
    plan = hub.plan(folder, repo_id, private=private, revision=revision, create_pr=create_pr, unverified=unverified)
    click.echo(_shown(plan))
    if dry_run:
        return
    if not yes:
        if not sys.stdin.isatty():
            raise BsaError(
                "the push needs a confirmation, and stdin is not a terminal",
                hint="check the list above, then add --yes",
            )
        click.confirm("Push this?", abort=True)
    result = hub.upload(plan, message=message, progress=sys.stderr.isatty())
    click.echo(f"{'Pushed to' if result.changed else 'Already up to date:'} {result.url}")
    click.echo(f"commit  {result.commit}")
    click.echo(f'load    bsa_export.load("{result.name}")')
    if result.card_kept:
        warning = f"Warning: {folder}: the model card could not be completed here ({result.card_kept})"
        click.echo(f"{warning}; the repository has the complete card", err=True)


def _shown(plan: Plan) -> str:
    """The plan, for a person."""
    visibility = "private" if plan.private else "public"
    state = "existing" if plan.exists else "new"
    place = "pull request against main" if plan.create_pr else f"branch {plan.branch}"
    if plan.pull_request:
        place = f"pull request {plan.pull_request[0]}, which is open"
    lines = [
        f"{plan.repo_id} ({visibility}, {state}), {place}{' (new)' if plan.new_branch else ''}, as {plan.user}",
        "",
    ]
    width = min(max(len(file.name) for file in plan.files), 80)
    for file in plan.files:
        note = "" if file.name in plan.uploads else "  already there"
        lines.append(f"  {file.name:{width}}  {file.bytes:>15,} bytes{note}")
    lines += [f"  {name:{width}}  {'removed':>15}: file of an earlier model" for name in plan.deletes]
    lines += ["", f"{len(plan.uploads)} files, {plan.upload_bytes:,} bytes to upload."]
    if plan.left_out:
        lines.append(f"Left out, because conversion.json does not list it: {some(plan.left_out, 10)}.")
    if plan.own_card:
        lines.append("The model card is your own and is kept unchanged.")
    if plan.unverified:
        lines.append(f"Not verified: {plan.unverified}.")
    return "\n".join(map(printable, lines))
