"""gmemd.service of the booted systemd, and the memory behind its socket."""

from __future__ import annotations

import functools
import mmap
import os
import re
import select
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from gmemd.client.client import Client
from tests.patience import PATIENCE
from tests.systemd import boot

SOCKET = "/run/gmemd/qmp.sock"
UNITS = ("gmemd.service", "gmemd.socket")
SIZE = 2 << 20  # bytes of an object

TREE = Path(__file__).parents[3]
PROGRAM = Path("/usr/local/bin/gmemd")
PAGE = "docs/systemd.md"

_DROP_INS = Path("/run/systemd/system/gmemd.service.d")
_STATE = Path("/run/gmemd")
_REBOOTED = Path("/out/rebooted")  # by which test


def output(*words: str, status: int = 0) -> str:
    """Run a command to its end; give what it printed."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == status, f"{words}: status {done.returncode}\n{said}"
    return said.strip()


def type_block(number: int) -> str:
    """Run a block of the page unchanged; there is no network, so pip finds its wheels on the disk."""
    block = re.findall(r"^```sh host\n(.*?)^```$", (boot.SOURCE / PAGE).read_text(), re.DOTALL | re.MULTILINE)[number]
    wheels = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(boot.WHEELS), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return output("env", *(f"{key}={value}" for key, value in wheels.items()),
                  "sh", "-euc", f"cd {boot.SOURCE}\n{block}")


def journal() -> str:
    """Give the last of what the service had to say."""
    words = ["journalctl", "--unit=gmemd", "--output=cat", "--no-pager", "--lines=30"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def systemctl(*words: str) -> str:
    """Run systemctl; give what it printed."""
    return output("systemctl", *words)


@functools.cache
def systemd_version() -> int:
    """Return the version of systemd."""
    found = re.search(r"\d+", systemctl("--version"))
    assert found is not None
    return int(found[0])


def show(name: str) -> str:
    """Return a property of the service."""
    return systemctl("show", "--value", f"--property={name}", "gmemd.service")


def exposure(at_most: float = 1.0) -> str:
    """Return the exposure of the service as systemd-analyze judges it."""
    words = ["systemd-analyze", "security", "--no-pager", f"--threshold={at_most * 10:.0f}", "gmemd.service"]
    found = re.search(r"Overall exposure level for gmemd.service: (\S+)", output(*words))
    assert found is not None
    return found[1]


def main_pid() -> int:
    """Return the pid of the daemon; 0: it does not run."""
    return int(show("MainPID"))


@contextmanager
def ending(pid: int) -> Iterator[None]:
    """At the end wait until this process has ended."""
    handle = os.pidfd_open(pid)
    try:
        yield
        readable, _, _ = select.select([handle], [], [], PATIENCE)
        assert readable, f"process {pid} does not end"
    finally:
        os.close(handle)


def end_by(number: signal.Signals) -> None:
    """End the daemon by a signal."""
    pid = main_pid()
    with ending(pid):
        os.kill(pid, number)


def clear() -> None:
    """Make a running service empty; one that was stopped or changed as after the boot."""
    if show("SubState") != "running" or any(_DROP_INS.glob("*")):
        reset()
        return
    with Memory() as memory:
        lost = [entry["id"] for entry in memory.client.execute("query-memdev-lost")]
        for name in [*memory.names(), *lost]:
            memory.client.execute("object-del", {"id": name})


def reset() -> None:
    """Make all as after the boot: the socket listens, no daemon, no memory, no registry, no drop-ins."""
    systemctl("stop", *UNITS)
    systemctl("reset-failed")
    if systemd_version() >= 254:  # it keeps what is stored; `clean --what=fdstore` would need D-Bus
        drop_in("[Service]\nFileDescriptorStoreMax=0\n")
    for file in [*_STATE.iterdir(), *_DROP_INS.glob("*")]:
        file.unlink()
    systemctl("daemon-reload")
    systemctl("start", "gmemd.socket")


def rebooted(test: str) -> bool:
    """Has this test (node id) ended user space by soft_reboot()?"""
    return _REBOOTED.exists() and _REBOOTED.read_text() == test


def soft_reboot(test: str) -> NoReturn:
    """End all of user space, this process too; pytest is started again, with this test first."""
    _REBOOTED.write_text(test)
    systemctl("soft-reboot")
    while True:
        signal.pause()


def drop_in(text: str) -> None:
    """Install a drop-in of the service, or with "" remove it; what runs is not restarted."""
    _DROP_INS.mkdir(parents=True, exist_ok=True)
    if text:
        (_DROP_INS / "test.conf").write_text(text)
    else:
        (_DROP_INS / "test.conf").unlink()
    systemctl("daemon-reload")


def start_with(text: str) -> None:
    """Restart the service with a drop-in."""
    drop_in(text)
    systemctl("restart", "gmemd.service")


class Memory:
    """A connection, and what can be done with objects by it."""

    def __init__(self) -> None:
        self.client = Client(SOCKET, timeout=PATIENCE)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def add(self, name: str, **properties: Any) -> None:
        """Add a shared memfd object, or what the properties say, and write its name into it."""
        options = {"qom-type": "memory-backend-memfd", "id": name, "size": SIZE, "share": True}
        options |= {key.replace("_", "-"): value for key, value in properties.items()}
        self.client.execute("object-add", options)
        self.write(name)

    def write(self, name: str) -> None:
        """Write the name of an object into its memory."""
        with self.map(name) as view:
            view[: len(name)] = name.encode()

    def map(self, name: str) -> mmap.mmap:
        """Map the memory of an object."""
        info, [fd] = self.client.execute_fds("memdev-get-fd", {"id": name})
        try:
            return mmap.mmap(fd, info["size"])
        finally:
            os.close(fd)

    def intact(self) -> list[str]:
        """Return the ids of all objects whose memory begins with their id, sorted."""
        return [name for name in self.names() if self.begins(name)]

    def begins(self, name: str) -> bool:
        """Does the memory of an object begin with its id?"""
        with self.map(name) as view:
            return view[: len(name) + 1] == name.encode() + b"\0"

    def names(self) -> list[str]:
        """Return the ids of all objects, sorted."""
        return sorted(status["id"] for status in self.status())

    def status(self) -> Sequence[dict[str, Any]]:
        """Return what query-memdev-status tells."""
        listed: list[dict[str, Any]] = self.client.execute("query-memdev-status")
        return listed
