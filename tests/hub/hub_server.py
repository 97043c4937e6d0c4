"""A Hugging Face Hub on loopback: repositories, branches, pull requests, Git LFS, Xet, users, and faults on request.

It answers what huggingface_hub 0.34 to 2.4 and hf_xet 1.8 send. Two origins, as on the real Hub: `url` for the API and
`storage_url` for bytes.

It needs only the standard library, and hf_xet to serve a file that came by Xet to a client without it.

    with HubServer(folder) as server:
        server.fault("POST .*/commit/", Status(503))
        ...                                             # a client with HF_ENDPOINT=server.url, HF_TOKEN=WRITER

The parts: `hub_repos` (refs and commits), `hub_lfs`, `hub_xet`, `hub_faults`, `hub_http`, `hub_api` and `hub_storage`
(the two origins).

`python tests/hub/hub_server.py FOLDER` serves until Ctrl-C. Git itself, search, quotas and rate limits are not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_api import HubHandler
from hub_faults import Gone
from hub_repos import File, Repo, User, large_file, small_file
from hub_storage import StorageHandler
from hub_xet import XetStore

WRITER, READER, OTHER = "hf_alice_writes", "hf_alice_reads", "hf_bob_writes"
JOIN = """
import sys, time, hf_xet
url, name, size, path = sys.argv[1:]
session, expires = hf_xet.XetSession(), int(time.time()) + 3600
with session.new_file_download_group(endpoint=url, token="xet-inside", token_expiry_unix_secs=expires) as group:
    group.start_download_file(hf_xet.XetFileInfo(name, int(size)), path)
"""


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
        """Does `what` to requests whose "METHOD path?query" has the pattern: `times` times, after `skip` of them."""
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
        """Drops every connection after so many bytes in both directions, until `come_up`; `then` is called once."""
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


def main() -> None:
    server = HubServer(Path(sys.argv[1]), port=int(os.environ.get("PORT", "0")))
    print(f"HF_ENDPOINT={server.url} HF_TOKEN={WRITER}", flush=True)
    with contextlib.suppress(KeyboardInterrupt), server:
        threading.Event().wait()


if __name__ == "__main__":
    main()
