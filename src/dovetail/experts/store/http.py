"""Task experts on an HTTP server: the .dvt files and the index.json of a folder (`backends.write_index`).

Nothing that the server sends is trusted. Sizes are checked before a body is read, a body is read to its declared length
at most and into a private temporary file, and the connection is shut down when the time limit is reached, also while
headers or trailers are read.
"""

from __future__ import annotations

import hashlib
import io
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

import httpx

from dovetail.errors import LoadError
from dovetail.experts import expert as experts
from dovetail.experts.expert import Expert
from dovetail.experts.store.backends import INDEX, SUFFIX, Entry, Index, Stamp, good_name
from dovetail.files import parse_json

_INDEX_NBYTES, _MIB = 1 << 24, 1 << 20
_PAUSE = 0.2  # seconds before the first retry; doubled before each further one
_TRANSIENT = (429, 500, 502, 503, 504)
_MAX_REDIRECTS = 10
_REDIRECTS = {("http", "http"), ("http", "https"), ("https", "https")}


class HttpFolder:
    """A folder on a server. The index is read once, and again by `refresh`.

    timeout     seconds to wait for a connection and for the next bytes, and for a whole body, each MiB of it
    max_nbytes  the largest expert file that is downloaded
    retries     how often a download is repeated after a transient failure: no connection, a timeout, a body that ends
                early, a busy server
    """

    def __init__(self, url: str, *, timeout: float, max_nbytes: int, retries: int) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            rule = "a store must be a folder or an address http://HOST/PATH or https://HOST/PATH"
            raise LoadError(url[:300], found="not such an address", rule=rule, fix="correct the address")
        self.url, self.timeout, self.max_nbytes, self.retries = url.rstrip("/"), timeout, max_nbytes, retries
        self._closed = threading.Event()
        self._connections: set[_Connection] = set()  # of the downloads in progress
        self._tls = ssl.create_default_context()
        self.refresh()

    def refresh(self) -> None:
        """Read the index again."""
        where, text = f"{self.url}/{INDEX}", io.BytesIO()
        self._download(where, None, text)
        rule, fix = "the file must be an index of experts", "run `dovetail experts index FOLDER` on the server"
        self._entries = parse_json(where, text.getvalue(), Index, rule=rule, fix=fix).experts

    def names(self) -> list[str]:
        return sorted(self._entries)

    def stamp(self, name: str) -> Stamp:
        entry = self._entry(name)
        return entry.nbytes, entry.sha256

    def read(self, name: str) -> tuple[Expert, int]:
        entry = self._entry(name)
        where = f"{self.url}/{quote(name + SUFFIX, safe='')}"
        if entry.nbytes > self.max_nbytes:
            found, rule = f"{entry.nbytes} bytes in the index", f"a file may have at most {self.max_nbytes} bytes"
            raise LoadError(where, found=found, rule=rule, fix="pass a larger max_nbytes")
        with tempfile.TemporaryDirectory(prefix="dovetail-expert-") as folder:
            path = Path(folder, "expert")
            with open(path, "wb") as file:
                sha256 = self._download(where, entry.nbytes, file)
            if entry.sha256 not in (None, sha256):
                found, rule = f"SHA-256 {sha256}", "the file must have the SHA-256 that the index declares"
                raise LoadError(where, found=found, rule=rule, fix="call refresh() if the file was replaced")
            return experts.load(path), entry.nbytes

    def close(self) -> None:
        self._closed.set()
        for connection in list(self._connections):
            connection.cut()

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(good_name(name))
        if entry is None:
            rule, fix = "the index must list the expert", "call refresh() if the expert is new"
            raise LoadError(self.url, found=f"no expert {name}", rule=rule, fix=fix)
        return entry

    def _download(self, where: str, nbytes: int | None, file: IO[bytes]) -> str:
        """Write the body, of `nbytes` bytes if they are known, and return its SHA-256. Raise only LoadError."""
        for attempt in range(self.retries + 1):
            file.seek(0)
            file.truncate()
            try:
                return self._body(where, nbytes, file)
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
                if attempt == self.retries:
                    found, rule = f"{type(error).__name__}: {error}"[:300], "the server must send the complete file"
                    raise LoadError(where, found=found, rule=rule, fix="check the address and the server") from None
            if self._closed.wait(_PAUSE * 2**attempt):
                raise _was_closed(where)
        raise AssertionError

    def _body(self, where: str, nbytes: int | None, file: IO[bytes]) -> str:
        limit = _INDEX_NBYTES if nbytes is None else nbytes
        start, digest, done = time.monotonic(), hashlib.sha256(), 0
        with self._response(where, self.timeout * (1 + limit / _MIB)) as response:
            declared = response.headers.get("Content-Length")  # digits: httpx has checked it
            if declared is not None and int(declared) not in (range(limit + 1) if nbytes is None else (nbytes,)):
                rule = f"at most {limit} bytes" if nbytes is None else f"the index declares {nbytes} bytes"
                raise LoadError(where, found=f"{declared} bytes declared", rule=rule, fix="call refresh()")
            size = _MIB if nbytes is None and declared is None else int(declared or limit)
            seconds = self.timeout * (1 + size / _MIB)
            for chunk in response.iter_raw():
                done += len(chunk)
                if done > limit:
                    raise LoadError(where, found="more bytes than declared", rule=f"at most {limit} bytes",
                                    fix="call refresh()")  # fmt: skip
                if self._closed.is_set():
                    raise _was_closed(where)
                if time.monotonic() - start > seconds:
                    raise TimeoutError(f"{done} bytes in {seconds:.1f} seconds")
                digest.update(chunk)
                file.write(chunk)
        if nbytes is not None and done != nbytes:
            raise ConnectionError(f"{done} of {nbytes} bytes")
        return digest.hexdigest()

    @contextmanager
    def _response(self, where: str, seconds: float) -> Iterator[httpx.Response]:
        """Open a response with status 200 and an unread body. `close` and a timer shut its connection down."""
        connection = _Connection()
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), connection.cut)
        timer.daemon = True
        timer.start()
        self._connections.add(connection)
        headers, extensions = {"Accept-Encoding": "identity"}, {"trace": connection.trace}
        try:
            if self._closed.is_set():
                raise _was_closed(where)
            with (
                httpx.Client(verify=self._tls, timeout=self.timeout, headers=headers) as client,
                closing(_follow(client, client.build_request("GET", where, extensions=extensions))) as response,
            ):
                yield response
        except httpx.HTTPError:
            if not connection.is_cut:
                raise
        finally:
            timer.cancel()
            self._connections.discard(connection)
        if connection.is_cut:
            raise TimeoutError(f"not complete within {seconds:.1f} seconds")


class _Connection:
    """The socket of a download, which other threads may shut down."""

    def __init__(self) -> None:
        self._lock, self._socket, self.is_cut = threading.Lock(), None, False

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Take each new socket: of the first connection, after its TLS handshake, and after a redirect."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
            if self.is_cut:
                self.cut()

    def cut(self) -> None:
        """Shut the socket down. A thread that reads from it sees the end of the stream."""
        with self._lock, suppress(OSError):
            self.is_cut = True
            if self._socket is not None:
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # below TLS, which another thread uses


def _follow(client: httpx.Client, request: httpx.Request) -> httpx.Response:
    """Send a request and follow redirects to http and https, never from https to http. No redirect's body is read."""
    where = str(request.url)
    for _ in range(_MAX_REDIRECTS + 1):
        response = client.send(request, stream=True)
        target = response.next_request
        if target is None:
            break
        response.close()
        if (request.url.scheme, target.url.scheme) not in _REDIRECTS:
            rule = "redirects must lead to https, or from http to http"
            raise LoadError(where, found=f"a redirect to {target.url}"[:300], rule=rule, fix="correct the server")
        request = target
    else:
        rule = f"at most {_MAX_REDIRECTS} redirects are followed"
        raise LoadError(where, found=f"a further redirect to {request.url}"[:300], rule=rule, fix="correct the server")
    status, encoding = response.status_code, response.headers.get("Content-Encoding", "identity")
    if status == 200 and encoding == "identity":
        return response
    response.close()
    if status in _TRANSIENT:
        raise ConnectionError(f"status {status}")
    found = f"status {status}, content encoding {encoding}"[:300]
    rule = "the server must answer with status 200 and send the file without content encoding"
    raise LoadError(where, found=found, rule=rule, fix="correct the server")


def _was_closed(where: str) -> LoadError:
    return LoadError(where, found="a closed store", rule="the store must be open", fix="open another Store")
