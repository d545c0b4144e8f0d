"""Templates: freezing an object, and which templates have which clones and users."""

from __future__ import annotations

import errno
import os
from collections.abc import Coroutine, Iterable
from functools import partial
from typing import Any, NamedTuple

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.holders import holders_now, look_for_holders
from gmemd.commands.lease import check_free
from gmemd.commands.measure import measured
from gmemd.commands.templates import home_of_template, is_template, named
from gmemd.errors import QmpError, os_errors
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.uapi import F_SEAL_SEAL, F_SEAL_WRITE, SEALS_OF_SIZE
from gmemd.memory.usage import Item, occupied
from gmemd.processes.copies import written
from gmemd.processes.holders import Holder, shown_as

_SEALS = F_SEAL_SEAL | SEALS_OF_SIZE | F_SEAL_WRITE  # of a template


def memdev_freeze(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    backend = gmemd.objects.find(arguments["id"])
    backend.check_idle()
    if not backend.frozen:
        _check_sealable(gmemd.kernel, backend)
        if not arguments["force"]:
            check_free(backend, caller)
    change.judged(f"seal '{backend.id}' against writing, for good", whole=False)
    change.claim(backend, "it is being frozen")
    return _freeze(gmemd.kernel, backend, arguments.get("origin", backend.origin), change)


def _check_sealable(kernel: Kernel, backend: HostMemoryBackend) -> None:
    if backend.kind != "memfd":
        raise QmpError(f"object '{backend.id}' is a {backend.kind.replace('-', '_')}, which takes no seals: "
                       "memdev-clone with 'copy' can clone it")
    with os_errors(f"cannot examine '{backend.id}'"):
        seals = kernel.seals(backend.fd)
    if seals is None or seals & F_SEAL_SEAL:
        raise QmpError(f"the memfd of '{backend.id}' takes no more seals: it was created with seal=off, as "
                       "memory-backend-shm, or elsewhere")


async def _freeze(kernel: Kernel, backend: HostMemoryBackend, origin: str, change: Change) -> dict[str, Any]:
    """Seal an object's memory, then record what it is of; if sealing fails, nothing has changed."""
    try:
        if not backend.frozen:
            await in_thread(kernel.seal, backend.fd, _SEALS)  # examines every page, waits for pinned ones
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise QmpError(f"cannot freeze '{backend.id}': {os.strerror(exc.errno or 0)}") from exc
        writers = [holder for holder in await holders_now(backend) if holder.shares]
        raise QmpError(_why_busy(backend, writers)) from exc
    if origin != backend.origin:
        change.undo(setattr, backend, "origin", backend.origin)
        backend.origin = origin
        change.rewrite(backend)
    return {}


def _why_busy(backend: HostMemoryBackend, writers: list[Holder]) -> str:
    if not writers:
        return (f"object '{backend.id}' is mapped for writing by a process that cannot be seen from here, or a device "
                "has pinned its pages")
    return (f"object '{backend.id}' is mapped for writing by {named(writers)}: end that first, or clone the object "
            "with 'copy'")


# -- looking -----------------------------------------------------------------------------------------

class _Group(NamedTuple):
    """A template and its clones."""

    id: str
    first: HostMemoryBackend  # of those that are left, the template if it is
    clones: list[HostMemoryBackend]


def query_memdev_clones(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
    groups = _groups(gmemd)
    if "id" in arguments:
        wanted = gmemd.objects.find(arguments["id"])
        groups = [group for group in groups if wanted is group.first or wanted in group.clones]
        if not groups:
            raise QmpError(f"object '{wanted.id}' is neither a template nor a clone: memdev-freeze makes it a template")
    return _describe(gmemd, groups)


def _groups(gmemd: Gmemd) -> list[_Group]:
    """The templates, those that were deleted too, with their clones, by age."""
    found: dict[tuple[Any, int, int], _Group] = {}
    for backend in gmemd.by_age():
        if not is_template(backend) and not backend.template:
            continue
        with os_errors(f"cannot examine '{backend.id}'"):
            status = os.fstat(backend.fd)
        group = found.setdefault((home_of_template(gmemd, backend), status.st_dev, status.st_ino),
                                 _Group(gmemd.of(backend).named(backend.template or backend.id), backend, []))
        if backend.template:
            group.clones.append(backend)
    return list(found.values())


async def _describe(gmemd: Gmemd, groups: list[_Group]) -> list[dict[str, Any]]:
    """The answer; groups of which nothing is left meanwhile are left out."""
    holders = await look_for_holders([group.first for group in groups])
    by_first = {group.first: group for group in groups}
    rows: list[dict[str, Any]] = []
    async for found in measured(gmemd, by_first, partial(_examine, gmemd.kernel)):
        for first, (resident, file) in found:
            group = by_first[first]
            users = [holder for holder in holders[first] if holder.mapped]
            rows.append({"id": group.id, "size": first.memory_size,
                         "clones": [gmemd.called(one) for one in group.clones],
                         "users": await in_thread(_describe_users, users, file),
                         **({"origin": first.origin} if first.origin else {}),
                         **({} if resident is None else {"resident": resident})})
    return rows


def _examine(kernel: Kernel, item: Item) -> tuple[int | None, tuple[int, int]]:
    status = os.fstat(item.fd)
    return occupied(kernel, item), (status.st_dev, status.st_ino)


def _describe_users(users: Iterable[Holder], file: tuple[int, int]) -> list[dict[str, Any]]:
    """The MemdevCloneUser of each process; in a thread."""
    described = []
    for user in users:
        count = written(user.pid, shown_as(file))
        described.append({"pid": user.pid, "uid": user.uid, "comm": user.comm, "mapped": user.mapped,
                          **({} if count is None else {"written": count})})
    return described
