"""What was written to an object, for a cooperating holder that passes its userfaultfd.

Exact for what the process and its guest write through the mapping it names. Anybody else who can write the object makes
it unknown: then a copy is compared by its digests.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from functools import partial
from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.threads import beside, in_thread
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.holders import writers_now
from gmemd.commands.listing import listed
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel import userfault
from gmemd.kernel.maps import shown
from gmemd.memory.tracking import Tracker, Tracking
from gmemd.processes.holders import is_mapped
from gmemd.processes.identity import command_name, start_time
from gmemd.processes.watch import watch

_NEEDED: Final = {"UFFD_FEATURE_WP_ASYNC": userfault.UFFD_FEATURE_WP_ASYNC,
                  "UFFD_FEATURE_WP_UNPOPULATED": userfault.UFFD_FEATURE_WP_UNPOPULATED}


def memdev_track(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Coroutine[Any, Any, Any]:
    backend, name, address = gmemd.objects.find(arguments["id"]), arguments["fdname"], arguments["address"]
    backend.check_idle()
    check_features(caller, name, _NEEDED)
    if any(one.pid == caller.pid for one in _trackers(backend)):
        raise QmpError(f"object '{backend.id}' is tracked already in process {caller.pid}")
    with os_errors(f"cannot see process {caller.pid}"):
        start = start_time(caller.pid)
    names, pid = caller.named_fds, caller.pid
    change.judged()

    async def work() -> dict[str, Any]:
        await check_mapped(backend, pid, address)
        with os_errors(f"cannot track process {pid}"):
            pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            tracker = Tracker(pid, start or 0, address, names.take(name), pagemap)
        except BaseException:
            close_fd(pagemap)
            raise
        return {"mark": await _track(gmemd, backend, tracker, change)}

    change.claim(backend, "its writes are about to be tracked")
    return work()


async def _track(gmemd: Gmemd, backend: HostMemoryBackend, tracker: Tracker, change: Change) -> int:
    """Start using a tracker, which is closed if that fails; the mark from which on everything is known."""
    change.undo(tracker.close)
    with os_errors(f"cannot track what process {tracker.pid} writes"):
        await in_thread(_begin, tracker, backend.memory_size)
        end = watch(tracker.pid, tracker.start, partial(_drop, backend, tracker))
    if end is None:
        raise QmpError(f"process {tracker.pid} has ended")
    tracker.end = end
    if backend.tracking is None:
        backend.tracking = Tracking(backend.memory_size, backend.handed_out, asyncio.Lock())
    tracking = backend.tracking
    tracking.trackers += (tracker,)
    return tracking.forget()


def _begin(tracker: Tracker, size: int) -> None:
    where = tracker.fd, tracker.pid, tracker.address, size
    if any(mode & (userfault.WP | userfault.RWP) for _, _, mode in userfault.modes(*where[1:])) \
            and sum(length for _, length in _unprotected(tracker, size)) < size:
        raise QmpError(f"process {tracker.pid} uses the write protection of that mapping itself")
    userfault.register(*where, userfault.WP)
    try:
        userfault.write_protect(tracker.fd, tracker.address, size, on=True)
    except OSError:
        userfault.unregister(*where, userfault.WP)
        raise


def _unprotected(tracker: Tracker, size: int) -> list[tuple[int, int]]:
    try:
        return userfault.written(tracker.pagemap, tracker.address, size, again=False)
    except PermissionError:  # registered, and not for tracking
        return []


def memdev_untrack(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    backend, pid = gmemd.objects.find(arguments["id"]), arguments.get("pid", caller.pid)
    backend.check_idle()
    for tracker in _trackers(backend):
        if tracker.pid == pid:
            change.judged(f"no longer track what process {pid} writes to '{backend.id}'")
            return _untrack(backend, tracker)
    raise QmpError(f"object '{backend.id}' is not tracked in process {pid}")


def _untrack(backend: HostMemoryBackend, tracker: Tracker) -> Coroutine[Any, Any, Any]:
    with os_errors(f"cannot untrack process {tracker.pid}"):
        fd = os.dup(tracker.fd)
    _drop(backend, tracker)

    def give_back() -> None:
        try:
            userfault.write_protect(fd, tracker.address, backend.memory_size, on=False)
            userfault.unregister(fd, tracker.pid, tracker.address, backend.memory_size, userfault.WP)
        finally:
            close_fd(fd)

    async def work() -> dict[str, Any]:
        await beside(give_back)
        return {}

    return work()


def _drop(backend: HostMemoryBackend, tracker: Tracker) -> None:
    """The process has ended, or is no longer tracked: nobody knows what it has written since the last look."""
    tracking = backend.tracking
    if tracking is not None and tracker in tracking.trackers:
        tracking.trackers = tuple(one for one in tracking.trackers if one is not tracker)
        tracking.forget()
        tracker.close()
        if not tracking.trackers:
            backend.tracking = None


def query_memdev_dirty(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
    backend, since = gmemd.objects.find(arguments["id"]), arguments["since"]

    async def work() -> Any:
        mark, runs = await dirty_since(gmemd, backend, since)
        found = listed(({"offset": offset, "size": size} for offset, size in runs), len(runs), mark=mark,
                       bytes=sum(size for _, size in runs), ranges=...)
        return await found if isinstance(found, Coroutine) else found

    return work()


async def dirty_since(gmemd: Gmemd, backend: HostMemoryBackend, mark: int) -> tuple[int, list[tuple[int, int]]]:
    """A new mark, and [(offset, bytes)] of what was written since an old one; QmpError: that is not known.

    If nobody writes while it is called, as behind a fence, the mark stands for the memory as it is.
    """
    check_unchanged(backend)
    now = await look(gmemd, backend)
    found = None if backend.tracking is None else backend.tracking.since(mark)
    if found is None:
        raise QmpError(f"what was written to '{backend.id}' since mark {mark} is not known")
    return now, found


async def look(gmemd: Gmemd, backend: HostMemoryBackend) -> int:
    """Find out what was written until now; the mark for what comes next. QmpError: its writers are not all tracked."""
    tracking = backend.tracking
    if tracking is None:
        raise QmpError(f"object '{backend.id}' is not tracked")
    async with tracking.lock:
        try:
            runs = [run for tracker in tracking.trackers for run in await _written(backend, tracker)]
            known = {tracker.pid for tracker in tracking.trackers}
            others = [holder for holder in await writers_now(gmemd, backend) if holder.pid not in known]
            if others:
                raise QmpError(f"object '{backend.id}' is also held by process {others[0].pid} ({others[0].comm}), "
                               "whose writes are not tracked")
        except BaseException:  # what was found is lost
            tracking.forget()
            raise
        if tracking.is_handed_out(backend.handed_out):
            tracking.forget()
        tracking.wrote(runs)
        check_unchanged(backend)
        return tracking.turn()


async def _written(backend: HostMemoryBackend, tracker: Tracker) -> list[tuple[int, int]]:
    """What a process has written since the last look; if that cannot be found out, it is no longer tracked."""
    pagemap, error = os.dup(tracker.pagemap), ""
    try:
        found: list[tuple[int, int]] = await in_thread(userfault.written, pagemap, tracker.address, backend.memory_size)
        await check_mapped(backend, tracker.pid, tracker.address)
        if start_time(tracker.pid) == tracker.start:
            return found
        error = "it has ended"
    except OSError as exc:
        error = os.strerror(exc.errno or 0)
    except QmpError as exc:
        error = exc.desc
    finally:
        close_fd(pagemap)
    _drop(backend, tracker)
    raise QmpError(f"process {tracker.pid} ({command_name(tracker.pid)}) is no longer tracked: {error}")


# -- of a userfaultfd that was passed ----------------------------------------------------------------

def check_features(caller: Caller, name: str, needed: dict[str, int]) -> None:
    """Refuse a named descriptor that is not a userfaultfd with these features."""
    with os_errors("cannot examine the descriptor"):
        found = userfault.features(caller.named_fds.look(name))
    for words, feature in needed.items():
        if found is None or not found & feature:
            raise QmpError(f"the descriptor '{name}' is not a userfaultfd with {words}")


async def check_mapped(backend: HostMemoryBackend, pid: int, address: int) -> None:
    """Refuse an address where a process has not mapped the whole object."""
    [file] = shown([backend.fd])
    if not await in_thread(is_mapped, pid, file, address, backend.memory_size, backend.offset):
        raise QmpError(f"object '{backend.id}' is not mapped as a whole at {address:#x} in process {pid}")


def check_unchanged(backend: HostMemoryBackend) -> None:
    """Refuse while gmemd itself changes the object: that counts for the epoch in which it began."""
    if not backend.shared:
        backend.check_idle()


def _trackers(backend: HostMemoryBackend) -> tuple[Tracker, ...]:
    return () if backend.tracking is None else backend.tracking.trackers
