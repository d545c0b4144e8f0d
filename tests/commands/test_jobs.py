"""Jobs: QEMU's states and refusals, verifying and wiping by a worker process, populating."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_hexdigest

from gmemd.changes.jobs import JOBS_MAX, Jobs
from gmemd.errors import QmpError
from gmemd.kernel import uapi
from gmemd.kernel.worker import hash_chunks, zero_chunks
from tests.commands.live import LiveMachine, with_memfd

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 8 * PAGE
WELL = ["created", "running", "waiting", "pending", "concluded"]
BADLY = ["created", "running", "aborting", "concluded"]


live = with_memfd(SIZE)


def fd_of(machine: LiveMachine, name: str = "m") -> int:
    return machine.gmemd.objects.find(name).fd


async def verify(machine: LiveMachine, **how: Any) -> list[Any]:
    await machine.do("memdev-verify", job_id="v", chunk=2 * PAGE, **how)
    assert "error" not in await machine.ended("v")
    digests: list[Any] = await machine.do("query-memdev-digests", job_id="v")
    await machine.do("job-dismiss", id="v")
    return digests


# -- the states ---------------------------------------------------------------------------------------

def test_newest_first() -> None:
    """query-jobs lists the newest job first."""
    jobs = Jobs(lambda name, data: None)
    for job_id in ("a", "b", "c"):
        jobs.create(job_id, "verify", 1)
    assert [job.id for job in jobs] == ["c", "b", "a"]


async def test_a_job_goes_through_the_states(live: LiveMachine) -> None:
    """created, running, waiting, pending, concluded; and null when it is dismissed."""
    await live.do("memdev-populate", id="m", job_id="p")
    assert await live.ended("p") == {"id": "p", "type": "populate", "status": "concluded", "current-progress": SIZE,
                                     "total-progress": SIZE}
    assert live.states("p") == WELL
    assert await live.do("job-dismiss", id="p") == {}
    assert live.states("p") == [*WELL, "null"]
    assert await live.do("query-jobs") == []


@pytest.mark.parametrize("verb", ["cancel", "dismiss"])
async def test_no_such_job(live: LiveMachine, verb: str) -> None:
    """What was dismissed, or never was, is not found."""
    assert await live.refused(f"job-{verb}", id="x") == "Job not found"


async def test_verbs_of_the_wrong_state(live: LiveMachine) -> None:
    """A running job cannot be dismissed, a concluded one not cancelled."""
    await live.do("memdev-populate", id="m", job_id="p")
    assert await live.refused("job-dismiss", id="p") \
        == "Job 'p' in state 'running' cannot accept command verb 'dismiss'"
    await live.ended("p")
    assert await live.refused("job-cancel", id="p") \
        == "Job 'p' in state 'concluded' cannot accept command verb 'cancel'"
    await live.do("job-dismiss", id="p")


async def test_ids_of_jobs(live: LiveMachine) -> None:
    """An id is an identifier, and not one that is taken; then nothing has begun."""
    await live.do("memdev-populate", id="m", job_id="p")
    await live.ended("p")
    assert await live.refused("memdev-verify", id="m", job_id="p") == "Job ID 'p' already in use"
    assert await live.refused("memdev-verify", id="m", job_id="1 2") == "Invalid job ID '1 2'"
    assert await live.refused("memdev-delete", id="m", job_id="p", zero=True) == "Job ID 'p' already in use"
    await live.do("memdev-delete", id="m")


# -- verify -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel", ["simulated", pytest.param("kvm", marks=pytest.mark.kvm)])
async def test_verify_hashes_what_is_there(kernel: str) -> None:
    """Chunks with anything in them have the XXH3 of their bytes; nothing is allocated by looking."""
    live = LiveMachine(kernel)
    await live.do("object-add", qom_type="memory-backend-guest-memfd", id="m", size=SIZE)
    with mmap.mmap(fd_of(live), SIZE) as memory:
        memory[3 * PAGE:3 * PAGE + 5] = b"hello"
        memory[7 * PAGE] = 1
        digests = await verify(live, id="m")
        assert live.gmemd.kernel.resident(fd_of(live)) == 2 * PAGE
        assert digests == [{"offset": at, "size": 2 * PAGE, "digest": xxh3_128_hexdigest(memory[at:at + 2 * PAGE])}
                           for at in (2 * PAGE, 6 * PAGE)]
    await live.close()


async def test_verify_an_empty_object(live: LiveMachine) -> None:
    """Nothing there: no digests, and still nothing there."""
    assert await verify(live, id="m") == []
    assert live.gmemd.kernel.resident(fd_of(live)) == 0


async def test_digests_are_paged(live: LiveMachine) -> None:
    """offset and limit cut the list."""
    os.pwrite(fd_of(live), b"x" * SIZE, 0)
    await live.do("memdev-verify", id="m", job_id="v", chunk=PAGE)
    await live.ended("v")
    found = await live.do("query-memdev-digests", job_id="v", offset=PAGE, limit=2)
    assert [digest["offset"] for digest in found] == [PAGE, 2 * PAGE]


def test_jobs_are_not_kept_without_end() -> None:
    """Who never dismisses any cannot start more; one that is dismissed makes room."""
    jobs = Jobs(lambda name, data: None)
    for number in range(JOBS_MAX):
        jobs.create(f"j{number}", "verify", 1)
    with pytest.raises(QmpError, match=f"there are {JOBS_MAX} jobs already"):
        jobs.create("more", "verify", 1)
    jobs.find("j7").conclude(None)
    jobs.dismiss("j7")
    assert jobs.create("more", "verify", 1).status == "running"


async def test_digests_are_not_kept_without_end(live: LiveMachine) -> None:
    """All jobs together hold so many; those of a failed job are none."""
    held = live.gmemd.jobs.create("held", "verify", 1)
    held.rows = (2 << 20) - 3
    assert await live.refused("memdev-verify", id="m", job_id="v", chunk=2 * PAGE) == (
        f"jobs that are not dismissed have {held.rows} digests: 4 more would be more than {2 << 20}")
    held.conclude("failed")
    assert len(await verify(live, id="m")) <= 4


async def test_verify_refuses(live: LiveMachine) -> None:
    """Unaligned chunks, too many of them, digests that are not there."""
    assert "multiple of the page size" in await live.refused("memdev-verify", id="m", job_id="v", chunk=PAGE + 1)
    await live.do("object-add", qom_type="memory-backend-memfd", id="big", size=1 << 40)
    assert "more than 1048576 digests" in await live.refused("memdev-verify", id="big", job_id="v", chunk=PAGE)
    await live.do("memdev-populate", id="m", job_id="p")
    await live.ended("p")
    assert await live.refused("query-memdev-digests", job_id="p") == "Job 'p' has no digests"


async def test_an_object_may_go_while_it_is_verified(live: LiveMachine) -> None:
    """The job has a descriptor of its own."""
    os.pwrite(fd_of(live), b"x", 0)
    await live.do("memdev-verify", id="m", job_id="v")
    await live.do("object-del", id="m")
    assert "error" not in await live.ended("v")
    assert len(await live.do("query-memdev-digests", job_id="v")) == 1


async def test_a_cancelled_job(live: LiveMachine) -> None:
    """job-cancel ends the worker; the job's error says so, and no digests are there."""
    await live.do("memdev-verify", id="m", job_id="v")
    assert await live.do("job-cancel", id="v") == {}
    assert (await live.ended("v"))["error"] == "Operation canceled"
    assert live.states("v") == BADLY
    assert await live.refused("query-memdev-digests", job_id="v") == "Job 'v' has no digests"


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


async def test_a_worker_that_is_killed(live: LiveMachine) -> None:
    """The end of the worker is the job's error, and the daemon goes on."""
    before = children()
    await live.do("memdev-verify", id="m", job_id="v")
    while not (found := children() - before):
        await asyncio.sleep(0)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    assert (await live.ended("v"))["error"] == "the worker process ended unexpectedly: signal 9"
    await live.do("job-dismiss", id="v")
    assert await verify(live, id="m") == []


# -- delete and zero ----------------------------------------------------------------------------------

@pytest.mark.parametrize("job", [{}, {"job_id": "d"}])
@pytest.mark.parametrize("kernel", ["simulated", pytest.param("kvm", marks=pytest.mark.kvm)])
async def test_zero_wipes_before_it_deletes(kernel: str, job: dict[str, str]) -> None:
    """Who still has the memory mapped finds zeros, and the pages are gone."""
    live = LiveMachine(kernel)
    await live.do("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE)
    with mmap.mmap(fd_of(live, "g"), SIZE) as memory:
        memory[:] = b"s" * SIZE
        await live.do("memdev-convert", id="g", offset=0, size=PAGE, to="private", preserve=True)
        aside = os.dup(live.gmemd.objects.find("g").aside.fd)
        assert os.pread(aside, 1, 0) == b"s"
        await live.do("memdev-delete", id="g", zero=True, **job)
        if job:
            assert "error" not in await live.ended("d")
        assert memory[:] == bytes(SIZE)
        assert os.pread(aside, PAGE, 0) == bytes(PAGE)
        os.close(aside)
    assert await live.refused("object-del", id="g") == "object 'g' not found"
    await live.close()


async def test_a_busy_object(live: LiveMachine) -> None:
    """While it is wiped, no other command works on it; a cancelled wipe leaves it there."""
    await live.do("memdev-delete", id="m", zero=True, job_id="d")
    await asyncio.sleep(0)
    assert await live.refused("object-del", id="m") == "object 'm' is busy: it is being wiped"
    await live.do("job-cancel", id="d")
    assert (await live.ended("d"))["error"] == "Operation canceled"
    await live.do("object-del", id="m")


async def test_a_file_that_is_not_shared_is_not_wiped(live: LiveMachine, tmp_path: Path) -> None:
    """A private mapping's file is not the object's to write to."""
    path = tmp_path / "f"
    path.write_bytes(b"z" * SIZE)
    await live.do("object-add", qom_type="memory-backend-file", id="f", size=SIZE, mem_path=str(path), share=False)
    assert await live.refused("memdev-delete", id="f", zero=True) == "object 'f' may not write to its file"
    assert path.read_bytes() == b"z" * SIZE
    await live.do("memdev-delete", id="f")
    await live.do("object-add", qom_type="memory-backend-file", id="f", size=SIZE, mem_path=str(path), share=True)
    await live.do("memdev-delete", id="f", zero=True)
    assert path.read_bytes() == bytes(SIZE)


async def test_a_sealed_memfd_is_not_wiped(live: LiveMachine) -> None:
    """It is refused, and the object stays as it is, whoever has sealed it."""
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.write(fd, b"k" * SIZE)
    live.gmemd.kernel.seal(fd, uapi.F_SEAL_SHRINK)
    live.sent = [fd]
    await live.do("getfd", fdname="s")
    await live.do("memdev-adopt", id="s", fdname="s")
    live.gmemd.kernel.seal(fd, uapi.F_SEAL_WRITE)
    assert await live.refused("memdev-delete", id="s", zero=True) \
        == "object 's' is frozen: its memory never changes again"
    assert os.pread(fd_of(live, "s"), SIZE, 0) == b"k" * SIZE
    await live.do("memdev-delete", id="s")


# -- the worker itself --------------------------------------------------------------------------------

def test_chunks_cover_what_is_there() -> None:
    """Ranges are cut at chunks' borders; the last chunk may be short; offsets count from the range."""
    fd = os.memfd_create("w")
    os.ftruncate(fd, 12 * PAGE)
    os.pwrite(fd, b"a" * 3 * PAGE, 4 * PAGE)
    os.pwrite(fd, b"b", 11 * PAGE)
    said = list(hash_chunks(fd, 2 * PAGE, 10 * PAGE, 4 * PAGE))
    assert [(m["offset"], m["size"], m["done"]) for m in said] \
        == [(0, 4 * PAGE, 4 * PAGE), (4 * PAGE, 4 * PAGE, 8 * PAGE), (8 * PAGE, 2 * PAGE, 10 * PAGE)]
    content = os.pread(fd, 10 * PAGE, 2 * PAGE)
    assert [m["digest"] for m in said] \
        == [xxh3_128_hexdigest(content[at:at + 4 * PAGE]) for at in range(0, 10 * PAGE, 4 * PAGE)]
    assert list(zero_chunks(fd, 2 * PAGE, 10 * PAGE, 4 * PAGE))[-1] == {"done": 10 * PAGE}
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)


# -- populate -----------------------------------------------------------------------------------------

async def test_populate_allocates(live: LiveMachine) -> None:
    """All pages are there and prealloc is true, as after qom-set."""
    assert await live.do("memdev-populate", id="m") == {}
    assert live.gmemd.kernel.resident(fd_of(live)) == SIZE
    assert await live.do("qom-get", path="/objects/m", property="prealloc") is True


async def test_populate_is_cancelled(live: LiveMachine) -> None:
    """A cancelled population of an object that nobody has yet gives everything back."""
    await live.do("object-add", qom_type="memory-backend-memfd", id="big", size=1 << 30)
    await live.do("memdev-populate", id="big", job_id="p")
    await live.do("job-cancel", id="p")
    assert (await live.ended("p"))["error"] == "Operation canceled"
    assert live.gmemd.kernel.resident(fd_of(live, "big")) == 0
    assert await live.do("qom-get", path="/objects/big", property="prealloc") is False


async def test_what_does_not_fit_is_refused(live: LiveMachine) -> None:
    """Head-room first: the job fails with the reason, nothing is allocated."""
    await live.do("object-add", qom_type="memory-backend-memfd", id="huge", size=1 << 45)
    await live.do("memdev-populate", id="huge", job_id="p")
    assert (await live.ended("p"))["error"].endswith("Cannot allocate memory")
    assert live.gmemd.kernel.resident(fd_of(live, "huge")) == 0
