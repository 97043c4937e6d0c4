"""From the Hub: `pull` makes a folder of a published conversion, `fetch` brings any checkpoint into the Hub's cache."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bsa_export.checkpoint.atomic_folder import AtomicFolder
from bsa_export.checkpoint.open import WEIGHT_ENDINGS, without_weights
from bsa_export.converted.names import (
    CARD,
    CONVERSION_RECORD,
    MODULES,
    PULL_RECORD,
    SAFE_NAME,
    is_runnable,
    is_weights,
    of_conversion,
    of_people,
)
from bsa_export.converted.records import PullRecord, read_conversion, to_json
from bsa_export.errors import CheckpointError, HubError
from bsa_export.files import MAX_JSON_BYTES, read_json, write_json
from bsa_export.hub import client, names
from bsa_export.text import argument

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

PIECE = 1 << 20


class Fetched(NamedTuple):
    """A snapshot in the Hub's cache, and the commit (40 hex digits) that it is of."""

    folder: Path
    commit: str


class PullResult(NamedTuple):
    """The folder that a pull made, the commit (40 hex digits) that it is of, and its files: name -> bytes."""

    folder: Path
    commit: str
    files: dict[str, int]


class CachedFile(NamedTuple):
    """A file in the cache, used instead of the Hub's listing while offline."""

    size: int
    blob_id: str | None = None
    lfs: None = None


class Snapshot(NamedTuple):
    """Files of one commit, which a revision names: name -> size and hashes, as the Hub lists them."""

    repo_id: str
    revision: str
    commit: str
    files: Mapping[str, RepoFile | CachedFile]
    cache_dir: str | Path | None


def pull(
    repo: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> PullResult:
    """Downloads a converted model: the command bsa-pull.

    Downloads the files of one commit that its conversion.json lists, the card, licenses and pictures. Checks sizes,
    hashes, weight files and layouts. Then makes the folder, whole or not at all. `pulled.json` in it names the commit.
    Nothing of the repository is executed, and no code or pickle is downloaded. An interrupted pull continues from the
    Hub's cache.

    Args:
        repo: `org/name` or `org/name@revision`.
        folder: the folder to make.
        revision: branch, tag or commit, if `repo` names none; main by default.
        overwrite: whether an earlier conversion may be replaced.
        cache_dir: the Hub's cache; huggingface_hub's own by default.
        progress: whether to show bars on stderr.

    Returns:
        The folder, its commit and its files.

    Raises:
        HubError: the Hub or the network refused, the repository is not a conversion or a damaged one, or what arrived
            is not what it lists.
        CheckpointError: `folder` cannot be made.
    """
    repo_id, revision = named(repo, revision)
    with AtomicFolder(folder, overwrite=overwrite) as staging:
        there = _listing(repo_id, revision, cache_dir)
        if CONVERSION_RECORD not in there.files:
            command = f"bsa-convert {repo_id} {argument(folder)}"
            raise HubError(
                f"expected a converted model, with a {CONVERSION_RECORD}",
                found="none",
                where=repo_id,
                hint=f"if it is a dense BERT, {command} converts it; if it was trained from a conversion, {command} "
                "--trained-from CONVERSION makes it whole",
            )
        wanted = _of_conversion(there, of_people)
        snapshot = _download(wanted, progress)
        digests = {}
        for name in wanted.files:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            digests[name] = _checked(wanted, name, snapshot, staging / name)
        _check_conversion(repo_id, staging)
        record = PullRecord(repo_id, revision or names.MAIN, there.commit, digests)
        write_json(staging / PULL_RECORD, to_json(record))
    return PullResult(Path(folder), there.commit, {name: file.size for name, file in wanted.files.items()})


def named(repo: str, revision: str | None = None, bare: bool = False) -> tuple[str, str | None]:
    """Repository and revision of `org/name` or `org/name@revision`, or `bare` of `name`.

    Raises:
        HubError: it is neither, there are two revisions, or the revision cannot be the name of one.
    """
    parts = names.parse_repo(repo, bare)
    if parts is None:
        raise HubError("expected a repository org/name or org/name@revision", found=repr(repo))
    if revision is not None:
        if parts[1] is not None:
            raise HubError("expected one revision", found=f"{parts[1]} and {revision}", where=parts[0])
        if names.parse_repo(f"{parts[0]}@{revision}", bare) != (parts[0], revision):
            raise HubError("expected a branch, tag or commit", found=repr(revision), where=parts[0])
        return parts[0], revision
    return parts


def fetch(
    repo_id: str,
    revision: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    allow: Iterable[str] | None = None,
    path: str = "",
    progress: bool = False,
) -> Fetched:
    """Downloads what a checkpoint needs, dense or converted, into the Hub's cache.

    For a conversion these are the files that its conversion.json lists. It must pass the checks of file and layouts, as
    in `pull`. For others: weights (safetensors if there are any), config.json, tokenizer, every file of the modules
    that modules.json lists, licenses, and README.md. Sizes are checked, and hashes of new files.

    With HF_HUB_OFFLINE the cache answers.

    Args:
        repo_id: `org/name`.
        revision: branch, tag or commit; main by default.
        cache_dir: the Hub's cache; huggingface_hub's own by default.
        allow: patterns of names to take instead.
        path: a folder in the repository that holds the checkpoint, or its file of weights.
        progress: whether to show bars on stderr.

    Returns:
        The snapshot, or the folder in it that holds the checkpoint.

    Raises:
        HubError: the Hub or the network refused, a checkpoint is missing, what arrived is not what the Hub lists, or it
            is a conversion that fails a check.
    """
    file = path if path.endswith((*WEIGHT_ENDINGS, ".json")) else None
    folder = f"{path.rpartition('/')[0] if file else path}/".lstrip("/")
    there = _listing(repo_id, revision, cache_dir, folder)
    if allow is None and not folder and CONVERSION_RECORD in there.files:
        chosen = list(_of_conversion(there, lambda name: name == CARD).files)
    elif allow is None:
        chosen = _of_checkpoint(there, folder, file)
    else:
        patterns = list(allow)
        safe = filter(SAFE_NAME.fullmatch, there.files)
        chosen = [name for name in safe if any(fnmatch(name, pattern) for pattern in patterns)]
    if not chosen:
        raise HubError("no file in it has such a name", where=f"{repo_id}@{there.commit[:12]}")
    wanted = there._replace(files={name: there.files[name] for name in chosen})
    new = [name for name in chosen if _cached(wanted, name) is None]
    snapshot = _download(wanted, progress)
    for name in new:
        _checked(wanted, name, snapshot)
    if allow is None and CONVERSION_RECORD in chosen:
        _check_snapshot(wanted, snapshot)
    elif f"{folder}{CONVERSION_RECORD}" in chosen:
        _check_conversion(repo_id, snapshot / folder)
    return Fetched(snapshot / folder, there.commit)


def _of_checkpoint(there: Snapshot, folder: str, file: str | None) -> list[str]:
    """The names that a checkpoint in `folder` (`""` or `x/`) needs. Its weights are `file` where one is named.

    Raises:
        HubError: there are no weights that can be read.
    """
    sizes = {name[len(folder) :]: size.size for name, size in there.files.items() if name.startswith(folder)}
    if not sizes or (file and file not in there.files):
        raise HubError(f"it has no {file or folder}", where=f"{there.repo_id}@{there.commit[:12]}")
    paths = _module_paths(there) if MODULES in sizes and not folder else []
    chosen = names.of_checkpoint(sizes, paths)
    if file is not None and not file.endswith(".json"):
        chosen = [*(name for name in chosen if not is_weights(name)), file[len(folder) :]]
    if not any(name.endswith(WEIGHT_ENDINGS) for name in chosen):
        found, hint = without_weights(list(sizes), f"{there.repo_id}/{folder}")
        raise HubError(
            "it holds no weights that can be read",
            found=found,
            where=f"{there.repo_id}@{there.commit[:12]}",
            hint=hint,
        )
    return [folder + name for name in chosen]


def _check_snapshot(wanted: Snapshot, snapshot: Path) -> None:
    """`_check_conversion` of these files alone: other programs put others of the repository into the same snapshot."""
    with tempfile.TemporaryDirectory() as view:
        for name in wanted.files:
            link = Path(view) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((snapshot / name).absolute())
        _check_conversion(wanted.repo_id, Path(view))


def _check_conversion(repo_id: str, folder: Path) -> None:
    """Raises HubError if a folder fails bsa-verify's checks of the file or of the layouts."""
    from bsa_export.converted.integrity import check_file, check_layout

    for check in (check_file(folder), check_layout(folder)):
        if not check.passed:
            reason = check.reason.replace(f"{folder}/", "").replace(str(folder), "it")
            raise HubError(f"it fails the {check.name} check: {reason}", where=repo_id, hint="report it to its owner")


def _of_conversion(there: Snapshot, others: Callable[[str], bool]) -> Snapshot:
    """The files of a published conversion: those that its conversion.json lists, its records, and `others`.

    Raises:
        HubError: conversion.json is damaged, or lists a file that is not part of a model or not in the repository.
    """
    path = _small_file(there, CONVERSION_RECORD)
    try:
        record = read_conversion(path.parent)
    except CheckpointError as error:
        raise HubError(
            str(error).replace(f"{path.parent}/", ""), where=there.repo_id, hint="report it to its owner"
        ) from None
    recorded = dict(record.files) if record else {}
    recorded.pop(CARD, None)
    for name, entry in recorded.items():
        if not SAFE_NAME.fullmatch(name) or is_runnable(name):
            raise HubError(
                f"its {CONVERSION_RECORD} lists what is not a file of a model",
                found=name,
                where=there.repo_id,
                hint="report it to its owner",
            )
        if (file := there.files.get(name)) is None or file.size != entry.bytes:
            raise HubError(
                f"expected {name} with {entry.bytes:,} bytes, as its {CONVERSION_RECORD} has it",
                found="no such file" if file is None else f"{file.size:,} bytes",
                where=there.repo_id,
                hint="report it to its owner",
            )
    files = {name: file for name, file in there.files.items() if of_conversion(name, recorded) or others(name)}
    return there._replace(files=files)


def _module_paths(there: Snapshot) -> list[str]:
    """The folders of the modules that a sentence-transformers repository lists."""
    path = _small_file(there, MODULES)
    try:
        modules = read_json(path)
    except CheckpointError as error:
        raise HubError(
            str(error).replace(f"{path.parent}/", ""), where=there.repo_id, hint="report it to its owner"
        ) from None
    paths = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return [path for path in paths if isinstance(path, str) and SAFE_NAME.fullmatch(path)]


def _small_file(there: Snapshot, name: str) -> Path:
    """A JSON file of a commit, in the Hub's cache. Raises HubError for one that is too large to be one."""
    if there.files[name].size > MAX_JSON_BYTES:
        found = f"{there.files[name].size:,} bytes"
        raise HubError(f"expected at most {MAX_JSON_BYTES:,} bytes in {name}", found=found, where=there.repo_id)
    one = there._replace(files={name: there.files[name]})
    snapshot = _download(one, progress=False)
    _checked(one, name, snapshot)
    return snapshot / name


def _listing(repo_id: str, revision: str | None, cache_dir: str | Path | None, folder: str = "") -> Snapshot:
    """The commit of a revision and all its files. Offline a cached config.json in `folder` (`""` or `x/`) finds it."""
    repo_id, revision = named(repo_id, revision, bare=True)
    if client.is_offline():
        return _cached_listing(repo_id, revision, cache_dir, folder)
    revision = revision or names.MAIN
    with client.sentences(repo_id, revision):
        hub = client.api(writing=False)
        commit = client.commit_of(client.patiently(lambda: hub.model_info(repo_id, revision=revision)))
        return Snapshot(repo_id, revision, commit, client.tree(hub, repo_id, commit), cache_dir)


def _cached_listing(repo_id: str, revision: str | None, cache_dir: str | Path | None, folder: str) -> Snapshot:
    from huggingface_hub import try_to_load_from_cache

    revision = revision or names.MAIN
    config = try_to_load_from_cache(repo_id, f"{folder}config.json", revision=revision, cache_dir=cache_dir)
    if not isinstance(config, str):
        where = f"{repo_id}@{revision}"
        raise HubError("it is not in the cache, and HF_HUB_OFFLINE is set", where=where, hint="unset it")
    snapshot = Path(config).parents[folder.count("/")]
    paths = sorted(path for path in snapshot.rglob("*") if path.is_file())
    files = {path.relative_to(snapshot).as_posix(): CachedFile(path.stat().st_size) for path in paths}
    return Snapshot(repo_id, revision, snapshot.name, files, cache_dir)


def _cached(wanted: Snapshot, name: str) -> Path | None:
    """The path of a file in the cache, None where it is not there in its whole size."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(wanted.repo_id, name, revision=wanted.commit, cache_dir=wanted.cache_dir)
    if not isinstance(path, str) or Path(path).stat().st_size != wanted.files[name].size:
        return None
    return Path(path)


def _download(wanted: Snapshot, progress: bool) -> Path:
    """Brings the files into the Hub's cache. Returns the snapshot's folder there."""
    from huggingface_hub import snapshot_download

    def in_cache() -> Path | None:
        folders = set()
        for name in wanted.files:
            if (path := _cached(wanted, name)) is None:
                return None
            folders.add(path.parents[name.count("/")])
        return folders.pop()

    def attempt() -> Path:
        snapshot_download(
            wanted.repo_id, revision=wanted.commit, allow_patterns=list(wanted.files), cache_dir=wanted.cache_dir
        )
        if folder := in_cache():
            _name_revision(wanted, folder)
            return folder
        # Without a connection huggingface_hub is content with what the cache holds.
        raise ConnectionError("the download is not complete")

    if (folder := in_cache()) is not None:
        return folder
    if client.is_offline():
        raise HubError("its files are not all in the cache, and HF_HUB_OFFLINE is set", where=wanted.repo_id)
    sizes = [file.size for file in wanted.files.values()]
    with client.sentences(wanted.repo_id, wanted.commit, sizes=sizes), client.bars(progress):
        return client.patiently(attempt, waits=client.LONG_WAITS)


def _name_revision(wanted: Snapshot, folder: Path) -> None:
    """Notes in the Hub's cache (its `refs`) which commit the revision names, so that it is found without the Hub."""
    if wanted.revision != wanted.commit:
        ref = folder.parents[1] / "refs" / wanted.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(wanted.commit)


def _checked(wanted: Snapshot, name: str, snapshot: Path, target: Path | None = None) -> str:
    """Reads a file of the cache, into `target` if there is one; downloads it once more if it is not as listed.

    Returns:
        Its sha256.
    """
    listed = wanted.files[name]
    for attempt in range(2):
        if attempt and not client.is_offline():
            _download_again(wanted, name)
        sha256, blob, size = _read(snapshot / name, target)
        found, expected = (blob, listed.blob_id) if listed.lfs is None else (sha256, listed.lfs.sha256)
        if size == listed.size and expected in (None, found):
            return sha256
    raise HubError(
        f"expected {listed.size:,} bytes with the hash {expected}",
        found=f"{size:,} with {found} in two downloads",
        where=f"{wanted.repo_id}: {name}",
        hint="report it to the repository's owner",
    )


def _download_again(wanted: Snapshot, name: str) -> None:
    from huggingface_hub import hf_hub_download

    with client.sentences(wanted.repo_id, wanted.commit, sizes=[wanted.files[name].size]), client.bars(False):
        client.patiently(
            lambda: hf_hub_download(
                wanted.repo_id, name, revision=wanted.commit, cache_dir=wanted.cache_dir, force_download=True
            ),
            waits=client.LONG_WAITS,
        )


def _read(path: Path, copy_to: Path | None) -> tuple[str, str, int]:
    """sha256, git's hash of a blob, and bytes of a file, which is copied on the way."""
    size = path.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as source, open(copy_to, "wb") if copy_to else nullcontext() as copy:
        while piece := source.read(PIECE):
            sha256.update(piece)
            blob.update(piece)
            if copy:
                copy.write(piece)
    return sha256.hexdigest(), blob.hexdigest(), size
