"""Limits on what a Hub can make huggingface_hub do: where the token goes, how long it waits, how much it reads.

huggingface_hub has one factory for its HTTP clients: httpx from 1.0 on, requests before. `install` wraps it once, so
that each client asks the `Limits` that are in force. Outside of `limits` nothing changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from bsa_export.errors import HubError

LONGEST_WAIT = 600.0  # seconds that the waits of one call take in all
MOST_ANSWERS = 1000  # to the requests of one call, in addition to 10 for each file: a page of a listing has 1,000 files
LARGEST_ANSWER = 64 << 20  # bytes of the answers of one call, without the files it asks for
_PORTS = {"http": 80, "https": 443}
_WAIT_HEADERS = ("ratelimit", "retry-after")


class Limits:
    """What one call of this program may cost.

    Args:
        sizes: bytes of each file that it asks for, as they are listed. Repetitions may double them.
    """

    def __init__(self, sizes: Collection[int] = ()):
        self.left = 2 * sum(sizes) + LARGEST_ANSWER
        self.largest = max(sizes, default=None)
        self.answers = MOST_ANSWERS + 10 * len(sizes)
        self.waits = LONGEST_WAIT
        self.lock = threading.Lock()

    def count(self, nbytes: int) -> None:
        """Counts bytes that arrived. Raises HubError when there are too many."""
        with self.lock:
            self.left -= nbytes
            if self.left < 0:
                raise HubError("the Hub sends more bytes than it lists", hint="check HF_ENDPOINT")

    def answered(self, url: str, status: int, headers: Any) -> None:
        """Looks at an answer before its body is read; takes out headers that ask for too long a wait.

        Raises:
            HubError: it is not an answer of a Hub, is too large, or one of endlessly many.
        """
        with self.lock:
            self.answers -= 1
            if self.answers < 0:
                raise HubError("the Hub's listing does not end", hint="check HF_ENDPOINT")
            for name in _WAIT_HEADERS:
                if name in headers and not self._may_wait(headers[name]):
                    del headers[name]
        if origin(url) != endpoint_origin():
            return
        if (
            status == 200
            and "text/html" in headers.get("content-type", "")
            and not urlsplit(url).path.endswith(".html")
        ):
            raise HubError(
                "a web page came instead of an answer of the Hub",
                hint="a login page of the network or a proxy may be in between; check HF_ENDPOINT too",
            )
        if headers.get("content-encoding", "identity") != "identity":  # could be endless once it is unpacked
            raise HubError("the Hub sends a compressed answer that was not asked for", hint="check HF_ENDPOINT")
        for name in ("x-xet-refresh-route", "link"):
            for address in _addresses(headers.get(name, "")):
                if address.startswith("http") and origin(address) != endpoint_origin():
                    raise HubError(
                        "the Hub redirects to another origin", found=origin(address), hint="check HF_ENDPOINT"
                    )
        size = headers.get("x-linked-size", "")
        if size.isascii() and size.isdecimal() and self.largest is not None and int(size[:20]) > self.largest:
            raise HubError("the Hub sends a file larger than it lists", found=f"{size[:20]} bytes")

    def _may_wait(self, header: str) -> bool:
        seconds = max((float(part) for part in _numbers(header)), default=LONGEST_WAIT)
        if seconds > self.waits:
            return False
        self.waits -= seconds
        return True


_in_force: list[Limits] = []


@contextmanager
def limits(sizes: Collection[int] = ()) -> Iterator[Limits]:
    """Puts limits in force for huggingface_hub's HTTP clients, in all threads: downloads run in several."""
    install()
    mine = Limits(sizes)
    _in_force.append(mine)
    try:
        yield mine
    finally:
        _in_force.remove(mine)


def install() -> None:
    """Wraps huggingface_hub's current factory of HTTP clients, whoever set it. Does so once."""
    from huggingface_hub.utils import _http

    http: Any = _http
    if hasattr(http, "set_client_factory"):
        if not hasattr(http._GLOBAL_CLIENT_FACTORY, "is_guarded"):
            http.set_client_factory(_factory(http._GLOBAL_CLIENT_FACTORY, _guarded_httpx))
    elif not hasattr(http._GLOBAL_BACKEND_FACTORY, "is_guarded"):
        http.configure_http_backend(_factory(http._GLOBAL_BACKEND_FACTORY, _guarded_requests))


def _factory(make: Callable[[], Any], guarded: Callable[[Any], Any]) -> Callable[[], Any]:
    def factory() -> Any:
        return guarded(make())

    factory.is_guarded = True  # type: ignore[attr-defined]
    return factory


def origin(url: str) -> str:
    """Scheme, host and port of an address."""
    parts = urlsplit(url)
    try:
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        port = None
    return f"{parts.scheme}://{parts.hostname}:{port}"


def endpoint_origin() -> str:
    """The origin of the Hub: the only one that the token is sent to."""
    from huggingface_hub import constants

    return origin(constants.ENDPOINT)


def _prepare(url: str, headers: Any) -> None:
    """Takes the token out of a request to another origin than the Hub's; asks the Hub for plain answers."""
    if not _in_force:
        return
    if origin(url) == endpoint_origin():
        headers["accept-encoding"] = "identity"
    elif "authorization" in headers:
        del headers["authorization"]


def _guarded_httpx(client: Any) -> Any:
    def on_request(request: Any) -> None:
        _prepare(str(request.url), request.headers)

    def on_response(response: Any) -> None:
        for mine in _in_force[-1:]:
            mine.answered(str(response.request.url), response.status_code, response.headers)
            response.stream = _counted_stream(response.stream, mine)

    hooks = client.event_hooks
    client.event_hooks = {"request": [*hooks["request"], on_request], "response": [*hooks["response"], on_response]}
    return client


def _counted_stream(stream: Any, mine: Limits) -> Any:
    """A body of httpx, which must stay an instance of the class that httpx looks for."""

    class Counted(type(stream)):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def __iter__(self) -> Iterator[bytes]:
            for piece in stream:
                mine.count(len(piece))
                yield piece

        def close(self) -> None:
            stream.close()

    return Counted()


def _guarded_requests(session: Any) -> Any:
    send = session.send

    def guarded_send(request: Any, **options: Any) -> Any:
        _prepare(request.url, request.headers)
        return send(request, **options)

    def on_response(response: Any, **_: Any) -> None:
        for mine in _in_force[-1:]:
            mine.answered(response.url, response.status_code, response.headers)
            response.raw.stream = _counted_pieces(response.raw.stream, mine)

    session.send = guarded_send
    session.hooks["response"].append(on_response)
    return session


def _counted_pieces(stream: Callable[..., Iterator[bytes]], mine: Limits) -> Callable[..., Iterator[bytes]]:
    def counted(*arguments: Any, **options: Any) -> Iterator[bytes]:
        for piece in stream(*arguments, **options):
            mine.count(len(piece))
            yield piece

    return counted


def _addresses(header: str) -> Iterator[str]:
    """The addresses in a Link header, or the only one in another."""
    if "<" not in header:
        yield header.strip()
    for part in header.split("<")[1:]:
        yield part.partition(">")[0].strip()


def _numbers(header: str) -> Iterator[str]:
    """The seconds in `Retry-After: 5` or `RateLimit: "api";r=0;t=55`; none in one that names a date."""
    if header.strip().isdecimal():
        yield header.strip()[:20]
    for part in header.replace(",", ";").split(";"):
        name, _, value = part.strip().partition("=")
        if name.strip() == "t" and value.strip().isdecimal():
            yield value.strip()[:20]
