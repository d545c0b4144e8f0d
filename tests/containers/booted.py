"""Runs inside a booted systemd: gmemd.service is a container, its memory is systemd's. Exits with 0 if all holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from gmemd.persist.keeping import SPARED
from tests.systemd.boot import REPORTS
from tests.systemd.booted.service import TREE, Memory, ending, journal, main_pid, systemctl

STORAGE = """[storage]
driver = "overlay"
graphroot = "/tmp/graph"
runroot = "/run/containers"
[storage.options]
additionalimagestores = ["/podman/graph"]
"""
CONTAINERS_CONF = TREE / "tests" / "containers" / "containers.conf"
UNIT = Path("/run/systemd/system/gmemd.service")
WATCHDOG = 2  # seconds
DROP_IN = """[Service]
Environment=IMAGE={image} CONTAINERS_STORAGE_CONF=/run/storage.conf CONTAINERS_CONF={conf}
Environment="OPTIONS={options}"
WatchdogSec={watchdog}
"""


def install(image: str, seccomp: str) -> None:
    """Make gmemd.service a container of this image, with this filter of system calls."""
    options = f"--security-opt=seccomp={seccomp}" + (" --device=/dev/kvm" if os.path.exists("/dev/kvm") else "")
    Path("/run/storage.conf").write_text(STORAGE)
    UNIT.with_name("gmemd.service.d").mkdir()
    (UNIT.with_name("gmemd.service.d") / "test.conf").write_text(
        DROP_IN.format(image=image, conf=CONTAINERS_CONF, options=options, watchdog=WATCHDOG))
    UNIT.write_text((TREE / "systemd" / "gmemd-container.service").read_text())
    systemctl("daemon-reload")


def daemon() -> int:
    """Return the pid of the daemon, which is the container's pid 1."""
    text = subprocess.run(["podman", "inspect", "--format={{.State.Pid}}", "gmemd"], check=True, capture_output=True,
                          env={**os.environ, "CONTAINERS_STORAGE_CONF": "/run/storage.conf"}).stdout
    return int(text)


def main(image: str, seccomp: str) -> None:
    """End it in several ways; memory must stay, and an answer must come."""
    install(image, seccomp)
    with Memory() as memory:
        memory.add("ram0")
        memory.add("gm0", guest_memfd="on")
        kernel = memory.status()[0]["kernel"]
    figures = []
    for what, find, number in (
        ("container killed", daemon, signal.SIGKILL),
        ("podman killed", main_pid, signal.SIGKILL),
        ("daemon hung", daemon, signal.SIGSTOP),
        ("container ended", daemon, signal.SIGTERM),
    ):
        pid = find()
        start = time.monotonic()
        with ending(daemon()), ending(main_pid()):
            os.kill(pid, number)
        with Memory() as memory:
            figures.append(f"{what} {time.monotonic() - start:.2f} s")
            assert memory.intact() == ["gm0", "ram0"], what
    figures.append(f"watchdog {WATCHDOG} s, kernel {kernel}")
    all_that_is_kept("FileDescriptorStoreMax=4", 4, "keeps at most 4 file descriptors")
    # what podman can hand down, less the socket and what a start needs for itself
    all_that_is_kept("FileDescriptorStoreMax=2000", 1000 - 1 - SPARED, "the next start can be given at most")
    all_that_is_kept("LimitNOFILE=200:16384", 200 - 1 - SPARED, "the next start can be given at most")
    REPORTS.write_text(", ".join(figures))


def all_that_is_kept(setting: str, room: int, refusal: str) -> None:
    """With this setting so many objects are kept and come back; the next one is refused."""
    drop_in = UNIT.with_name("gmemd.service.d") / "limit.conf"
    with Memory() as memory:
        for name in memory.names():
            memory.client.execute("object-del", {"id": name})
    drop_in.write_text(f"[Service]\n{setting}\n")
    systemctl("daemon-reload")
    systemctl("restart", "gmemd.service")
    with Memory() as memory:
        names = sorted(f"ram{number}" for number in range(room))
        for name in names:
            memory.add(name)
        with pytest.raises(QmpError, match=refusal):
            memory.add("more")
        said = {fate["event"]: fate["answer"] for fate in memory.status()[0]["survival"]}
        assert "yes" not in (said["service-stop"], said["soft-reboot"]), said  # nobody in there can know
    pid = main_pid()
    with ending(daemon()), ending(pid):
        os.kill(daemon(), signal.SIGKILL)
    with Memory() as memory:
        assert memory.intact() == names, setting


try:
    main(sys.argv[1], sys.argv[2])
except BaseException:
    print(journal())
    raise
