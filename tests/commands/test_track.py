"""A real second process hands its userfaultfd over: what it writes is known, page by page."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gmemd.kernel import userfault
from gmemd.memory.tracking import Tracking
from tests.commands.cooperating import userfaultfd
from tests.commands.guest import Guest, hand_over
from tests.commands.live import LiveMachine, with_memfd
from tests.patience import PATIENCE

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 16 * PAGE
BLOCK = 64 << 10
ASYNC = (userfault.UFFD_FEATURE_WP_ASYNC | userfault.UFFD_FEATURE_WP_UNPOPULATED
         | userfault.UFFD_FEATURE_WP_HUGETLBFS_SHMEM)


def _can_track() -> bool:
    with open("/proc/self/pagemap", "rb") as pagemap, suppress(OSError):
        userfault.written(pagemap.fileno(), 0x1000, PAGE)
        return True
    return False


pytestmark = pytest.mark.skipif(not _can_track(), reason="needs PAGEMAP_SCAN (Linux 6.7)")


live = with_memfd(SIZE)


@contextmanager
def guest_of(machine: LiveMachine, features: int = ASYNC, size: int = SIZE) -> Iterator[Guest]:
    with Guest(machine.gmemd.objects.find("m").fd, size, features) as guest:
        yield guest


async def track(machine: LiveMachine, guest: Guest) -> int:
    await hand_over(machine, guest)
    mark: int = (await machine.do("memdev-track", id="m", fdname="u", address=guest.address))["mark"]
    return mark


async def dirty(machine: LiveMachine, since: int) -> tuple[int, set[int]]:
    """The next mark, and the numbers of the pages."""
    found = await machine.do("query-memdev-dirty", id="m", since=since)
    assert found["bytes"] == sum(one["size"] for one in found["ranges"])
    return found["mark"], {page for one in found["ranges"]
                           for page in range(one["offset"] // PAGE, (one["offset"] + one["size"]) // PAGE)}


async def test_exactly_what_was_written(live: LiveMachine) -> None:
    """Reading is not writing, pages in memory or not; each user's marks are its own."""
    fd = live.gmemd.objects.find("m").fd
    os.pwrite(fd, b"x" * 4 * PAGE, 0)
    with guest_of(live) as guest:
        first = await track(live, guest)
        assert (await dirty(live, first))[1] == set()
        for page in (1, 2, 9):
            guest.ask("put", page * PAGE)
        for page in (3, 4, 10):
            guest.ask("touch", page * PAGE)
        second, found = await dirty(live, first)
        assert found == {1, 2, 9}
        guest.ask("put", 2 * PAGE)
        guest.ask("put", 4 * PAGE)
        third, found = await dirty(live, second)
        assert found == {2, 4}
        assert (await dirty(live, third))[1] == set()
        assert (await dirty(live, first))[1] == {1, 2, 4, 9}
        assert "is not known" in await live.refused("query-memdev-dirty", id="m", since=third + 10)


async def test_what_is_unmapped_was_written(live: LiveMachine) -> None:
    """Nothing is lost where the process drops a page from its mapping; what gmemd changes counts, too."""
    with guest_of(live) as guest:
        mark = await track(live, guest)
        guest.ask("put", 5 * PAGE)
        assert guest.ask("drop", 5 * PAGE) == "ok"
        await live.do("memdev-discard", id="m", offset=8 * PAGE, size=2 * PAGE)
        mark, found = await dirty(live, mark)
        assert found == {5, 8, 9}
        assert guest.ask("touch", 5 * PAGE) == "77"
        assert (await dirty(live, mark))[1] == set()


async def test_many_marks_and_writes(live: LiveMachine) -> None:
    """Against a plain model: never less than was written, and exactly that since the last few marks."""
    random, history = Random(5), []
    with guest_of(live) as guest:
        marks = [await track(live, guest)]
        for _ in range(30):
            pages = {random.randrange(16) for _ in range(random.randrange(4))}
            for page in pages:
                guest.ask("put", page * PAGE)
            history.append(pages)
            back = random.randrange(1, len(marks) + 1)
            mark, found = await dirty(live, marks[-back])
            expected = set().union(*history[-back:])
            assert found >= expected
            assert back > 10 or found == expected
            marks.append(mark)


async def test_it_ends_with_the_process(live: LiveMachine) -> None:
    """What it has written in the end is not known; the next process begins a new account."""
    with guest_of(live) as guest:
        mark = await track(live, guest)
    async with asyncio.timeout(PATIENCE):
        while live.gmemd.objects.find("m").tracking is not None:
            await asyncio.sleep(0)
    assert await live.refused("query-memdev-dirty", id="m", since=mark) == "object 'm' is not tracked"
    with guest_of(live) as guest:
        mark = await track(live, guest)
        guest.ask("put", 0)
        assert (await dirty(live, mark))[1] == {0}


async def test_others_that_can_write_make_it_unknown(live: LiveMachine) -> None:
    """While they are there, and for the time in which they were."""
    with guest_of(live) as guest:
        mark = await track(live, guest)
        reply = await live.do("memdev-get-fd", id="m")
        with subprocess.Popen(["sleep", "1000"], pass_fds=reply.fds) as other:
            assert await live.refused("query-memdev-dirty", id="m", since=mark) == \
                f"object 'm' is also held by process {other.pid} (sleep), whose writes are not tracked"
            other.kill()
        os.close(reply.fds.pop())
        assert "is not known" in await live.refused("query-memdev-dirty", id="m", since=mark)
        mark = live.gmemd.objects.find("m").tracking.now  # type: ignore[union-attr]
        guest.ask("put", 0)
        assert (await dirty(live, mark))[1] == {0}


async def test_two_processes_are_tracked(live: LiveMachine) -> None:
    with guest_of(live) as one, guest_of(live) as two:
        await track(live, one)
        mark = await track(live, two)
        one.ask("put", 3 * PAGE)
        two.ask("put", 7 * PAGE)
        mark, found = await dirty(live, mark)
        assert found == {3, 7}
        await live.do("memdev-untrack", id="m", pid=one.process.pid)
        assert "is also held by process" in await live.refused("query-memdev-dirty", id="m", since=mark)


@pytest.mark.parametrize("own", [0, userfault.MISSING])
async def test_untracking_leaves_what_was_registered(live: LiveMachine, own: int) -> None:
    """What the process itself has registered stays so, its writes no longer fault, and it can be tracked again."""
    with guest_of(live) as guest:
        for page in range(16):
            guest.ask("put", page * PAGE)
        if own:
            userfault.register(guest.uffd, guest.process.pid, guest.address, SIZE, own)
        again = os.dup(guest.uffd)
        await track(live, guest)
        await live.do("memdev-untrack", id="m")
        assert {mode & ~userfault.WP for _, _, mode in modes_of(guest)} == {own}
        assert own or {mode for _, _, mode in modes_of(guest)} == {0}
        with Path(f"/proc/{guest.process.pid}/pagemap").open("rb") as pagemap:
            if own:
                assert userfault.written(pagemap.fileno(), guest.address, SIZE, again=False) == [(0, SIZE)]
        assert await live.refused("memdev-untrack", id="m") == \
            f"object 'm' is not tracked in process {guest.process.pid}"
        guest.uffd = again
        mark = await track(live, guest)
        guest.ask("put", PAGE)
        assert (await dirty(live, mark))[1] == {1}


def modes_of(guest: Guest) -> list[tuple[int, int, int]]:
    return userfault.modes(guest.process.pid, guest.address, SIZE)


async def test_what_is_refused(live: LiveMachine) -> None:
    with guest_of(live, features=0) as guest:
        await hand_over(live, guest)
        assert await live.refused("memdev-track", id="m", fdname="u", address=guest.address) \
            == "the descriptor 'u' is not a userfaultfd with UFFD_FEATURE_WP_ASYNC"
        await live.do("closefd", fdname="u")
    with guest_of(live) as guest:
        await hand_over(live, guest)
        assert await live.refused("memdev-track", id="m", fdname="u", address=guest.address + PAGE) \
            == f"object 'm' is not mapped as a whole at {guest.address + PAGE:#x} in process {guest.process.pid}"
        uffd = live.named_fds.look("u")
        userfault.register(uffd, guest.process.pid, guest.address, SIZE, userfault.WP)
        userfault.write_protect(uffd, guest.address, PAGE, on=True)
        kept = os.dup(uffd)
        assert await live.refused("memdev-track", id="m", fdname="u", address=guest.address) \
            == f"process {guest.process.pid} uses the write protection of that mapping itself"
        assert {mode for _, _, mode in modes_of(guest)} == {userfault.WP}
        os.close(kept)


async def test_enforcing_keeps_what_the_holder_tracks() -> None:
    """memdev-enforce registers missing pages beside the write protection that the process uses itself."""
    machine = LiveMachine("simulated:in-place")
    await machine.do("object-add", qom_type="memory-backend-guest-memfd", id="m", size=SIZE)
    with guest_of(machine, ASYNC | userfault.UFFD_FEATURE_SIGBUS) as guest, \
            Path(f"/proc/{guest.process.pid}/pagemap").open("rb") as pagemap:
        where = guest.process.pid, guest.address, SIZE
        userfault.register(guest.uffd, *where, userfault.WP)
        userfault.write_protect(guest.uffd, guest.address, SIZE, on=True)
        await hand_over(machine, guest)
        await machine.do("memdev-enforce", id="m", fdname="u", address=guest.address)
        assert {mode for _, _, mode in userfault.modes(*where)} == {userfault.WP | userfault.MISSING}
        guest.ask("put", 3 * PAGE)
        assert userfault.written(pagemap.fileno(), guest.address, SIZE) == [(3 * PAGE, PAGE)]
        await machine.do("memdev-convert", id="m", offset=0, size=PAGE, to="private")
        assert guest.ask("call", 0) == "EFAULT"
    await machine.close()


async def test_enforcing_keeps_what_faults_when_it_is_read() -> None:
    """The same with the protection against reads and writes, which excludes tracking."""
    rwp = 1 << 17  # UFFD_FEATURE_RWP
    try:
        os.close(userfaultfd(rwp))
    except OSError:
        pytest.skip("needs a userfaultfd with RWP (Linux 7.3)")
    machine = LiveMachine("simulated:in-place")
    await machine.do("object-add", qom_type="memory-backend-guest-memfd", id="m", size=SIZE)
    with guest_of(machine, ASYNC | rwp | userfault.UFFD_FEATURE_SIGBUS) as guest:
        userfault.register(guest.uffd, guest.process.pid, guest.address, SIZE, userfault.RWP)
        again = os.dup(guest.uffd)
        await hand_over(machine, guest)
        await machine.do("memdev-enforce", id="m", fdname="u", address=guest.address)
        assert {mode for _, _, mode in modes_of(guest)} == {userfault.RWP | userfault.MISSING}
        assert guest.ask("put", 3 * PAGE) == "ok"
        await machine.do("memdev-convert", id="m", offset=0, size=PAGE, to="private")
        assert guest.ask("call", 0) == "EFAULT"
        machine.sent = [again]
        await machine.do("getfd", fdname="v")
        assert "uses the write protection" in await machine.refused("memdev-track", id="m", fdname="v",
                                                                    address=guest.address)
    await machine.close()


async def test_tracking_and_enforcing_together() -> None:
    """In either order, on one mapping, with one userfaultfd that was passed twice."""
    for first, second in (("memdev-track", "memdev-enforce"), ("memdev-enforce", "memdev-track")):
        machine = LiveMachine("simulated:in-place")
        await machine.do("object-add", qom_type="memory-backend-guest-memfd", id="m", size=SIZE)
        with guest_of(machine, ASYNC | userfault.UFFD_FEATURE_SIGBUS) as guest:
            again = os.dup(guest.uffd)
            await hand_over(machine, guest)
            machine.sent = [again]
            await machine.do("getfd", fdname="v")
            await machine.do(first, id="m", fdname="u", address=guest.address)
            await machine.do(second, id="m", fdname="v", address=guest.address)
            mark = machine.gmemd.objects.find("m").tracking.now  # type: ignore[union-attr]
            await dirty(machine, mark)
            mark = machine.gmemd.objects.find("m").tracking.now  # type: ignore[union-attr]
            guest.ask("put", 3 * PAGE)
            await machine.do("memdev-convert", id="m", offset=0, size=PAGE, to="private")
            assert (await dirty(machine, mark))[1] == {0, 3}
            assert guest.ask("call", 0) == "EFAULT"
            await machine.do("memdev-untrack", id="m")
            assert guest.ask("call", 0) == "EFAULT"
            assert guest.ask("put", 4 * PAGE) == "ok"
        await machine.close()


@pytest.mark.kvm
async def test_a_real_guest_memfd_is_tracked() -> None:
    machine = LiveMachine("kvm")
    await machine.do("object-add", qom_type="memory-backend-guest-memfd", id="m", size=SIZE)
    with guest_of(machine) as guest:
        mark = await track(machine, guest)
        guest.ask("put", 6 * PAGE)
        assert (await dirty(machine, mark))[1] == {6}
    await machine.close()


# -- increments --------------------------------------------------------------------------------------

async def saved(machine: LiveMachine, name: str, **how: Any) -> bytes:
    """Save the object while its holders are frozen; what the snapshot gives back."""
    await machine.do("memdev-snapshot", id="m", name=name, fence={"via": "freeze", "deadline": 600000}, **how)
    await machine.do("memdev-restore", name=name, id="again")
    backend = machine.gmemd.objects.find("again")
    found = os.pread(backend.fd, backend.memory_size, 0)
    await machine.do("object-del", id="again")
    return found


@pytest.mark.parametrize("live_pass", [False, True])
async def test_an_increment_looks_only_at_what_was_written(tmp_path: Path, live_pass: bool) -> None:
    """What nobody tracks is not found: the proof that nothing else was looked at. Untracked, everything is compared."""
    machine, size = LiveMachine(snapshots=str(tmp_path)), 4 * BLOCK
    await machine.do("object-add", qom_type="memory-backend-memfd", id="m", size=size)
    fd = machine.gmemd.objects.find("m").fd
    with guest_of(machine, size=size) as guest:
        await track(machine, guest)
        guest.ask("put", 3 * PAGE)
        assert await saved(machine, "first") == os.pread(fd, size, 0)
        guest.ask("put", BLOCK)
        guest.ask("put", 2 * BLOCK + PAGE)
        assert await saved(machine, "second", parent="first", live=live_pass) == os.pread(fd, size, 0)
        os.pwrite(fd, b"unseen", 0)  # by gmemd itself, which never does that
        memory = os.pread(fd, size, 0)
        third = await saved(machine, "third", parent="first", live=live_pass)
        assert third[BLOCK:] == memory[BLOCK:]
        assert (third[:BLOCK] == memory[:BLOCK]) == live_pass  # whose first pass compares everything
        await machine.do("memdev-untrack", id="m")
        assert await saved(machine, "fourth", parent="first") == memory
    await machine.close()


def test_old_epochs_are_merged() -> None:
    """A mark of any age gets all that was written since, perhaps more; one before the beginning gets nothing."""
    tracking = Tracking(100, 0, asyncio.Lock())
    marks = [tracking.now]
    for offset in range(50):
        tracking.wrote([(offset, 1)])
        marks.append(tracking.turn())
    for age, mark in enumerate(marks):
        found = tracking.since(mark)
        assert found is not None
        assert set(range(age, 50)) <= {at for offset, size in found for at in range(offset, offset + size)}
    assert tracking.since(marks[-3]) == [(48, 2)]
    assert tracking.since(marks[0] - 1) is None
    assert len(tracking._sets) <= 17
    tracking.forget()
    assert tracking.since(marks[-1]) is None
