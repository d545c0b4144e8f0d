"""The coroutines of object-add and object-del, which stay pure in a compiled build (docs/building.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.threads import beside, in_thread
from gmemd.commands.charging import check_resident, grow, huge_page_of
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.contexts import usable_cpus
from gmemd.commands.templates import check_unused
from gmemd.errors import QmpError
from gmemd.objects.container import ThreadContext

_LOOK_SECONDS = 0.2  # between two checks whether the client waiting for a file to open is still connected


async def add_context(gmemd: Gmemd, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    """Add a thread context whose id is reserved."""
    object_id, cpus = arguments["id"], await usable_cpus(arguments)
    await gmemd.settler.durable()  # the deletion of what had the id before
    gmemd.objects.add_context(ThreadContext(object_id, cpus))
    change.undo(gmemd.objects.remove_context, object_id)
    return {}


async def add_blocking(gmemd: Gmemd, caller: Caller, backend: HostMemoryBackend, change: Change,
                       make: Callable[[], None], added: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Make an object's memory in a worker thread; meanwhile the id is taken and the object not yet visible.

    Nobody waits for a file to open when the client has disconnected.
    """
    if backend.properties["prealloc"]:
        await check_resident(gmemd, change, backend.size)
    making = asyncio.ensure_future(in_thread(make))
    change.undo(_give_up, backend, making)
    while not (await asyncio.wait([making], timeout=_LOOK_SECONDS))[0]:
        if backend.waits and caller.is_gone():
            raise QmpError("the client disconnected before its file was open")
    making.result()
    if backend.on_file and backend.charge is not None:
        backend.huge_page = await in_thread(huge_page_of, gmemd.kernel, backend.fd)
        grow(gmemd, backend, change)
    return added()


def _give_up(backend: HostMemoryBackend, making: asyncio.Future[None]) -> asyncio.Future[None] | None:
    """Discard what a thread has created, or is still creating; the future ends when that is done."""
    if making.done():
        if backend.busy:  # it closes when the claim ends
            backend.abandon()
            return None
        return beside(backend.abandon)
    backend.unwanted = True

    def in_vain(making: asyncio.Future[None]) -> None:
        if not making.cancelled():
            making.exception()
        beside(backend.abandon)

    making.add_done_callback(in_vain)
    return None


async def delete_template(backend: HostMemoryBackend, change: Change, delete: Callable[[], Any]) -> Any:
    """Delete a claimed template, if nobody uses its memory."""
    await check_unused(backend)
    change.release(backend)
    return delete()
