"""The units as systemd sees them."""

from __future__ import annotations

import grp
import pwd
import re
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.systemd.booted.service import (
    SIZE,
    SOCKET,
    TREE,
    UNITS,
    Memory,
    drop_in,
    end_by,
    exposure,
    main_pid,
    output,
    show,
    systemctl,
    systemd_version,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CONNECT = f"import sys; from gmemd.client.client import Client; Client({SOCKET!r}).execute(*eval(sys.argv[1]))"


@pytest.mark.parametrize("units", [UNITS, (str(TREE / "systemd" / "gmemd-container.service"),)])
def test_verify(units: tuple[str, ...]) -> None:
    """systemd-analyze verify has nothing to say, but for what systemd before 254 does not know."""
    said = [line for line in output("systemd-analyze", "verify", *units).splitlines() if "gmemd" in line]
    if systemd_version() < 254:
        said = [line for line in said if "FileDescriptorStorePreserve" not in line]
    assert said == []


def test_exposure(record_property: Callable[[str, object], None]) -> None:
    """The running service is exposed to at most 1.0."""
    systemctl("start", "gmemd.service")
    record_property("figure", f"gmemd.service: exposure {exposure(1.0)} (systemd {systemd_version()})")


def test_files() -> None:
    """The daemon has its own user, and the socket's group may only open the socket."""
    directory, sock = Path(SOCKET).parent.stat(), Path(SOCKET).stat()
    user = pwd.getpwnam("gmemd")

    assert (directory.st_uid, stat.S_IMODE(directory.st_mode)) == (user.pw_uid, 0o755)
    assert (sock.st_uid, sock.st_gid) == (user.pw_uid, grp.getgrnam("qmp").gr_gid)
    assert stat.S_IMODE(sock.st_mode) == 0o660
    assert "gmemd" not in grp.getgrnam("qmp").gr_mem


def test_the_socket_is_enabled() -> None:
    """The socket listens from the boot on, and starts the service with the first client."""
    assert systemctl("is-enabled", "gmemd.socket") == "enabled"
    systemctl("stop", "gmemd.service")
    assert main_pid() == 0
    with Memory() as memory:
        assert memory.client.execute("query-status")
    assert main_pid() != 0


def test_ready() -> None:
    """A start has succeeded only when the daemon answers; its status line says what it holds."""
    systemctl("restart", "gmemd.service")
    assert (show("ActiveState"), show("SubState")) == ("active", "running")
    with Memory() as memory:
        memory.add("ram0")
        memory.add("ram1")
        until = time.monotonic() + PATIENCE
        while "2 objects" not in show("StatusText") and time.monotonic() < until:
            time.sleep(0.1)
        assert "2 objects of 4 MiB" in show("StatusText")


@pytest.mark.parametrize("group", ["qmp", "nogroup"])
def test_who_may_connect(group: str) -> None:
    """Members of the group qmp may connect, and the daemon sees who they are; others may not."""
    options = {"qom-type": "memory-backend-memfd", "id": "ram0", "size": 1 << 20}
    user = ["setpriv", "--reuid=1234", f"--regid={grp.getgrnam(group).gr_gid}", "--clear-groups"]
    words = [*user, "gmemd-python", "-c", CONNECT, repr(("object-add", options))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if group == "qmp":
        assert done.returncode == 0, done.stderr
        with Memory() as memory:
            assert memory.status()[0]["owner"]["uid"] == 1234
    else:
        assert "PermissionError" in done.stderr


def test_stop_leaves_the_socket() -> None:
    """After a stop of the service the socket is still there and starts it again."""
    with Memory():
        pass
    systemctl("stop", "gmemd.service")
    with Memory():
        assert main_pid() != 0


@pytest.mark.kvm
def test_kvm_and_policies() -> None:
    """The hardening leaves /dev/kvm, NUMA policies and the counting of pages to the daemon."""
    with Memory() as memory:
        where = {"policy": "bind", "host_nodes": [0], "prealloc": True}
        memory.add("ram0", **where)
        memory.add("gm0", guest_memfd="on", **where)
        found = {status["id"]: (status["kind"], status["kernel"], status["resident"]) for status in memory.status()}
        assert found == {"ram0": ("memfd", "kvm", SIZE), "gm0": ("guest-memfd", "kvm", SIZE)}


def test_policies() -> None:
    """The hardening leaves NUMA policies and the counting of pages to the daemon."""
    with Memory() as memory:
        memory.add("ram0", policy="bind", host_nodes=[0], prealloc=True)
        assert memory.status()[0]["resident"] == SIZE


def test_reload_reads_the_policy() -> None:
    """`systemctl reload` puts a changed policy into force, for a client that is connected, too."""
    rule = 'version = 1\n[[rule]]\nname = "root"\nmatch = {{ uid = 0 }}\nrole = "{}"\n'
    policy = Path("/run/gmemd-policy.toml")
    policy.write_text(rule.format("operator"))
    drop_in(f"[Service]\nExecStart=\nExecStart=gmemd --qmp unix:%t/gmemd/qmp.sock --persist on --policy {policy}\n")
    systemctl("restart", "gmemd.service")
    with Memory() as memory:
        before = main_pid()
        assert memory.client.execute("query-memdev-rights")["role"] == "operator"
        policy.write_text(rule.format("admin"))
        systemctl("reload", "gmemd.service")
        until = time.monotonic() + PATIENCE
        while memory.client.execute("query-memdev-rights")["role"] != "admin":
            assert time.monotonic() < until
        assert main_pid() == before


def test_huge_pages() -> None:
    """The hardening leaves huge pages to the daemon."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    free, reserved = (int((pool / name).read_text()) for name in ("free_hugepages", "resv_hugepages"))
    if free <= reserved:
        pytest.skip("needs a huge page (2 MiB)")
    with Memory() as memory:
        memory.add("huge0", hugetlb=True, hugetlbsize=2 << 20, prealloc=True)
        end_by(signal.SIGKILL)
    with Memory() as memory:
        assert memory.intact() == ["huge0"]


def test_no_privileges() -> None:
    """The daemon has no capability, cannot gain any, and sees neither homes nor other devices."""
    with Memory():
        pass
    status = Path(f"/proc/{main_pid()}/status").read_text()
    assert re.findall(r"Cap(Prm|Eff|Bnd|Amb):\s0+\n", status) == ["Prm", "Eff", "Bnd", "Amb"]
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert not Path(f"/proc/{main_pid()}/root/home").stat().st_mode & 0o777
