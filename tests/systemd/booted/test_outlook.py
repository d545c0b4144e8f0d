"""What is said to survive does, and what is not said to does not: systemd is asked what is really set."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patience import wait_for
from tests.systemd.booted.service import (
    TREE,
    Memory,
    drop_in,
    end_by,
    show,
    start_with,
    systemctl,
    systemd_version,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PRESERVES = systemd_version() >= 254 if os.path.isdir("/run/systemd/system") else False


def answers(memory: Memory) -> dict[str, str]:
    """What is said of the first object, event by event."""
    return {fate["event"]: fate["answer"] for fate in memory.status()[0]["survival"]}


def fates(memory: Memory) -> tuple[str, str, str]:
    """The answers for a crash, a restart and a stop, once systemd has been heard."""
    said: dict[str, str] = {}

    def heard() -> bool:
        said.update(answers(memory))
        return said["gmemd-crash"] != "unknown"

    wait_for(heard)
    return said["gmemd-crash"], said["gmemd-upgrade"], said["service-stop"]


def restart() -> None:
    systemctl("restart", "gmemd.service")


def stop() -> None:
    systemctl("stop", "gmemd.service")


def crash() -> None:
    end_by(signal.SIGKILL)


def survives(event: Any) -> str:
    """Whether a new object outlives an event, by trying it; then it goes."""
    with Memory() as memory:
        memory.add("tried")
    event()
    with Memory() as memory:
        intact = "tried" in memory.intact()
        memory.client.execute("object-del", {"id": "tried"})
    return "yes" if intact else "no"


def test_as_shipped() -> None:
    """The answers of the shipped unit are what then happens."""
    with Memory() as memory:
        memory.add("ram0")
        said = fates(memory)
    assert said == ("yes", "yes", "yes" if PRESERVES else "no")
    assert said == (survives(crash), survives(restart), survives(stop))


def test_most_hardened() -> None:
    """systemd can be asked from within max-hardening.conf, too."""
    start_with((TREE / "systemd" / "max-hardening.conf").read_text())
    with Memory() as memory:
        memory.add("ram0")
        assert fates(memory) == ("yes", "yes", "yes" if PRESERVES else "no")


@pytest.mark.parametrize("value", ["no", "restart", "on-success"])
def test_preserve(value: str) -> None:
    """A drop-in is seen without a restart, and what it says is what happens."""
    with Memory() as memory:
        memory.add("ram0")
        drop_in(f"[Service]\nFileDescriptorStorePreserve={value}\n")
        said = fates(memory)
    if not PRESERVES:
        assert said == ("yes", "yes", "no")
        return
    tried = survives(crash), survives(restart), survives(stop)
    for answer, truth in zip(said, tried, strict=True):
        assert answer in (truth, "unknown")
    if value != "on-success":
        assert said == tried


def test_socket_not_enabled() -> None:
    """A stopped service is forgotten up to 257 unless its socket is enabled, and so it is said."""
    with Memory() as memory:
        memory.add("ram0")
        systemctl("disable", "gmemd.socket")
        try:
            said = fates(memory)
        finally:
            systemctl("enable", "gmemd.socket")
        assert said[:2] == ("yes", "yes")
        assert said[2] == ("yes" if systemd_version() >= 262 else "no")
        assert fates(memory)[2] == ("yes" if PRESERVES else "no")


def test_too_few_descriptors() -> None:
    """With LimitNOFILE= below what is stored no start can succeed; the object that would be one too many is refused."""
    start_with("[Service]\nLimitNOFILE=128\n")
    with Memory() as memory:
        for number in range(63):
            memory.add(f"ram{number}")
        with pytest.raises(Exception, match=r"the next start can be given at most 63 .* LimitNOFILE="):
            memory.add("more")
        names = memory.names()
        assert len(names) == 63
        assert fates(memory)[:2] == ("yes", "yes")
    restart()
    with Memory() as memory:
        assert memory.names() == names
        drop_in("[Service]\nLimitNOFILE=120\n")
        assert fates(memory)[:2] == ("no", "no")
        advice = {fate["event"]: fate.get("advice", "") for fate in memory.status()[0]["survival"]}
        assert "LimitNOFILE= to at least 127 (it is 120)" in advice["gmemd-crash"]
        drop_in("")
        assert fates(memory)[:2] == ("yes", "yes")


def test_store_lowered() -> None:
    """What systemd has dropped is not said to survive; with room again it is given again, and survives."""
    with Memory() as memory:
        for number in range(5):
            memory.add(f"ram{number}")
        drop_in("[Service]\nFileDescriptorStoreMax=2\n")
        assert fates(memory) == ("no", "no", "no")
        assert show("NFileDescriptorStore") == "2"
        with pytest.raises(Exception, match="keeps at most 2 file descriptors"):
            memory.add("more")
        drop_in("")
        assert fates(memory)[0] == "yes"
        assert show("NFileDescriptorStore") == "5"
    crash()
    with Memory() as memory:
        assert memory.intact() == [f"ram{number}" for number in range(5)]


@contextlib.contextmanager
def unit_file_gone() -> Iterator[None]:
    """Within this the service has no unit file."""
    path = Path(show("FragmentPath"))
    aside = shutil.copy(path, "/run/aside")
    path.unlink()
    systemctl("daemon-reload")
    try:
        yield
    finally:
        shutil.copy(aside, path)
        systemctl("daemon-reload")


def test_unit_file_gone() -> None:
    """While it is gone nothing is said to survive; when it is back, systemd is given everything again, and says so."""
    with Memory() as memory:
        for name in ("ram0", "ram1"):
            memory.add(name)
        with unit_file_gone():
            assert set(fates(memory)) == {"no"}
        # nobody asks: the daemon looks by itself
        wait_for(lambda: show("NFileDescriptorStore") == "2")
        assert fates(memory)[0] == "yes"
    crash()
    with Memory() as memory:
        assert memory.intact() == ["ram0", "ram1"]


def test_no_restart() -> None:
    """Without Restart= a crash is not followed by a start; only a kept store waits for the next one."""
    with Memory() as memory:
        memory.add("ram0")
        drop_in("[Service]\nRestart=no\n")
        assert fates(memory)[:2] == ("yes" if PRESERVES else "no", "yes")
    crash()
    with Memory() as memory:
        assert memory.intact() == (["ram0"] if PRESERVES else [])
        memory.client.execute("object-del", {"id": "ram0"})


def test_silent_bus() -> None:
    """Where systemd cannot be asked nothing is promised, and the page says whom to ask."""
    with Memory() as memory:
        memory.add("ram0")
        systemctl("stop", "dbus.socket", "dbus.service")
        try:
            systemctl("daemon-reload")
            said = answers(memory)
            advice = {fate["event"]: fate.get("advice", "") for fate in memory.status()[0]["survival"]}
        finally:
            systemctl("start", "dbus.socket")
        assert {said["gmemd-crash"], said["gmemd-upgrade"]} == {"unknown"}
        assert "systemctl show -p FileDescriptorStorePreserve" in advice["gmemd-crash"]
        systemctl("daemon-reload")
        assert fates(memory)[0] == "yes"
