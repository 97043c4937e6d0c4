"""A Hugging Face Hub on loopback: repositories with commits, branches and pull requests, Git LFS, Xet, users, and faults on request.

It answers what huggingface_hub 0.34 to 2.4 and hf_xet 1.8 send. Two origins, as on the real Hub: `url` for the API and `storage_url` for
bytes. Nothing but the standard library is needed, except to serve a file that came by Xet to a client without it.

    with HubServer(folder) as server:
        server.fault("POST .*/commit/", Status(503))
        ...                                             # a client with HF_ENDPOINT=server.url, HF_TOKEN=WRITER

`python tests/hub/hub_server.py FOLDER` serves until Ctrl-C. Git itself, search, quotas and rate limits are not there.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER, OTHER = "hf_alice_writes", "hf_alice_reads", "hf_bob_writes"
PIECE = 1 << 18
JOIN = """
import sys, time, hf_xet
url, name, size, path = sys.argv[1:]
session, expires = hf_xet.XetSession(), int(time.time()) + 3600
with session.new_file_download_group(endpoint=url, token="xet-inside", token_expiry_unix_secs=expires) as group:
    group.start_download_file(hf_xet.XetFileInfo(name, int(size)), path)
"""


@dataclass(frozen=True)
class User:
    name: str
    role: str
    orgs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class File:
    """A file of a commit: `content` of a small one, else the sha256 by which storage knows it, and its Xet hash if it came that way."""

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


# --- faults: what happens to a request instead of, or after, its answer


@dataclass(frozen=True)
class Status:
    """Answers with an HTTP status, and the words that the Hub puts into its headers."""

    code: int
    message: str = "out of order"
    error_code: str | None = None


@dataclass(frozen=True)
class Cut:
    """Drops the connection, before the answer, or after so many bytes of it."""

    after: int = 0


@dataclass(frozen=True)
class LoseAnswer:
    """Does what was asked and drops the connection."""


@dataclass(frozen=True)
class Slow:
    """Waits before the answer."""

    seconds: float


@dataclass(frozen=True)
class Corrupt:
    """Turns one bit of the answer's body."""

    at: int = 0


@dataclass(frozen=True)
class Redirect:
    """Sends the client elsewhere."""

    to: str


@dataclass(frozen=True)
class First:
    """Lets something else happen at the Hub just before."""

    act: Callable[[], None]


class Gone(ConnectionError):
    """The connection is dropped here."""


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def small_file(content: bytes) -> File:
    return File(len(content), blob_id(content), content)


def large_file(sha256: str, size: int, xet: str | None = None) -> File:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return File(size, blob_id(pointer.encode()), None, sha256, xet)


class HubServer(contextlib.AbstractContextManager):
    """The server, running in threads of this process between `with` and its end.

    Attributes:
        url, storage_url: the two origins.
        users: token -> User.
        repos: `org/name` -> Repo.
        log: (origin, "METHOD path?query", token or None, status) of each request; status 0 where no answer came.
    """

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", port: int = 0):
        self.folder = Path(folder)
        for name in ("lfs", "xorbs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.multipart: int | None = None  # bytes of a part, where large files come in parts
        self.users = {
            WRITER: User("alice", "write", (("alices-lab", "write"), ("library", "read"))),
            READER: User("alice", "read"),
            OTHER: User("bob", "write"),
        }
        self.repos: dict[str, Repo] = {}
        self.xet = XetStore(self.folder / "xorbs")
        self.log: list[tuple[str, str, str | None, int]] = []
        self.lock, self.joining = threading.RLock(), threading.Lock()
        self.faults: list[list] = []
        self.listed_sha256: str | None = None  # what every large file is said to have, if anything
        self.budget: int | None = None
        self.traffic = 0
        self.on_exhausted: Callable[[], None] = lambda: None
        # Two hosts, not only two ports: some clients take a port for the same place.
        self.servers = [_serving(self, "hub", host, port), _serving(self, "storage", "127.0.0.2", 0)]
        self.url, self.storage_url = ("http://{}:{}".format(*server.server_address) for server in self.servers)

    def __exit__(self, *_) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def make_repo(self, repo_id: str, files: dict[str, bytes] | None = None, **attributes) -> Repo:
        """A repository with these files; those of more than 100 kB lie in storage."""
        repo = self.repos[repo_id] = Repo(repo_id, **({"private": False} | attributes))
        kept = {".gitattributes": small_file(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
        repo.commit("refs/heads/main", kept, "initial commit")
        if files:
            repo.commit(
                "refs/heads/main", kept | {path: self.stored(content) for path, content in files.items()}, "files"
            )
        return repo

    def stored(self, content: bytes) -> File:
        if len(content) < 100_000:
            return small_file(content)
        digest = hashlib.sha256(content).hexdigest()
        (self.folder / "lfs" / digest).write_bytes(content)
        return large_file(digest, len(content))

    def forget_objects(self) -> None:
        """Empties the storage."""
        for name in ("lfs", "xorbs"):
            for path in (self.folder / name).iterdir():
                path.unlink()
        self.xet = XetStore(self.folder / "xorbs")

    def holds(self, file: File) -> bool:
        """Whether all bytes of a large file are in storage."""
        if (self.folder / "lfs" / file.sha256).exists():
            return True
        return all((self.xet.folder / term.xorb).exists() for term in self.xet.files[file.xet])

    def content(self, file: File) -> bytes:
        """The bytes of a file, however they came."""
        return file.content if file.content is not None else self.object(file).read_bytes()

    def object(self, file: File) -> Path:
        """Where the bytes of a large file lie; those that came by Xet are put together with hf_xet."""
        path = self.folder / "lfs" / file.sha256
        with self.joining:
            if not path.exists():
                # In a process of its own: hf_xet asks this server, whose threads it would not let run.
                arguments = [self.storage_url, file.xet, str(file.size), str(path)]
                subprocess.run([sys.executable, "-c", JOIN, *arguments], check=True)
        return path

    # faults

    def fault(self, requests: str, what, *, skip: int = 0, times: int = 1) -> None:
        """Does `what` to requests whose "METHOD path?query" contains the pattern: after `skip` of them, `times` times."""
        self.faults.append([re.compile(requests), what, skip, times])

    def next_fault(self, request: str):
        with self.lock:
            for fault in self.faults:
                pattern, what, skip, times = fault
                if times and pattern.search(request):
                    if skip:
                        fault[2] -= 1
                        continue
                    fault[3] -= 1
                    return what
        return None

    def go_down_after(self, budget: int, then: Callable[[], None] = lambda: None) -> None:
        """After so many bytes in both directions every connection is dropped, until `come_up`; `then` is called once."""
        with self.lock:
            self.budget, self.on_exhausted = budget, then

    def come_up(self) -> None:
        with self.lock:
            self.faults.clear()
            self.listed_sha256 = self.budget = None

    def meter(self, count: int) -> int:
        """How many of so many bytes may still pass. Raises Gone when none may."""
        with self.lock:
            self.traffic += count
            if self.budget is None:
                return count
            passed, self.budget = min(count, self.budget), max(self.budget - count, 0)
            act, self.on_exhausted = (self.on_exhausted, lambda: None) if passed < count else (None, self.on_exhausted)
        if act is not None:
            act()
        if passed == 0 and count:
            raise Gone
        return passed


def _serving(hub: HubServer, origin: str, host: str, port: int) -> ThreadingHTTPServer:
    handler = type("Handler", (HubHandler if origin == "hub" else StorageHandler,), {"hub": hub, "origin": origin})
    server = ThreadingHTTPServer((host, port), handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


class Wire:
    """One direction of a connection, with every byte metered."""

    def __init__(self, file, hub: HubServer):
        self.file, self.hub = file, hub

    def read(self, count: int = -1) -> bytes:
        data = self.file.read(count)
        return self._passed(data)

    def readline(self, limit: int = -1) -> bytes:
        return self._passed(self.file.readline(limit))

    def _passed(self, data: bytes) -> bytes:
        if self.hub.meter(len(data)) < len(data):
            raise Gone
        return data

    def write(self, data) -> int:
        passed = self.hub.meter(len(data))
        self.file.write(data[:passed])
        if passed < len(data):
            self.file.flush()
            raise Gone
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


class Refused(Exception):
    """Ends a request with a status."""

    def __init__(self, code: int, message: str, error_code: str | None = None):
        self.answer = Status(code, message, error_code)


class Handler(BaseHTTPRequestHandler):
    """What both origins do: find the route, do the fault, answer."""

    protocol_version = "HTTP/1.1"
    hub: HubServer
    origin: str
    routes: list[tuple[str, re.Pattern, Callable]]

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rfile, self.wfile = Wire(self.rfile, self.hub), Wire(self.wfile, self.hub)

    def log_message(self, *_) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError, ValueError):
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def do(self) -> None:
        self.status, self.fault, self.left = 0, None, int(self.headers.get("Content-Length") or 0)
        self.chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        request = f"{self.command} {self.path}"
        entry = len(self.hub.log)
        self.hub.log.append((self.origin, request, self.token, 0))
        try:
            self.fault = self.hub.next_fault(request)
            self.answer(url.path)
        except Gone:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            raise
        finally:
            self.hub.log[entry] = (self.origin, request, self.token, self.status)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def answer(self, path: str) -> None:
        match self.fault:
            case Slow(seconds):
                time.sleep(seconds)
            case First(act):
                act()
            case Status():
                return self.refuse(self.fault)
            case Redirect(to):
                return self.send(307, headers={"Location": to})
            case Cut(0):
                raise Gone
        for method, pattern, function in self.routes:
            if method in (self.command, "GET" if self.command == "HEAD" else None) and (
                match := pattern.fullmatch(path)
            ):
                try:
                    return function(self, *(None if part is None else unquote(part) for part in match.groups()))
                except Refused as refused:
                    return self.refuse(refused.answer)
        self.refuse(Status(404, "Sorry, we can't find the page you are looking for."))

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def pieces(self):
        """The request's body in pieces."""
        if self.chunked:
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            self.chunked = False
        while self.left:
            piece = self.rfile.read(min(PIECE, self.left))
            if not piece:
                raise Gone
            self.left -= len(piece)
            yield piece

    def body(self) -> bytes:
        return b"".join(self.pieces())

    def json(self) -> dict:
        return json.loads(self.body() or b"{}")

    def send(self, code: int, data=None, headers: dict[str, str] | None = None) -> None:
        """Answers with JSON, or with bytes as they are."""
        content = data if isinstance(data, bytes) else b"" if data is None else json.dumps(data).encode()
        kind = "application/octet-stream" if isinstance(data, bytes) else "application/json"
        self.start(code, {"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {}))
        self.write(content)

    def start(self, code: int, headers: dict[str, str]) -> None:
        for _ in self.pieces():  # an unread body would be taken for the next request
            pass
        if isinstance(self.fault, LoseAnswer):
            raise Gone
        self.sent = 0
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.status = code

    def write(self, content: bytes) -> None:
        if self.command == "HEAD":
            return
        match self.fault:
            case Cut(after) if self.sent + len(content) > after:
                self.wfile.write(content[: after - self.sent])
                self.wfile.flush()
                self.status = 0
                raise Gone
            case Corrupt(at) if self.sent <= at < self.sent + len(content):
                content = bytearray(content)
                content[at - self.sent] ^= 1
        self.wfile.write(content)
        self.sent += len(content)

    def send_file(self, path: Path, span: tuple[int, int] | None = None) -> None:
        """Answers with a file, or the range that the request asks for."""
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first, last = (int(asked[1]), min(int(asked[2] or size - 1), size - 1)) if asked else (0, size - 1)
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        headers["Content-Length"] = str(last - first + 1)
        if asked:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.start(206 if asked else 200, headers)
        with open(path, "rb") as file:
            file.seek(first)
            left = last - first + 1
            while left and self.command != "HEAD":
                piece = file.read(min(PIECE, left))
                left -= len(piece)
                self.write(piece)

    def refuse(self, answer: Status) -> None:
        headers = {"X-Error-Message": answer.message}
        if answer.error_code:
            headers["X-Error-Code"] = answer.error_code
        self.send(answer.code, {"error": answer.message}, headers)


def _router():
    routes: list[tuple[str, re.Pattern, Callable]] = []

    def route(method: str, pattern: str):
        """`{repo}`, `{oid}`, `{hash}` and `{rest}` stand for what they say."""
        parts = {
            "repo": "([^/]+/[^/]+)",
            "oid": "([0-9a-f]{64})",
            "hash": "([0-9a-f]{64})",
            "rest": "(.+)",
            "one": "([^/]+)",
        }
        compiled = re.compile(re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], pattern))
        return lambda function: routes.append((method, compiled, function)) or function

    return routes, route


class HubHandler(Handler):
    """The API."""

    routes, route = _router()

    @property
    def user(self) -> User | None:
        if self.token is not None and self.token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(self.token)

    def repo(self, repo_id: str, *, writing: bool = False, reading_bytes: bool = False) -> Repo:
        """The repository, if the user may do that."""
        user, repo = self.user, self.hub.repos.get(repo_id)
        namespace = repo_id.split("/")[0]
        member = user is not None and namespace in (user.name, *(org for org, _ in user.orgs))
        if repo is None or (repo.private and not member):
            if user is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if writing and not self._may_write(namespace):
            raise Refused(403, "You don't have the required permissions to perform this action")
        if reading_bytes and repo.gated and not member:
            raise Refused(403 if user else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        return repo

    def _may_write(self, namespace: str) -> bool:
        user = self.user
        return (
            user is not None and user.role == "write" and (namespace == user.name or (namespace, "write") in user.orgs)
        )

    def commit_at(self, repo: Repo, revision: str | None) -> Commit:
        commit = repo.at(revision or "main")
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        user = self.user
        if user is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user.orgs]
        access = {"displayName": "a token", "role": user.role}
        auth = {"type": "access_token", "accessToken": access}
        self.send(200, {"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        import yaml

        content = self.json()["content"]
        block = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        try:
            data = yaml.safe_load(block[1]) if block else None
        except yaml.YAMLError:
            return self.send(400, {"errors": [{"message": "Invalid YAML in README.md"}], "warnings": []})
        wrong = isinstance(data, dict) and not isinstance(data.get("tags", []), list)
        errors = [{"message": '"tags" must be an array'}] if wrong else []
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        user, asked = self.user, self.json()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        namespace = asked.get("organization") or user.name
        repo_id = f"{namespace}/{asked['name']}"
        if not self._may_write(namespace):
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        with self.hub.lock:
            there = repo_id in self.hub.repos
            if not there:
                self.hub.make_repo(
                    repo_id, private=asked.get("visibility") == "private" or asked.get("private") is True
                )
        url = f"{self.hub.url}/{repo_id}"
        if there:
            return self.send(409, {"error": "You already created this model repo", "url": url, "name": repo_id})
        self.send(200, {"url": url, "name": repo_id, "id": hashlib.md5(repo_id.encode()).hexdigest()})

    @route("GET", "/api/models/{repo}(?:/revision/{one})?")
    def info(self, repo_id: str, revision: str | None) -> None:
        repo = self.repo(repo_id)
        commit = self.commit_at(repo, revision)
        about = {"_id": "0", "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": commit.id}
        about |= {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
        about |= {
            "lastModified": commit.date,
            "createdAt": commit.date,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "xetEnabled": True,
        }
        self.send(200, about | {"siblings": [{"rfilename": path} for path in sorted(commit.files)]})

    @route("GET", "/api/models/{repo}/tree/{one}")
    def tree(self, repo_id: str, revision: str) -> None:
        files = self.commit_at(self.repo(repo_id), revision).files
        folders = {path.rpartition("/")[0] for path in files} - {""}
        entries = [
            {"type": "directory", "path": path, "oid": blob_id(path.encode()), "size": 0} for path in sorted(folders)
        ]
        self.send(200, entries + [self._entry(path, file) for path, file in sorted(files.items())])

    @route("POST", "/api/models/{repo}/paths-info/{one}")
    def paths_info(self, repo_id: str, revision: str) -> None:
        body = self.body()
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
        files = self.commit_at(self.repo(repo_id), revision).files
        self.send(200, [self._entry(path, files[path]) for path in paths if path in files])

    def _entry(self, path: str, file: File) -> dict:
        entry = {"type": "file", "path": path, "oid": file.blob, "size": file.size}
        if file.sha256:
            entry["lfs"] = {"oid": self.hub.listed_sha256 or file.sha256, "size": file.size, "pointerSize": 134}
        return entry | ({"xetHash": file.xet} if file.xet else {})

    @route("GET", "/api/models/{repo}/refs")
    def refs(self, repo_id: str) -> None:
        listed = {"heads": [], "tags": [], "pr": []}
        for ref, commit in self.repo(repo_id).refs.items():
            _, kind, name = ref.split("/", 2)
            listed[kind].append({"name": name, "ref": ref, "targetCommit": commit})
        self.send(
            200, {"branches": listed["heads"], "tags": listed["tags"], "converts": [], "pullRequests": listed["pr"]}
        )

    @route("GET", "/api/models/{repo}/discussions")
    def discussions(self, repo_id: str) -> None:
        listed = self.repo(repo_id).proposals.values()
        listed = [one for one in listed if self.query.get("author") in (None, one["author"]["name"])]
        self.send(200, {"discussions": listed, "count": len(listed), "start": 0})

    @route("POST", "/api/models/{repo}/branch/{one}")
    def branch(self, repo_id: str, name: str) -> None:
        repo = self.repo(repo_id, writing=True)
        start = self.commit_at(repo, self.json().get("startingPoint"))
        if f"refs/heads/{name}" in repo.refs:
            raise Refused(409, "Reference already exists")
        repo.refs[f"refs/heads/{name}"] = start.id
        self.send(200, {})

    @route("POST", "/api/models/{repo}/preupload/{one}")
    def preupload(self, repo_id: str, revision: str) -> None:
        commit = self.commit_at(self.repo(repo_id, writing="create_pr" not in self.query), revision)
        answers = []
        for asked in self.json()["files"]:
            is_text = b"\0" not in base64.b64decode(asked.get("sample") or "")
            small = is_text and asked["size"] < 10_000_000 and not asked["path"].endswith((".safetensors", ".png"))
            there = commit.files.get(asked["path"])
            answer = {"path": asked["path"], "uploadMode": "regular" if small else "lfs", "shouldIgnore": False}
            answers.append(answer | ({"oid": there.sha256 or there.blob} if there else {}))
        self.send(200, {"files": answers, "commitOid": commit.id})

    @route("POST", "/{repo}\\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str) -> None:
        self.repo(repo_id)
        objects, body = [], self.json()
        for asked in body["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if not (self.hub.folder / "lfs" / asked["oid"]).exists():
                answer["actions"] = self._lfs_actions(asked["oid"], asked["size"])
            objects.append(answer)
        transfer = "xet" if "xet" in body["transfers"] else "multipart" if self.hub.multipart else "basic"
        self.send(200, {"transfer": transfer, "objects": objects})

    def _lfs_actions(self, oid: str, size: int) -> dict:
        upload = {"href": f"{self.hub.storage_url}/lfs/{oid}"}
        if self.hub.multipart and size > self.hub.multipart:
            parts = range(1, -(-size // self.hub.multipart) + 1)
            header = {f"{part:05d}": f"{upload['href']}/part/{part}" for part in parts}
            upload = {"href": f"{self.hub.url}/lfs/{oid}/complete"}
            upload["header"] = header | {"chunk_size": str(self.hub.multipart)}
        return {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}

    @route("POST", "/lfs/{oid}/complete")
    def lfs_complete(self, oid: str) -> None:
        digest, joined = hashlib.sha256(), self.hub.folder / "lfs" / f"{oid}.joined"
        with open(joined, "wb") as file:
            for part in self.json()["parts"]:
                content = (self.hub.folder / "lfs" / f"{oid}.{part['partNumber']}").read_bytes()
                digest.update(content)
                file.write(content)
        if digest.hexdigest() != oid:
            raise Refused(400, "sha256 mismatch")
        joined.rename(self.hub.folder / "lfs" / oid)
        self.send(200, {})

    @route("POST", "/lfs/{oid}/verify")
    def lfs_verify(self, oid: str) -> None:
        path = self.hub.folder / "lfs" / oid
        if not path.exists() or path.stat().st_size != self.json()["size"]:
            raise Refused(404, "object missing")
        self.send(200, {})

    @route("GET", "/api/models/{repo}/xet-(read|write)-token/{one}")
    def xet_token(self, repo_id: str, kind: str, _revision: str) -> None:
        self.repo(repo_id, writing=kind == "write" and "create_pr" not in self.query, reading_bytes=kind == "read")
        expires = int(time.time()) + 3600
        token = f"xet-{kind}"
        headers = {"X-Xet-Cas-Url": self.hub.storage_url, "X-Xet-Access-Token": token}
        headers["X-Xet-Token-Expiration"] = str(expires)
        self.send(200, {"casUrl": self.hub.storage_url, "accessToken": token, "exp": expires}, headers)

    @route("POST", "/api/models/{repo}/commit/{one}")
    def commit(self, repo_id: str, revision: str) -> None:
        as_pr = "create_pr" in self.query
        repo = self.repo(repo_id, writing=not as_pr)
        if as_pr and self.user is None:
            raise Refused(401, "Invalid username or password.")
        lines = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        with self.hub.lock:
            parent = self.commit_at(repo, revision)
            files, title = dict(parent.files), ""
            for line in lines:
                match line["key"], line["value"]:
                    case "header", value:
                        title = value["summary"]
                        if value.get("parentCommit") not in (None, parent.id):
                            raise Refused(412, "A commit has happened since. Please refresh and try again.")
                    case "file", value:
                        files[value["path"]] = small_file(base64.b64decode(value["content"]))
                    case "lfsFile", value:
                        files[value["path"]] = self._uploaded(value["oid"], value["size"])
                    case "deletedFile", value:
                        if files.pop(value["path"], None) is None:
                            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            ref = f"refs/pr/{number}" if as_pr else revision if revision in repo.refs else f"refs/heads/{revision}"
            made = repo.commit(ref, files, title)
            if as_pr:
                repo.proposals[number] = {
                    "num": number, "title": title, "status": "open", "isPullRequest": True, "createdAt": made.date,
                    "author": {"name": self.user.name}, "repo": {"name": repo_id, "type": "model"},
                }  # fmt: skip
        answer = {"success": True, "commitOid": made.id, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{made.id}"}
        if as_pr:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        self.send(200, answer | {"hookOutput": ""})

    def _uploaded(self, oid: str, size: int) -> File:
        xet = self.hub.xet.by_sha256.get(oid)
        if (self.hub.folder / "lfs" / oid).exists():
            return large_file(oid, size, xet)
        if xet is None or self.hub.xet.size(xet) != size:
            raise Refused(
                400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist. {oid}"
            )
        return large_file(oid, size, xet)

    @route("GET", "/{repo}/resolve/{one}/{rest}")
    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.repo(repo_id, reading_bytes=True)
        commit = self.commit_at(repo, revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.id}
        if file is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.send(404, {"error": "Entry not found"}, headers)
        if file.content is not None:
            return self.send(200, file.content, headers | {"ETag": f'"{file.blob}"', "Accept-Ranges": "bytes"})
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        headers["Location"] = f"{self.hub.storage_url}/lfs/{file.sha256}"
        if file.xet:
            headers["X-Xet-Hash"] = file.xet
            headers["Link"] = f'<{self.hub.url}/api/models/{repo_id}/xet-read-token/{commit.id}>; rel="xet-auth"'
        self.send(302, b"Found. Redirecting", headers)


class StorageHandler(Handler):
    """Bytes: LFS objects, and the content-addressed storage of Xet (https://huggingface.co/docs/xet)."""

    routes, route = _router()

    @route("PUT", "/lfs/{oid}")
    def put_object(self, oid: str) -> None:
        if self._receive(self.hub.folder / "lfs" / oid) != oid:
            (self.hub.folder / "lfs" / oid).unlink()
            raise Refused(400, "sha256 mismatch")
        self.send(200)

    @route("PUT", "/lfs/{oid}/part/(\\d+)")
    def put_part(self, oid: str, part: str) -> None:
        self.send(200, headers={"ETag": f'"{self._receive(self.hub.folder / "lfs" / f"{oid}.{part}")}"'})

    def _receive(self, path: Path) -> str:
        """Writes the body into a file that is there only when all of it came. Returns its sha256."""
        digest, beside = hashlib.sha256(), path.with_name(f"{path.name}.{threading.get_ident()}")
        with open(beside, "wb") as file:
            for piece in self.pieces():
                digest.update(piece)
                file.write(piece)
        beside.rename(path)
        return digest.hexdigest()

    @route("GET", "/lfs/{oid}")
    def get_object(self, oid: str) -> None:
        files = (
            file
            for repo in self.hub.repos.values()
            for commit in repo.commits.values()
            for file in commit.files.values()
        )
        file = next((file for file in files if file.sha256 == oid), None)
        if file is None:
            raise Refused(404, "no such object")
        self.send_file(self.hub.object(file))

    def _check_xet_token(self) -> None:
        if not (self.token or "").startswith("xet-"):
            raise Refused(401, "no token of this storage")

    @route("POST", "/v1/xorbs/default/{hash}")
    def put_xorb(self, name: str) -> None:
        self._check_xet_token()
        self._receive(self.hub.xet.folder / name)
        self.send(200, {"was_inserted": True})

    @route("POST", "/(?:v1/)?shards")
    def put_shard(self) -> None:
        self._check_xet_token()
        self.hub.xet.add_shard(self.body())
        self.send(200, {"result": 1})

    @route("GET", "/v[12]/reconstructions/{hash}")
    def reconstruction(self, name: str) -> None:
        self._check_xet_token()
        if self.path.startswith("/v2") or name not in self.hub.xet.files:
            raise Refused(404, "not found")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        first, last = (int(asked[1]), int(asked[2])) if asked else (0, sys.maxsize)
        if asked and first >= self.hub.xet.size(name):
            raise Refused(416, "beyond the end")
        self.send(200, self.hub.xet.reconstruction(name, first, last, self.hub.storage_url))

    @route("GET", "/xorbs/{hash}")
    def get_xorb(self, name: str) -> None:
        self.send_file(self.hub.xet.folder / name)


@dataclass(frozen=True)
class Term:
    """A run of chunks of a xorb that makes up `size` bytes of a file."""

    xorb: str
    size: int
    first: int
    end: int


class XetStore:
    """Xorbs as they came, and from the shards which of their chunks make up which file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, list[Term]] = {}
        self.by_sha256: dict[str, str] = {}

    def size(self, name: str) -> int:
        return sum(term.size for term in self.files[name])

    def add_shard(self, shard: bytes) -> None:
        """Reads the file section of a shard: behind a header of 48 bytes, records of 48 bytes."""
        records = (shard[start : start + 48] for start in range(48, len(shard), 48))
        for header in records:
            if header[:32] == b"\xff" * 32:
                return
            flags, count = struct.unpack_from("<II", header, 32)
            terms = []
            for record in (next(records) for _ in range(count)):
                size, first, end = struct.unpack_from("<III", record, 36)
                terms.append(Term(_hash(record), size, first, end))
            if flags & 1 << 31:
                for _ in range(count):
                    next(records)
            name = _hash(header)
            self.files[name] = terms
            if flags & 1 << 30:
                self.by_sha256[_hash(next(records))] = name

    def reconstruction(self, name: str, first: int, last: int, url: str) -> dict:
        """The runs of chunks that hold these bytes of a file, and where to get them."""
        terms, places, position, skipped = [], {}, 0, None
        for term in self.files[name]:
            if position + term.size > first and position <= last:
                skipped = first - position if skipped is None else skipped
                terms.append(term)
                ends = self._chunk_ends(term.xorb)
                begin = ends[term.first - 1] if term.first else 0
                place = {"range": {"start": term.first, "end": term.end}, "url": f"{url}/xorbs/{term.xorb}"}
                place["url_range"] = {"start": begin, "end": ends[term.end - 1] - 1}
                if place not in places.setdefault(term.xorb, []):
                    places[term.xorb].append(place)
            position += term.size
        listed = [
            {"hash": term.xorb, "unpacked_length": term.size, "range": {"start": term.first, "end": term.end}}
            for term in terms
        ]
        return {"offset_into_first_range": skipped or 0, "terms": listed, "fetch_info": places}

    def _chunk_ends(self, xorb: str) -> list[int]:
        """Where the chunks of a xorb end: each has a header of 8 bytes, with its packed size in the second to fourth."""
        ends, position = [], 0
        data = (self.folder / xorb).read_bytes()
        while position + 8 <= len(data) and data[position] == 0:
            position += 8 + int.from_bytes(data[position + 1 : position + 4], "little")
            ends.append(position)
        return ends


def _hash(record: bytes) -> str:
    """The 32 bytes at the start of a record as Xet writes them: four little-endian numbers in hex."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", record))


def main() -> None:
    server = HubServer(Path(sys.argv[1]), port=int(os.environ.get("PORT", "0")))
    print(f"HF_ENDPOINT={server.url} HF_TOKEN={WRITER}", flush=True)
    with contextlib.suppress(KeyboardInterrupt), server:
        threading.Event().wait()


if __name__ == "__main__":
    main()
