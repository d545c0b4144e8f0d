"""Memory outlives the daemon: whatever ends it, systemd has the fds and hands them to the next one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from gmemd.cli.doctor import findings
from tests.patience import wait_for
from tests.systemd.booted.service import (
    SIZE,
    TREE,
    Memory,
    drop_in,
    end_by,
    ending,
    exposure,
    main_pid,
    show,
    start_with,
    systemctl,
    systemd_version,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MANY = 1000
WATCHDOG = 2.0  # seconds


def kill() -> None:
    end_by(signal.SIGKILL)


def end() -> None:
    end_by(signal.SIGTERM)


def hang() -> None:
    """Leave a daemon that does nothing any more, which the watchdog finds."""
    start_with(f"[Service]\nWatchdogSec={WATCHDOG}\n")
    stopped = main_pid()
    os.kill(stopped, signal.SIGSTOP)
    wait_for(lambda: main_pid() not in (0, stopped))  # it may greet once more while it is killed


def restart() -> None:
    systemctl("restart", "gmemd.service")


def restart_socket() -> None:
    systemctl("restart", "gmemd.socket")


def reload() -> None:
    systemctl("daemon-reload")
    kill()


def reexec() -> None:
    systemctl("daemon-reexec")
    kill()


@pytest.mark.parametrize("event", [kill, end, hang, restart, restart_socket, reload, reexec])
def test_memory_survives(event: Callable[[], None]) -> None:
    """Contents, and what a client has mapped, are the same memory afterwards."""
    with Memory() as memory:
        memory.add("ram0")
        memory.add("gm0", guest_memfd="on")
        before, mapped = main_pid(), memory.map("ram0")
    event()
    with mapped, Memory() as memory:
        assert main_pid() != before
        assert memory.intact() == ["gm0", "ram0"]
        with memory.map("ram0") as view:
            view[-3:] = b"new"
            assert mapped[-3:] == b"new"


@pytest.mark.kvm
def test_guest_memfd_survives() -> None:
    """A guest_memfd of KVM stays one."""
    with Memory() as memory:
        memory.add("gm0", guest_memfd="on")
    kill()
    with Memory() as memory:
        [status] = memory.status()
        assert (status["kind"], status["kernel"]) == ("guest-memfd", "kvm")
        assert memory.intact() == ["gm0"]


def test_healthy_daemon_is_left_alone() -> None:
    """The event loop feeds the watchdog while a client keeps it busy for longer than the watchdog waits."""
    start_with(f"[Service]\nWatchdogSec={WATCHDOG}\n")
    with Memory() as memory:
        before, until = main_pid(), time.monotonic() + 1.5 * WATCHDOG
        while time.monotonic() < until:
            memory.client.execute("query-memdev")
    assert main_pid() == before


def test_crash_loop() -> None:
    """A daemon that cannot start for a while loses nothing: there is no start limit."""
    with Memory() as memory:
        memory.add("ram0")
    drop_in("[Service]\nExecStartPre=/bin/false\nRestartSec=10ms\n")
    kill()
    while int(show("NRestarts")) < 8:
        os.sched_yield()
    drop_in("")
    with Memory() as memory:
        assert memory.intact() == ["ram0"]


def test_quit() -> None:
    """`quit` ends the daemon and keeps the objects."""
    with Memory() as memory:
        memory.add("ram0")
        before = main_pid()
        with ending(before):
            memory.client.execute("quit")
    with Memory() as memory:
        assert main_pid() != before
        assert memory.intact() == ["ram0"]


def test_deleted_is_gone() -> None:
    """Nobody holds what object-del has freed."""
    with Memory() as memory:
        memory.add("ram0")
        memory.add("ram1")
        memory.client.execute("object-del", {"id": "ram0"})
        assert show("NFileDescriptorStore") == "1"
    kill()
    with Memory() as memory:
        assert memory.intact() == ["ram1"]


def test_file_in_shared_memory() -> None:
    """A file that the daemon made in /dev/shm outlives it by its name too."""
    with Memory() as memory:
        memory.add("file0", qom_type="memory-backend-file", mem_path="/dev/shm/gmemd-test")
    kill()
    with Memory() as memory:
        assert memory.intact() == ["file0"]
        assert os.stat("/dev/shm/gmemd-test").st_size == SIZE
        systemctl("stop", "gmemd.service")
    os.unlink("/dev/shm/gmemd-test")


def test_most_hardened(record_property: Callable[[str, object], None]) -> None:
    """With max-hardening.conf memory survives as well."""
    start_with((TREE / "systemd" / "max-hardening.conf").read_text())
    record_property("figure", f"gmemd.service with max-hardening.conf: exposure {exposure()}")
    with Memory() as memory:
        memory.add("ram0")
        memory.add("gm0", guest_memfd="on")
    kill()
    with Memory() as memory:
        assert memory.intact() == ["gm0", "ram0"]


def test_many(record_property: Callable[[str, object], None]) -> None:
    """A thousand objects come back with their contents, and the time that takes is printed."""
    adds = b"".join(
        json.dumps({"execute": "object-add", "arguments": {
            "qom-type": "memory-backend-memfd", "id": f"ram{number}", "size": SIZE,
            "guest-memfd": "on" if number % 2 else "off", "share": True}}).encode() + b"\n"
        for number in range(MANY))
    figures = []

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        figures.append(f"{what} {(time.monotonic() - start) * 1e3:.0f} ms")

    with Memory() as memory:
        with timed("added, pipelined"):
            replies = memory.client.send_text(adds, MANY)
        assert [reply for reply in replies if "error" in reply] == []
        names = memory.names()
        for name in names:
            memory.write(name)
    pid = main_pid()
    with timed("kill to the first answer"):
        os.kill(pid, signal.SIGKILL)
        memory = Memory()
        assert memory.client.execute("query-status")
    with memory, timed("all checked"):
        assert memory.intact() == names
    with timed("daemon-reload"):
        systemctl("daemon-reload")
    with timed("restart to the first answer"):
        restart()
        memory = Memory()
    with memory:
        assert memory.intact() == names
    record_property("figure", f"systemd {systemd_version()}, {MANY} objects: {', '.join(figures)}")


def test_store_is_full() -> None:
    """An object that the store could not keep is refused with the setting to raise; the others stay."""
    start_with("[Service]\nFileDescriptorStoreMax=4\nEnvironment=GMEMD_FDSTORE=4\n")
    [finding] = [found for found in findings() if found.item == "FileDescriptorStoreMax="]
    assert (finding.found, finding.verdict) == ("4", "ok")
    with Memory() as memory:
        for number in range(4):
            memory.add(f"ram{number}")
        with pytest.raises(Exception, match="FileDescriptorStoreMax"):
            memory.add("ram4")
        memory.client.execute("object-del", {"id": "ram0"})
        memory.add("ram4")
    kill()
    with Memory() as memory:
        assert memory.intact() == ["ram1", "ram2", "ram3", "ram4"]
