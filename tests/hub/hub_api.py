"""The API of the Hub: users, repositories, commits, pull requests, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from urllib.parse import parse_qs

from hub_http import Refused, router
from hub_lfs import LfsHandler
from hub_repos import Commit, File, Repo, User, blob_id, large_file, small_file


class HubHandler(LfsHandler):
    """The API."""

    routes, route = router(LfsHandler.routes)

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
