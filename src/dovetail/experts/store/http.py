"""Experts on an HTTP server: a folder's .dvt files and its index.json (`places.write_index`), served by anything.

Nothing that a server says is trusted: sizes are checked before anything is read, a body is read to its declared length
and no further, to a file that nobody else sees and that is gone afterwards; and whatever it sends instead, headers
without end for one, the connection is cut when the time is up.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import socket
import ssl
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

import pydantic

from dovetail.errors import LoadError
from dovetail.experts import expert as experts
from dovetail.experts.expert import Expert
from dovetail.experts.store.folder import INDEX, SUFFIX, Entry, Index, Stamp, good_name

_INDEX_NBYTES, _CHUNK, _MIB = 1 << 24, 1 << 18, 1 << 20
_PAUSE = 0.2  # seconds before the first retry; twice as long before each further one
_PASSING = (429, 500, 502, 503, 504)


class Web:
    """A folder on a server. The index is read once, and again by `refresh`.

    timeout     seconds to wait for a connection and for the next bytes; and for a whole body, each MiB of it
    max_nbytes  the largest expert that is downloaded
    retries     how often a download is begun again after a failure that may pass: no connection, a timeout, a body
                that ends early, a busy server
    """

    def __init__(self, url: str, *, timeout: float, max_nbytes: int, retries: int) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise LoadError(url[:300], found="no such address", rule="a store is a folder, http://… or https://…")
        self.url, self.timeout, self.max_nbytes, self.retries = url.rstrip("/"), timeout, max_nbytes, retries
        self._closed = threading.Event()
        self._lines: dict[int, _Line] = {}  # by thread, of what is under way
        self._opener = urllib.request.OpenerDirector()  # build_opener's would open files and FTP, too
        for handler in (
            urllib.request.ProxyHandler(),
            _Connections(self._connected),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _Redirects(),
        ):
            self._opener.add_handler(handler)
        self.refresh()

    def refresh(self) -> None:
        """Reads the index again."""
        where, text = f"{self.url}/{INDEX}", io.BytesIO()
        self._download(where, None, text)
        try:
            self._entries = Index.model_validate_json(text.getvalue()).experts
        except pydantic.ValidationError as error:
            first = error.errors(include_input=False)[0]
            found = f"{'.'.join(map(str, first['loc']))[:200]}: {first['msg'][:200]}"
            fix = "Store.write_index(folder), there"
            raise LoadError(where, found=found, rule="an index of experts", fix=fix) from None

    def names(self) -> list[str]:
        return sorted(self._entries)

    def stamp(self, name: str) -> Stamp:
        entry = self._entry(name)
        return entry.nbytes, entry.sha256

    def read(self, name: str) -> tuple[Expert, int]:
        entry = self._entry(name)
        where = f"{self.url}/{quote(name + SUFFIX, safe='')}"
        if entry.nbytes > self.max_nbytes:
            rule = f"at most {self.max_nbytes} (max_nbytes)"
            raise LoadError(where, found=f"{entry.nbytes} bytes, says the index", rule=rule)
        with tempfile.TemporaryDirectory(prefix="dovetail-expert-") as folder:
            path = Path(folder, "expert")
            with open(path, "wb") as file:
                sha256 = self._download(where, entry.nbytes, file)
            if entry.sha256 not in (None, sha256):
                fix = "refresh(), if it was changed there"
                raise LoadError(where, found=f"bytes of SHA-256 {sha256}", rule="the index says another", fix=fix)
            return experts.load(path), entry.nbytes

    def close(self) -> None:
        self._closed.set()
        for line in list(self._lines.values()):
            line.cut()

    def _connected(self, connection: socket.socket) -> None:
        self._lines[threading.get_ident()].take(connection)

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(good_name(name))
        if entry is None:
            raise LoadError(self.url, found=f"no expert {name}", rule="the index names all", fix="refresh()")
        return entry

    def _download(self, where: str, nbytes: int | None, file: IO[bytes]) -> str:
        """Writes what is there, `nbytes` where they are known, and returns its SHA-256. LoadError, whatever happens."""
        for left in reversed(range(self.retries + 1)):
            try:
                file.seek(0)
                file.truncate()
                return self._in_time(where, nbytes, file)
            except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
                passing = not isinstance(error, urllib.error.HTTPError) or error.code in _PASSING
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                if not left or not passing:
                    found, rule = f"{type(error).__name__}: {error}"[:300], "the server gives the whole file"
                    raise LoadError(where, found=found, rule=rule) from None
            if self._closed.wait(_PAUSE * 2 ** (self.retries - left)):
                raise self._was_closed(where)
        raise AssertionError

    def _in_time(self, where: str, nbytes: int | None, file: IO[bytes]) -> str:
        """`_body`, whose connection is cut when it takes too long, or by `close`, wherever it then waits."""
        seconds = self.timeout * (1 + (_INDEX_NBYTES if nbytes is None else nbytes) / _MIB)
        line = self._lines[threading.get_ident()] = _Line()
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), line.cut)
        timer.daemon = True
        timer.start()
        try:
            if self._closed.is_set():
                raise self._was_closed(where)
            digest = self._body(where, nbytes, file)
            if line.is_cut:
                raise TimeoutError(f"not whole in {seconds:.1f} seconds")
            return digest
        finally:
            timer.cancel()
            del self._lines[threading.get_ident()]

    def _body(self, where: str, nbytes: int | None, file: IO[bytes]) -> str:
        most = _INDEX_NBYTES if nbytes is None else nbytes
        start = time.monotonic()
        request = urllib.request.Request(where, headers={"Accept-Encoding": "identity"})
        digest, done = hashlib.sha256(), 0
        with self._opener.open(request, timeout=self.timeout) as response:
            declared = _declared(response.headers, where)
            if response.status != 200 or response.headers.get("Content-Encoding", "identity") != "identity":
                found = f"status {response.status}, {response.headers.get('Content-Encoding', 'identity')}"
                raise LoadError(where, found=found[:300], rule="status 200, and the bytes as they are")
            if declared is not None and (declared > most or (nbytes is not None and declared != nbytes)):
                rule = f"at most {most}" if nbytes is None else f"{nbytes}, says the index"
                raise LoadError(where, found=f"{declared} bytes declared", rule=rule, fix="refresh()")
            whole = declared if nbytes is None else nbytes
            seconds = self.timeout * (1 + (_MIB if whole is None else whole) / _MIB)
            while chunk := response.read1(min(_CHUNK, most + 1 - done)):
                done += len(chunk)
                if done > most:
                    raise LoadError(where, found="a body that goes on", rule=f"at most {most} bytes", fix="refresh()")
                if self._closed.is_set():
                    raise self._was_closed(where)
                if time.monotonic() - start > seconds:
                    raise TimeoutError(f"{done} bytes in {seconds:.1f} seconds")
                digest.update(chunk)
                file.write(chunk)
        if whole is not None and done != whole:
            raise ConnectionError(f"{done} of {whole} bytes")
        return digest.hexdigest()

    def _was_closed(self, where: str) -> LoadError:
        return LoadError(where, found="a store that was closed", rule="an open one downloads")


class _Line:
    """The connection of a download, which other threads may cut."""

    def __init__(self) -> None:
        self._lock, self._connection, self.is_cut = threading.Lock(), None, False

    def take(self, connection: socket.socket) -> None:
        """Another connection: the first, or one that a redirect led to."""
        with self._lock:
            self._connection = connection
        if self.is_cut:
            self.cut()

    def cut(self) -> None:
        """Whoever reads from it comes to its end."""
        with self._lock, suppress(OSError):
            self.is_cut = True
            if self._connection is not None:
                socket.socket.shutdown(self._connection, socket.SHUT_RDWR)  # below TLS, which another thread uses


class _Told(http.client.HTTPConnection):
    """Tells of its socket as soon as there is one."""

    def __init__(self, *arguments: Any, tell: Callable[[socket.socket], None], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._tell = tell

    def connect(self) -> None:
        super().connect()
        self._tell(self.sock)


class _ToldSecure(_Told, http.client.HTTPSConnection):
    pass


class _Connections(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens http and https, and tells of each socket."""

    def __init__(self, tell: Callable[[socket.socket], None]) -> None:
        self._tell, self._tls = tell, ssl.create_default_context()
        super().__init__(context=self._tls)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Told, tell=self._tell), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_ToldSecure, tell=self._tell, context=self._tls), req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To http and https alone, and never from https to http. What comes with a redirect isn't read."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        fp.close()  # urllib would read it to its end, which may never come
        if (urlsplit(req.full_url).scheme, urlsplit(newurl).scheme) not in _LEADS:
            rule = "redirects lead to https, or from http to http"
            raise LoadError(req.full_url, found=f"a redirect to {newurl}"[:300], rule=rule)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_LEADS = {("http", "http"), ("http", "https"), ("https", "https")}


def _declared(headers: Message, where: str) -> int | None:
    text = headers.get("Content-Length")
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise LoadError(where, found=f"Content-Length {text!r}"[:200], rule="a number of bytes")
    return None if text is None else int(text)
