"""The other origin: bytes of LFS objects, and Xet's content-addressed storage (https://huggingface.co/docs/xet)."""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from pathlib import Path

from hub_http import Handler, Refused, router


class StorageHandler(Handler):
    """Bytes: LFS objects, and the content-addressed storage of Xet (https://huggingface.co/docs/xet)."""

    routes, route = router()

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
