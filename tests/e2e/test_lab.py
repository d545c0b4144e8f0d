"""The fault lab, leases and jobs of a real daemon: over sockets, with the keeper, and over its restart."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from gmemd.client.client import Client
from gmemd.client.running import children
from gmemd.errors import QmpError
from tests.daemon import Daemon
from tests.patience import wait_for
from tests.programs import ROOT
from tests.robustness.world import Link

PAGE = os.sysconf("SC_PAGESIZE")
MEMORY = {"qom-type": "memory-backend-guest-memfd", "id": "g", "size": 4 * PAGE}

# Leases the object `g` of the daemon at argv[1], and says so; ends with its input.
RECEIVER = """
import sys
from gmemd.client.client import Client
with Client(sys.argv[1]) as client:
    client.execute_fds("memdev-get-fd", {"id": "g", "lease": "keep"})
    print("leased", flush=True)
    sys.stdin.read()
"""


def refusal(client: Client, command: str, arguments: dict[str, object]) -> str:
    with pytest.raises(QmpError) as caught:
        client.execute(command, arguments)
    return caught.value.desc


def test_no_lab_without_the_option() -> None:
    """The command is not found."""
    with Daemon(kernel="simulated") as daemon, daemon.client() as client:
        assert refusal(client, "x-memdev-inject", {"operation": "create", "errno": "EIO"}) \
            == "The command x-memdev-inject has not been found"


def test_every_fault_over_a_socket() -> None:
    """Each is an error reply; the daemon keeps nothing of what failed, the store included; the retry works."""
    with Daemon("--keeper", "--lab", kernel="simulated", persist="on") as daemon, daemon.client() as client:
        def inject(operation: str, **how: object) -> None:
            client.execute("x-memdev-inject", {"operation": operation, **how})

        inject("create", errno="EMFILE")
        assert refusal(client, "object-add", MEMORY) == "Error creating KVM guest_memfd: Too many open files"
        inject("store", errno="ENOBUFS")
        assert refusal(client, "object-add", MEMORY).endswith("No buffer space available")
        assert client.execute("query-memdev") == []
        inject("store", delay=20)
        client.execute("object-add", MEMORY)
        inject("hand-out", errno="ENFILE")
        assert refusal(client, "memdev-get-fd", {"id": "g"}) == "cannot hand out 'g': Too many open files in system"
        fd = client.execute_fds("memdev-get-fd", {"id": "g"})[1][0]
        os.pwrite(fd, b"keep", PAGE)
        convert = {"id": "g", "offset": 0, "size": 2 * PAGE, "to": "private", "preserve": True}
        inject("store", errno="ENOBUFS")  # of the memfd that the preserved bytes are kept in
        assert "No buffer space" in refusal(client, "memdev-convert", convert)
        assert client.execute("query-memdev-ranges", {"id": "g"})["private"] == 0
        assert os.pread(fd, 4, PAGE) == b"keep"
        client.execute("memdev-convert", convert)
        assert os.pread(fd, 4, PAGE) == bytes(4)
        client.execute("memdev-convert", {**convert, "to": "shared"})
        assert os.pread(fd, 4, PAGE) == b"keep"
        os.close(fd)
        client.execute("object-del", {"id": "g"})


def test_a_lease_outlives_the_daemon(tmp_path: Path) -> None:
    """The next daemon finds the holder, refuses others, and says when it has ended."""
    with Daemon("--keeper", kernel="simulated", persist="on") as daemon:
        with daemon.client() as client:
            client.execute("object-add", MEMORY)
        receiver = subprocess.Popen([sys.executable, "-c", RECEIVER, str(daemon.sock)], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, cwd=ROOT)
        assert receiver.stdout is not None
        assert receiver.stdin is not None
        try:
            assert receiver.stdout.readline() == b"leased\n"
            daemon.kill()
            with daemon.client() as client:
                assert f"is leased to process {receiver.pid} " in refusal(client, "memdev-get-fd", {"id": "g"})
                receiver.kill()
                client.wait_event("MEMDEV_ORPHANED", 20)
                _, fds = client.execute_fds("memdev-get-fd", {"id": "g"})
                os.close(fds[0])
        finally:
            receiver.kill()
            receiver.wait()
            receiver.stdin.close()
            receiver.stdout.close()


def test_a_failed_flush_after_a_failed_conversion() -> None:
    """A failed conversion leaves no operation behind: later changes are made and answered."""
    with Daemon("--keeper", "--lab", kernel="simulated", persist="on") as daemon, daemon.client() as client:
        client.execute("object-add", MEMORY)
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": "g"})
        os.pwrite(fd, b"keep", 0)
        client.execute("x-memdev-inject", {"operation": "create", "errno": "ENOMEM"})
        convert = {"id": "g", "offset": 0, "size": PAGE, "to": "private", "preserve": True}
        assert refusal(client, "memdev-convert", convert) == "cannot convert 'g': Cannot allocate memory"
        client.execute("x-memdev-inject", {"operation": "store", "errno": "ENOBUFS"})
        other = {"qom-type": "memory-backend-memfd", "id": "h", "size": PAGE}
        assert "No buffer space" in refusal(client, "object-add", other)
        client.execute("object-add", other)
        client.execute("memdev-convert", convert)
        client.execute("memdev-convert", {**convert, "to": "shared"})
        assert os.pread(fd, 4, 0) == b"keep"
        os.close(fd)
        for name in ("g", "h"):
            client.execute("object-del", {"id": name})


def in_one_message(link: Link, *requests: tuple[str, dict[str, object]], fds: list[int] | None = None) -> list[str]:
    """What is wrong with each request, "" nothing."""
    link.replies.clear()
    link.send(list(requests), fds)
    link.wait(len(requests))
    return [reply["error"]["desc"] if "error" in reply else "" for reply in link.replies]


FAILING: tuple[str, dict[str, object]] = ("x-memdev-inject", {"operation": "store", "errno": "ENOBUFS"})


@pytest.mark.parametrize("persist", [False, True])
def test_what_changes_beside_its_custody(persist: bool) -> None:
    """What was acknowledged of an object comes back, though in the same turn it was to be kept no more, or again."""
    other: dict[str, object] = {"qom-type": "memory-backend-memfd", "id": "h", "size": PAGE}
    with Daemon("--keeper", "--lab", kernel="simulated", persist="on") as daemon:
        with daemon.client() as client:
            client.execute("object-add", MEMORY)
            client.execute("memdev-persist", {"id": "g", "persist": not persist})
        with closing(Link(str(daemon.sock))) as link:
            _, *said = in_one_message(
                link, FAILING, ("memdev-persist", {"id": "g", "persist": persist}),
                ("memdev-convert", {"id": "g", "offset": 0, "size": PAGE, "to": "private"}), ("object-add", other))
        daemon.kill()
        with daemon.client() as client:
            kept = [memdev["id"] for memdev in client.execute("query-memdev")]
            assert ("g" in kept) == (persist == (said[0] == ""))
            if "g" in kept:
                private = client.execute("query-memdev-ranges", {"id": "g"})["private"]
                assert private == (PAGE if said[1] == "" else 0)


@pytest.mark.parametrize("work", [{}, {"job-id": "j"}], ids=["work", "job"])
def test_what_was_not_adopted_keeps_its_name(work: dict[str, object]) -> None:
    """Also when somebody has begun to wait for it to be worked on."""
    fd = os.memfd_create("given", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE)
    with Daemon("--keeper", "--lab", kernel="simulated", persist="on") as daemon, \
            closing(Link(str(daemon.sock))) as link:
        in_one_message(link, ("getfd", {"fdname": "f"}), fds=[fd])
        adopt = ("memdev-adopt", {"id": "m", "fdname": "f", "require-seals": False})
        said = in_one_message(link, FAILING, adopt, ("memdev-populate", {"id": "m", **work}))
        assert [line != "" for line in said] == [False, True, not work]
        assert in_one_message(link, ("closefd", {"fdname": "f"})) == [""]
    os.close(fd)


def test_a_job_over_a_socket() -> None:
    """Its events arrive, its digests are the contents', and a cancelled one leaves the daemon as it was."""
    with Daemon(kernel="simulated") as daemon, daemon.client() as client:
        client.execute("object-add", MEMORY)
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": "g"})
        os.pwrite(fd, b"x" * PAGE, 0)
        os.close(fd)
        client.execute("memdev-verify", {"id": "g", "job-id": "v", "chunk": PAGE})
        states = [client.wait_event("JOB_STATUS_CHANGE", 20)["data"]["status"] for _ in range(5)]
        assert states == ["created", "running", "waiting", "pending", "concluded"]
        assert [digest["offset"] for digest in client.execute("query-memdev-digests", {"job-id": "v"})] == [0]
        before = daemon.open_fds()
        client.execute("memdev-verify", {"id": "g", "job-id": "w"})
        client.execute("job-cancel", {"id": "w"})
        wait_for(lambda: client.execute("query-jobs")[0]["status"] == "concluded")
        assert daemon.settled_fds(before) <= before  # a daemon that has just started closes some of its own, too


def test_a_daemon_ends_while_a_job_runs() -> None:
    """It ends cleanly, and its worker with it."""
    with Daemon(kernel="simulated") as daemon, daemon.client() as client:
        client.execute("object-add", {**MEMORY, "size": 64 << 20})
        client.execute("memdev-populate", {"id": "g"})
        client.execute("memdev-verify", {"id": "g", "job-id": "v", "chunk": PAGE})
        wait_for(lambda: children(daemon.pid))
        [worker] = children(daemon.pid)
        assert daemon.stop() == 0
        wait_for(lambda: not Path(f"/proc/{worker}").exists())
