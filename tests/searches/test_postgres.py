"""Searches on a real PostgreSQL server, which the test starts and stops."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from dovetail.errors import SearchError
from dovetail.searches.study import delete_study, finished, open_study, work
from quick_space import KILLS, NAME, QuickSpace, RacingSpace, check_nothing_lost, kill_workers

pytest.importorskip("psycopg", reason="the extra postgres is not installed")


def server_folder() -> Path | None:
    """The folder of initdb and postgres, on the path or where packages put it."""
    found = [Path(path) for path in [shutil.which("initdb")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return next((path.resolve().parent for path in found if (path.resolve().parent / "postgres").exists()), None)


@pytest.fixture(scope="module")
def server():
    programs = server_folder()
    if programs is None:
        pytest.skip("no PostgreSQL server (initdb) on this machine")
    user = None
    if os.geteuid() == 0:  # initdb refuses to run as root
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = next((name for name in ("postgres", "nobody") if name in names), None)
        if user is None:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")
    folder = Path(tempfile.mkdtemp(prefix="dovetail-postgres-"))
    if user is not None:
        shutil.chown(folder, user)
    data, environment = folder / "data", {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(folder)}
    common = {"user": user, "env": environment, "cwd": folder}
    try:
        initialized = subprocess.run(
            [programs / "initdb", "-D", data, "-U", "dovetail", "--auth=trust", "--no-sync", "--encoding=UTF8"],
            capture_output=True, text=True, **common,
        )  # fmt: skip
        assert initialized.returncode == 0, initialized.stderr
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = (folder / "log").open("w")
        server = subprocess.Popen(
            [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"], stdout=log,
            stderr=log, **common,
        )  # fmt: skip
        url = f"postgresql+psycopg://dovetail@127.0.0.1:{port}/postgres"
        try:
            wait_for(url, server, folder / "log")
            yield url
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
            log.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(url, server, log):
    import time

    import sqlalchemy

    engine = sqlalchemy.create_engine(url)
    for _ in range(600):
        try:
            engine.connect().close()
            break
        except sqlalchemy.exc.OperationalError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
    engine.dispose()


def test_workers_that_are_killed(server):
    space = RacingSpace(3 * KILLS, seconds=0.1)
    delete_study(server, NAME)
    kill_workers(server, space, workers=2, kills=KILLS, seed=0)
    check_nothing_lost(server, space, workers=2)


def test_a_study_of_another_recipe_is_refused(server):
    space = QuickSpace(1)
    delete_study(server, NAME)
    with open_study(server, NAME, space, {"recipe": "quick"}) as study:
        work(study, space)
        assert [trial.number for trial in finished(study, space)] == [0]
    with pytest.raises(SearchError, match="other recipe"), open_study(server, NAME, space, {"recipe": "another"}):
        pass
    delete_study(server, NAME)
    with open_study(server, NAME, space, {"recipe": "another"}) as study:
        assert not finished(study, space)
