"""Commands on the contents of an object by range: visibility, conversion, discarding."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Coroutine
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.guest_memfd import convert, fill, forget, set_aside
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Caller, Change, Gmemd, settled, store_record, updated
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel.base import PageInUse, check_inside
from gmemd.ranges import PRIVATE, SHARED, RangeMap

_AT_ONCE = 16 << 20  # bytes that may be preserved on the event loop


def memdev_convert(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    backend, _, size = part(gmemd, arguments)
    visibility_of(backend)
    first = _begins_store(gmemd, backend, arguments)
    if first or ((arguments["preserve"] or backend.enforcers) and size > _AT_ONCE):
        return _convert_busy(gmemd, backend, arguments, first)
    undo = _undo(gmemd, backend, arguments)
    _set_aside(gmemd, backend, arguments)
    return _converted(gmemd, backend, arguments, _convert(gmemd, backend, arguments), undo)


def _begins_store(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any]) -> bool:
    """May this conversion make a memfd of preserved bytes that is to be kept?"""
    return gmemd.custody is not None and backend.record is not None and backend.private_record is None \
        and arguments["preserve"] and arguments["to"] == "private"


async def _convert_busy(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any], first: bool) -> Any:
    """The same with waiting; a `first` memfd of preserved bytes is kept before the bytes are only there."""
    run = in_thread if arguments["size"] > _AT_ONCE else _at_once
    if first and gmemd.custody is not None:
        gmemd.custody.reserve()
    backend.busy = "a part of it is being converted"
    try:
        undo = _undo(gmemd, backend, arguments)
        try:
            await run(_set_aside, gmemd, backend, arguments)
        finally:
            if first:
                begun = _keep_store(gmemd, backend)
        if first:
            await settled(gmemd, begun)
        converted = await run(_convert, gmemd, backend, arguments)
    finally:
        backend.busy = ""
    return _converted(gmemd, backend, arguments, converted, undo)


async def _at_once(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _keep_store(gmemd: Gmemd, backend: HostMemoryBackend) -> Any:
    """Give the memfd of preserved bytes to custody, using up the reservation."""
    custody = gmemd.custody
    assert custody is not None
    if backend.private_fd < 0:
        custody.release()
        return {}

    def undo() -> None:
        fd = backend.private_fd
        backend.private_record, backend.private_fd = None, -1
        close_fd(fd)

    record = store_record(backend)
    try:
        operation = custody.add(record, backend.private_fd)
    except BaseException:
        custody.release()
        undo()
        raise
    backend.private_record = record
    return Change({}, operation, undo=undo)


def _set_aside(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any]) -> None:
    if arguments["preserve"] and arguments["to"] == "private":
        with os_errors(f"cannot convert '{backend.id}'"):
            set_aside(backend, gmemd.kernel, arguments["offset"], arguments["size"])


def _convert(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any]) -> int:
    offset, size = arguments["offset"], arguments["size"]
    to = PRIVATE if arguments["to"] == "private" else SHARED
    try:
        return convert(backend, gmemd.kernel, offset, size, to, preserve=arguments["preserve"])
    except PageInUse as exc:
        with contextlib.suppress(OSError):
            forget(backend, gmemd.kernel, offset, size)
        raise QmpError(f"cannot convert '{backend.id}': {os.strerror(errno.EAGAIN)} "
                       f"at offset {exc.offset:#x}") from exc
    except OSError as exc:
        with contextlib.suppress(OSError):
            forget(backend, gmemd.kernel, offset, size)
        raise QmpError(f"cannot convert '{backend.id}': {os.strerror(exc.errno or 0)}") from exc


def _undo(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any]) -> Callable[[], None]:
    """What puts map and preserved content back as they are now; content that was not preserved stays zero."""
    visibility, kernel = visibility_of(backend), gmemd.kernel
    to = arguments["to"] == "private"
    before = [(start, length) for start, length, state in visibility.ranges(arguments["offset"], arguments["size"])
              if state is not to]
    record = backend.record

    def undo() -> None:
        for start, length in before:
            with contextlib.suppress(OSError):
                convert(backend, kernel, start, length, not to, preserve=arguments["preserve"])
            visibility.set(start, length, not to)
            with contextlib.suppress(OSError):
                forget(backend, kernel, start, length)
        backend.record = record

    return undo


def _converted(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any], converted: int,
               undo: Callable[[], None]) -> Any:
    """Keep the new map, tell everybody, and answer."""
    value = {"simulated": _simulated(gmemd), "converted": converted}
    event = {name: arguments[name] for name in ("id", "offset", "size", "to")}

    def done() -> None:
        with contextlib.suppress(OSError):  # it is only room: set_aside() begins with the same
            forget(backend, gmemd.kernel, arguments["offset"], arguments["size"])
        _tell(gmemd, event, converted)

    custody = gmemd.custody
    if custody is None or backend.record is None:
        done()
        return value
    backend.record = updated(backend)
    return Change(value, custody.update(backend.record), undo=undo, done=done)


def _tell(gmemd: Gmemd, event: dict[str, Any], converted: int) -> None:
    gmemd.counters.conversions[event["to"]] += 1
    gmemd.counters.converted_bytes[event["to"]] += converted
    gmemd.emit("MEMDEV_CONVERTED", event)


def query_memdev_ranges(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    backend = gmemd.objects.find(arguments["id"])
    visibility = visibility_of(backend)
    offset = min(arguments["offset"], visibility.size)
    size = min(arguments.get("size", visibility.size), visibility.size - offset)
    return {"simulated": _simulated(gmemd), "private": visibility.total(PRIVATE),
            "ranges": [{"offset": start, "size": length, "visibility": "private" if state is PRIVATE else "shared"}
                       for start, length, state in visibility.ranges(offset, size)]}


def memdev_discard(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    backend, offset, size = part(gmemd, arguments)
    if size > _AT_ONCE:
        return _discard_in_thread(gmemd, backend, offset, size)
    _discard(gmemd, backend, offset, size)
    return {}


def _discard_in_thread(gmemd: Gmemd, backend: HostMemoryBackend, offset: int, size: int) -> Coroutine[Any, Any, Any]:
    async def work() -> dict[str, Any]:
        backend.busy = "a part of it is being discarded"
        try:
            await in_thread(_discard, gmemd, backend, offset, size)
        finally:
            backend.busy = ""
        return {}

    return work()


def _discard(gmemd: Gmemd, backend: HostMemoryBackend, offset: int, size: int) -> None:
    with os_errors(f"cannot discard of '{backend.id}'"):
        gmemd.kernel.punch_hole(backend.fd, backend.offset + offset, size)
        if backend.private_fd >= 0:
            gmemd.kernel.punch_hole(backend.private_fd, offset, size)
        if backend.visibility is not None:
            fill(backend, gmemd.kernel, [(start, length) for start, length, state
                                         in backend.visibility.ranges(offset, size) if state is SHARED])


def part(gmemd: Gmemd, arguments: dict[str, Any]) -> tuple[HostMemoryBackend, int, int]:
    """The object and the range that a command names, both fit to be worked on; else QmpError."""
    backend, offset, size = gmemd.objects.find(arguments["id"]), arguments["offset"], arguments["size"]
    backend.check_idle()
    with os_errors(f"offset {offset:#x} and size {size:#x} are no range of pages of '{backend.id}'"):
        check_inside(offset, size, backend.memory_size)
    return backend, offset, size


def visibility_of(backend: HostMemoryBackend) -> RangeMap:
    """What of an object is private and what shared; QmpError if it is no guest_memfd."""
    if backend.visibility is None:
        raise QmpError(f"object '{backend.id}' is no guest_memfd")
    return backend.visibility


def _simulated(gmemd: Gmemd) -> bool:
    return not (gmemd.kernel.conversion and gmemd.kernel.kvm_enabled)
