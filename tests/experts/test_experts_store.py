"""Stores of experts: within their budget, whole or refused, whatever threads, disks and servers do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn

from dovetail import experts
from dovetail.errors import DataError, LoadError
from dovetail.experts.store.store import Store

NAMES = [f"expert-{number}" for number in range(12)]


def make(seed: int) -> experts.Expert:
    generator = torch.Generator().manual_seed(seed)
    return experts.compress({"weight": torch.randn(40, 50, generator=generator)}, 0.05)


@pytest.fixture(scope="module")
def made() -> dict[str, experts.Expert]:
    return {name: make(seed) for seed, name in enumerate(NAMES)}


@pytest.fixture
def folder(made: dict[str, experts.Expert], tmp_path: Path) -> Path:
    path = tmp_path / "experts"
    path.mkdir()
    for name, expert in made.items():
        expert.save(path / f"{name}.dvt")
    return path


def equal(one: experts.Expert, other: experts.Expert) -> bool:
    return one.header == other.header and torch.equal(one.dense()["weight"], other.dense()["weight"])


# Folders.


def test_budget_and_order(folder: Path, made: dict[str, experts.Expert]) -> None:
    (folder / "notes.txt").write_text("not an expert")
    (folder / "deeper.dvt").mkdir()
    size = max(path.stat().st_size for path in folder.glob("expert*.dvt"))
    with Store(folder, 3 * size + 3) as store:
        assert store.names() == sorted(NAMES)
        for name in NAMES[:3]:
            assert equal(store.get(name), made[name])
        assert store.get(NAMES[0]) is store.get(NAMES[0])  # now NAMES[1] is the one asked for longest ago
        store.get(NAMES[3])
        loads = store.stats().loads
        store.get(NAMES[0])
        store.get(NAMES[2])
        assert store.stats().loads == loads
        store.get(NAMES[1])
        stats = store.stats()
        assert (stats.loads, stats.misses, stats.hits, stats.evictions, stats.held) == (5, 5, 4, 2, 3)
        assert stats.nbytes <= stats.budget_nbytes
        assert stats.hit_rate == 4 / 9
        assert stats.load_seconds > 0
    with pytest.raises(LoadError, match="closed"):
        store.get(NAMES[0])
    with pytest.raises(LoadError, match="closed"):
        store.prefetch(NAMES[0])


def test_larger_than_the_budget_is_used_but_not_kept(folder: Path, made: dict[str, experts.Expert]) -> None:
    with Store(folder, 10) as store:
        assert equal(store.get(NAMES[0]), made[NAMES[0]])
        assert equal(store.get(NAMES[0]), made[NAMES[0]])
        assert (store.stats().loads, store.stats().held, store.stats().evictions) == (2, 0, 0)


@pytest.mark.parametrize(
    "name", ["../expert-0", "a/b", "a\\b", "", ".hidden", "c:x", "a\x00b", "x" * 201, "..", "nowhere"]
)
def test_names_stay_in_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "expert-0.dvt").write_bytes((folder / "expert-0.dvt").read_bytes())
    with Store(folder, 1 << 20) as store, pytest.raises(LoadError):
        store.get(name)


def test_what_can_not_be_a_store(folder: Path) -> None:
    for place in (
        folder / "nowhere",
        folder / "expert-0.dvt",
        "ftp://localhost/x",
        "file:///tmp",
        "http://",
        "http://h/?q",
    ):
        with pytest.raises(LoadError):
            Store(place, 1)
    with pytest.raises(DataError, match="budget_nbytes"):
        Store(folder, -1)
    with pytest.raises(DataError, match="timeout"):
        Store(folder, 1, timeout=0)


def test_changed_files_are_noticed(folder: Path, made: dict[str, experts.Expert]) -> None:
    with Store(folder, 1 << 20) as store:
        store.get("expert-0")
        made["expert-1"].save(folder / "expert-0.dvt")
        assert equal(store.get("expert-0"), made["expert-1"])
        (folder / "expert-0.dvt").unlink()
        with pytest.raises(LoadError, match="expert-0"):
            store.get("expert-0")
        shutil.copy(folder / "expert-2.dvt", folder / "expert-0.dvt")
        assert equal(store.get("expert-0"), made["expert-2"])
        assert store.stats().nbytes == (folder / "expert-0.dvt").stat().st_size


def test_damaged_files_are_refused_before_anyone_sees_them(folder: Path, made: dict[str, experts.Expert]) -> None:
    path = folder / "expert-0.dvt"
    whole = path.read_bytes()
    random = Random(0)
    with Store(folder, 1 << 20) as store:
        for number in range(60):
            damaged = bytearray(whole)
            if number % 3:
                damaged[random.randrange(len(whole) // 2 if number % 2 else len(whole))] ^= 1 << random.randrange(8)
            else:
                del damaged[random.randrange(len(whole)) :]
            path.write_bytes(damaged)
            try:
                assert equal(store.get("expert-0"), made["expert-0"])  # what no check covers: JSON's white space
            except LoadError:
                assert store.stats().held == 0
        path.write_bytes(whole)
        os.utime(path, ns=(1, 1))
        assert equal(store.get("expert-0"), made["expert-0"])


def test_wrong_base(folder: Path) -> None:
    base, other = nn.Linear(4, 4), nn.Linear(4, 4)
    made = experts.compress({"weight": torch.randn(4, 4)}, 0.5, base=base, origin=experts.Origin("base"))
    made.save(folder / "of-base.dvt")
    with Store(folder, 1 << 20, base=base) as store:
        store.get("of-base")
        with pytest.raises(LoadError, match="name the base"):
            store.get("expert-0")
    with Store(folder, 1 << 20, base=other) as store, pytest.raises(LoadError, match="expert's fingerprint"):
        store.get("of-base")
    with Store(folder, 1 << 20) as store:
        with pytest.raises(LoadError, match="expert's fingerprint"):
            store.activate(other, "of-base")
        assert store.stats().swaps == 0


def test_activate(folder: Path, made: dict[str, experts.Expert]) -> None:
    model = nn.Linear(50, 40)
    before, where = model.weight.detach().clone(), model.weight.data_ptr()
    with Store(folder, 1 << 20) as store:
        for name in NAMES:
            store.activate(model, name)
            assert torch.equal(model.weight.detach(), made[name].dense()["weight"])
        assert store.stats().swaps == len(NAMES)
        assert store.stats().swap_seconds >= store.stats().load_seconds > 0
    experts.deactivate(model)
    assert torch.equal(model.weight.detach(), before)
    assert model.weight.data_ptr() == where


def test_activating_a_damaged_file_changes_nothing(folder: Path, made: dict[str, experts.Expert]) -> None:
    model, path = nn.Linear(50, 40), folder / "expert-1.dvt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    with Store(folder, 1 << 20) as store:
        before = model.weight.detach().clone()
        with pytest.raises(LoadError, match="block 0"):
            store.activate(model, "expert-1")
        assert torch.equal(model.weight.detach(), before)
        store.activate(model, "expert-0")
        with pytest.raises(LoadError, match="block 0"):
            store.activate(model, "expert-1")
        assert torch.equal(model.weight.detach(), made["expert-0"].dense()["weight"])
        assert (store.stats().loads, store.stats().swaps) == (1, 1)


def test_a_model_that_can_not_take_an_expert_is_nobody_elses_failure(folder: Path) -> None:
    with Store(folder, 1 << 20) as store, ThreadPoolExecutor(2) as pool:
        gate = Gate(store)
        wrong = pool.submit(store.activate, nn.Linear(3, 3), "expert-0")
        wait(lambda: gate.reads == 1)
        right = pool.submit(store.activate, nn.Linear(50, 40), "expert-0")
        wait(lambda: store.stats().misses == 2)
        gate.open.set()
        right.result()
        with pytest.raises(LoadError, match="shape"):
            wrong.result()
        assert (gate.reads, store.stats().swaps, store.stats().held) == (1, 1, 1)


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_prefetch(folder: Path) -> None:
    with Store(folder, 1 << 20, prefetch_threads=2) as store:
        store.prefetch(*NAMES[:5], "nowhere", NAMES[0])
        wait(lambda: store.stats().held == 5)
        for name in NAMES[:5]:
            store.get(name)
        stats = store.stats()
        assert (stats.hits, stats.misses, stats.loads, stats.prefetched) == (5, 0, 5, 5)
        with pytest.raises(LoadError):
            store.get("nowhere")


# Threads.


class Gate:
    """A backend whose reads wait, and fail when told."""

    def __init__(self, store: Store) -> None:
        self.backend, self.open, self.reads, self.fails = store._backend, threading.Event(), 0, False
        self.close, self.stamp, self.names = self.backend.close, self.backend.stamp, self.backend.names
        store._backend = self  # type: ignore[assignment]

    def read(self, name: str) -> tuple[experts.Expert, int]:
        self.reads += 1
        assert self.open.wait(60)
        if self.fails:
            raise LoadError(name, found="a failure")
        return self.backend.read(name)


def test_one_loads_and_the_others_wait(folder: Path) -> None:
    with Store(folder, 1 << 20) as store, ThreadPoolExecutor(8) as pool:
        gate = Gate(store)
        asked = [pool.submit(store.get, "expert-0") for _ in range(8)]
        wait(lambda: store.stats().misses == 8)
        gate.open.set()
        assert len({id(each.result()) for each in asked}) == 1
        assert gate.reads == 1


def test_a_failure_is_everyones_and_not_remembered(folder: Path) -> None:
    with Store(folder, 1 << 20) as store, ThreadPoolExecutor(8) as pool:
        gate = Gate(store)
        gate.fails = True
        asked = [pool.submit(store.get, "expert-0") for _ in range(8)]
        wait(lambda: store.stats().misses == 8)
        gate.open.set()
        for each in asked:
            with pytest.raises(LoadError, match="a failure"):
                each.result()
        assert gate.reads == 1
        gate.fails = False
        store.get("expert-0")
        assert store.stats().loads == 1


def test_threads_hammer_a_store(folder: Path, made: dict[str, experts.Expert]) -> None:
    """Gets, prefetches, activations, and files that change and break under way: never another expert, never half."""
    whole = {name: (folder / f"{name}.dvt").read_bytes() for name in NAMES}
    models = [nn.Linear(50, 40) for _ in range(2)]
    stop, failed = threading.Event(), []
    valid = [each.dense()["weight"] for each in made.values()]
    with Store(folder, 4 * len(whole["expert-0"]) + 50, prefetch_threads=2) as store:

        def ask(seed: int) -> None:
            random = Random(seed)
            while not stop.is_set():
                name = random.choice(NAMES)
                try:
                    if random.random() < 0.2:
                        store.prefetch(*random.sample(NAMES, 2))
                    elif random.random() < 0.3:
                        store.activate(models[seed % 2], name)
                    elif not equal(store.get(name), made[name]):
                        failed.append(name)
                except LoadError:
                    if name != "expert-3":
                        raise
                stats = store.stats()
                if stats.nbytes > stats.budget_nbytes:
                    failed.append(stats)

        with ThreadPoolExecutor(6) as pool:
            asking = [pool.submit(ask, seed) for seed in range(6)]
            end, path = time.monotonic() + 1.5, folder / "expert-3.dvt"
            while time.monotonic() < end:
                path.write_bytes(whole["expert-3"][: len(whole["expert-3"]) // 2])
                time.sleep(0.01)
                path.write_bytes(whole["expert-3"])
                time.sleep(0.01)
            stop.set()
            for each in asking:
                each.result()
    assert not failed
    for model in models:
        assert any(torch.equal(model.weight.detach(), weight) for weight in valid)


# Servers.


class Server:
    """Serves a folder, except where `answers` says how to answer a path."""

    def __init__(self, folder: Path) -> None:
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                answer = server.answers.get(self.path)
                try:
                    if answer is not None:
                        answer(self)
                        return
                    path = folder / self.path.removeprefix("/")
                    give(self, path.read_bytes()) if path.is_file() else self.send_error(404)
                except OSError:
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def give(
    handler: BaseHTTPRequestHandler, body: bytes, *, declared: object = None, status: int = 200, **headers: str
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if declared is None else declared))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("dovetail.experts.store.http._PAUSE", 0.001)
    monkeypatch.setattr("dovetail.experts.store.http._INDEX_NBYTES", 1 << 17)
    Store.write_index(folder)
    server = Server(folder)
    yield server
    server.stop()


def test_a_server(folder: Path, server: Server, made: dict[str, experts.Expert]) -> None:
    made["expert-0"].save(folder / "ä b%?#.dvt")
    Store.write_index(folder)
    assert [path.name for path in folder.iterdir() if path.name.endswith(".part")] == []
    server.answers["/%C3%A4%20b%25%3F%23.dvt"] = lambda handler: give(handler, (folder / "ä b%?#.dvt").read_bytes())
    with Store(server.url + "/", 1 << 20) as store:
        assert store.names() == sorted([*NAMES, "ä b%?#"])
        for name in (*NAMES, *NAMES):
            assert equal(store.get(name), made[name])
        assert equal(store.get("ä b%?#"), made["expert-0"])
        assert server.asked.count("/expert-0.dvt") == 1
        for name in ("nowhere", "../x", "a/b"):
            with pytest.raises(LoadError):
                store.get(name)
        made["expert-1"].save(folder / "new.dvt")
        Store.write_index(folder)
        store.refresh()
        assert equal(store.get("new"), made["expert-1"])


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(1 << 16))


def dripping(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.6)


def silent_for_long(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1)


def cut(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-")
    handler.connection.close()


def continuing(handler: BaseHTTPRequestHandler) -> None:
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)


def trailing(body: bytes, handler: BaseHTTPRequestHandler) -> None:
    start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(body), body)
    handler.wfile.write(start)
    while True:
        handler.wfile.write(b"a: b\r\n" * 100)


def redirecting(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "/nowhere")
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(1 << 16))


def dripping_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.flush_headers()
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


BAD: dict[str, Callable[[bytes, BaseHTTPRequestHandler], None]] = {
    "404": lambda body, handler: handler.send_error(404),
    "500": lambda body, handler: handler.send_error(500),
    "204": lambda body, handler: give(handler, b"", status=204),
    "206": lambda body, handler: give(handler, body, status=206),
    "truncated": lambda body, handler: give(handler, body[:-9], declared=len(body)),
    "too short": lambda body, handler: give(handler, body[:-9]),
    "too long": lambda body, handler: give(handler, body + b"x"),
    "huge": lambda body, handler: give(handler, b"", declared=1 << 50),
    "no number": lambda body, handler: give(handler, body, declared="-5"),
    "other number": lambda body, handler: give(handler, body, declared="1e3"),
    "other bytes": lambda body, handler: give(handler, bytes(len(body))),
    "encoded": lambda body, handler: give(handler, body, Content_Encoding="gzip"),
    "endless": lambda body, handler: endless(handler),
    "dripping": lambda body, handler: dripping(handler),
    "continuing": lambda body, handler: continuing(handler),
    "trailing": lambda body, handler: trailing(body, handler),
    "redirecting": lambda body, handler: redirecting(handler),
    "dripping headers": lambda body, handler: dripping_headers(handler),
    "silent": lambda body, handler: silent(handler),
    "cut": lambda body, handler: cut(handler),
    "no HTTP": lambda body, handler: (handler.wfile.write(b"hello\r\n\r\n"), None)[1],
    "file redirect": lambda body, handler: give(handler, b"", status=302, Location="file:///etc/passwd"),
    "ftp redirect": lambda body, handler: give(handler, b"", status=302, Location="ftp://127.0.0.1/x"),
    "itself": lambda body, handler: give(handler, b"", status=302, Location=handler.path),
}


@pytest.mark.parametrize("kind", BAD)
def test_servers_that_fail_or_lie(
    kind: str,
    folder: Path,
    server: Server,
    made: dict[str, experts.Expert],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    body = (folder / "expert-0.dvt").read_bytes()
    with Store(server.url, 1 << 20, timeout=0.4, retries=1) as store:
        server.answers["/expert-0.dvt"] = lambda handler: BAD[kind](body, handler)
        with pytest.raises(LoadError, match="expert-0"):
            store.get("expert-0")
        assert server.asked.count("/expert-0.dvt") <= 2 or kind == "itself"
        assert (store.stats().held, store.stats().loads) == (0, 0)
        del server.answers["/expert-0.dvt"]
        assert equal(store.get("expert-0"), made["expert-0"])
        assert not list(tmp_path.glob("dovetail-expert-*"))
    server.answers["/index.json"] = lambda handler: BAD[kind](b"{}", handler)
    with pytest.raises(LoadError, match="index"):
        Store(server.url, 1 << 20, timeout=0.4, retries=1)


def test_a_failure_that_passes_is_tried_again(folder: Path, server: Server, made: dict[str, experts.Expert]) -> None:
    def sometimes(handler: BaseHTTPRequestHandler) -> None:
        body = (folder / "expert-0.dvt").read_bytes()
        count = server.asked.count("/expert-0.dvt")
        give(handler, body[: len(body) // 2] if count < 3 else body, declared=len(body))

    server.answers["/expert-0.dvt"] = sometimes
    with Store(server.url, 1 << 20) as store:
        assert equal(store.get("expert-0"), made["expert-0"])
        assert server.asked.count("/expert-0.dvt") == 3


def test_redirects_to_http_are_followed(folder: Path, server: Server, made: dict[str, experts.Expert]) -> None:
    where = f"{server.url}/expert-1.dvt"
    size = (folder / "expert-1.dvt").stat().st_size
    index = json.loads((folder / "index.json").read_text())
    index["experts"]["moved"] = {"nbytes": size}
    (folder / "index.json").write_text(json.dumps(index))
    server.answers["/moved.dvt"] = lambda handler: give(handler, b"", status=302, Location=where)
    with Store(server.url, 1 << 20) as store:
        assert equal(store.get("moved"), made["expert-1"])


@pytest.mark.parametrize(
    "index",
    [
        b"", b"[]", b"{", b"\xff", b'{"experts": {"../x": {"nbytes": 3}}}', b'{"experts": {"x": {"nbytes": -3}}}',
        b'{"experts": {"x": {"nbytes": 1e9}}}', b'{"experts": {"x": {"nbytes": 3, "sha256": "zz"}}}',
        b'{"version": 2, "experts": {}}', b'{"experts": {"x": {"nbytes": 3, "url": "http://elsewhere"}}}',
        b"[" * 100_000,
    ],
)  # fmt: skip
def test_bad_indexes(index: bytes, server: Server) -> None:
    server.answers["/index.json"] = lambda handler: give(handler, index)
    with pytest.raises(LoadError, match="index"):
        Store(server.url, 1 << 20)


def test_sizes_are_checked_before_anything_is_read(folder: Path, server: Server) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["experts"]["expert-0"]["nbytes"] = 1 << 40
    (folder / "index.json").write_text(json.dumps(index))
    with Store(server.url, 1 << 20) as store:
        with pytest.raises(LoadError, match="max_nbytes"):
            store.get("expert-0")
        assert "/expert-0.dvt" not in server.asked


@pytest.mark.parametrize("answer", [dripping, dripping_headers, silent_for_long])
def test_closing_ends_downloads(answer: Callable[[BaseHTTPRequestHandler], None], folder: Path, server: Server) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["experts"]["expert-0"]["nbytes"] = 1 << 30
    (folder / "index.json").write_text(json.dumps(index))
    server.answers["/expert-0.dvt"] = answer
    store = Store(server.url, 1 << 20)
    store.prefetch("expert-0", "expert-1")
    wait(lambda: "/expert-0.dvt" in server.asked)
    store.close()  # waits for the downloads, of which two never end by themselves
    assert store.stats().loads == 0


def test_a_files_name_is_a_name_too_and_a_pipe_is_no_file(tmp_path: Path) -> None:
    experts.compress({"w": torch.randn(9)}, 0.5).save(tmp_path / "one.dvt")
    with experts.Store(tmp_path, budget_nbytes=1 << 20) as store:
        assert store.get("one.dvt") is store.get("one")
    os.mkfifo(tmp_path / "pipe.dvt")
    with pytest.raises(LoadError, match="regular"):
        experts.load(tmp_path / "pipe.dvt")
