"""Memory is freed beside the event loop, however the daemon gives it up: 0.1 s per GiB in which others would wait.

The kernel charges the CPU time to the thread that closes the last descriptor, so that of the loop's thread tells, on a
busy machine too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gmemd.client.client import Client
from tests.daemon import Daemon
from tests.patience import wait_for

SIZE = 256 << 20
SHARE = 0.5  # of the CPU time that freeing takes: the loop's thread is to take less


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(kernel="simulated", measured=False) as daemon:
        with daemon.client() as client:
            for command in ("object-del", "memdev-discard"):  # what is loaded ahead is there then
                client.send_text(json.dumps({"execute": command}).encode(), 1)
        wait_for(lambda: len(os.listdir(f"/proc/{daemon.pid}/task")) == 1)
        yield daemon


def populated() -> int:
    """The fd of a memfd with all its pages."""
    fd = os.memfd_create("populated", os.MFD_ALLOW_SEALING)
    os.posix_fallocate(fd, 0, SIZE)
    return fd


def given(client: Client, command: str, **arguments: object) -> None:
    """Run a command that takes the only descriptor of populated memory."""
    fd = populated()
    client.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()}, fds=[fd])
    os.close(fd)


def added(client: Client, kind: str = "memfd") -> None:
    client.execute("object-add", {"qom-type": f"memory-backend-{kind}", "id": "m", "size": SIZE, "prealloc": True})


Free = Callable[[], object]


def object_del(client: Client, other: Client) -> Free:
    added(client)
    return lambda: client.execute("object-del", {"id": "m"})


def object_del_of_passed(client: Client, other: Client) -> Free:
    given(client, "getfd", fdname="x")
    client.execute("memdev-adopt", {"id": "m", "fdname": "x", "require-seals": False})
    return lambda: client.execute("object-del", {"id": "m"})


def object_del_of_set_aside(client: Client, other: Client) -> Free:
    added(client, "guest-memfd")
    client.execute("memdev-convert", {"id": "m", "offset": 0, "size": SIZE, "to": "private", "preserve": True})
    return lambda: client.execute("object-del", {"id": "m"})


def transaction(client: Client, other: Client) -> Free:
    added(client)
    return lambda: client.execute("memdev-transaction", {"actions": [{"type": "object-del", "data": {"id": "m"}}]})


def failed_transaction(client: Client, other: Client) -> Free:
    action = {"type": "object-add", "data": {"qom-type": "memory-backend-memfd", "id": "m", "size": SIZE,
                                             "prealloc": True}}
    return lambda: client.send_text(json.dumps({"execute": "memdev-transaction", "arguments": {
        "actions": [action, {"type": "object-del", "data": {"id": "nothing"}}]}}).encode(), 1)


def converted(client: Client, other: Client) -> Free:
    added(client, "guest-memfd")
    return lambda: client.execute("memdev-convert", {"id": "m", "offset": 0, "size": SIZE, "to": "private"})


def discarded(client: Client, other: Client) -> Free:
    added(client)
    return lambda: client.execute("memdev-discard", {"id": "m", "offset": 0, "size": SIZE})


def closefd(client: Client, other: Client) -> Free:
    given(client, "getfd", fdname="x")
    return lambda: client.execute("closefd", {"fdname": "x"})


def getfd_again(client: Client, other: Client) -> Free:
    given(client, "getfd", fdname="x")
    return lambda: client.execute("getfd", {"fdname": "x"}, fds=[0])


def remove_fd(client: Client, other: Client) -> Free:
    given(client, "add-fd", fdset_id=1)
    return lambda: client.execute("remove-fd", {"fdset-id": 1})


def untaken(client: Client, other: Client) -> Free:
    """The next command's descriptor replaces one that nobody took."""
    given(client, "query-status")
    return lambda: client.execute("query-status", fds=[0])


def disconnected(client: Client, other: Client) -> Free:
    given(other, "getfd", fdname="x")
    return other.close


def disconnected_untaken(client: Client, other: Client) -> Free:
    given(other, "query-status")
    return other.close


@pytest.mark.parametrize("way", [
    object_del, object_del_of_passed, object_del_of_set_aside, transaction, failed_transaction, converted, discarded,
    closefd, getfd_again, remove_fd, untaken, disconnected, disconnected_untaken],
    ids=lambda way: way.__name__)
def test_freed_beside_the_loop(daemon: Daemon, way: Callable[[Client, Client], Free]) -> None:
    """The thread of the event loop takes a small part of what freeing costs."""
    with daemon.client() as client, daemon.client() as other:
        free = way(client, other)
        loop = cpu(daemon.pid)
        free()
        client.execute("query-status")
        wait_for(lambda: len(os.listdir(f"/proc/{daemon.pid}/task")) == 1)
        assert cpu(daemon.pid) - loop < SHARE * cost_of_freeing()
        if any(found["id"] == "m" for found in client.execute("query-memdev")):
            client.execute("object-del", {"id": "m"})


def cpu(pid: int) -> int:
    """Nanoseconds of CPU time of a process's first thread, which is the event loop's."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0])


def cost_of_freeing() -> int:
    """Nanoseconds of CPU time that freeing as much takes here and now."""
    fd = populated()
    before = cpu(os.getpid())
    os.close(fd)
    return cpu(os.getpid()) - before
