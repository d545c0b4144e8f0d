"""Commands on jobs, and those that start one: verifying, populating, wiping."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from itertools import islice
from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.jobs import Job
from gmemd.changes.threads import close_beside, in_thread
from gmemd.changes.workers import run_worker, working
from gmemd.commands.charging import check_resident
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.listing import listed
from gmemd.commands.memdev import delete
from gmemd.commands.properties import populate, set_property
from gmemd.commands.runners import check_runner
from gmemd.errors import QmpError, os_errors
from gmemd.objects.shares import of_descriptors

_CHUNKS_MAX: Final = 1 << 20  # digests of one job at most: about 150 MiB
_DIGESTS_MAX: Final = 2 * _CHUNKS_MAX  # digests of all jobs that are not dismissed
_PART: Final = 2  # half of the process's descriptors
_WIPE_CHUNK: Final = 64 << 20  # bytes between two reports of progress

Part = tuple[int, int, int]  # fd, offset, bytes
Work = Callable[[Job | None, Change], Coroutine[Any, Any, Any]]


def query_jobs(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    return listed(described(gmemd), sum(len(room.jobs) for room in gmemd.seen_rooms()))


def described(gmemd: Gmemd) -> Iterator[dict[str, Any]]:
    """The JobInfo of each job that is seen here."""
    jobs = [(room, job) for room in gmemd.seen_rooms() for job in room.jobs]
    return ({**job.describe(), "id": room.named(job.id)} for room, job in jobs)


def job_cancel(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    job = gmemd.jobs.find(arguments["id"])
    change.judged(f"cancel the job '{job.id}', which is {job.status}", whole=False)
    job.cancel()
    return {}


def job_dismiss(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    job = gmemd.jobs.find(arguments["id"])
    change.judged(f"dismiss the job '{job.id}', which is {job.status}", whole=False)
    gmemd.jobs.dismiss(job.id)
    return {}


def memdev_verify(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    backend, chunk = gmemd.objects.find(arguments["id"]), arguments["chunk"]
    check_job(gmemd, arguments, change)
    if chunk == 0 or chunk % gmemd.kernel.page_size:
        raise QmpError(f"parameter 'chunk' must be a multiple of the page size, {gmemd.kernel.page_size}")
    if backend.memory_size > chunk * _CHUNKS_MAX:
        raise QmpError(f"chunks of {chunk} bytes would yield more than {_CHUNKS_MAX} digests")
    chunks, held = -(-backend.memory_size // chunk), sum([job.rows for job in gmemd.jobs])
    if held + chunks > _DIGESTS_MAX:
        raise QmpError(f"jobs that are not dismissed have {held} digests: {chunks} more would be more than"
                       f" {_DIGESTS_MAX}")
    waiting = sum([job.kind == "verify" and job.status != "concluded" for job in gmemd.jobs])
    if waiting >= of_descriptors(_PART):
        raise QmpError(f"{waiting} objects are being verified already: each takes a descriptor, and none is left")
    change.judged()
    with os_errors(f"cannot read '{backend.id}'"):
        part = (os.dup(backend.fd), backend.offset, backend.memory_size)
    job = gmemd.jobs.create(arguments["job-id"], "verify", backend.memory_size, change.budget)
    job.rows = chunks
    gmemd.spawn(conclude(job, lambda: _verify(job, part, chunk)))
    return {}


async def _verify(job: Job, part: Part, chunk: int) -> list[dict[str, Any]]:
    digests: list[dict[str, Any]] = []

    try:
        async with working(job, "hash", _spec(part, chunk), [part[0]]) as worker:
            async for message in worker:
                job.current = message.pop("done")
                digests.append(message)
    finally:
        close_beside([part[0]])  # the object may be deleted, and this the last descriptor of its memory
    return digests


def query_memdev_digests(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    job = gmemd.jobs.find(arguments["job-id"])
    if job.kind != "verify" or job.result is None:
        raise QmpError(f"Job '{job.id}' has no digests")
    begin = bisect_left(job.result, arguments["offset"], key=lambda digest: digest["offset"])
    count = min(arguments["limit"], len(job.result) - begin)
    return listed(islice(job.result, begin, begin + count), count)


def memdev_populate(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    backend = gmemd.objects.find(arguments["id"])
    backend.check_idle()
    backend.check_writable()
    if backend.properties.get("readonly"):
        raise QmpError("qemu_prealloc_mem: preallocating memory failed: Bad address")
    backend.check_value("prealloc", True)

    async def work(job: Job | None, change: Change) -> Any:
        def progress(done: int) -> None:
            if job is not None:
                job.current = done

        await check_resident(gmemd, change, backend.memory_size)
        await in_thread(populate, gmemd, backend, progress, lambda: job is not None and job.cancelled)
        return set_property(backend, "prealloc", True, change)

    return _run(gmemd, arguments, "populate", backend, "it is being populated", work, change)


def memdev_delete(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    force = arguments["force"]
    if not arguments["zero"] and "job-id" not in arguments:
        return delete(gmemd, arguments["id"], change, force=force)
    backend = gmemd.objects.find(arguments["id"])
    backend.check_idle()
    if not force:
        check_runner(backend, but="deleting it needs 'force'")
    if arguments["zero"]:
        backend.check_writable()
    if arguments["zero"] and (backend.properties.get("readonly") or not backend.properties["share"]) \
            and backend.kind == "file":
        raise QmpError(f"object '{backend.id}' may not write to its file")

    async def wipe(job: Job | None, change: Change) -> Any:
        if arguments["zero"]:
            await _wipe(backend, job)
        change.release(backend)
        deleted = delete(gmemd, backend.id, change, force=force)
        return await deleted if isinstance(deleted, Coroutine) else deleted

    return _run(gmemd, arguments, "delete", backend, "it is being wiped", wipe, change)


async def _wipe(backend: HostMemoryBackend, job: Job | None) -> None:
    """Overwrite the contents of an object, and what is set aside for it."""
    parts = [(backend.fd, backend.offset, backend.memory_size)]
    if backend.aside is not None:
        parts.insert(0, (backend.aside.fd, 0, backend.memory_size))
    for part in parts:
        await run_worker(job, "zero", _spec(part, _WIPE_CHUNK), [part[0]])


def _spec(part: Part, chunk: int) -> dict[str, int]:
    fd, offset, size = part
    return {"fd": fd, "offset": offset, "size": size, "chunk": chunk}


# -- running ----------------------------------------------------------------------------------------

def _run(gmemd: Gmemd, arguments: dict[str, Any], kind: str, backend: HostMemoryBackend, doing: str,
         work: Work, change: Change) -> Any:
    """Work on a claimed object: as a job if requested, otherwise the monitor waits."""
    check_job(gmemd, arguments, change)
    change.judged()
    change.claim(backend, doing)
    return begin(gmemd, arguments, kind, backend.memory_size, work, change, {})


def check_job(gmemd: Gmemd, arguments: dict[str, Any], change: Change) -> None:
    """Refuse a job id that cannot be a new job's, and one job too many."""
    if "job-id" in arguments:
        gmemd.jobs.check_id(arguments["job-id"])
        change.check_quota({"jobs": 1})


def begin(gmemd: Gmemd, arguments: dict[str, Any], kind: str, total: int, work: Work, change: Change,
          value: Any) -> Any:
    """Work as a job if requested, whose id was checked, with `value` as the reply; otherwise the monitor waits."""
    if "job-id" not in arguments:
        return work(None, change)
    job = gmemd.jobs.create(arguments["job-id"], kind, total, change.budget)
    own = change.hand_over()
    gmemd.spawn(conclude(job, lambda: own.conclude(work(job, own))))
    return value


async def conclude(job: Job, work: Callable[[], Awaitable[Any]]) -> None:
    """Do a job's work until its end."""
    error: str | None = "internal error"
    try:
        job.result = await work()
        error = None
    except QmpError as exc:
        error = exc.desc
    finally:
        job.conclude(error)
