"""Daemons on both sides of a kexec, which carries the memfds of their store and nothing else.

The kernel's part is played by tests.persist.luo; the real one, with systemd, is in `script/kernel-lab kexec`.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from tests.daemon import Server
from tests.patience import PATIENCE
from tests.persist.luo import carried
from tests.persist.manager import StandIn

# A gmemd that is given descriptors, and told what it would see elsewhere: the boot, live update, a kernel to start.
_START = """
import fcntl, os, sys
fds, names, boot, live, loaded = sys.argv[1:6]
above = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 500) for fd in fds.split(",") if fd]
for place, fd in enumerate(above, 3):
    os.dup2(fd, place)
    os.close(fd)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(above)), LISTEN_FDNAMES=names)
import gmemd.persist.manager as manager, gmemd.persist.note as note
note.leave.__defaults__ = (loaded,)
manager.boot_id, manager.is_on = lambda: boot, lambda: live == "1"
from gmemd.cli.gmemd import main
sys.argv[1:] = sys.argv[6:]
sys.exit(main())
"""
_SIZE = 1 << 20
OBJECTS: dict[str, dict[str, Any]] = {
    "sealed": {"qom-type": "memory-backend-memfd", "size": _SIZE},
    "plain": {"qom-type": "memory-backend-memfd", "size": _SIZE, "seal": False},
    "sparse": {"qom-type": "memory-backend-memfd", "size": 16 * _SIZE},
    "shm": {"qom-type": "memory-backend-shm", "size": _SIZE + 4096},
    "ram": {"qom-type": "memory-backend-ram", "size": _SIZE, "share": True},
    "guest": {"qom-type": "memory-backend-guest-memfd", "size": _SIZE},
}


class Host:
    """A machine with a service manager; `live`: its kernels have live update."""

    def __init__(self, directory: Path, *, live: bool) -> None:
        self.live = live
        self.boot = 1
        self.run = directory / "run"
        self.disk = directory / "disk"
        self.disk.mkdir()
        self.loaded = directory / "kexec_loaded"
        self.loaded.write_text("1")
        (directory / "systemd").mkdir()
        self.manager = StandIn(directory / "systemd")
        self._ended = threading.Event()
        self._serving = threading.Thread(target=self._serve)
        self._serving.start()

    def _serve(self) -> None:
        while not self._ended.wait(0.002):
            self.manager.receive()

    @contextmanager
    def gmemd(self) -> Iterator[Client]:
        entries = self.manager.hand_down()
        fds = [fd for _, fd in entries]
        argv = [sys.executable, "-c", _START, ",".join(map(str, fds)), ":".join(name for name, _ in entries),
                f"{self.boot:032x}", str(int(self.live)), str(self.loaded), "--qmp", "{address}", "--persist", "on",
                "--kernel", "simulated", "--state-dir", str(self.run)]
        env = {"NOTIFY_SOCKET": self.manager.address, "FDSTORE": "64", "STATE_DIRECTORY": str(self.disk)}
        with Server(argv, env=env, pass_fds=fds) as server:
            for fd in fds:
                os.close(fd)
            with server.client(timeout=PATIENCE) as client:
                yield client

    def kexec(self) -> None:
        """The daemon has ended."""
        self.manager.receive()
        before, self.manager.store = self.manager.store, []
        for name, fd in before:
            new = carried(fd) if self.live else -1
            os.close(fd)
            if new >= 0:
                self.manager.store.append((name, new))
        shutil.rmtree(self.run)
        self.boot += 1

    def close(self) -> None:
        self._ended.set()
        self._serving.join()
        self.manager.close()


@pytest.fixture(params=[True, False], ids=["live update", "none"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path, live=request.param)
    yield host
    host.close()


def mapped(client: Client, name: str) -> mmap.mmap:
    """The memory of an object, writable."""
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": name, "force": True})
    try:
        return mmap.mmap(fd, OBJECTS[name]["size"])
    finally:
        os.close(fd)


def make(client: Client) -> None:
    for name, arguments in OBJECTS.items():
        client.execute("object-add", {"id": name, **arguments})
        with mapped(client, name) as memory:
            memory[8192:8192 + len(name)] = name.encode()
    client.execute("memdev-convert", {"id": "guest", "offset": 65536, "size": 8192, "to": "private"})
    os.close(client.execute_fds("memdev-get-fd", {"id": "ram", "lease": "keep"})[1][0])


def described(client: Client) -> dict[str, Any]:
    """What stays, of all objects."""
    status = {row["id"]: [row[key] for key in ("qom-type", "kind", "size", "offset", "owner", "generation")]
              for row in client.execute("query-memdev-status")}
    return {"status": status, "memdev": client.execute("query-memdev"),
            "ranges": client.execute("query-memdev-ranges", {"id": "guest"})}


@pytest.mark.parametrize("host", [True], indirect=True, ids=["live update"])
def test_everything_is_back_twice(host: Host) -> None:
    """Ids, types, owners, ranges, bytes, and memory that can be written; the lease has ended, as its holder has."""
    with host.gmemd() as client:
        make(client)
        before = described(client)
        [lease] = client.execute("query-memdev-leases")
        assert not lease["orphaned"]
    for again in (False, True):
        host.kexec()
        with host.gmemd() as client:
            assert described(client) == before
            assert client.execute("query-memdev-lost") == client.execute("query-memdev-unclaimed") == []
            leases = client.execute("query-memdev-leases")  # the next holder, below, takes the orphan
            assert [lease["orphaned"] for lease in leases] == ([] if again else [True])
            for name in OBJECTS:
                with mapped(client, name) as memory:
                    assert memory[8192:8192 + len(name)] == name.encode()
            client.execute("object-add", {"id": "new", **OBJECTS["sealed"]})
            client.execute("object-del", {"id": "new"})
            client.execute("memdev-verify", {"id": "guest", "job-id": "look"})
        with host.gmemd() as client:  # in the same boot
            assert described(client) == before


@pytest.mark.parametrize("host", [False], indirect=True, ids=["none"])
def test_without_live_update_all_is_lost_and_that_is_said(host: Host) -> None:
    with host.gmemd() as client:
        make(client)
    host.kexec()
    with host.gmemd() as client:
        assert {row["id"]: row["reason"] for row in client.execute("query-memdev-lost")} == dict.fromkeys(
            OBJECTS, "the machine was started anew, and its fd did not come back")
        assert client.execute("query-memdev") == []
        client.execute("object-del", {"id": "ram"})
        client.execute("object-add", {"id": "ram", **OBJECTS["ram"]})
