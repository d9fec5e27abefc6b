"""Experts on an HTTP server: a folder's .dvt files and its index.json (`places.write_index`), served by anything.

Nothing that a server says is trusted: sizes are checked before anything is read, a body is read to its declared length
and no further, in a bounded time, to a file that nobody else sees and that is gone afterwards.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import tempfile
import threading
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit

import pydantic

from dovetail.errors import LoadError
from dovetail.experts import expert as experts
from dovetail.experts.expert import Expert
from dovetail.experts.places import INDEX, SUFFIX, Entry, Index, Stamp, good_name

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
        self._opener = urllib.request.OpenerDirector()  # build_opener's would open files and FTP, too
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
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
                return self._body(where, nbytes, file)
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


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To http and https alone, and never from https to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if (urlsplit(req.full_url).scheme, urlsplit(newurl).scheme) not in _LEADS:
            rule = "redirects lead to https, or from http to http"
            fp.close()
            raise LoadError(req.full_url, found=f"a redirect to {newurl}"[:300], rule=rule)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_LEADS = {("http", "http"), ("http", "https"), ("https", "https")}


def _declared(headers: Message, where: str) -> int | None:
    text = headers.get("Content-Length")
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise LoadError(where, found=f"Content-Length {text!r}"[:200], rule="a number of bytes")
    return None if text is None else int(text)
