"""Commands about owning memory: adoption, memory that came back without a record, what is kept."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.threads import beside, close_beside, in_thread
from gmemd.commands.charging import charge
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.listing import listed
from gmemd.commands.memdev import added
from gmemd.commands.status import describe_memory
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel.uapi import F_SEAL_SHRINK, GUEST_MEMFD_SHARED
from gmemd.memory.ranges import SHARED, RangeMap
from gmemd.persist.fdstore import opened_again

if TYPE_CHECKING:
    from gmemd.persist.fdstore import Again

# The type of an adopted fd, by what it is.
_TYPES = {"memfd": "memory-backend-memfd", "hugetlb-memfd": "memory-backend-memfd",
          "guest-memfd": "memory-backend-guest-memfd", "file": "memory-backend-file"}

Judged = tuple[str, os.stat_result, int]  # a descriptor's kind, status and page size in bytes


def memdev_adopt(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    fd = caller.named_fds.look(arguments["fdname"])
    with os_errors("cannot examine the descriptor"):
        if gmemd.kernel.seals(fd) is None:  # it may be a file, whose server may not answer
            return _adopt_file(gmemd, caller, os.dup(fd), arguments, change)
    return _adopt(gmemd, caller, arguments, _judge(gmemd, fd, arguments), opened_again, change)


async def _adopt_file(gmemd: Gmemd, caller: Caller, copy: int, arguments: dict[str, Any], change: Change) -> Any:
    """The same, examining the descriptor off the event loop; `copy` is closed."""
    another = _Another()
    try:
        judged = await in_thread(_judge, gmemd, copy, arguments)
        await in_thread(another.open, copy)
    finally:
        await beside(lambda: close_fd(copy))
    change.done(another.close)
    change.undo(another.close)
    return _adopt(gmemd, caller, arguments, judged, another.take, change)


class _Another:
    """Another open file of a file, opened off the event loop for custody, which may not need it."""

    def __init__(self) -> None:
        self._fd = -1
        self._error = OSError(errno.EBADF, os.strerror(errno.EBADF))

    def open(self, fd: int) -> None:
        """Open it; may take long. A failure is reported when it is taken."""
        try:
            self._fd = opened_again(fd)
        except OSError as exc:
            self._error = exc

    def take(self, _fd: int) -> int:
        """Give it away; OSError if it could not be opened."""
        if self._fd < 0:
            raise self._error
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        """Close it if it was not taken."""
        close_beside([self._fd] if self._fd >= 0 else [])
        self._fd = -1


def _adopt(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], judged: Judged, again: Again,
           change: Change) -> dict[str, Any]:
    name, names = arguments["fdname"], caller.named_fds
    backend = _adopted(gmemd, caller, names.look(name), arguments["id"], judged, change)
    change.reserve()
    change.judged()
    change.undo(lambda: close_beside([fd for fd in _taken_back(backend) if not names.give_back(name, fd)]))
    names.take(name)
    added(gmemd, backend, change, again=again)
    return describe_memory(gmemd, backend)


def _taken_back(backend: HostMemoryBackend) -> list[int]:
    """The descriptors of an object whose creation is undone: no work on it has begun, because that waits for the
    creation."""
    backend.claims = ()
    return backend.detach()


def _adopted(gmemd: Gmemd, caller: Caller, fd: int, object_id: str, judged: Judged,
             change: Change) -> HostMemoryBackend:
    """The object for an fd, checked; its id is taken."""
    kind, status, page = judged
    size = status.st_size
    properties: dict[str, Any] = {"qom-type": _TYPES[kind], "id": object_id, "size": size, "share": True}
    if kind == "file":
        properties["mem-path"] = os.readlink(f"/proc/self/fd/{fd}")
    elif kind == "hugetlb-memfd":
        properties.update({"hugetlb": True, "hugetlbsize": page})
    complete = gmemd.schema.check_object(properties)
    caller.rights.check_type(complete["qom-type"])
    backend = gmemd.objects.begin(complete, (caller.uid, caller.pid), lambda name: "", dry_run=change.dry_run)
    change.undo(gmemd.objects.cancel, backend)
    backend.memory_size, backend.foreign = size, True
    if kind == "file":
        backend.huge_page = page if page > gmemd.kernel.page_size else 0
    charge(gmemd, backend, change, fd=-1 if kind == "file" else fd)
    backend.fd = fd
    backend.kind = "memfd" if kind == "hugetlb-memfd" else kind
    if kind == "file":
        backend.file_kind, backend.status = kind, status
    if kind == "guest-memfd":
        backend.guest_memfd_flags = GUEST_MEMFD_SHARED
        backend.visibility = RangeMap(size, SHARED)
    return backend


def _judge(gmemd: Gmemd, fd: int, arguments: dict[str, Any]) -> Judged:
    """What an fd is; QmpError if it is not memory or not what was asked for."""
    with os_errors("cannot examine the descriptor"):
        kind, status = gmemd.kernel.identify(fd), os.fstat(fd)
        seals, page = gmemd.kernel.seals(fd), gmemd.kernel.file_page_size(fd)
    if kind not in _TYPES:
        raise QmpError(f"the descriptor is not memory: {os.readlink(f'/proc/self/fd/{fd}')}")
    wanted, size = arguments.get("size"), status.st_size
    if size == 0 or size % page:
        raise QmpError(f"the descriptor has {size} bytes, which is not a whole number of pages")
    if wanted is not None and size != wanted:
        raise QmpError(f"the descriptor has {size} bytes, not {wanted}")
    if arguments["require-seals"] and kind.endswith("memfd") and kind != "guest-memfd" and not (
            seals is not None and seals & F_SEAL_SHRINK):
        raise QmpError("the memfd is not sealed against shrinking")
    with os_errors("cannot examine the descriptor"):
        why = gmemd.kernel.unusable(fd, size, frozen=arguments.get("frozen", False))
    if why:
        raise QmpError(why)
    return kind, status, page


def query_memdev_unclaimed(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    there = list(gmemd.unclaimed)
    return listed((_describe(gmemd, *entry) for entry in there if entry in gmemd.unclaimed), len(there))


def _describe(gmemd: Gmemd, name: str, fd: int) -> dict[str, Any]:
    with os_errors(f"cannot examine '{name}'"):
        kind = gmemd.kernel.identify(fd).removeprefix("hugetlb-")
        return {"name": name, "kind": kind if kind in _TYPES else "file", "size": os.fstat(fd).st_size}


def memdev_claim(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    name, unclaimed = arguments["name"], _unclaimed(gmemd)
    found = next((entry for entry in unclaimed if entry[0] == name), None)
    if found is None:
        raise QmpError(f"no unclaimed memory is named '{name}'")
    if "id" not in arguments:
        return _give_up(gmemd, name, change)
    judged = _judge(gmemd, found[1], {**arguments, "require-seals": False, "frozen": True})
    backend = _adopted(gmemd, caller, found[1], arguments["id"], judged, change)
    change.judged()
    unclaimed.remove(found)
    change.undo(lambda: unclaimed.extend((name, fd) for fd in _taken_back(backend)))
    change.keep_stored(backend, name)
    gmemd.objects.commit(backend)
    change.undo(gmemd.objects.uncommit, backend)
    return {}


def _give_up(gmemd: Gmemd, name: str, change: Change) -> dict[str, Any]:
    """Release all unclaimed memory with a name."""
    unclaimed = _unclaimed(gmemd)
    change.judged()
    gone = [entry for entry in unclaimed if entry[0] == name]
    unclaimed[:] = [entry for entry in unclaimed if entry[0] != name]
    change.undo(lambda: unclaimed.extend(gone))
    change.done(lambda: close_beside(fd for _, fd in gone))
    change.let_go(name)
    return {}


def _unclaimed(gmemd: Gmemd) -> list[tuple[str, int]]:
    """What may be claimed, also by those in the house into a room."""
    return gmemd.house.unclaimed if gmemd.sees_all else gmemd.unclaimed


def query_memdev_lost(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    lost = [(room.named(object_id), record) for room in gmemd.seen_rooms() for object_id, record in room.lost.items()]
    return listed(({"id": name, "qom-type": record.qom_type, "size": record.size, "reason": record.missing}
                   for name, record in lost), len(lost))


def memdev_persist(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    backend = gmemd.objects.find(arguments["id"])
    if not gmemd.custody.keeps:
        raise QmpError("objects are not kept: gmemd runs with --persist off, or without systemd and --keeper")
    backend.check_idle()
    change.judged()
    if arguments["persist"] == (backend.record is not None):
        return {}
    # Claimed until it is durable: changes by others to an object that is not kept would not be recorded.
    change.claim(backend, "its persistence is being changed")
    return _keep(backend, change) if arguments["persist"] else _let_go(backend, change)


async def _let_go(backend: HostMemoryBackend, change: Change) -> dict[str, Any]:
    """Remove an object, with its private bytes set aside, from custody."""
    for piece in backend.pieces():
        change.forget(piece)
    return {}


async def _keep(backend: HostMemoryBackend, change: Change) -> dict[str, Any]:
    """Give an object, with its private bytes set aside, to custody."""
    another = _Another()
    change.undo(another.close)
    if backend.on_file:
        await in_thread(another.open, backend.fd)
    for piece in backend.pieces():
        change.reserve()
        change.keep(piece, again=another.take if backend.on_file else opened_again)
    change.done(another.close)
    return {}
