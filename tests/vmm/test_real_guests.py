"""Captured, adopted, attached: a real Linux guest in a real QEMU goes on on gmemd's memory."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gmemd.client.client import Client
from gmemd.vmm.attach import Memory, attach, detach
from gmemd.vmm.memfds import memfds
from gmemd.vmm.qemu import Qemu
from tests.daemon import Daemon
from tests.e2e.test_docs import blocks, user_environment
from tests.guests.linux import LinuxGuest, needs_qemu
from tests.patience import PATIENCE, wait_for
from tests.programs import ROOT, gmemctl, output

pytestmark = [pytest.mark.e2e, needs_qemu]
MIB = 1 << 20
BACKEND = "memory-backend-memfd,id=ram,size={}M,share=on"
SANDBOX = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
TIMES = 20


@contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program, killed in the end."""
    with subprocess.Popen(words) as process:
        try:
            yield process
        finally:
            process.kill()


def holds(client: Client, name: str) -> list[tuple[int, int]]:
    """The processes that hold an object, and how much of it they map."""
    return [(holder["pid"], holder["mapped"]) for holder in client.execute("query-memdev-holders", {"id": name})]


def runner(client: Client, name: str) -> int | None:
    """The process that runs a guest on an object, as far as gmemd knows."""
    [status] = client.execute("query-memdev-status", {"id": name})
    return status.get("runner", {}).get("pid")


def total(guest: LinuxGuest) -> int:
    """What the guest says that it has, in KiB."""
    return int(guest.run("only", "sed -n 's/MemTotal: *//p' /proc/meminfo").split()[0])


def the_block(directory: Path, qmp: Path) -> list[str]:
    """The lines of docs/qemu.md about attaching, for this QEMU."""
    [text] = [text for word, text in blocks(ROOT / "docs/qemu.md") if word == "attach"]
    (directory / "vm1.sock").symlink_to(qmp)
    return text.replace("/tmp/", f"{directory}/").splitlines()


def test_a_captured_guest_gets_more_memory_and_gives_it_back(tmp_path: Path) -> None:
    """A QEMU in its sandbox runs its guest on an object without knowing; the guest takes a DIMM and gives it back,
    many times, and QEMU keeps no descriptor of it; what the guest had written outlives QEMU."""
    guest = LinuxGuest(tmp_path, size=256 * MIB)
    command = guest.command("only", "-m", "256M,slots=4,maxmem=1G", *SANDBOX, backend=BACKEND.format(256))
    with Daemon(kernel="simulated") as daemon, daemon.client(timeout=PATIENCE) as client:
        for name, size in (("ram0", 256 * MIB), ("more", 128 * MIB)):
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": name, "size": size})
        run = gmemctl("--socket", str(daemon.sock), "run", "--capture", "ram0", "--", *command)
        with running(*run) as qemu:
            guest.wait_started()
            assert (holds(client, "ram0"), runner(client, "ram0")) == ([(qemu.pid, 256 * MIB)], qemu.pid)
            assert "Seccomp:\t2" in Path(f"/proc/{qemu.pid}/status").read_text()
            _, [fd] = client.execute_fds("memdev-get-fd", {"id": "more"})
            there = os.fstat(fd)
            file = (there.st_dev, there.st_ino)
            had = total(guest)
            mark = guest.mark()
            with Qemu(str(guest.qmp("only")), PATIENCE) as monitor:
                for _ in range(TIMES):
                    done = attach(monitor, Memory("more", 128 * MIB, 0, fd), None, None, PATIENCE)
                    assert (done.driver, done.taken, done.guest) == ("pc-dimm", True, "has taken it")
                    detach(monitor, "more", file, PATIENCE)
                assert monitor.ask("query-fdsets") == []
            assert file not in {one.file for one in memfds(qemu.pid)}
            guest.check_went_on(mark, sums=1)
            client.execute("object-del", {"id": "more"})
            created, attached, detached = the_block(tmp_path, guest.qmp("only"))
            environment = user_environment(tmp_path, daemon)
            output(["sh", "-c", created], env=environment)
            assert output(["sh", "-c", attached], env=environment) == (
                "'more' is attached as a DIMM; the guest has taken it\n")
            assert holds(client, "more") == [(qemu.pid, 128 * MIB)]
            assert runner(client, "more") == qemu.pid
            wait_for(lambda: total(guest) > had)
            output(["sh", "-c", detached], env=environment)
            assert (holds(client, "more"), runner(client, "more")) == ([], None)
        os.close(fd)
        assert b"FILLED " in content(client)


@pytest.mark.kvm
def test_a_captured_guest_on_a_guest_memfd(tmp_path: Path) -> None:
    """QEMU boots Linux, by TCG, on a guest_memfd that no path of it leads to."""
    guest = LinuxGuest(tmp_path)
    with Daemon(kernel="kvm") as daemon, daemon.client(timeout=PATIENCE) as client:
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "gm0", "size": 128 * MIB,
                                      "guest-memfd": "on"})
        run = gmemctl("--socket", str(daemon.sock), "run", "--capture", "gm0", "--")
        with running(*run, *guest.command("only", backend=BACKEND.format(128))) as qemu:
            guest.wait_started()
            assert holds(client, "gm0") == [(qemu.pid, 128 * MIB)]
            with Client(guest.qmp("only"), timeout=PATIENCE) as monitor:
                monitor.execute("stop")
                mark = guest.mark()
                monitor.execute("cont")
            guest.check_went_on(mark, sums=1)
        assert client.execute("query-memdev-status")[0]["kernel"] == "kvm"


def test_an_adopted_guest_goes_on_in_another_qemu(tmp_path: Path) -> None:
    """The memory of a QEMU that knows nothing of gmemd is adopted; another QEMU takes its guest over, and when that is
    killed, the memory is as the guest had it when it was stopped."""
    guest = LinuxGuest(tmp_path)
    with Daemon(kernel="simulated") as daemon, daemon.client(timeout=PATIENCE) as client, \
            running(*guest.command("old", backend=BACKEND.format(128))) as qemu:
        guest.wait_started()
        words = gmemctl("--socket", str(daemon.sock), "adopt", "--pid", str(qemu.pid), "--id", "ram0")
        assert "ram0  memory-backend-memfd  128 MiB" in output(words)
        assert holds(client, "ram0") == [(qemu.pid, 128 * MIB)]
        replace = gmemctl("--socket", str(daemon.sock), "replace", "ram0", "--qmp", str(guest.qmp("old")), "--",
                          *guest.command("new"))
        mark = guest.mark()
        with running(*replace):
            qemu.wait(PATIENCE)
            guest.check_went_on(mark, sums=1)
            [(pid, _)] = holds(client, "ram0")
            with Client(guest.qmp("new"), timeout=PATIENCE, wait=PATIENCE) as monitor:
                monitor.execute("stop")
                before = content(client)
                assert b"FILLED " in before
                os.kill(pid, 9)
            wait_for(lambda: holds(client, "ram0") == [])
        assert content(client) == before


def content(client: Client) -> bytes:
    """That of ram0."""
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": "ram0"})
    with mmap.mmap(fd, 0) as ram:
        os.close(fd)
        return bytes(ram)
