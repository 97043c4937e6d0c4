"""What a Hub stores: users, and repositories with commits, branches, tags and pull requests."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class User:
    name: str
    role: str
    orgs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class File:
    """A file of a commit: `content` of a small one, else the sha256 that storage knows it by, and any Xet hash."""

    size: int
    blob: str
    content: bytes | None = None
    sha256: str | None = None
    xet: str | None = None


@dataclass(frozen=True)
class Commit:
    id: str
    files: dict[str, File]
    title: str
    parent: str | None
    date: str


@dataclass
class Repo:
    id: str
    private: bool
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    proposals: dict[int, dict] = field(default_factory=dict)  # pull requests by number, as they are listed

    def commit(self, ref: str, files: dict[str, File], title: str) -> Commit:
        parent = self.refs.get(ref) or self.refs.get("refs/heads/main")
        text = json.dumps([sorted((path, file.blob) for path, file in files.items()), title, parent, len(self.commits)])
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        made = Commit(hashlib.sha1(f"{self.id} {text}".encode()).hexdigest(), files, title, parent, date)
        self.commits[made.id] = made
        self.refs[ref] = made.id
        return made

    def at(self, revision: str) -> Commit | None:
        known = (self.refs.get(ref) for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision))
        found = next(filter(None, known), revision)
        return self.commits.get(found)

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["refs/heads/main"]]


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def small_file(content: bytes) -> File:
    return File(len(content), blob_id(content), content)


def large_file(sha256: str, size: int, xet: str | None = None) -> File:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return File(size, blob_id(pointer.encode()), None, sha256, xet)
