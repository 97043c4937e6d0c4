"""From the Hub: `pull` makes a folder of a published conversion, `fetch` brings any checkpoint into the Hub's cache."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bsa_export.checkpoint.atomic_folder import AtomicFolder
from bsa_export.converted.names import CARD, CONVERSION_RECORD, PULL_RECORD, SAFE_NAME, of_repository
from bsa_export.converted.records import PullRecord, read_conversion, to_json
from bsa_export.errors import CheckpointError, HubError
from bsa_export.files import write_json
from bsa_export.hub import client, names

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
    """What stands in for the Hub's listing of a file where the Hub cannot be asked."""

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
    repo_id: str,
    revision: str | None,
    target: str | Path,
    *,
    overwrite: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> PullResult:
    """Gets a published conversion: downloads one commit, checks sizes, hashes, file and layouts, and makes the folder.

    An interrupted pull goes on from the Hub's cache. The folder appears whole or not at all; `pulled.json` in it says which
    commit it is of. Nothing of the repository is executed, and nothing that could be is taken along.

    Args:
        repo_id: `org/name`.
        revision: branch, tag or commit; main by default.
        target: the folder to make.
        overwrite: replaces an earlier conversion.
        cache_dir: the Hub's cache; huggingface_hub's own by default.
        progress: whether to show bars on stderr.

    Raises:
        HubError: the Hub or the network refused, the repository is no conversion or a damaged one, or what arrived is not what
            it lists.
        CheckpointError: `target` cannot be made.
    """
    with AtomicFolder(target, overwrite=overwrite) as staging:
        there = _listing(repo_id, revision, cache_dir)
        if CONVERSION_RECORD not in there.files:
            raise HubError(
                f"expected a converted model, with a {CONVERSION_RECORD}",
                found="none",
                where=repo_id,
                hint=f"if it is a dense BERT, bsa-convert {repo_id} {target} converts it",
            )
        wanted = there._replace(files={name: file for name, file in there.files.items() if of_repository(name)})
        snapshot = _download(wanted, progress)
        digests = {}
        for name in wanted.files:
            (staging / name).parent.mkdir(exist_ok=True)
            digests[name] = _checked(wanted, name, snapshot, staging / name)
        _check_conversion(repo_id, staging)
        record = PullRecord(repo_id, revision or names.MAIN, there.commit, digests)
        write_json(staging / PULL_RECORD, to_json(record))
    return PullResult(Path(target), there.commit, {name: file.size for name, file in wanted.files.items()})


def fetch(
    repo_id: str,
    revision: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    allow: Iterable[str] | None = None,
    progress: bool = False,
) -> Fetched:
    """Downloads what a checkpoint needs, dense or converted, into the Hub's cache. Sizes are checked, and hashes of what is new; a
    conversion must pass the checks of file and layouts, as `pull` has it.

    That is: weights (safetensors if there are any), config.json, tokenizer and sentence-transformers files, the records of a
    conversion, and README.md for the license. With HF_HUB_OFFLINE the cache answers.

    Args:
        repo_id: `org/name`.
        revision: branch, tag or commit; main by default.
        cache_dir: the Hub's cache; huggingface_hub's own by default.
        allow: patterns of names to take instead.
        progress: whether to show bars on stderr.

    Raises:
        HubError: the Hub or the network refused, there is no checkpoint, what arrived is not what the Hub lists, or it is a
            conversion that fails a check.
    """
    there = _listing(repo_id, revision, cache_dir)
    if allow is None:
        chosen = names.of_checkpoint(there.files)
    else:
        patterns = list(allow)
        safe = filter(SAFE_NAME.fullmatch, there.files)
        chosen = [name for name in safe if any(fnmatch(name, pattern) for pattern in patterns)]
    if not chosen:
        raise HubError("it holds no file that a checkpoint needs", where=f"{repo_id}@{there.commit[:12]}")
    wanted = there._replace(files={name: there.files[name] for name in chosen})
    new = [name for name in chosen if _cached(wanted, name) is None]
    snapshot = _download(wanted, progress)
    for name in new:
        _checked(wanted, name, snapshot)
    if allow is None and CONVERSION_RECORD in chosen:
        _check_snapshot(wanted, snapshot)
    return Fetched(snapshot, there.commit)


def _check_snapshot(wanted: Snapshot, snapshot: Path) -> None:
    """`_check_conversion` of these files alone: other programs put others of the repository into the same snapshot."""
    with tempfile.TemporaryDirectory() as view:
        for name in wanted.files:
            link = Path(view) / name
            link.parent.mkdir(exist_ok=True)
            link.symlink_to((snapshot / name).absolute())
        _check_conversion(wanted.repo_id, Path(view))


def _check_conversion(repo_id: str, folder: Path) -> None:
    """Raises HubError if a folder fails bsa-verify's checks of the file or of the layouts."""
    from bsa_export.converted.integrity import check_file, check_layout

    for check in (check_file(folder), check_layout(folder)):
        if not check.passed:
            reason = check.reason.replace(f"{folder}/", "").replace(str(folder), "it")
            raise HubError(f"it fails the {check.name} check: {reason}", where=repo_id, hint="tell its owner")


def recorded_files(folder: Path) -> list[str]:
    """The files that conversion.json lists. The card, which a push completes, is left out."""
    record = read_conversion(folder)
    if record is None:
        raise CheckpointError("expected a finished conversion", found=f"no {CONVERSION_RECORD}", where=folder)
    return [name for name in record.files if name != CARD]


def _listing(repo_id: str, revision: str | None, cache_dir: str | Path | None) -> Snapshot:
    """The commit of a revision and all its files."""
    if names.parse_repo(repo_id) != (repo_id, None):
        raise HubError("expected a repository org/name", found=repr(repo_id))
    if client.is_offline():
        return _cached_listing(repo_id, revision, cache_dir)
    revision = revision or names.MAIN
    with client.sentences(repo_id, revision):
        hub = client.api(writing=False)
        commit = client.patiently(lambda: hub.model_info(repo_id, revision=revision)).sha
        return Snapshot(repo_id, revision, commit, client.tree(hub, repo_id, commit), cache_dir)


def _cached_listing(repo_id: str, revision: str | None, cache_dir: str | Path | None) -> Snapshot:
    from huggingface_hub import try_to_load_from_cache

    revision = revision or names.MAIN
    config = try_to_load_from_cache(repo_id, "config.json", revision=revision, cache_dir=cache_dir)
    if not isinstance(config, str):
        where = f"{repo_id}@{revision}"
        raise HubError("it is not in the cache, and HF_HUB_OFFLINE is set", where=where, hint="unset it")
    folder = Path(config).parent
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): CachedFile(path.stat().st_size) for path in paths}
    return Snapshot(repo_id, revision, folder.name, files, cache_dir)


def _cached(wanted: Snapshot, name: str) -> Path | None:
    """Where a file lies in the cache, if it does in its whole size."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(wanted.repo_id, name, revision=wanted.commit, cache_dir=wanted.cache_dir)
    whole = isinstance(path, str) and Path(path).stat().st_size == wanted.files[name].size
    return Path(path) if whole else None


def _download(wanted: Snapshot, progress: bool) -> Path:
    """Brings the files into the Hub's cache. Returns the snapshot's folder there."""
    from huggingface_hub import snapshot_download

    def in_cache() -> Path | None:
        paths = [_cached(wanted, name) for name in wanted.files]
        return None if None in paths else paths[0].parents[next(iter(wanted.files)).count("/")]

    def attempt() -> Path:
        snapshot_download(
            wanted.repo_id, revision=wanted.commit, allow_patterns=list(wanted.files), cache_dir=wanted.cache_dir
        )
        if folder := in_cache():
            _name_revision(wanted, folder)
            return folder
        # Without a connection huggingface_hub is content with what the cache holds.
        raise ConnectionError("the download is not complete")

    if (folder := in_cache()) or client.is_offline():
        return folder
    with client.sentences(wanted.repo_id, wanted.commit), client.bars(progress):
        return client.patiently(attempt, waits=client.LONG_WAITS)


def _name_revision(wanted: Snapshot, folder: Path) -> None:
    """Notes in the Hub's cache which commit the revision names, so that it is found there without the Hub (the cache's `refs`)."""
    if wanted.revision != wanted.commit:
        ref = folder.parents[1] / "refs" / wanted.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(wanted.commit)


def _checked(wanted: Snapshot, name: str, snapshot: Path, target: Path | None = None) -> str:
    """Reads a file of the cache, into `target` if there is one. Returns its sha256. What is not as listed is downloaded once more."""
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
        hint="tell the repository's owner",
    )


def _download_again(wanted: Snapshot, name: str) -> None:
    from huggingface_hub import hf_hub_download

    with client.sentences(wanted.repo_id, wanted.commit), client.bars(False):
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
