"""To the Hub: `plan` checks a folder and a repository, `upload` does what the plan says in one commit, `push` is both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bsa_export import model_card
from bsa_export.checkpoint.folder import CONVERSION_RECORD, plain_error
from bsa_export.checkpoint.source import open_checkpoint
from bsa_export.checkpoint.table import file_stamp
from bsa_export.checkpoint.writer import INDEX_NAME
from bsa_export.errors import CheckpointError, HubError
from bsa_export.hub import client, names
from bsa_export.hub.errors import status_of
from bsa_export.hub.names import MAIN, VERIFICATION_RECORD
from bsa_export.hub.pull import recorded_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

PIECE = 1 << 20
# Metadata of a card that the Hub reads as text, as a list of texts, or as either.
CARD_TEXTS = {"license", "library_name", "pipeline_tag", "base_model", "base_model_relation", "language"}
CARD_LISTS = {"tags", "license", "base_model", "datasets", "metrics", "language"}


@dataclass(frozen=True)
class PlannedFile:
    """A file of the model. `content` is None where it is the folder's own file, else what is pushed in its place."""

    name: str
    bytes: int
    sha256: str
    content: bytes | None = None


@dataclass(frozen=True)
class Plan:
    """What a push would do.

    Attributes:
        folder, repo_id, user: from where, to where, as whom.
        exists: whether the repository is there.
        private: its visibility, as it is or as it will be made.
        branch: where the commit goes; with `create_pr`, what the pull request is against.
        base: the commit that the push builds on, None if it is yet to be made.
        new_branch: whether the branch will be made, from main.
        create_pr: whether a pull request is opened instead.
        files: all that belongs to the model.
        uploads: names of those that the branch does not hold yet.
        deletes: files of an earlier model in the repository that this model does not have.
        left_out: what lies in the folder and does not go up.
        own_card: whether the card is the user's own text, here or there, which is kept.
        unverified: why the folder does not count as verified; None if it does.
        stamps: the folder's files as they were when they were hashed.
    """

    folder: Path
    repo_id: str
    user: str
    exists: bool
    private: bool
    branch: str
    base: str | None
    new_branch: bool
    create_pr: bool
    files: tuple[PlannedFile, ...]
    uploads: tuple[str, ...]
    deletes: tuple[str, ...]
    left_out: tuple[str, ...]
    own_card: bool
    unverified: str | None
    stamps: Mapping[str, tuple[int, int, int]]

    @property
    def upload_bytes(self) -> int:
        return sum(file.bytes for file in self.files if file.name in self.uploads)


class PushResult(NamedTuple):
    """What a push did.

    Attributes:
        url: the page of the repository, branch or pull request.
        commit: 40 hex digits.
        changed: False if everything was there already.
        name: what `bsa_export.load` and `bsa-pull` take.
    """

    url: str
    commit: str
    changed: bool
    name: str


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    unverified: bool = False,
    progress: bool = False,
) -> PushResult:
    """Publishes a converted folder: `upload(plan(...))`, which see."""
    what = plan(folder, repo_id, private=private, revision=revision, create_pr=create_pr, unverified=unverified)
    return upload(what, message=message, progress=progress)


def plan(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    unverified: bool = False,
) -> Plan:
    """Checks a folder and a repository, and says what a push would do. Changes neither.

    Args:
        folder: what bsa-convert made and bsa-verify passed.
        repo_id: `org/name`.
        private: makes a new repository private.
        revision: the branch to commit to, main by default; made from main if it is not there.
        create_pr: opens a pull request against main instead of committing.
        unverified: takes a folder that bsa-verify did not pass, or that changed since.

    Raises:
        CheckpointError: the folder is no finished conversion, or its card holds metadata that the Hub would refuse.
        HubError: it is not verified, or the Hub does not allow it.
    """
    folder, branch = Path(folder), revision or MAIN
    if names.parse_repo(repo_id) != (repo_id, None):
        raise HubError("expected a repository org/name", found=repr(repo_id))
    if create_pr and branch != MAIN:
        raise HubError(
            "a pull request is opened against main", found=f"the branch {branch}", hint="drop one of the two"
        )
    hub = client.api(writing=True)
    there, left_out = _folder_files(folder)
    stamps = {name: file_stamp(folder / name) for name in there}
    digests = {name: _sha256(folder / name) for name in there}
    reason = _unverified_because(folder, digests)
    if reason and not unverified:
        hint = f"run bsa-verify {folder}, or push it with --unverified, which its card will say"
        raise HubError(reason, where=folder, hint=hint)
    files = _planned_files(folder, repo_id, digests, reason)

    with client.sentences(repo_id, branch, pushing=True):
        user = _checked_user(hub, repo_id, create_pr)
        info = client.find(hub, repo_id)
        _refuse_repository(info, repo_id, private, create_pr)
        head = info and client.find(hub, repo_id, branch)
        remote = client.tree(hub, repo_id, (head or info).sha) if info else {}
        kept_there = _kept_card(hub, repo_id, (head or info).sha, files) if model_card.FILE_NAME in remote else False
    if kept_there:
        files = [file for file in files if file.name != model_card.FILE_NAME]
    return Plan(
        folder=folder,
        repo_id=repo_id,
        user=user,
        exists=info is not None,
        private=bool(info.private) if info else private,
        branch=branch,
        base=head.sha if head else None,
        new_branch=head is None and branch != MAIN,
        create_pr=create_pr,
        files=tuple(files),
        uploads=tuple(file.name for file in files if not _is_same(folder, file, remote.get(file.name))),
        deletes=tuple(_earlier(files, remote)),
        left_out=tuple(left_out),
        own_card=kept_there or all(file.content is None for file in files),
        unverified=reason,
        stamps=stamps,
    )


def upload(what: Plan, *, message: str | None = None, progress: bool = False) -> PushResult:
    """Does what `plan` says, in one commit, and compares the repository with the folder afterwards.

    Safe to repeat: after an interruption only what is missing goes up, and a commit that went through unanswered is found.

    Args:
        what: from `plan`.
        message: of the commit.
        progress: whether to show bars on stderr.

    Raises:
        HubError: the Hub or the network refused, somebody else committed meanwhile, or what arrived is not the folder.
        CheckpointError: the folder changed since `plan`.
    """
    number = None
    with client.sentences(what.repo_id, what.branch, pushing=True), client.bars(progress):
        hub = client.api(writing=True)
        commit = base = _base(hub, what)
        if what.uploads or what.deletes:
            commit, number = _commit(hub, what, base, message or f"Upload {what.folder.resolve().name} with bsa_export")
        for name, stamp in what.stamps.items():
            if file_stamp(what.folder / name) != stamp:
                where = what.folder / name
                raise CheckpointError("it changed while it was being pushed", where=where, hint="verify and push again")
        _compare(what, client.tree(hub, what.repo_id, commit))
    for file in what.files:
        if file.content is not None:
            with suppress(PermissionError):  # the folder may be read-only; the repository has the card
                (what.folder / file.name).write_bytes(file.content)
    at = f"refs/pr/{number}" if number else what.branch
    page = f"/discussions/{number}" if number else "" if at == MAIN else f"/tree/{at}"
    return PushResult(
        url=f"{client.endpoint()}/{what.repo_id}{page}",
        commit=commit,
        changed=commit != base,
        name=what.repo_id if at == MAIN else f"{what.repo_id}@{at}",
    )


def _folder_files(folder: Path) -> tuple[list[str], list[str]]:
    """The names that belong to the model in a finished conversion, and the others. Raises CheckpointError if it is none."""
    if not (folder / CONVERSION_RECORD).is_file():
        found = f"no {CONVERSION_RECORD}" if folder.is_dir() else "no such folder"
        raise CheckpointError("expected a finished conversion", found=found, where=folder, hint="bsa-convert makes one")
    for name in recorded_files(folder):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"expected the files of its {CONVERSION_RECORD}", found=f"no {name}", where=folder, hint="convert again"
            )
    weights = {file.name for file in open_checkpoint(folder).files}
    if len(weights) > 1:
        weights.add(INDEX_NAME)
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    belong = [name for name in there if names.of_repository(name)]
    # Shards beside a single file, or the other way round, would be read in its place.
    belong = [name for name in belong if name in weights or not names.is_weights(name)]
    return belong, [name for name in there if name not in belong]


def _unverified_because(folder: Path, digests: Mapping[str, str]) -> str | None:
    """Why a folder whose files have these sha256 does not count as verified, or None."""
    path = folder / VERIFICATION_RECORD
    if not path.is_file():
        return "bsa-verify has not run on it"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        verdict, verified = record["verdict"], dict(record["files"])
        failed = [check["name"] for check in record["checks"] if check["status"] == "failed"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"its {VERIFICATION_RECORD} cannot be read ({error})"
    if failed or verdict == "failed":
        return f"it failed bsa-verify ({', '.join(failed) or 'no check is named'})"
    if verdict != "passed":
        return f"bsa-verify could not tell whether it is right (verdict {verdict})"
    verified.pop(model_card.FILE_NAME, None)  # a push completes it
    for name, digest in verified.items():
        if digests.get(name) != digest:
            return f"{name} {'changed' if name in digests else 'is gone'} since bsa-verify ran"
    unseen = [name for name in digests if name not in verified and (name == "config.json" or names.is_weights(name))]
    return f"bsa-verify did not see its {unseen[0]}" if unseen else None


def _planned_files(folder: Path, repo_id: str, digests: Mapping[str, str], unverified: str | None) -> list[PlannedFile]:
    """What goes up: the folder's files, with the card completed, or checked if it is the user's own."""
    card = model_card.FILE_NAME
    text = model_card.complete(folder, repo_id, unverified)
    if text is None:
        _check_card(folder / card)
    files = [
        PlannedFile(name, (folder / name).stat().st_size, digest)
        for name, digest in digests.items()
        if not (name == card and text is not None) and not (name == VERIFICATION_RECORD and unverified)
    ]
    if text is not None:
        content = text.encode()
        files.append(PlannedFile(card, len(content), hashlib.sha256(content).hexdigest(), content))
    return sorted(files, key=lambda file: file.name)


def _check_card(card: Path) -> None:
    """Raises CheckpointError for metadata that the Hub would refuse, or could not find the model by."""
    for key, value in model_card.metadata(card).items():
        if key not in CARD_TEXTS | CARD_LISTS or (key in CARD_TEXTS and isinstance(value, str)):
            continue
        if key in CARD_LISTS and isinstance(value, list) and all(isinstance(item, str) for item in value):
            continue
        kind = "text" if key in CARD_TEXTS else "a list of texts"
        raise CheckpointError(f"expected {kind} as {key} in its metadata", found=repr(value), where=card)


def _checked_user(hub: HfApi, repo_id: str, create_pr: bool) -> str:
    """The name of the token's user. Raises HubError if it cannot write there, as far as the Hub tells without a try."""
    me = client.patiently(hub.whoami)
    user, (namespace, name) = me["name"], repo_id.split("/")
    if ((me.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise HubError(
            f"the token of {user} may only read",
            hint=f"make one with write access at {client.endpoint()}/settings/tokens, then set HF_TOKEN or run hf auth login",
        )
    own = [user, *(org["name"] for org in me.get("orgs") or [] if org.get("roleInOrg") != "read")]
    if namespace.lower() not in map(str.lower, own) and not create_pr:
        raise HubError(
            f"{user} may not write in the namespace {namespace}, only in {', '.join(own)}",
            where=repo_id,
            hint=f"push to {user}/{name}, or propose the files to an existing repository with --create-pr",
        )
    return user


def _refuse_repository(info, repo_id: str, private: bool, create_pr: bool) -> None:
    """Raises HubError for a repository that this push would not be right for."""
    if info is None and create_pr:
        raise HubError(
            "there is no such repository to open a pull request in, or this token may not see it", where=repo_id
        )
    if info is not None and info.id.lower() != repo_id.lower():
        raise HubError(f"it is called {info.id} now", where=repo_id, hint="push there")
    if info is not None and private and not info.private:
        hint = f"make it private at {client.endpoint()}/{repo_id}/settings, or drop --private"
        raise HubError("it is public, and a push does not change that", where=repo_id, hint=hint)


def _kept_card(hub: HfApi, repo_id: str, commit: str, files: Iterable[PlannedFile]) -> bool:
    """Whether the repository has a card that a person wrote and the folder has not: more than the metadata the Hub starts one with."""
    if all(file.content is None for file in files):
        return False
    with client.bars(False):
        card = client.patiently(lambda: hub.hf_hub_download(repo_id, model_card.FILE_NAME, revision=commit))
    text = Path(card).read_bytes().decode("utf-8", "replace")
    return model_card.is_edited_text(text) and bool(model_card.FRONT_MATTER.sub("", text, count=1).strip())


def _base(hub: HfApi, what: Plan) -> str:
    """The commit to build on; the repository and the branch are made where they are not there."""
    if what.base is not None:
        return what.base
    if not what.exists:
        client.patiently(
            lambda: hub.create_repo(what.repo_id, private=what.private, exist_ok=True), waits=client.LONG_WAITS
        )
    if what.new_branch:
        client.patiently(
            lambda: hub.create_branch(what.repo_id, branch=what.branch, exist_ok=True), waits=client.LONG_WAITS
        )
    made = client.patiently(lambda: hub.model_info(what.repo_id, revision=what.branch))
    if what.private and not made.private:
        raise HubError("it was made by somebody else meanwhile, and is public", where=what.repo_id)
    return made.sha


def _commit(hub: HfApi, what: Plan, base: str, message: str) -> tuple[str, str | None]:
    """Uploads what is missing and commits it on `base`. Returns the commit and, if one was opened, the pull request's number.

    huggingface_hub repeats the upload of bytes but not the commit, whose answer can be lost after it went through. So after
    trouble the repository is looked at first; the next attempt is for the same `base`, and cannot come twice.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list = [CommitOperationDelete(name) for name in what.deletes]
    for file in what.files:
        if file.name in what.uploads:
            addition = CommitOperationAdd(file.name, file.content or what.folder / file.name)
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # saves computing it again
            operations.append(addition)
    earlier = _pull_requests(hub, what.repo_id) if what.create_pr else {}

    def attempt() -> tuple[str, str | None]:
        try:
            made = hub.create_commit(
                what.repo_id,
                operations,
                commit_message=message,
                revision=what.branch,
                create_pr=what.create_pr,
                parent_commit=base,
            )
        except (PermissionError, ConnectionError, RuntimeError) as error:
            if status_of(error) in (401, 402, 403):
                client.ask_for_room(what.repo_id, what.branch)
            raise
        return made.oid, str(made.pr_num) if what.create_pr else None

    def went_through() -> tuple[str, str | None] | None:
        if what.create_pr:
            heads = {n: head for n, head in _pull_requests(hub, what.repo_id).items() if n not in earlier}
        else:
            found = client.find(hub, what.repo_id, what.branch)
            heads = {None: found.sha} if found and found.sha != base else {}
        for number, head in heads.items():
            with suppress(HubError):
                _compare(what, client.tree(hub, what.repo_id, head))
                return head, number
        return None

    return client.patiently(attempt, went_through, waits=client.LONG_WAITS)


def _pull_requests(hub: HfApi, repo_id: str) -> dict[str, str]:
    """The pull requests of a repository: number -> head."""
    refs = client.patiently(lambda: hub.list_repo_refs(repo_id, include_pull_requests=True)).pull_requests or []
    return {ref.ref.rpartition("/")[2]: ref.target_commit for ref in refs}


def _compare(what: Plan, remote: Mapping[str, RepoFile]) -> None:
    """Raises HubError if the files of a commit are not those of the plan."""
    for file in what.files:
        there = remote.get(file.name)
        if not _is_same(what.folder, file, there):
            hashed = there and (f"sha256 {there.lfs.sha256}" if there.lfs else f"git blob {there.blob_id}")
            raise HubError(
                f"expected {file.name} of {file.bytes:,} bytes, sha256 {file.sha256}, in what was pushed",
                found=f"{there.size:,} bytes, {hashed}" if there else "no such file",
                where=what.repo_id,
                hint="push again",
            )
    if stale := _earlier(what.files, remote):
        raise HubError(f"it still holds {stale[0]} of an earlier model", where=what.repo_id, hint="push again")


def _earlier(files: Iterable[PlannedFile], remote: Iterable[str]) -> list[str]:
    """The files in a repository that belong to an earlier model: left there, they would be read with the new one."""
    new = {file.name for file in files}
    return [name for name in remote if name not in new and names.of_model(name)]


def _is_same(folder: Path, file: PlannedFile, there: RepoFile | None) -> bool:
    """Whether the repository lists the file's content: by sha256 where it is large, by git's own hash where it is small."""
    if there is None or there.size != file.bytes:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == file.sha256
    content = file.content or (folder / file.name).read_bytes()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    except OSError as error:
        raise plain_error(error, path) from None
    return digest.hexdigest()
