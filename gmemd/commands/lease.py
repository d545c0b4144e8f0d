"""Handing out memory: to anybody, or as a lease to one writer whose end is watched.

Apart from commands, the event loop calls this module: a holder has ended, an orphan's time is over.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change, WithFds, changing
from gmemd.changes.completed import completed
from gmemd.changes.threads import close_copies
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.listing import listed
from gmemd.commands.memdev import object_del
from gmemd.commands.status import describe_memory
from gmemd.errors import QmpError, os_errors
from gmemd.memory.lease import Lease
from gmemd.processes.identity import command_name, start_time
from gmemd.processes.watch import watch

_WATCH_AGAIN = 1.0  # seconds until watching a holder is retried
_BUSY_AGAIN = 1.0  # seconds until deleting a busy orphan is retried


def memdev_get_fd(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> WithFds:
    backend = gmemd.objects.find(arguments["id"])
    backend.check_here()
    lease = backend.lease
    wanted = arguments.get("lease")
    if wanted is None and arguments["fences"]:
        raise QmpError("parameter 'fences' needs 'lease'")
    if not arguments["force"]:
        check_free(backend, caller)
    if wanted is not None or (lease is not None and lease.orphaned):
        backend.check_idle()
        new = None if wanted is None else _lease(backend, caller, arguments)
        change.judged()
        reply = _hand_out(gmemd, backend, change)
        _exchange(gmemd, backend, new, change)  # it is recorded before the fd is sent
        return reply
    change.judged()
    return _hand_out(gmemd, backend, change)


def memdev_release(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    backend = gmemd.objects.find(arguments["id"])
    backend.check_idle()
    lease = backend.lease
    if lease is None:
        raise QmpError(f"object '{backend.id}' is not leased")
    if not arguments["force"]:
        check_free(backend, caller)
    change.judged(f"end the lease of '{backend.id}' to process {lease.pid}",
                  then=partial(setattr, backend, "lease", None))
    _exchange(gmemd, backend, None, change)
    return {}


def query_memdev_leases(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    leases = [(gmemd.called(backend), backend.lease) for backend in gmemd.seen() if backend.lease is not None]
    return listed(({"id": name, **lease.describe()} for name, lease in leases), len(leases))


def check_free(backend: HostMemoryBackend, caller: Caller) -> None:
    """Refuse a process that does not hold the current lease, if there is one."""
    lease = backend.lease
    if lease is None:
        return
    with os_errors(f"cannot see the holder of '{backend.id}'"):
        own = lease.is_of(caller.pid)
    if not lease.orphaned and not own:
        raise QmpError(f"object '{backend.id}' is leased to process {lease.pid} ({command_name(lease.pid)}): "
                       "a second writer needs 'force'")


def _hand_out(gmemd: Gmemd, backend: HostMemoryBackend, change: Change) -> WithFds:
    with os_errors(f"cannot hand out '{backend.id}'"):
        fds = [gmemd.kernel.duplicate(backend.fd, readonly=backend.frozen)]
    backend.handed_out += 1
    backend.blank = False

    def take_back() -> None:
        close_copies(fds)
        backend.handed_out -= 1

    change.undo(take_back)
    return WithFds({**describe_memory(gmemd, backend), "revocable": False}, fds)


def _lease(backend: HostMemoryBackend, caller: Caller, arguments: dict[str, Any]) -> Lease:
    policy, delete_after = arguments["lease"], arguments["delete-after"]
    if policy == "delete":
        caller.rights.check_command("object-del")
    if delete_after and policy != "delete":
        raise QmpError("parameter 'delete-after' needs 'lease' to be 'delete'")
    with os_errors(f"cannot lease '{backend.id}'"):
        start = start_time(caller.pid)
    if start is None:
        raise QmpError(f"cannot lease '{backend.id}': the receiving process is not visible from here")
    return Lease(caller.pid, start, caller.uid, policy, delete_after, arguments["fences"])


def _exchange(gmemd: Gmemd, backend: HostMemoryBackend, lease: Lease | None, change: Change) -> None:
    """Replace a lease by another."""
    before = backend.lease
    if lease is not None:
        with os_errors(f"cannot lease '{backend.id}'"):
            watched = _watch(gmemd, backend, lease)
        if not watched:
            raise QmpError(f"cannot lease '{backend.id}': the receiving process has ended")
    if before is not None:
        before.end()
    backend.lease = lease

    def undo() -> None:
        if lease is not None:
            lease.end()
        backend.lease = before
        if before is not None:
            _resume(gmemd, backend, before)

    change.undo(undo)
    change.rewrite(backend)


def end_lease(gmemd: Gmemd, backend: HostMemoryBackend, change: Change) -> None:
    """Have nobody hold it any more."""
    if backend.lease is not None:
        _exchange(gmemd, backend, None, change)


# -- watching ----------------------------------------------------------------------------------------

def watch_leases(gmemd: Gmemd) -> None:
    """Watch the holders that a predecessor left; those that have ended meanwhile leave orphans."""
    for backend in list(gmemd.objects):
        if backend.lease is not None:
            _resume(gmemd, backend, backend.lease)


def _resume(gmemd: Gmemd, backend: HostMemoryBackend, lease: Lease) -> None:
    try:
        living = not lease.orphaned and _watch(gmemd, backend, lease)
    except OSError:  # for example too few descriptors: that does not mean that the process is dead
        lease.end = asyncio.get_running_loop().call_later(_WATCH_AGAIN, _resume, gmemd, backend, lease).cancel
        return
    if not living:
        _orphaned(gmemd, backend, lease)


def _watch(gmemd: Gmemd, backend: HostMemoryBackend, lease: Lease) -> bool:
    """Wait for the holder's end; False when it has ended already."""
    end = watch(lease.pid, lease.start, lambda: _orphaned(gmemd, backend, lease))
    if end is None:
        return False
    lease.end = end
    return True


def _orphaned(gmemd: Gmemd, backend: HostMemoryBackend, lease: Lease) -> None:
    """The holder has ended: announce it, and apply the policy."""
    lease.orphaned = True
    gmemd.emit("MEMDEV_ORPHANED", {"id": backend.id, **{name: value for name, value in lease.describe().items()
                                                        if name not in ("fences", "orphaned")}})
    lease.answer("it has ended")
    if lease.policy == "delete":
        _later(gmemd, backend, lease, lease.delete_after)


def _later(gmemd: Gmemd, backend: HostMemoryBackend, lease: Lease, seconds: float) -> None:
    def due() -> None:
        if backend.busy:
            _later(gmemd, backend, lease, _BUSY_AGAIN)
        elif backend.lease is lease:
            gmemd.spawn(_delete(gmemd, backend, lease))

    lease.end = asyncio.get_running_loop().call_later(seconds, due).cancel


async def _delete(gmemd: Gmemd, backend: HostMemoryBackend, lease: Lease) -> None:
    """Delete an orphan, unless it was handed out in the turn since its time was over."""
    if backend.lease is not lease:
        return
    if not backend.lives:  # another deletion is not durable yet
        _later(gmemd, backend, lease, _BUSY_AGAIN)
        return
    try:
        await completed(changing(gmemd.settler, object_del)(gmemd, None, {"id": backend.id}))
    except QmpError:  # custody's, which has logged it: the object stays, and its time starts over
        _later(gmemd, backend, lease, max(_BUSY_AGAIN, lease.delete_after))
        return
    gmemd.emit("MEMDEV_EXPIRED", {"id": backend.id})
