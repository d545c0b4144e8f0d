"""Commands that create and delete memory objects: QEMU's object-add and object-del."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.file import FileBackend
from gmemd.changes.change import Change
from gmemd.changes.threads import close_beside, closed_at_once
from gmemd.commands.blocking import add_blocking, add_context, delete_template
from gmemd.commands.charging import charge, release
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.contexts import check_cpus
from gmemd.commands.measure import with_resident
from gmemd.commands.properties import populate
from gmemd.commands.runners import check_runner
from gmemd.commands.templates import check_no_clones, is_template
from gmemd.commands.tombstones import forget_tombstone
from gmemd.errors import QmpError, close_fd
from gmemd.kernel.beneath import Paths
from gmemd.objects.container import ThreadContext

if TYPE_CHECKING:
    from gmemd.authority.rights import Rights
    from gmemd.persist.fdstore import Again

def object_add(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    paths = None if caller.rights.all else _paths(caller.rights, arguments)
    if arguments["qom-type"] == ThreadContext.qom_type:
        return _add_context(gmemd, caller, arguments, change)
    backend = gmemd.objects.begin(arguments, (caller.uid, caller.pid), gmemd.find_context, dry_run=change.dry_run)
    if paths is not None and isinstance(backend, FileBackend):
        backend.paths = paths
    slow = (backend.on_file or backend.properties["prealloc"]) and not change.dry_run
    if slow:
        change.undo(gmemd.objects.cancel, backend)
    else:
        change.undo(_unmake, gmemd, backend)
    if change.budget is not None or gmemd.account is not None:
        charge(gmemd, backend, change)
    change.reserve()
    if slow:
        return add_blocking(gmemd, caller, backend, change, partial(make, gmemd, backend),
                            partial(added, gmemd, backend, change))
    if change.dry_run:
        _try(gmemd, backend, change)
    backend.allocate(gmemd.kernel)
    backend.finish(gmemd.kernel)
    change.keep(backend)
    gmemd.objects.commit(backend)
    backend.blank = True
    return {}


def _paths(rights: Rights, arguments: dict[str, Any]) -> Paths | None:
    """How an object's file is to be found, if it has one; QmpError if the rights do not allow the object."""
    rights.check_type(arguments["qom-type"])
    return Paths(rights.root_of(arguments["mem-path"])) if "mem-path" in arguments else None


def _add_context(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    """Add a thread context."""
    object_id = arguments["id"]
    check_cpus(arguments)
    gmemd.objects.check_owner(caller.uid)
    gmemd.objects.reserve(object_id)
    change.undo(gmemd.objects.release, object_id)
    if change.dry_run:
        change.judged(f"create the thread context '{object_id}', which ends with gmemd", whole=False,
                      then=partial(gmemd.objects.add_context, ThreadContext(object_id, [])))

    return add_context(gmemd, arguments, change)


def _try(gmemd: Gmemd, backend: HostMemoryBackend, change: Change) -> None:
    """Create memory and free it again, if that leaves no trace; injected faults are not for a dry run."""
    kept = "kept across restarts of gmemd" if gmemd.custody.keeps else "which ends with gmemd"
    appear = partial(gmemd.objects.restore, [backend])
    if not backend.can_be_tried or gmemd.lab is not None:
        change.judged(f"create '{backend.id}' of {backend.size} bytes, {kept}", whole=False, then=appear)
    backend.allocate(gmemd.kernel)
    backend.finish(gmemd.kernel)
    populates = backend.properties["prealloc"]
    if populates:
        try:
            gmemd.kernel.check_headroom(backend.memory_size, backend.fd)
        except OSError as exc:
            raise QmpError(f"qemu_prealloc_mem: preallocating memory failed: {os.strerror(exc.errno or 0)}") from exc
    change.judged(f"create '{backend.id}', {backend.memory_size} bytes of {backend.kind}, {kept}",
                  whole=not populates, then=appear)


def _unmake(gmemd: Gmemd, backend: HostMemoryBackend) -> None:
    """Undo the creation of an object, however far it has come."""
    gmemd.objects.cancel(backend)
    backend.abandon()


def make(gmemd: Gmemd, backend: HostMemoryBackend) -> None:
    """Create the memory of an object, and populate it if that is asked for; may block."""
    backend.allocate(gmemd.kernel)
    backend.finish(gmemd.kernel)
    if backend.properties["prealloc"]:
        populate(gmemd, backend)


def added(gmemd: Gmemd, backend: HostMemoryBackend, change: Change, *, again: Again | None = None) -> dict[str, Any]:
    """Make an object visible and have it kept; `again` as for Custody.add."""
    change.keep(backend, again=again)
    gmemd.objects.commit(backend)
    change.undo(gmemd.objects.uncommit, backend)
    return {}


def object_del(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    return delete(gmemd, arguments["id"], change)


def delete(gmemd: Gmemd, object_id: str, change: Change, *, force: bool = False) -> Any:
    """Delete an object, or what is left of a lost one.

    When the change has ended, its memory is free, unless another process has it.
    force: even if it is a template in use.
    """
    backend = gmemd.objects.get(object_id)
    if backend is None:
        _delete_other(gmemd, object_id, change)
        return {}
    backend.check_idle()
    if not force:
        if backend.runner is not None:
            check_runner(backend, but="deleting it with memdev-delete needs 'force'")
        if is_template(backend):
            check_no_clones(gmemd, backend)
            change.claim(backend, "it is being deleted")
            return delete_template(backend, change, partial(_delete_idle, gmemd, backend, change))
    return _delete_idle(gmemd, backend, change)


def _delete_other(gmemd: Gmemd, object_id: str, change: Change) -> None:
    """Delete what has an id and is not memory; QmpError if nothing has it."""
    objects = gmemd.objects
    if object_id in gmemd.lost:
        _forget(gmemd, object_id, change)
    elif object_id in gmemd.gone:
        forget_tombstone(gmemd, object_id, change)
    elif object_id in objects.contexts:
        if change.dry_run:
            change.judged(f"delete the thread context '{object_id}'", then=partial(objects.remove_context, object_id))
        context = objects.contexts[object_id]
        users = objects.remove_context(object_id)
        change.undo(objects.restore_context, context, users)
    else:
        objects.find(object_id)


def _delete_idle(gmemd: Gmemd, backend: HostMemoryBackend, change: Change) -> dict[str, Any]:
    if change.dry_run:
        _judge_deletion(gmemd, backend, change)
    remove(gmemd, backend, change)
    return {}


def _judge_deletion(gmemd: Gmemd, backend: HostMemoryBackend, change: Change) -> None:
    change.judged(with_resident(gmemd, backend, 0, backend.memory_size, (
        f"delete '{backend.id}' with {{}} bytes in memory; its descriptor was handed out "
        f"{backend.handed_out} times, and processes that still have it keep the memory")),
        then=partial(gmemd.objects.remove, backend.id))


def remove(gmemd: Gmemd, backend: HostMemoryBackend, change: Change) -> None:
    """Remove an object, and free its memory when that is durable."""
    if gmemd.custody.keeps:
        for piece in backend.pieces():
            change.forget(piece)
    gmemd.objects.remove(backend.id)
    change.undo(gmemd.objects.restore, [backend])
    change.done(_let_go, gmemd, backend)


def _let_go(gmemd: Gmemd, backend: HostMemoryBackend) -> asyncio.Future[None] | None:
    """Free a deleted object's memory; None when that is done."""
    fd, fds = backend.fd, backend.detach()
    if backend.charge is not None:
        release(backend)
    if backend.on_file:
        return close_beside(fds, first=lambda: backend.discard(gmemd.kernel, fd))
    if backend.kind == "memfd" and len(fds) == 1 and fd >= 0:
        if backend.blank:
            close_fd(fd)
            return None
        if closed_at_once(fd):
            return None
    return close_beside(fds)


def _forget(gmemd: Gmemd, object_id: str, change: Change) -> None:
    """Delete what is left of a lost object: its record."""
    record = gmemd.lost[object_id]

    def forget() -> None:
        del gmemd.lost[object_id]
        gmemd.objects.lose(object_id, lost=False)

    if change.dry_run:
        change.judged(f"delete what is left of '{object_id}', which is lost", then=forget)
    change.drop(record)
    forget()

    def undo() -> None:
        gmemd.lost[object_id] = record
        gmemd.objects.lose(object_id)

    change.undo(undo)
