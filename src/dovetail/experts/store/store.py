"""A store of many experts: the most recently used ones stay in memory, compressed, up to a budget of bytes.

    with Store("experts/", budget_nbytes=300_000_000) as store:      # or "https://…/experts"
        store.activate(model, "french")
        store.prefetch("german", "italian")

An expert takes a twentieth to a fiftieth of its adapter, so the memory of a few adapters holds a hundred experts. A
switch is one decode into the live tensors (`activate`).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from dovetail.errors import DataError, DovetailError, LoadError
from dovetail.experts.expert import Expert, verify
from dovetail.experts.live.activate import activate
from dovetail.experts.store.backends import SUFFIX, Backend, LocalFolder, Stamp, good_name, write_index
from dovetail.experts.store.http import HttpFolder
from dovetail.models.fingerprint import model_fingerprint

__all__ = ["Stats", "Store"]


@dataclass(frozen=True)
class Stats:
    """Statistics of a store.

    hits           `get`s answered from memory
    misses         other `get`s: loaded, or waited for
    loads          experts read and verified, including prefetches
    load_seconds   total time of loads
    prefetched     loads by `prefetch`
    evictions      experts dropped for others
    swaps          activations
    swap_seconds   total time of swaps, with their loads
    held, nbytes   experts in memory, and the bytes of their files
    budget_nbytes  limit of nbytes
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    prefetched: int = 0
    evictions: int = 0
    swaps: int = 0
    swap_seconds: float = 0.0
    held: int = 0
    nbytes: int = 0
    budget_nbytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of hits among all `get`s; 0 before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


@dataclass(frozen=True)
class _Held:
    expert: Expert
    nbytes: int
    stamp: Stamp


class Store:
    """Experts of a folder or server, by name, for any number of threads.

    An expert is returned only after all its blocks have been checked. If several threads request the same expert, one
    loads it; a failure is raised in all of them and not cached. A changed file is loaded again at the next request. On
    a server, changes take effect after `refresh`.
    """

    def __init__(
        self,
        place: str | Path,
        budget_nbytes: int,
        *,
        base: nn.Module | str | None = None,
        prefetch_threads: int = 1,
        timeout: float = 30.0,
        max_nbytes: int = 1 << 32,
        retries: int = 2,
    ) -> None:
        """Open a folder of .dvt files, or the URL of one with an index.json (`write_index`).

        budget_nbytes     bytes of compressed experts in memory. A larger expert is loaded and used, but not kept.
                          Experts in use by models, and loads in progress, do not count
        base              the model that all experts must be for, or its fingerprint
        prefetch_threads  number of experts that `prefetch` loads at a time
        timeout           of downloads, with max_nbytes and retries (`http.HttpFolder`)
        errors            LoadError for a missing folder or server; DataError for numbers out of range
        """
        for name, value, least in (("budget_nbytes", budget_nbytes, 0), ("prefetch_threads", prefetch_threads, 1),
                                   ("max_nbytes", max_nbytes, 1), ("retries", retries, 0)):  # fmt: skip
            if not isinstance(value, int) or value < least:
                rule, fix = f"the value must be an integer of at least {least}", f"pass {name}={max(least, 1)}"
                raise DataError("Store", found=f"{name}={value!r}"[:200], rule=rule, fix=fix)
        if not timeout > 0:
            raise DataError("Store", found=f"timeout={timeout!r}"[:200], rule="the timeout must be above 0 seconds")
        self._base = model_fingerprint(base) if isinstance(base, nn.Module) else base
        self._backend: Backend
        if isinstance(place, str) and "://" in place:
            self._backend = HttpFolder(place, timeout=timeout, max_nbytes=max_nbytes, retries=retries)
        else:
            self._backend = LocalFolder(Path(place).expanduser())
        self._lock = threading.Lock()
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._coming: dict[str, Future[Expert]] = {}
        self._stats = Stats(budget_nbytes=budget_nbytes)
        self._pool = ThreadPoolExecutor(prefetch_threads, thread_name_prefix="dovetail-prefetch")
        self._closed = False

    @staticmethod
    def write_index(folder: str | Path) -> Path:
        """Write the index.json of a folder's experts atomically, for a server. Return its path."""
        return write_index(Path(folder))

    def names(self) -> list[str]:
        """Return the names of all experts, sorted."""
        return self._backend.names()

    def get(self, name: str) -> Expert:
        """Return a verified expert from memory, or load it; by its name, or by the name of its file.

        errors  LoadError for an unknown name, an incomplete file, and an expert for another base
        """
        return self._get(name)

    def activate(self, model: nn.Module, name: str) -> None:
        """Get an expert and activate it in the model (`experts.activate`).

        If it is loaded first, the decode that writes it checks its blocks. If a block is invalid, the previously active
        expert is restored.
        """
        start = time.perf_counter()
        failed: list[DovetailError] = []
        used: list[Expert] = []

        def use(expert: Expert) -> None:
            try:
                activate(model, expert, verified=True)
                used.append(expert)
            except DovetailError as error:
                failed.append(error)
                verify(expert)  # other threads may wait for an expert that only this model cannot take

        expert = self._get(name, check=use)
        if failed:
            raise failed[0]
        if not used:
            activate(model, expert, verified=True)
        with self._lock:
            self._add(swaps=1, swap_seconds=time.perf_counter() - start)

    def prefetch(self, *names: str) -> None:
        """Load experts in the background. A failure is raised when the expert is requested."""
        for name in names:
            good_name(name)
            with self._lock:
                self._check_open()
                self._pool.submit(self._fetch_ahead, name)

    def stats(self) -> Stats:
        """Return statistics of the store."""
        with self._lock:
            return replace(self._stats, held=len(self._held), nbytes=sum(each.nbytes for each in self._held.values()))

    def refresh(self) -> None:
        """Read a server's index again."""
        self._backend.refresh()

    def close(self) -> None:
        """Release all experts and end downloads with errors. Active experts stay active."""
        with self._lock:
            self._closed = True
            self._held.clear()
        self._backend.close()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _get(self, name: str, *, ahead: bool = False, check: Callable[[Expert], None] = verify) -> Expert:
        """Return an expert. `check` is called with a newly loaded one before it is shared."""
        name = good_name(name).removesuffix(SUFFIX)
        stamp = self._backend.stamp(name)
        with self._lock:
            self._check_open()
            held, coming = self._held.get(name), self._coming.get(name)
            if held is not None and held.stamp == stamp:
                self._held.move_to_end(name)
                if not ahead:
                    self._add(hits=1)
                return held.expert
            if not ahead:
                self._add(misses=1)
            mine: Future[Expert] = Future()
            if coming is None:
                self._coming[name] = mine
        if coming is not None:
            return coming.result()
        try:
            expert = self._load(name, stamp, ahead, check)
            mine.set_result(expert)
        except BaseException as error:
            found = f"{type(error).__name__} while loading"
            interrupted = LoadError(name, found=found, rule="loading must not be interrupted", fix="load it again")
            if not mine.done():
                mine.set_exception(error if isinstance(error, Exception) else interrupted)
            raise
        finally:
            with self._lock:
                if self._coming.get(name) is mine:
                    del self._coming[name]
        return expert

    def _load(self, name: str, stamp: Stamp, ahead: bool, check: Callable[[Expert], None]) -> Expert:
        start = time.perf_counter()
        expert, nbytes = self._backend.read(name)
        if self._base is not None:
            expert.check_base(self._base)
        check(expert)
        with self._lock:
            self._add(loads=1, load_seconds=time.perf_counter() - start, prefetched=int(ahead))
            if not self._closed:
                self._keep(name, _Held(expert, nbytes, stamp))
        return expert

    def _keep(self, name: str, held: _Held) -> None:
        self._held.pop(name, None)
        if held.nbytes > self._stats.budget_nbytes:
            return
        room = self._stats.budget_nbytes - held.nbytes - sum(each.nbytes for each in self._held.values())
        while room < 0:
            room += self._held.popitem(last=False)[1].nbytes
            self._add(evictions=1)
        self._held[name] = held

    def _fetch_ahead(self, name: str) -> None:
        try:
            self._get(name, ahead=True)
        except LoadError:
            return

    def _check_open(self) -> None:
        if self._closed:
            raise LoadError("store", found="a closed store", rule="the store must be open", fix="open another Store")

    def _add(self, **more: float) -> None:
        """Add to the statistics. The caller holds the lock."""
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + each for name, each in more.items()})
