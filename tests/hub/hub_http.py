"""HTTP of both origins: finds the route, does the fault, answers, counts bytes."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from hub_faults import Answer, Corrupt, Cut, Endless, First, Gone, Headers, LoseAnswer, Redirect, Slow, Status

if TYPE_CHECKING:
    from hub_server import HubServer

PIECE = 1 << 18


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
            case Answer(content, kind, code, headers):
                return self.send(code, content, {"Content-Type": kind} | headers)
            case Endless():
                return self.send_endless(self.fault)
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
        if isinstance(self.fault, Headers):
            headers = headers | self.fault.more
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

    def send_endless(self, what: Endless) -> None:
        self.start(200, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"} | what.headers)
        while self.command != "HEAD":
            self.wfile.write(b"%x\r\n%s\r\n" % (len(what.piece), what.piece))

    def refuse(self, answer: Status) -> None:
        headers = {"X-Error-Message": answer.message}
        if answer.error_code:
            headers["X-Error-Code"] = answer.error_code
        self.send(answer.code, {"error": answer.message}, headers)


def router(inherited: list = ()):
    """The routes of a handler, after those it inherits, and the decorator that adds one."""
    routes: list[tuple[str, re.Pattern, Callable]] = list(inherited)

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
