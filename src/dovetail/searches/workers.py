"""Processes that share an Optuna study: their names, and whether one of them has ended.

A process writes its name on the trial that it runs. On its own host, another process sees at once whether it has ended;
on other hosts the heartbeats of Optuna tell, after `storage.GRACE_SECONDS`.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning
from optuna.storages import fail_stale_trials

UNSIGNED_SECONDS = 10
"""Age at which a running trial without a worker's name counts as lost: a worker signs its trial at once."""


def this_worker() -> dict[str, Any]:
    """Return the name of this process: its host, its number and the time at which it started."""
    return {"host": _host(), "pid": os.getpid(), "started": psutil.Process().create_time()}


@cache
def _host() -> str:
    """Return the name of the host; containers on one host may have equal names, and other process numbers."""
    with suppress(OSError):
        return f"{platform.node()} {os.stat('/proc/self/ns/pid').st_ino}"
    return platform.node()


def has_ended(worker: Mapping[str, Any]) -> bool:
    """Return whether a worker ran on this host and has ended."""
    if worker["host"] != _host():
        return False
    try:
        process = psutil.Process(worker["pid"])
        same = abs(process.create_time() - worker["started"]) < 2  # the clock of the host may be set
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def fail_stale(study: optuna.Study) -> None:
    """Fail the trials without a heartbeat, and enqueue a copy of each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        fail_stale_trials(study)
