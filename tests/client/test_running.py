"""Servers of one's own: started, waited for, killed and ended, with nothing left behind."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from gmemd.client.running import Running, RunningGmemd, state

ADD = {"qom-type": "memory-backend-memfd", "id": "ram", "size": 4096}


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Directories are made below `tmp_path`; at the end there is none."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield
    assert list(tmp_path.iterdir()) == []


def test_a_gmemd_of_ones_own(tmp_path: Path) -> None:
    """It answers on its socket and has its files in its directory; all of it ends with the block."""
    with RunningGmemd("--audit", "{directory}/audit") as gmemd, gmemd.client() as client:
        client.execute("object-add", ADD)
        assert gmemd.directory.parent == tmp_path
        assert "object-add" in (gmemd.directory / "audit").read_text()
        assert gmemd.stop() == 0


def test_one_that_does_not_start_says_why() -> None:
    """What ends before it greets is not waited for, with a keeper or without."""
    for keep in (False, True):
        with pytest.raises(ConnectionError, match="unrecognized arguments: --nonsense"):
            RunningGmemd("--nonsense", keep=keep)
    with pytest.raises(FileNotFoundError):
        Running(["/nowhere/qemu"])


def test_a_crash_needs_a_keeper() -> None:
    """Without one nothing would come back, and that is said at once; the daemon lives on."""
    with RunningGmemd() as gmemd:
        with pytest.raises(ValueError, match="keep=True"):
            gmemd.crash()
        gmemd.client().close()


def test_the_path_may_hold_a_comma(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    with RunningGmemd(parent=str(tmp_path / "a,b")) as gmemd, gmemd.client() as client:
        assert client.execute("query-memdev") == []
    (tmp_path / "a,b").rmdir()


def test_under_the_keeper_a_killed_daemon_comes_back() -> None:
    """Another process answers, which has the objects."""
    with RunningGmemd(keep=True) as gmemd:
        first = gmemd.daemon()
        with gmemd.client() as client:
            client.execute("object-add", ADD)
        gmemd.crash()
        assert state(first) in "ZX"
        assert gmemd.daemon() != first
        with gmemd.client() as client:
            assert [memdev["id"] for memdev in client.execute("query-memdev")] == ["ram"]
        assert gmemd.kill(signal.SIGTERM) != first
        assert gmemd.stop() == 0


def test_a_start_that_is_broken_off_leaves_no_process() -> None:
    """Neither the keeper nor its daemon goes on."""
    seen = []

    class Interrupted(RunningGmemd):
        def wait_greeting(self) -> None:
            super().wait_greeting()
            seen.extend([self.process.pid, self.daemon()])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(keep=True)
    keeper, daemon = seen
    assert not os.path.exists(f"/proc/{keeper}")
    assert state(daemon) in "ZX"


def test_one_that_has_ended_by_itself() -> None:
    """Its status can still be had, and leaving the block is no error."""
    server = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); " \
             "s.accept()[0].send(b'hello'); sys.exit(7)"
    with Running([sys.executable, "-c", server, "{socket}"], env={**os.environ, "COVERAGE_PROCESS_CONFIG": ""}) as it:
        it.process.wait()
        assert it.stop() == 7
