"""Leases: one writer, tied to a process; orphans and their policy; over a restart of the daemon."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Coroutine
from typing import Any

import pytest

from gmemd.changes.change import WithFds
from gmemd.changes.completed import completed
from gmemd.commands.fences import choose
from gmemd.commands.fencing import Fence
from gmemd.commands.lease import watch_leases
from gmemd.errors import QmpError
from gmemd.memory.lease import Lease
from gmemd.objects.records import backend_of, record_of
from gmemd.processes.identity import command_name, start_time
from tests.commands.live import LiveMachine, end, idle_process, with_memfd

PAGE = os.sysconf("SC_PAGESIZE")


live = with_memfd(PAGE)


other = pytest.fixture(idle_process, name="other")


async def get(machine: LiveMachine, **how: object) -> None:
    """Get the object's fd, and close it."""
    reply = await machine.do("memdev-get-fd", id="m", **how)
    assert isinstance(reply, WithFds)
    os.close(reply.fds.pop())


async def test_no_lease_by_default(live: LiveMachine) -> None:
    """Without a lease anybody may have the memory, as often as they like."""
    await get(live)
    await get(live)
    assert await live.do("query-memdev-leases") == []


async def test_a_second_writer_is_refused(live: LiveMachine, other: subprocess.Popen[bytes]) -> None:
    """By name, with what would help; the holder itself may have it again; force takes it."""
    live.pid = other.pid
    await get(live, lease="keep")
    await get(live)
    live.pid = os.getpid()
    refusal = f"object 'm' is leased to process {other.pid} ({command_name(other.pid)}): a second writer needs 'force'"
    assert await live.refused("memdev-get-fd", id="m") == refusal
    assert await live.refused("memdev-get-fd", id="m", lease="keep") == refusal
    assert await live.refused("memdev-release", id="m") == refusal
    await get(live, force=True)
    assert [lease["pid"] for lease in await live.do("query-memdev-leases")] == [other.pid]
    await get(live, force=True, lease="delete", delete_after=7)
    assert await live.do("query-memdev-leases") == [
        {"id": "m", "pid": os.getpid(), "uid": os.getuid(), "policy": "delete", "delete-after": 7, "fences": False,
         "orphaned": False}]
    end(other)
    await live.do("memdev-release", id="m")
    assert live.events == []


async def test_the_end_of_the_holder(live: LiveMachine, other: subprocess.Popen[bytes]) -> None:
    """It leaves an orphan, which is announced and may be taken by anybody."""
    live.pid = other.pid
    await get(live, lease="keep")
    end(other)
    assert await live.wait_event("MEMDEV_ORPHANED") == {"id": "m", "pid": other.pid, "uid": os.getuid(),
                                                        "policy": "keep"}
    assert (await live.do("query-memdev-leases"))[0]["orphaned"] is True
    live.pid = os.getpid()
    await get(live)
    assert await live.do("query-memdev-leases") == []


async def test_an_orphan_is_deleted(live: LiveMachine, other: subprocess.Popen[bytes]) -> None:
    """Where the lease said so, after its time."""
    live.pid = other.pid
    await get(live, lease="delete")
    end(other)
    await live.wait_event("MEMDEV_EXPIRED", id="m")
    assert [name for name, _ in live.events] == ["MEMDEV_ORPHANED", "MEMDEV_EXPIRED"]
    assert await live.refused("memdev-get-fd", id="m") == "object 'm' not found"


async def test_an_orphan_that_is_taken_stays(live: LiveMachine, other: subprocess.Popen[bytes]) -> None:
    """The next receiver ends the wait for the deletion."""
    live.pid = other.pid
    await get(live, lease="delete", delete_after=3600)
    end(other)
    await live.wait_event("MEMDEV_ORPHANED")
    live.pid = os.getpid()
    await get(live, lease="keep")
    assert [lease["policy"] for lease in await live.do("query-memdev-leases")] == ["keep"]


async def test_an_orphan_that_is_taken_in_time_stays(live: LiveMachine, other: subprocess.Popen[bytes]) -> None:
    """In time is until it is deleted: also in the turn since its time was over."""
    live.pid = other.pid
    await get(live, lease="delete")
    live.pid = os.getpid()
    spawn, due = live.spawn, asyncio.Event()

    def taken_first(work: Coroutine[Any, Any, None]) -> None:
        taken.append(live.dispatch("memdev-get-fd", id="m", lease="keep"))
        spawn(work)
        due.set()

    taken: list[Any] = []
    live.gmemd.spawn = taken_first
    end(other)
    await due.wait()
    await asyncio.gather(*live.tasks)
    for fd in (await completed(taken[0])).fds:
        os.close(fd)
    assert [lease["policy"] for lease in await live.do("query-memdev-leases")] == ["keep"]


async def test_deleting_ends_the_lease(live: LiveMachine, other: subprocess.Popen[bytes]) -> None:
    """Nothing is watched any more."""
    live.pid = other.pid
    await get(live, lease="delete")
    await live.do("object-del", id="m")
    end(other)
    await asyncio.sleep(0)
    assert live.events == []


async def test_who_cannot_lease(live: LiveMachine, other: subprocess.Popen[bytes]) -> None:
    """A process that has ended, or that this one does not see; a time without the policy."""
    assert await live.refused("memdev-get-fd", id="m", lease="keep", delete_after=1) \
        == "parameter 'delete-after' needs 'lease' to be 'delete'"
    end(other)
    for live.pid in (other.pid, 0):
        assert await live.refused("memdev-get-fd", id="m", lease="keep") \
            == "cannot lease 'm': the receiving process is not visible from here"
    live.pid = os.getpid()
    assert await live.refused("memdev-release", id="m") == "object 'm' is not leased"
    assert live.gmemd.objects.find("m").handed_out == 0


@pytest.mark.parametrize("ended", [False, True])
async def test_a_restart_finds_the_holder_again(live: LiveMachine, other: subprocess.Popen[bytes],
                                                ended: bool) -> None:
    """By its id and start time; one that ended meanwhile, or whose id another process has now, left an orphan."""
    live.pid = other.pid
    await get(live, lease="keep")
    backend = live.gmemd.objects.find("m")
    record = record_of(backend, live.gmemd.kernel)
    next_one = LiveMachine()
    next_one.gmemd.objects.restore([backend_of(record, os.dup(backend.fd), next_one.gmemd.schema)])
    await live.do("object-del", id="m")
    if ended:
        record.extra["lease"][1] += 1
        next_one.gmemd.objects.find("m").lease = Lease(*record.extra["lease"])
    watch_leases(next_one.gmemd)
    assert [name for name, _ in next_one.events] == ["MEMDEV_ORPHANED"] * ended
    end(other)
    await next_one.wait_event("MEMDEV_ORPHANED", pid=other.pid)
    await next_one.close()


def test_start_times() -> None:
    """A process has one while it lives."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    assert isinstance(start_time(process.pid), int)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(process.pid) is None  # a zombie
    process.communicate()
    assert start_time(process.pid) is None
    assert command_name(process.pid) == "?"


# -- fences ------------------------------------------------------------------------------------------

def fence_of(machine: LiveMachine, **asked: Any) -> Fence:
    return choose(machine.gmemd, machine, machine.gmemd.objects.find("m"), asked or None)


async def test_a_holder_fences(live: LiveMachine, other: subprocess.Popen[bytes]) -> None:
    """It is asked, answers, and hears when it may go on; others cannot answer for it."""
    live.pid = other.pid
    await get(live, lease="keep", fences=True)
    assert (await live.do("query-memdev-leases"))[0]["fences"]
    fence = fence_of(live, deadline=60000, via="lease")
    holding = asyncio.ensure_future(fence.hold())
    asked = await live.wait_event("MEMDEV_PREPARE", id="m", pid=other.pid, deadline=60000)
    live.pid = os.getpid()
    assert await live.refused("memdev-prepared", id="m", fence=asked["fence"]) \
        == "object 'm' is not leased to the calling process"
    live.pid = other.pid
    assert await live.refused("memdev-prepared", id="m", fence="x") == "nobody waits for the fence 'x' of 'm'"
    assert not holding.done()
    await live.do("memdev-prepared", id="m", fence=asked["fence"])
    await holding
    assert "MEMDEV_DONE" not in [name for name, _ in live.events]
    await fence.release()
    assert live.events[-1] == ("MEMDEV_DONE", {"id": "m", "fence": asked["fence"]})
    assert "nobody waits" in await live.refused("memdev-prepared", id="m", fence=asked["fence"])


async def test_a_holder_that_does_not_fence(live: LiveMachine, other: subprocess.Popen[bytes]) -> None:
    """It refuses, says nothing, or ends: the fence is not held, and the holder hears that it is over."""
    live.pid = other.pid
    assert await live.refused("memdev-get-fd", id="m", fences=True) == "parameter 'fences' needs 'lease'"
    with pytest.raises(QmpError, match=r"^object 'm' is not leased$"):
        await fence_of(live, via="lease").hold()
    await get(live, lease="keep")
    who = f"process {other.pid} ({command_name(other.pid)})"
    with pytest.raises(QmpError) as caught:
        await fence_of(live, via="lease").hold()
    assert caught.value.desc == f"{who} took the lease of 'm' without 'fences'"
    await get(live, lease="keep", fences=True)
    with pytest.raises(QmpError) as caught:
        await fence_of(live, via="lease", deadline=20).hold()
    assert caught.value.desc == f"{who} has not answered MEMDEV_PREPARE in 20 ms"
    assert [name for name, _ in live.events] == ["MEMDEV_PREPARE", "MEMDEV_DONE"]
    live.events.clear()
    holding = asyncio.ensure_future(fence_of(live, via="lease").hold())
    asked = await live.wait_event("MEMDEV_PREPARE")
    await live.do("memdev-prepared", id="m", fence=asked["fence"], error="a disk is being attached")
    with pytest.raises(QmpError) as caught:
        await holding
    assert caught.value.desc == f"{who} does not fence 'm': a disk is being attached"
    live.events.clear()
    holding = asyncio.ensure_future(fence_of(live, via="lease").hold())
    await live.wait_event("MEMDEV_PREPARE")
    end(other)
    with pytest.raises(QmpError, match=r"does not fence 'm': it has ended$"):
        await holding


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
async def test_a_holder_that_cannot_be_seen_is_none_that_is_not_there(live: LiveMachine,
                                                                      other: subprocess.Popen[bytes]) -> None:
    """Another user's process that holds the lease may write, although nothing of it can be inspected."""
    live.pid = other.pid
    await get(live, lease="keep")
    os.seteuid(65534)
    try:
        with pytest.raises(QmpError, match=f"cannot see whether process {other.pid} .* holds 'm': Permission denied"):
            await fence_of(live, via="idle").hold()
    finally:
        os.seteuid(0)
    await fence_of(live, via="idle").hold()
