"""To the Hub: `plan` checks folder and repository, `upload` does what the plan says in one commit, `push` is both."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bsa_export.checkpoint.table import file_stamp
from bsa_export.converted import card as model_card
from bsa_export.converted.names import CARD, CONVERSION_RECORD, SAFE_NAME, of_model, of_people
from bsa_export.converted.records import read_conversion
from bsa_export.errors import CheckpointError, HubError
from bsa_export.files import hashes_of, replace_file
from bsa_export.hub import client, names
from bsa_export.hub.errors import endpoint, is_transient, status_of
from bsa_export.hub.names import MAIN
from bsa_export.hub.pushed_files import PlannedFile, folder_files, planned_files, refuse_claim, unverified_because
from bsa_export.text import argument

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile


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
        pull_request: number and head of an open one of this user that holds all of it already.
        files: all that belongs to the model.
        uploads: names of those that the branch does not hold yet.
        deletes: files of an earlier model in the repository that this model does not have.
        left_out: files of the folder that are not uploaded.
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
    pull_request: tuple[str, str] | None
    files: tuple[PlannedFile, ...]
    uploads: tuple[str, ...]
    deletes: tuple[str, ...]
    left_out: tuple[str, ...]
    own_card: bool
    unverified: str | None
    stamps: Mapping[str, tuple[int, ...]]

    @property
    def upload_bytes(self) -> int:
        return sum(file.bytes for file in self.files if file.name in self.uploads)


class PushResult(NamedTuple):
    """What a push did.

    Attributes:
        url: the page of the repository, branch or pull request.
        commit: 40 hex digits.
        changed: False if everything was there already.
        name: what `bsa_export.load` and `bsa-pull` accept.
        card_kept: why the completed card could not be written into the folder too; None if it was.
    """

    url: str
    commit: str
    changed: bool
    name: str
    card_kept: str | None = None


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    unverified: bool = False,
    progress: bool = False,
) -> PushResult:
    """Publishes a converted folder: the command bsa-push. It is `upload(plan(...))`, without a question in between.

    Args:
        folder: a folder of bsa-convert that has passed bsa-verify.
        repo: `org/name`.
        private: makes a new repository private.
        revision: the branch to commit to, main by default; made from main if it is not there.
        create_pr: opens a pull request against main instead of committing.
        message: of the commit.
        unverified: publishes a folder that has not passed bsa-verify, or that changed since; the card says so.
        progress: whether to show bars on stderr.

    Returns:
        The page, the commit, and whether anything changed.

    Raises:
        CheckpointError: the folder is not a finished conversion, changed meanwhile, or has a card that the Hub refuses.
        HubError: it is not verified, the Hub or the network refused, or somebody else committed meanwhile.
    """
    what = plan(folder, repo, private=private, revision=revision, create_pr=create_pr, unverified=unverified)
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
        folder: a folder of bsa-convert that has passed bsa-verify.
        repo_id: `org/name`.
        private: makes a new repository private.
        revision: the branch to commit to, main by default; made from main if it is not there.
        create_pr: opens a pull request against main instead of committing.
        unverified: accepts a folder that bsa-verify did not pass, or that changed since.

    Raises:
        CheckpointError: the folder is not a finished conversion, or its card holds metadata that the Hub would refuse.
        HubError: it is not verified, or the Hub does not allow it.
    """
    folder, branch = Path(folder), revision or MAIN
    if names.parse_repo(repo_id) != (repo_id, None):
        raise HubError("expected a repository org/name", found=repr(repo_id))
    if not names.is_branch(branch):
        raise HubError("expected the name of a branch", found=repr(branch), where="--revision")
    if create_pr and branch != MAIN:
        raise HubError(
            "a pull request is opened against main", found=f"the branch {branch}", hint="drop one of the two"
        )
    hub = client.api(writing=True)
    there, left_out = folder_files(folder)
    stamps = {name: file_stamp(folder / name) for name in there}
    hashes = {name: hashes_of(folder / name) for name in there}
    reason = unverified_because(folder, hashes)
    if reason and not unverified:
        hint = f"run bsa-verify {argument(folder)}, or push it with --unverified, which its card will say"
        raise HubError(reason, where=folder, hint=hint)
    files = planned_files(folder, repo_id, hashes, reason)

    with client.sentences(repo_id, branch, pushing=True):
        user = _checked_user(hub, repo_id, create_pr)
        info = client.find(hub, repo_id)
        _refuse_repository(info, repo_id, private, create_pr)
        head = info and client.find(hub, repo_id, branch)
        commit = client.commit_of(head or info) if info else None  # a new branch starts at main
        remote = client.tree(hub, repo_id, commit) if commit else {}
        kept_there = _kept_card(hub, repo_id, commit, files) if commit and CARD in remote else None
        if kept_there is not None:
            files = [file for file in files if file.name != CARD]
            if reason:
                refuse_claim(kept_there, f"{repo_id}: {CARD}")
        uploads = [file.name for file in files if not _is_same(file, remote.get(file.name))]
        deletes = _earlier(files, remote, _recorded_there(hub, repo_id, commit, files, remote) if commit else ())
        open_one = _proposed(hub, repo_id, user, files) if create_pr else None
        if open_one:
            uploads, deletes = [], []
        if CARD in uploads:
            _check_metadata(folder, files)
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
        pull_request=open_one,
        files=tuple(files),
        uploads=tuple(uploads),
        deletes=tuple(deletes),
        left_out=tuple(left_out),
        own_card=kept_there is not None or all(file.content is None for file in files),
        unverified=reason,
        stamps=stamps,
    )


def upload(what: Plan, *, message: str | None = None, progress: bool = False) -> PushResult:
    """Does what `plan` says, in one commit, and compares the repository with the folder afterwards.

    Safe to repeat: after an interruption only what is missing is uploaded. A commit whose answer was lost is found.

    Args:
        what: from `plan`.
        message: of the commit.
        progress: whether to show bars on stderr.

    Raises:
        HubError: the Hub or the network refused, somebody else committed meanwhile, or what arrived is not the folder.
        CheckpointError: the folder changed since `plan`; nothing is published then.
    """
    _refuse_changed(what)
    with client.sentences(what.repo_id, what.branch, pushing=True), client.bars(progress):
        hub = client.api(writing=True)
        number, base = what.pull_request or (None, _base(hub, what))
        commit = base
        if what.uploads or what.deletes:
            commit, number = _commit(hub, what, base, message or f"Upload {what.folder.resolve().name} with bsa_export")
        _compare(what, client.tree(hub, what.repo_id, commit))
    at = f"refs/pr/{number}" if number else what.branch
    page = f"/discussions/{number}" if number else "" if at == MAIN else f"/tree/{at}"
    return PushResult(
        url=f"{endpoint()}/{what.repo_id}{page}",
        commit=commit,
        changed=commit != base,
        name=what.repo_id if at == MAIN else f"{what.repo_id}@{at}",
        card_kept=_complete_card(what),
    )


def _refuse_changed(what: Plan) -> None:
    """Raises CheckpointError if a file of the folder is not the one that was hashed."""
    for name, stamp in what.stamps.items():
        try:
            same = file_stamp(what.folder / name) == stamp
        except OSError:
            same = False
        if not same:
            raise _changed(what.folder / name)


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        "it changed while it was being pushed", where=path, hint="nothing was published; verify and push again"
    )


def _complete_card(what: Plan) -> str | None:
    """Writes the card into the folder as it was pushed. Returns why that cannot be: the folder may be read-only."""
    try:
        for file in what.files:
            if file.content is not None:
                replace_file(what.folder / file.name, file.content)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _checked_user(hub: HfApi, repo_id: str, create_pr: bool) -> str:
    """The name of the token's user. Raises HubError if it cannot write there, as far as the Hub says without a try."""
    me = client.patiently(hub.whoami)
    if not isinstance(me, dict) or not isinstance(user := me.get("name"), str):
        raise HubError("expected the name of the token's user from the Hub", hint="check HF_ENDPOINT")
    (namespace, name), auth, orgs = repo_id.split("/"), me.get("auth"), me.get("orgs")
    access = auth.get("accessToken") if isinstance(auth, dict) else None
    if isinstance(access, dict) and access.get("role") == "read":
        raise HubError(
            f"the token of {user} may only read",
            hint=f"make one with write access at {endpoint()}/settings/tokens, then set HF_TOKEN or run hf auth login",
        )
    orgs = [org for org in orgs if isinstance(org, dict)] if isinstance(orgs, list) else []
    own = [user, *(str(org.get("name")) for org in orgs if org.get("roleInOrg") != "read")]
    if namespace.lower() not in map(str.lower, own) and not create_pr:
        raise HubError(
            f"{user} may not write in the namespace {namespace}, only in {', '.join(own)}",
            where=repo_id,
            hint=f"push to {user}/{name}, or propose the files to an existing repository with --create-pr",
        )
    return user


def _refuse_repository(info: ModelInfo | None, repo_id: str, private: bool, create_pr: bool) -> None:
    """Raises HubError for a repository that this push would not be right for."""
    if info is None and create_pr:
        raise HubError(
            "there is no such repository to open a pull request in, or this token may not see it", where=repo_id
        )
    if info is not None and info.id.lower() != repo_id.lower():
        raise HubError(f"it is called {info.id} now", where=repo_id, hint="push there")
    if info is not None and private and not info.private:
        hint = f"make it private at {endpoint()}/{repo_id}/settings, or drop --private"
        raise HubError("it is public, and a push does not change that", where=repo_id, hint=hint)


def _kept_card(hub: HfApi, repo_id: str, commit: str, files: Iterable[PlannedFile]) -> str | None:
    """The repository's card, if a person wrote it and the folder has none of a person's.

    Metadata alone, as the Hub writes it into a new repository, are not a card.
    """
    if all(file.content is None for file in files):
        return None
    with client.bars(False):
        card = client.patiently(lambda: hub.hf_hub_download(repo_id, CARD, revision=commit))
    text = model_card.read_card(Path(card))
    return text if model_card.body(text) and model_card.is_edited_text(text) else None


def _check_metadata(folder: Path, files: Iterable[PlannedFile]) -> None:
    """Raises CheckpointError for a card whose metadata the Hub refuses: it would do so after the repository is made."""
    card = next(file for file in files if file.name == CARD)
    content = (folder / card.name).read_bytes() if card.content is None else card.content
    if refusal := client.patiently(lambda: client.refused_metadata(content.decode("utf-8", "replace"))):
        hint = "edit the lines between its two --- lines"
        raise CheckpointError(f"the Hub refuses its metadata ({refusal})", where=folder / card.name, hint=hint)


def _proposed(hub: HfApi, repo_id: str, user: str, files: Iterable[PlannedFile]) -> tuple[str, str] | None:
    """Number and head of an open pull request of the user whose repository is the folder already."""
    listed = client.patiently(
        lambda: list(islice(hub.get_repo_discussions(repo_id, author=user, discussion_type="pull_request"), 1000))
    )
    numbers = [str(one.num) for one in listed if one.author == user and one.status in ("open", "draft")]
    heads = _pull_requests(hub, repo_id) if numbers else {}
    for number in numbers:
        if number in heads and _holds(files, client.tree(hub, repo_id, heads[number])):
            return number, heads[number]
    return None


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
    return client.commit_of(made)


def _commit(hub: HfApi, what: Plan, base: str, message: str) -> tuple[str, str | None]:
    """Uploads what is missing and commits it on `base`. Returns the commit, and the number of the pull request if any.

    Bytes go up before the commit, which only names them: a folder that changed meanwhile is found between the two.

    huggingface_hub repeats the upload of bytes but not the commit, whose answer can be lost after it went through. So
    after trouble the repository is looked at first; the next attempt is for the same `base`, and cannot come twice.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list = [CommitOperationDelete(name) for name in what.deletes]
    for file in what.files:
        if file.name in what.uploads:
            content = _content(what.folder, file)
            addition = CommitOperationAdd(file.name, what.folder / file.name if content is None else content)
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # saves computing it again
            operations.append(addition)
    additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
    earlier = _pull_requests(hub, what.repo_id) if what.create_pr else {}

    def attempt() -> tuple[str, str | None]:
        try:
            hub.preupload_lfs_files(what.repo_id, additions, revision=what.branch, create_pr=what.create_pr)
            _refuse_changed(what)
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
            open_now = _pull_requests(hub, what.repo_id).items()
            heads: dict[str | None, str] = {number: head for number, head in open_now if number not in earlier}
        else:
            found = client.find(hub, what.repo_id, what.branch)
            head = client.commit_of(found) if found else base
            heads = {} if head == base else {None: head}
        for number, head in heads.items():
            if _holds(what.files, client.tree(hub, what.repo_id, head)):
                return head, number
        return None

    try:
        return client.patiently(attempt, went_through, waits=client.LONG_WAITS)
    except Exception as error:
        if not is_transient(error):  # after which nobody knows whether the commit went through
            _refuse_changed(what)  # the likeliest reason why the Hub finds another hash
        raise


def _content(folder: Path, file: PlannedFile) -> bytes | None:
    """The content of a small file as it was hashed, so that later changes do not matter. None for weights.

    Raises:
        CheckpointError: the file is another one by now.
    """
    if file.content is not None or file.blob is None or file.name.endswith(".safetensors"):
        return file.content
    content = (folder / file.name).read_bytes()
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise _changed(folder / file.name)
    return content


def _pull_requests(hub: HfApi, repo_id: str) -> dict[str, str]:
    """The pull requests of a repository: number -> head."""
    refs = client.patiently(lambda: hub.list_repo_refs(repo_id, include_pull_requests=True)).pull_requests or []
    return {ref.ref.rpartition("/")[2]: ref.target_commit for ref in refs}


def _compare(what: Plan, remote: Mapping[str, RepoFile]) -> None:
    """Raises HubError if the files of a commit are not those of the plan."""
    for file in what.files:
        there = remote.get(file.name)
        if not _is_same(file, there):
            hashed = there and (f"sha256 {there.lfs.sha256}" if there.lfs else f"git blob {there.blob_id}")
            raise HubError(
                f"expected {file.name} of {file.bytes:,} bytes, sha256 {file.sha256}, in what was pushed",
                found=f"{there.size:,} bytes, {hashed}" if there else "no such file",
                where=what.repo_id,
                hint="push again",
            )
    if stale := [name for name in what.deletes if name in remote] or _earlier(what.files, remote):
        raise HubError(f"it still holds {stale[0]} of an earlier model", where=what.repo_id, hint="push again")


def _holds(files: Iterable[PlannedFile], remote: Mapping[str, RepoFile]) -> bool:
    """Whether the files of a commit are those of the folder, and none of an earlier model."""
    return all(_is_same(file, remote.get(file.name)) for file in files) and not _earlier(files, remote)


def _earlier(files: Iterable[PlannedFile], remote: Iterable[str], recorded: Container[str] = frozenset()) -> list[str]:
    """The files in a repository that belong to an earlier model: left there, they would be read with the new one.

    Args:
        files: those of the new model.
        remote: the names in the repository.
        recorded: the names that its own conversion.json lists.
    """
    new = {file.name for file in files}
    return [name for name in remote if name not in new and not of_people(name) and (of_model(name) or name in recorded)]


def _recorded_there(
    hub: HfApi, repo_id: str, commit: str, files: Iterable[PlannedFile], remote: Mapping[str, RepoFile]
) -> set[str]:
    """The files that the repository's own conversion.json lists; none where it has none that can be read."""
    there = remote.get(CONVERSION_RECORD)
    if there is None or any(file.name == CONVERSION_RECORD and _is_same(file, there) for file in files):
        return set()
    with client.bars(False):
        path = client.patiently(lambda: hub.hf_hub_download(repo_id, CONVERSION_RECORD, revision=commit))
    try:
        record = read_conversion(Path(path).parent)
    except CheckpointError:
        return set()
    return {name for name in record.files if SAFE_NAME.fullmatch(name)} if record else set()


def _is_same(file: PlannedFile, there: RepoFile | None) -> bool:
    """Whether the repository lists the file's content: by sha256 for a large one, by git's hash for a small one."""
    if there is None or there.size != file.bytes:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == file.sha256
    return there.blob_id == file.blob
