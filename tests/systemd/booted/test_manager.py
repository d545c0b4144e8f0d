"""What an operator does to the units, and what that does to memory: the rows of docs/systemd.md, one by one.

Those in which gmemd's own answer matters most are in test_outlook.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.systemd.booted.service import (
    SOCKET,
    UNITS,
    Memory,
    drop_in,
    end_by,
    main_pid,
    output,
    rebooted,
    show,
    soft_reboot,
    systemctl,
    systemd_version,
    type_block,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PRESERVES = systemd_version() >= 254  # FileDescriptorStorePreserve=
PINS = systemd_version() >= 262  # a stopped service that has something stored is never forgotten
UNIT = Path("/etc/systemd/system/gmemd.service")
IDS = ["gm0", "ram0"]

needs_preserve = pytest.mark.skipif(not PRESERVES, reason="needs systemd 254")


def make() -> None:
    """Make an object of each kind."""
    with Memory() as memory:
        memory.add("ram0")
        memory.add("gm0", guest_memfd="on")


def check(*, kept: bool) -> None:
    """What was made is there with its contents, or all of it is listed as lost; then it can be made again."""
    with Memory() as memory:
        lost = sorted(entry["id"] for entry in memory.client.execute("query-memdev-lost"))
        assert (memory.intact(), lost) == ((IDS, []) if kept else ([], IDS))
        for name in IDS:
            memory.client.execute("object-del", {"id": name})
        memory.add("ram0")


@contextmanager
def socket_not_enabled() -> Iterator[None]:
    """The socket listens, but nothing refers to it."""
    systemctl("disable", "gmemd.socket")
    systemctl("daemon-reload")
    try:
        yield
    finally:
        systemctl("enable", "gmemd.socket")


@contextmanager
def no_unit_file() -> Iterator[None]:
    """For one daemon-reload there is no unit file of the service."""
    text = UNIT.read_text()
    UNIT.unlink()
    try:
        systemctl("daemon-reload")
        yield
    finally:
        UNIT.write_text(text)
        systemctl("daemon-reload")


def start_by_client() -> None:
    """Nothing: the first client starts it."""


def start_by_hand() -> None:
    systemctl("start", "gmemd.service")


def reload_first() -> None:
    systemctl("daemon-reload")
    systemctl("daemon-reexec")


@pytest.mark.parametrize("start", [start_by_client, start_by_hand, reload_first])
def test_stop_and_start(start: Callable[[], None]) -> None:
    """A stop keeps memory from systemd 254 on, however the service comes back."""
    make()
    systemctl("stop", "gmemd.service")
    start()
    check(kept=PRESERVES)


def test_stop_of_both() -> None:
    """So does a stop of service and socket, as long as the socket is enabled."""
    make()
    systemctl("stop", *UNITS)
    systemctl("daemon-reload")
    systemctl("start", "gmemd.socket")
    check(kept=PRESERVES)


def test_stop_of_both_where_the_socket_is_not_enabled() -> None:
    """Nothing refers to the service any more, and systemd up to 257 forgets it, and its memory."""
    with socket_not_enabled():
        make()
        systemctl("stop", *UNITS)
        systemctl("daemon-reload")
        systemctl("start", "gmemd.socket")
        check(kept=PINS)


def test_mask() -> None:
    """A masked service is not started, and keeps what it has."""
    make()
    systemctl("mask", "--runtime", "gmemd.service")
    try:
        end_by(signal.SIGKILL)
    finally:
        systemctl("unmask", "--runtime", "gmemd.service")
    systemctl("start", "gmemd.socket")
    check(kept=True)


@needs_preserve
def test_clean_gives_memory_back() -> None:
    """It empties the store of the stopped service; what the daemon still lists as lost is deleted by its id."""
    make()
    output("systemctl", "clean", "--what=fdstore", "gmemd.service", status=1)  # it runs
    type_block(2)
    assert show("NFileDescriptorStore") == "0"
    check(kept=False)


@needs_preserve
def test_clean_of_all_takes_the_socket_too() -> None:
    """Without --what, clean empties the store as well and removes /run/gmemd; the socket's unit puts that right."""
    make()
    systemctl("stop", "gmemd.service")
    systemctl("clean", "gmemd.service")
    assert not os.path.exists(SOCKET)
    type_block(3)
    with Memory() as memory:
        assert memory.names() == []
        assert memory.client.execute("query-memdev-lost") == []
        memory.add("ram0")


def test_fewer_descriptors_than_are_stored() -> None:
    """A service with such a limit cannot start; with the limit put back it starts, and has all."""
    names = sorted(f"ram{number}" for number in range(100))
    with Memory() as memory:
        for name in names:
            memory.add(name)
    drop_in("[Service]\nLimitNOFILE=80\n")
    output("systemctl", "restart", "gmemd.service", status=1)
    assert show("NFileDescriptorStore") == "100"
    drop_in("")
    with Memory() as memory:
        assert memory.intact() == names


def test_unit_file_of_a_stopped_service_is_gone_for_a_while() -> None:
    """As while a package is replaced. Up to 257 the service is forgotten, and its memory."""
    make()
    systemctl("stop", "gmemd.service")
    with no_unit_file():
        pass
    check(kept=PINS)


@needs_preserve
@pytest.mark.parametrize("stopped", [False, True])
def test_soft_reboot(stopped: bool, request: pytest.FixtureRequest) -> None:
    """User space restarts, and the service has its memory, whether it ran or not."""
    test = request.node.nodeid
    if not rebooted(test):
        make()
        if stopped:
            systemctl("stop", "gmemd.service")
        soft_reboot(test)
    assert main_pid() == 0
    check(kept=True)


@needs_preserve
def test_soft_reboot_where_the_socket_is_not_enabled(request: pytest.FixtureRequest) -> None:
    """Nothing refers to the service when units are loaded again, and systemd up to 257 has forgotten its memory."""
    test = request.node.nodeid
    if not rebooted(test):
        systemctl("disable", "gmemd.socket")
        make()
        soft_reboot(test)
    systemctl("enable", "--now", "gmemd.socket")
    check(kept=PINS)
