"""Commands on the contents of an object by range: visibility, conversion, discarding."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Coroutine, Iterator
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.guest_memfd import convert, fill
from gmemd.commands.context import Caller, Change, Gmemd, in_thread, store_record, updated
from gmemd.errors import QmpError, os_errors
from gmemd.kernel.base import PageInUse, check_inside
from gmemd.ranges import PRIVATE, SHARED, RangeMap

_AT_ONCE = 16 << 20  # bytes that may be preserved on the event loop


def memdev_convert(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    backend, _, size = part(gmemd, arguments)
    visibility_of(backend)
    if (arguments["preserve"] or backend.enforcers) and size > _AT_ONCE:
        return _convert_in_thread(gmemd, backend, arguments)
    with _store_room(gmemd, backend, arguments) as store:
        undo = _undo(gmemd, backend, arguments)
        converted = _convert(gmemd, backend, arguments)
    return _converted(gmemd, backend, arguments, converted, store, undo)


@contextlib.contextmanager
def _store_room(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any]) -> Iterator[bool]:
    """Hold custody's room for the memfd of preserved bytes, if this conversion may make it; gives whether so."""
    custody = gmemd.custody
    if custody is None or backend.record is None or backend.private_record is not None \
            or not arguments["preserve"] or arguments["to"] != "private":
        yield False
        return
    custody.reserve()
    try:
        yield True
    except BaseException:
        custody.release()
        raise


async def _convert_in_thread(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any]) -> Any:
    backend.busy = "a part of it is being converted"
    try:
        with _store_room(gmemd, backend, arguments) as store:
            undo = _undo(gmemd, backend, arguments)
            converted = await in_thread(_convert, gmemd, backend, arguments)
    finally:
        backend.busy = ""
    return _converted(gmemd, backend, arguments, converted, store, undo)


def _convert(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any]) -> int:
    offset, size = arguments["offset"], arguments["size"]
    to = PRIVATE if arguments["to"] == "private" else SHARED
    try:
        return convert(backend, gmemd.kernel, offset, size, to, preserve=arguments["preserve"])
    except PageInUse as exc:
        raise QmpError(f"cannot convert '{backend.id}': {os.strerror(errno.EAGAIN)} "
                       f"at offset {exc.offset:#x}") from exc
    except OSError as exc:
        raise QmpError(f"cannot convert '{backend.id}': {os.strerror(exc.errno or 0)}") from exc


def _undo(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any]) -> Any:
    """What puts map and preserved content back as they are now; content that was not preserved stays zero."""
    visibility = visibility_of(backend)
    before = list(visibility.ranges(arguments["offset"], arguments["size"]))
    records = (backend.record, backend.private_record)

    def undo() -> None:
        for start, length, state in before:
            if arguments["preserve"]:
                with contextlib.suppress(OSError):
                    convert(backend, gmemd.kernel, start, length, state, preserve=True)
            visibility.set(start, length, state)
        backend.record, backend.private_record = records

    return undo


def _converted(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any], converted: int,
               store: bool, undo: Any) -> Any:
    """Keep the new map, tell everybody, and answer."""
    value = {"simulated": _simulated(gmemd), "converted": converted}
    event = {name: arguments[name] for name in ("id", "offset", "size", "to")}
    custody = gmemd.custody
    if custody is None or backend.record is None:
        _tell(gmemd, event, converted)
        return value
    operations = []
    if store and backend.private_fd < 0:
        custody.release()
    elif store:
        backend.private_record = store_record(backend)
        operations.append(custody.add(backend.private_record, backend.private_fd))
    backend.record = updated(backend)
    operations.append(custody.update(backend.record))
    return Change(value, *operations, undo=undo, done=lambda: _tell(gmemd, event, converted))


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
