"""Fences by write protection: the holder goes on writing, and what is saved is the memory of one moment."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gmemd.commands.fences import choose
from gmemd.commands.fencing import Fence, held
from gmemd.errors import QmpError
from gmemd.kernel import userfault
from tests.commands.guest import SIGBUS_FEATURE, Guest, hand_over
from tests.commands.live import LiveMachine, with_memfd
from tests.patience import wait_for
from tests.snapshots.engine import MEMBERS, Engine, restore, running

PAGE = os.sysconf("SC_PAGESIZE")
PAGES = 1024
SIZE = PAGES * PAGE
SYNC = userfault.UFFD_FEATURE_WP_UNPOPULATED | userfault.UFFD_FEATURE_WP_HUGETLBFS_SHMEM


live = with_memfd(SIZE)


def fd_of(machine: LiveMachine) -> int:
    return machine.gmemd.objects.find("m").fd


def fence_of(machine: LiveMachine, guest: Guest) -> Fence:
    return choose(machine.gmemd, machine, machine.gmemd.objects.find("m"),
                  {"via": "write-protect", "fdname": "u", "address": guest.address}, protecting=True)


def numbers(data: bytes) -> list[int]:
    return [int(struct.unpack_from("<Q", data, page * PAGE)[0]) for page in range(len(data) // PAGE)]


def goes_on(machine: LiveMachine) -> None:
    before = os.pread(fd_of(machine), SIZE, 0)
    wait_for(lambda: os.pread(fd_of(machine), SIZE, 0) != before)


def saving(root: Path, machine: LiveMachine, fence: Fence) -> Any:
    assert fence.protect is not None
    spec = {"name": "s", "size": SIZE, "id": "m", "memory": {"fd": fd_of(machine), **fence.protect}}
    return running("save", spec, root, [fd_of(machine), fence.protect["uffd"]])


def finish(engine: Engine) -> None:
    engine.heard("ready")
    engine.tell({"pass": {"dirty": None}})
    engine.heard("passed")
    engine.tell({"finish": MEMBERS})
    engine.heard("end")


async def test_it_is_of_one_moment(live: LiveMachine, tmp_path: Path) -> None:
    """All the numbers that were written in one round, and the writer has gone on meanwhile and goes on afterwards."""
    with Guest(fd_of(live), SIZE, SYNC) as guest:
        await hand_over(live, guest)
        guest.ask("run", 0)
        wait_for(lambda: min(numbers(os.pread(fd_of(live), SIZE, 0))) > 0)
        fence = fence_of(live, guest)
        async with held(fence):
            assert fence.consistent
            with saving(tmp_path, live, fence) as engine:
                finish(engine)
        goes_on(live)
        assert userfault.modes(guest.process.pid, guest.address, SIZE)[0][2] == 0
    target = os.memfd_create("target")
    os.truncate(target, SIZE)
    restore(tmp_path, "s", target)
    found = numbers(os.pread(target, SIZE, 0))
    assert sorted(found) == list(range(max(found) - PAGES + 1, max(found) + 1))
    os.close(target)


async def test_pages_that_did_not_exist_are_zeros(live: LiveMachine, tmp_path: Path) -> None:
    """Also where the guest has created them before they were read."""
    with Guest(fd_of(live), SIZE, SYNC) as guest:
        await hand_over(live, guest)
        os.pwrite(fd_of(live), b"\xff" * 8, 5 * PAGE)
        async with held(fence_of(live, guest)) as fence:
            with saving(tmp_path, live, fence) as engine:
                guest.ask("run", 0)
                finish(engine)
    found = sorted({*numbers((tmp_path / "s" / "memory.raw").read_bytes())} - {0, (1 << 64) - 1})
    assert not found or found == list(range(found[0], found[-1] + 1))


async def test_a_snapshot_of_a_running_guest(tmp_path: Path) -> None:
    """By the command: what is restored is of one moment, and the manifest says how."""
    machine = LiveMachine(snapshots=str(tmp_path))
    await machine.do("object-add", qom_type="memory-backend-memfd", id="m", size=SIZE)
    with Guest(fd_of(machine), SIZE, SYNC) as guest:
        await hand_over(machine, guest)
        guest.ask("run", 0)
        wait_for(lambda: min(numbers(os.pread(fd_of(machine), SIZE, 0))) > 0)
        await machine.do("memdev-snapshot", id="m", name="s", fence={
            "via": "write-protect", "fdname": "u", "address": guest.address, "deadline": 600000})
        goes_on(machine)
    [found] = await machine.do("query-memdev-snapshots")
    assert (found["via"], found["consistent"]) == ("write-protect", True)
    await machine.do("memdev-restore", name="s", id="n")
    values = numbers(os.pread(machine.gmemd.objects.find("n").fd, SIZE, 0))
    assert sorted(values) == list(range(max(values) - PAGES + 1, max(values) + 1))
    await machine.close()


async def test_a_killed_reader_lets_the_holder_go_on(live: LiveMachine, tmp_path: Path) -> None:
    """With the last copy of the userfaultfd gone nothing faults any more."""
    with Guest(fd_of(live), SIZE, SYNC) as guest:
        await hand_over(live, guest)
        guest.ask("run", 0)
        fence = fence_of(live, guest)
        await fence.hold()
        with saving(tmp_path, live, fence) as engine:
            engine.heard("ready")
            engine.tell({"pass": {"dirty": None}})
            engine.heard("done", "passed")
            engine.process.kill()
        await fence.release()
        goes_on(live)
        assert userfault.modes(guest.process.pid, guest.address, SIZE)[0][2] == 0


async def test_what_is_refused(live: LiveMachine) -> None:
    """A userfaultfd that the process has, too, or that tells nobody; others that write."""
    with Guest(fd_of(live), SIZE, SIGBUS_FEATURE | SYNC) as guest:
        await hand_over(live, guest)
        with pytest.raises(QmpError, match="does not report faults to anybody"):
            fence_of(live, guest)
        await live.do("closefd", fdname="u")
    with Guest(fd_of(live), SIZE, SYNC) as guest:
        kept = os.dup(guest.uffd)
        await hand_over(live, guest)
        with subprocess.Popen(["sleep", "1000"], pass_fds=(fd_of(live),)) as other:
            with pytest.raises(QmpError) as caught:
                await fence_of(live, guest).hold()
            assert caught.value.desc == \
                f"object 'm' is also held by process {other.pid} (sleep), which is not write-protected"
            other.kill()
        live.pid = os.getpid()  # as if it were this process's, which has another copy
        assert userfault.is_kept(os.getpid(), kept)
        assert not userfault.is_kept(guest.process.pid, kept)
        live.pid = guest.process.pid
        userfault.register_only(kept, guest.address, SIZE, userfault.WP)
        with pytest.raises(QmpError, match="has registered its mapping of 'm' already"):
            await fence_of(live, guest).hold()
        os.close(kept)
