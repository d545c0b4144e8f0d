"""Private pages that fault, for a cooperating holder that passes its userfaultfd."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from typing import Any

from gmemd.backends.base import Enforcer, HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.listing import listed
from gmemd.commands.track import check_features, check_mapped
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel.userfault import MISSING, UFFD_FEATURE_SIGBUS, can_miss, register
from gmemd.memory.ranges import SHARED
from gmemd.processes.identity import start_time
from gmemd.processes.watch import watch


def memdev_enforce(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any],
                   change: Change) -> Coroutine[Any, Any, Any]:
    backend, name, address = gmemd.objects.find(arguments["id"]), arguments["fdname"], arguments["address"]
    backend.check_idle()
    if backend.visibility is None:
        raise QmpError(f"object '{backend.id}' is not a guest_memfd")
    if not can_miss(backend.fd):
        raise QmpError(f"object '{backend.id}' is a real guest_memfd: userfaultfd cannot make its pages fault")
    check_features(caller, name, {"UFFD_FEATURE_SIGBUS": UFFD_FEATURE_SIGBUS})
    with os_errors(f"cannot see process {caller.pid}"):
        start = start_time(caller.pid)
    names, pid = caller.named_fds, caller.pid
    change.judged()

    async def work() -> dict[str, Any]:
        await check_mapped(backend, pid, address)
        return await _enforce(gmemd, backend, names.take(name), address, pid, start or 0, change)

    change.claim(backend, "its shared pages are being allocated")
    return work()


async def _enforce(gmemd: Gmemd, backend: HostMemoryBackend, fd: int, address: int, pid: int, start: int,
                   change: Change) -> dict[str, Any]:
    """Start using the descriptor `fd`; it is closed if that fails."""

    def drop() -> None:
        if enforcer in backend.enforcers:
            backend.drop(enforcer)

    enforcer = Enforcer(pid, address, fd)
    backend.enforcers += (enforcer,)
    change.undo(drop)
    with os_errors(f"cannot watch process {pid}"):
        end = watch(pid, start, drop)
    if end is None:
        raise QmpError(f"process {pid} has ended")
    enforcer.end = end
    with os_errors(f"cannot make private pages of '{backend.id}' fault"):
        used = os.dup(fd)  # by the thread: the process may end meanwhile
        try:
            await in_thread(_begin, gmemd, backend, used, pid, address)
        finally:
            close_fd(used)
    return {}


def _begin(gmemd: Gmemd, backend: HostMemoryBackend, fd: int, pid: int, address: int) -> None:
    """Allocate what is shared, make missing pages fault, and free the pages of private parts."""
    assert backend.visibility is not None
    ranges = list(backend.visibility.ranges())
    for start, length, state in ranges:
        if state is SHARED:
            gmemd.kernel.populate(backend.fd, start, length, 1)
    register(fd, pid, address, backend.memory_size, MISSING)
    for start, length, state in ranges:
        if state is not SHARED:
            gmemd.kernel.punch_hole(backend.fd, start, length)


def query_memdev_enforcers(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    found = [(gmemd.called(backend), one) for backend in gmemd.seen() for one in backend.enforcers]
    return listed(({"id": name, "pid": one.pid, "address": one.address} for name, one in found), len(found))
