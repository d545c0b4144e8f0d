"""Fences: who writes an object's memory stands still while it is held, and goes on afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest

from gmemd.commands.fences import choose, recover
from gmemd.commands.fencing import Fence, held
from gmemd.errors import QmpError
from gmemd.kernel.program import is_own
from gmemd.processes.identity import start_time
from tests.commands.live import LiveMachine, with_memfd
from tests.patience import wait_for

PAGE = os.sysconf("SC_PAGESIZE")
PAGES = 64
SIZE = PAGES * PAGE

# Writes 1, 2, 3, ... into the pages in turn, in several threads each its own part; "r" on standard output once it does.
WRITER = f"""
import mmap, struct, sys, threading
memory = mmap.mmap(int(sys.argv[1]), {SIZE})
threads = int(sys.argv[2])
def write(part):
    n = 0
    while True:
        n += 1
        for page in range(part, {PAGES}, threads):
            struct.pack_into("<Q", memory, page * {PAGE}, n)
for part in range(1, threads):
    threading.Thread(target=write, args=(part,), daemon=True).start()
print("r", flush=True)
write(0)
"""


@contextlib.contextmanager
def writing(fd: int, threads: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A process that writes the memory all the time."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(fd), str(threads)], pass_fds=(fd,),
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "r\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


live = with_memfd(SIZE)


def fd_of(machine: LiveMachine) -> int:
    return machine.gmemd.objects.find("m").fd


def fence_of(machine: LiveMachine, **asked: Any) -> Fence:
    """One without a deadline that a busy machine could reach, unless one is asked for."""
    return choose(machine.gmemd, machine, machine.gmemd.objects.find("m"), {"deadline": 600_000, **asked})


def content(fd: int) -> bytes:
    with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as memory:
        return memory[:]


async def is_still(fd: int) -> bool:
    """Whether nothing is written for a while."""
    before = content(fd)
    await asyncio.sleep(0.02)
    return content(fd) == before


def goes_on(fd: int) -> None:
    before = content(fd)
    wait_for(lambda: content(fd) != before)


async def refusal(fence: Fence) -> str:
    with pytest.raises(QmpError) as caught:
        await fence.hold()
    return caught.value.desc


async def test_nobody_holds_it(live: LiveMachine) -> None:
    """Then nobody is stopped, and auto finds that out."""
    for asked in ({}, {"via": "idle"}):
        fence = fence_of(live, **asked)
        async with held(fence):
            assert (fence.via, fence.consistent) == ("idle", True)


async def test_a_holder_is_not_idle(live: LiveMachine) -> None:
    with writing(fd_of(live)) as writer:
        assert await refusal(fence_of(live, via="idle")) == f"object 'm' is held by process {writer.pid} " \
            f"({Path(f'/proc/{writer.pid}/comm').read_text().strip()})"
    async with held(fence_of(live, via="idle")):
        pass


async def test_what_is_handed_out_meanwhile_is_not_of_one_moment(live: LiveMachine) -> None:
    fence = fence_of(live)
    await fence.hold()
    os.close((await live.do("memdev-get-fd", id="m")).fds[0])
    with pytest.raises(QmpError, match="was handed out while it was fenced"):
        await fence.release()


async def test_unfenced_is_never_consistent(live: LiveMachine) -> None:
    fence = fence_of(live, via="unfenced")
    with writing(fd_of(live)):
        async with held(fence):
            assert not fence.consistent
            goes_on(fd_of(live))


@pytest.mark.parametrize("threads", [1, 4])
async def test_freezing_stops_every_thread(live: LiveMachine, threads: int) -> None:
    """Nothing is written while it is held, and everything goes on afterwards; the whole is of one moment."""
    with writing(fd_of(live), threads), writing(fd_of(live)):
        fence = fence_of(live)
        async with held(fence):
            assert fence.via == "freeze"
            assert await is_still(fd_of(live))
            assert live.gmemd.objects.find("m").fence is not None
        goes_on(fd_of(live))
        assert fence.pause >= 0.02
        assert live.gmemd.objects.find("m").fence is None


async def test_who_was_stopped_before_stays_so(live: LiveMachine) -> None:
    """Only what gmemd has stopped goes on."""
    with writing(fd_of(live)) as writer:
        writer.send_signal(signal.SIGSTOP)
        wait_for(lambda: state(writer.pid) == "T")
        async with held(fence_of(live, via="freeze")):
            pass
        assert state(writer.pid) == "T"
        writer.send_signal(signal.SIGCONT)
        goes_on(fd_of(live))


async def test_who_is_continued_meanwhile_is_noticed(live: LiveMachine) -> None:
    with writing(fd_of(live)) as writer:
        fence = fence_of(live, via="freeze")
        await fence.hold()
        writer.send_signal(signal.SIGCONT)
        goes_on(fd_of(live))
        writer.send_signal(signal.SIGSTOP)
        wait_for(lambda: state(writer.pid) == "T")
        with pytest.raises(QmpError, match="was continued by somebody else"):
            await fence.release()
        goes_on(fd_of(live))


async def test_who_is_killed_meanwhile_has_written_nothing(live: LiveMachine) -> None:
    with writing(fd_of(live)) as writer:
        async with held(fence_of(live, via="freeze")):
            writer.kill()
            wait_for(lambda: start_time(writer.pid) is None)


async def test_the_deadline_lets_go_on(live: LiveMachine) -> None:
    """Whatever became of the one who holds the fence."""
    with writing(fd_of(live)):
        fence = fence_of(live, via="freeze", deadline=1000)
        lost = asyncio.Event()
        fence.lost = lost.set
        await fence.hold()
        async with asyncio.timeout(60):
            await lost.wait()
            while live.gmemd.objects.find("m").fence is not None:
                await asyncio.sleep(0.001)
        goes_on(fd_of(live))
        with pytest.raises(QmpError, match="the deadline of 1000 ms has passed: 'm' is no longer fenced"):
            await fence.release()
        async with held(fence_of(live, via="freeze")):
            pass


async def test_one_fence_at_a_time(live: LiveMachine) -> None:
    with writing(fd_of(live)):
        async with held(fence_of(live)):
            assert await refusal(fence_of(live)) == "object 'm' is fenced already, by 'freeze'"
            assert await is_still(fd_of(live))


async def test_an_error_lets_go_on(live: LiveMachine) -> None:
    """And is what the caller sees; a cancelled task does so too."""
    with writing(fd_of(live)):
        with pytest.raises(ZeroDivisionError):
            async with held(fence_of(live)):
                raise ZeroDivisionError
        goes_on(fd_of(live))

        async def wait() -> None:
            async with held(fence_of(live)):
                await asyncio.sleep(3600)

        task = asyncio.ensure_future(wait())
        while live.gmemd.objects.find("m").fence is None:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        goes_on(fd_of(live))
        assert live.gmemd.objects.find("m").fence is None


async def test_a_crash_leaves_a_note(live: LiveMachine) -> None:
    """The next daemon lets go on what it says: not one that has the number of an ended process."""
    backend = live.gmemd.objects.find("m")
    with writing(fd_of(live)) as writer, writing(fd_of(live)) as other:
        fence = fence_of(live, via="freeze")
        await fence.hold()
        note = backend.fence
        assert note is not None
        assert {pid for pid, _ in note["processes"]} == {writer.pid, other.pid}
        note["processes"] = [[writer.pid, start_time(writer.pid)], [other.pid, (start_time(other.pid) or 0) + 1]]
        recover(live.gmemd)  # as the next daemon finds the note
        async with asyncio.timeout(60):
            while backend.fence is not None:
                await asyncio.sleep(0.001)
        goes_on(fd_of(live))
        assert state(writer.pid) != "T"
        assert state(other.pid) == "T"
        with pytest.raises(QmpError):
            await fence.release()


async def test_the_guard_lets_go_on(live: LiveMachine) -> None:
    """When the daemon ends, which closes its pipe; the daemon notices if it lives."""
    with writing(fd_of(live)):
        fence = fence_of(live, via="freeze")
        await fence.hold()
        assert fence._guard is not None
        assert fence._guard._process.stdin is not None
        fence._guard._process.stdin.close()
        await fence._guard._process.stdin.wait_closed()  # or goes_on() would keep the loop from closing it
        goes_on(fd_of(live))
        with pytest.raises(QmpError, match="was continued by somebody else"):
            await fence.release()


@pytest.mark.parametrize(("asked", "words"), [
    ({"via": "qmp"}, "a fence by 'qmp' needs parameter 'qmp'"),
    ({"via": "idle", "qmp": "/x"}, "parameter 'qmp' is for a fence by 'qmp'"),
    ({"via": "freeze", "fdname": "u"}, "parameter 'fdname' is for a fence by 'write-protect'"),
    ({"via": "write-protect", "fdname": "u"}, "a fence by 'write-protect' needs parameter 'address'"),
    ({"deadline": 0}, "parameter 'deadline' must not be 0"),
])
async def test_what_is_refused(live: LiveMachine, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(QmpError) as caught:
        fence_of(live, **asked)
    assert caught.value.desc == words


async def test_a_worker_is_not_a_holder(live: LiveMachine) -> None:
    """gmemd's own processes read while the fence is held: they are not stopped, nor counted."""
    await live.do("memdev-verify", id="m", job_id="j")
    async with held(fence_of(live, via="idle")):
        pass
    await live.ended("j")
    assert not is_own(1)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


CGROUPS = next((Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()
                if " - cgroup2 " in line), None)


@pytest.mark.skipif(CGROUPS is None or not os.access(CGROUPS, os.W_OK), reason="needs control groups of its own")
async def test_a_control_group_of_holders_is_frozen(live: LiveMachine) -> None:
    """Without a signal, so that nobody's parent sees it stop; one with others in it is not."""
    assert CGROUPS is not None
    group = CGROUPS / f"gmemd-test-{os.getpid()}"
    group.mkdir()
    try:
        with writing(fd_of(live)) as writer:
            (group / "cgroup.procs").write_text(str(writer.pid))
            fence = fence_of(live, via="freeze")
            async with held(fence):
                assert (group / "cgroup.freeze").read_text() == "1\n"
                assert state(writer.pid) != "T"
                assert await is_still(fd_of(live))
            goes_on(fd_of(live))
            with subprocess.Popen(["sleep", "1000"]) as bystander:
                (group / "cgroup.procs").write_text(str(bystander.pid))
                async with held(fence_of(live, via="freeze")):
                    assert (group / "cgroup.freeze").read_text() == "0\n"
                    assert state(writer.pid) == "T"
                    assert state(bystander.pid) == "S"
                bystander.kill()
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


async def test_a_tenant_stops_its_own_processes_only(live: LiveMachine) -> None:
    """Its memory may be held by another user's process, to which it was passed: that is not stopped for it."""
    with writing(fd_of(live)) as process:
        room = copy(live.gmemd)
        room.sees_all = False
        for via in ("freeze", "auto"):
            room.tenant = str(os.getuid() + 1)
            fence = choose(room, live, live.gmemd.objects.find("m"), {"via": via})
            with pytest.raises(QmpError, match=f"^process {process.pid}, which is another user's, holds the memory"):
                await fence.hold()
            assert state(process.pid) in "RS"
            room.tenant = str(os.getuid())
            async with held(choose(room, live, live.gmemd.objects.find("m"), {"via": via})):
                assert state(process.pid) == "T"
