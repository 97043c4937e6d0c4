"""Git LFS: the batch endpoint of the API. Bytes go to `hub_storage`."""

from __future__ import annotations

import hashlib

from hub_http import Handler, Refused, router


class LfsHandler(Handler):
    """The part of the API that large files go through without Xet."""

    routes, route = router()

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
