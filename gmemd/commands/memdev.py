"""Commands about memory objects: QEMU's object-add family and gmemd's own memdev ones."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import beside, close_beside, closed_at_once, in_thread
from gmemd.commands.context import Caller, Change, Gmemd, Step, record_of
from gmemd.commands.contexts import check_cpus, usable_cpus
from gmemd.commands.properties import populate
from gmemd.errors import QmpError
from gmemd.objects.container import ThreadContext

if TYPE_CHECKING:
    from gmemd.persist.custody import Again

_LOOK_SECONDS = 0.2  # between two looks whether the client of a file that does not open is still there


def object_add(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    if arguments["qom-type"] == ThreadContext.qom_type:
        check_cpus(arguments)
        gmemd.objects.reserve(arguments["id"])
        return _add_context(gmemd, arguments)
    backend = gmemd.objects.begin(arguments, (caller.uid, caller.pid), gmemd.tree.find_context)
    try:
        if gmemd.custody is not None:
            gmemd.custody.reserve()
    except BaseException:
        gmemd.objects.cancel(backend)
        raise
    if backend.blocks:
        return _add_blocking(gmemd, caller, backend)
    try:
        _make(gmemd, backend)
        return added(gmemd, backend)
    except BaseException:
        backend.abandon()
        _give_up(gmemd, backend)
        raise


async def _add_context(gmemd: Gmemd, arguments: dict[str, Any]) -> dict[str, Any]:
    """Add a thread context, whose id is reserved."""
    try:
        cpus = await usable_cpus(arguments)
    except BaseException:
        gmemd.objects.release(arguments["id"])
        raise
    gmemd.objects.add_context(ThreadContext(arguments["id"], cpus))
    return {}


def _give_up(gmemd: Gmemd, backend: HostMemoryBackend) -> None:
    gmemd.objects.cancel(backend)
    if gmemd.custody is not None:
        gmemd.custody.release()


def _make(gmemd: Gmemd, backend: HostMemoryBackend) -> None:
    backend.allocate(gmemd.kernel)
    backend.finish(gmemd.kernel)
    if backend.properties["prealloc"]:
        populate(gmemd, backend)


async def _add_blocking(gmemd: Gmemd, caller: Caller, backend: HostMemoryBackend) -> Any:
    """The same in a worker thread; the id is taken meanwhile, the object not yet visible.

    For a client that has gone nobody waits until a file opens at last.
    """
    try:
        making = asyncio.ensure_future(in_thread(_make, gmemd, backend))
    except BaseException:
        _give_up(gmemd, backend)
        raise
    try:
        while not (await asyncio.wait([making], timeout=_LOOK_SECONDS))[0]:
            if backend.waits and caller.is_gone():
                raise QmpError("the client has gone before its file was open")
        making.result()
        return added(gmemd, backend)
    except BaseException:
        if making.done():
            await beside(backend.abandon)
        else:
            backend.unwanted = True
            making.add_done_callback(lambda making: _made_in_vain(backend, making))
        _give_up(gmemd, backend)
        raise


def _made_in_vain(backend: HostMemoryBackend, making: asyncio.Future[None]) -> None:
    if not making.cancelled():
        making.exception()
    beside(backend.abandon)


def added(gmemd: Gmemd, backend: HostMemoryBackend, undo: Step | None = None, *, again: Again | None = None) -> Any:
    """Make an object visible and tell custody; the result of the command that made it.

    `undo`: instead of giving up memory that was made for it; `again`: as of Custody.add.
    """
    custody = gmemd.custody
    if custody is None:
        gmemd.objects.commit(backend)
        return {}
    backend.record = record_of(backend, gmemd.kernel)
    operation = custody.add(backend.record, backend.fd, again=again, status=backend.status)
    gmemd.objects.commit(backend)
    return Change({}, operation, undo=undo or (lambda: _abandon(gmemd.objects.remove(backend.id))))


def _abandon(backend: HostMemoryBackend) -> asyncio.Future[None] | None:
    """Give up what was never acknowledged; None when that is done."""
    if backend.blocks and not backend.busy:
        return beside(backend.abandon)
    backend.abandon()
    return None


def object_del(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    return delete(gmemd, arguments["id"])


def delete(gmemd: Gmemd, object_id: str) -> Any:
    """Delete an object, or what is left of a lost one; the result of the command that does so.

    Its memory is free, as far as nobody else has it, when the result has come about.
    """
    if object_id in gmemd.lost:
        return _forget(gmemd, object_id)
    if object_id in gmemd.objects.contexts:
        gmemd.objects.remove_context(object_id)
        return {}
    backend = gmemd.objects.find(object_id)
    backend.check_idle()
    custody = gmemd.custody
    if custody is None:
        gmemd.objects.remove(object_id)
        closing = _let_go(gmemd, backend)
        return {} if closing is None else _closed(closing)
    operations = [custody.remove(record) for record in (backend.record, backend.private_record) if record is not None]
    gmemd.objects.remove(object_id)
    return Change({}, *operations, undo=lambda: gmemd.objects.restore([backend]),
                  done=lambda: _let_go(gmemd, backend))


def _let_go(gmemd: Gmemd, backend: HostMemoryBackend) -> asyncio.Future[None] | None:
    """Free what a deleted object has; None when that is done."""
    fd, fds = backend.fd, backend.detach()
    if backend.on_file:
        return close_beside(fds, first=lambda: backend.discard(gmemd.kernel, fd))
    if backend.kind == "memfd" and len(fds) == 1 and closed_at_once(fd):
        return None
    return close_beside(fds)


async def _closed(closing: asyncio.Future[None]) -> dict[str, Any]:
    await closing
    return {}


def _forget(gmemd: Gmemd, object_id: str) -> Any:
    """Delete what is left of a lost object: its record."""
    assert gmemd.custody is not None
    record = gmemd.lost[object_id]
    operation = gmemd.custody.remove(record)
    del gmemd.lost[object_id]
    gmemd.objects.lose(object_id, lost=False)

    def undo() -> None:
        gmemd.lost[object_id] = record
        gmemd.objects.lose(object_id)

    return Change({}, operation, undo=undo)


def query_memory_size_summary(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    # No machine, no RAM of a machine: the objects are in query-memdev.
    return {"base-memory": 0, "plugged-memory": 0}
