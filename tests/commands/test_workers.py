"""Worker processes do not become more than the machine has use for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmemd.changes.jobs import CANCELLED, Job, Jobs
from gmemd.changes.workers import Worker, Workers, workers, working
from gmemd.errors import QmpError
from gmemd.snapshots.folder import sweep
from gmemd.snapshots.stream import Sender
from tests.commands.live import LiveMachine

pytestmark = pytest.mark.asyncio


async def until_blocked() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_so_many_at_a_time_in_order() -> None:
    """The rest waits, and comes in the order in which it came; one that waits can be given up."""
    room, jobs = Workers(2), Jobs(lambda name, data: None)
    inside: list[str] = []
    go = {name: asyncio.Event() for name in "abcde"}

    async def work(name: str) -> None:
        async with room.room(jobs.create(name, "verify", 1)):
            inside.append(name)
            await go[name].wait()

    tasks = {name: asyncio.create_task(work(name)) for name in go}
    await until_blocked()
    assert inside == ["a", "b"]
    jobs.find("c").cancel()
    go["b"].set()
    await until_blocked()
    assert inside == ["a", "b", "d"]
    tasks["d"].cancel()
    await until_blocked()
    assert inside == ["a", "b", "d", "e"]
    for event in go.values():
        event.set()
    results = await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert [getattr(result, "desc", type(result)) for result in results] == [
        type(None), type(None), CANCELLED, asyncio.CancelledError, type(None)]
    async with room.room(None), room.room(None):
        pass


async def test_a_job_that_is_cancelled_already_does_not_wait() -> None:
    """Its cancelling was asked for between two pieces of its work."""
    room, job = Workers(1), Jobs(lambda name, data: None).create("a", "delete", 1)
    async with room.room(None):
        job.cancel()
        with pytest.raises(QmpError, match=CANCELLED):
            async with room.room(job):
                pass


async def test_jobs_that_wait_do_not_take_every_descriptor() -> None:
    """Each holds one; half of what the process may have, and no more."""
    live = LiveMachine()
    await live.do("object-add", qom_type="memory-backend-memfd", id="m", size=1 << 16)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    half = 80 + len(os.listdir("/proc/self/fd"))  # earlier tests have left some open
    try:
        async with contextlib.AsyncExitStack() as full:
            while workers._free:
                await full.enter_async_context(workers.room(None))
            resource.setrlimit(resource.RLIMIT_NOFILE, (2 * half, limits[1]))
            for number in range(half):
                await live.do("memdev-verify", id="m", job_id=f"j{number}")
            refusal = await live.refused("memdev-verify", id="m", job_id="more")
            assert refusal.startswith(f"{half} objects are being verified")
            await live.do("job-cancel", id="j7")
            await live.ended("j7")
            await live.do("memdev-verify", id="m", job_id="more")
            for number in range(half):
                if number != 7:
                    await live.do("job-cancel", id=f"j{number}")
        assert "error" not in await live.ended("more")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    await live.close()


async def test_jobs_wait_for_room() -> None:
    """A job without room is running, can be cancelled, and is done when there is room."""
    live = LiveMachine()
    await live.do("object-add", qom_type="memory-backend-memfd", id="m", size=1 << 16)
    async with contextlib.AsyncExitStack() as full:
        while workers._free:
            await full.enter_async_context(workers.room(None))
        await live.do("memdev-verify", id="m", job_id="given-up")
        await live.do("memdev-verify", id="m", job_id="patient")
        await until_blocked()
        await live.do("job-cancel", id="given-up")
        assert (await live.ended("given-up"))["error"] == CANCELLED
        assert (await live.do("query-jobs"))[0]["status"] == "running"
    assert "error" not in await live.ended("patient")
    await live.close()


# -- what one says and is told --------------------------------------------------------------------------------

class Place:
    """A folder for snapshots and memory to be saved there."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.root = os.open(folder, os.O_RDONLY)
        self.memory = os.memfd_create("workers")
        os.ftruncate(self.memory, 1 << 20)
        os.pwrite(self.memory, b"x", 0)

    def save(self, job: Job | None = None) -> contextlib.AbstractAsyncContextManager[Worker]:
        spec = {"root": self.root, "name": "s", "id": "m", "size": 1 << 20, "memory": {"fd": self.memory}}
        return working(job, "save", spec, [self.root, self.memory])

    def swept(self) -> list[str]:
        """What is there when nobody writes any more."""
        sweep(self.root)
        return os.listdir(self.path)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    os.close(made.root)
    os.close(made.memory)


async def test_a_worker_is_told_what_to_do_next(place: Place) -> None:
    """It says how far it is, hears what follows, and its last message is the result; a refusal is its own sentence."""
    async with place.save() as worker:
        async for message in worker:
            if "ready" in message:
                worker.tell({"pass": {"dirty": None}})
            elif "passed" in message:
                worker.tell({"finish": {"object": {"id": "m", "qom-type": "memory-backend-memfd"},
                                        "consistency": {"via": "idle", "consistent": True}}})
    assert worker.result["bytes"] == 4096
    assert os.listdir(place.path) == ["s"]

    async def verify() -> None:
        async with working(None, "verify", {"root": place.root, "name": "x"}, [place.root]) as other:
            async for _ in other:
                pass

    with pytest.raises(QmpError, match=r"^snapshot 'x' not found$"):
        await verify()


async def test_leaving_early_ends_the_worker(place: Place) -> None:
    """Whatever it is at; what it has begun is nobody's then."""
    async with place.save() as worker:
        async for message in worker:
            if "ready" in message:
                break
        assert os.listdir(place.path) != []
    assert place.swept() == []


async def test_cancelling_ends_the_worker(place: Place) -> None:
    """The job that it works for is over with it."""
    job = Jobs(lambda name, data: None).create("a", "snapshot", 1)

    async def save() -> None:
        async with place.save(job) as worker:
            async for message in worker:
                if "ready" in message:
                    job.cancel()

    with pytest.raises(QmpError, match=CANCELLED):
        await save()
    assert place.swept() == []


async def test_a_long_message(tmp_path: Path) -> None:
    """As the ends of a stream are, if much of an object is private here and shared there."""
    head = {"format": "gmemd-stream", "version": 1, "purpose": "resolve", "id": "x", "state": "x" * (1 << 20)}
    with (tmp_path / "stream").open("w+b") as file:
        Sender(file.fileno()).say("HEAD", head)
        file.seek(0)
        async with working(None, "stream-head", {"in": file.fileno()}, [file.fileno()]) as worker:
            assert [message async for message in worker] == []
        assert worker.result["head"] == head
