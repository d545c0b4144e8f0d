"""Commands on the contents of an object by range: visibility, conversion, discarding."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.threads import beside, close_beside, in_thread
from gmemd.commands.charging import grow
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.listing import SHORT, listed
from gmemd.commands.measure import with_resident
from gmemd.errors import QmpError, os_errors
from gmemd.kernel.kernel import PageInUse
from gmemd.kernel.rules import check_inside
from gmemd.memory.ranges import PRIVATE, SHARED, RangeMap
from gmemd.objects.conversion import convert, fill, forget, set_aside
from gmemd.qmp.rows import Form

_STATES: Final = {PRIVATE: "private", SHARED: "shared"}
_SOME: Final = 50  # ranges that are written at a time
_AT_ONCE = 8 << 20  # bytes that may be copied or freed on the event loop


def memdev_convert(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    backend, offset, size = part(gmemd, arguments)
    visibility, to = visibility_of(backend), arguments["to"]
    preserves = arguments["preserve"] and to == "private"
    if preserves and backend.aside is None:
        grow(gmemd, backend, change, aside=True)
    if change.dry_run:
        changed = sum(length for _, length, state in visibility.ranges(offset, size)
                      if (state is PRIVATE) != (to == "private"))
        content = "keep their content" if arguments["preserve"] else "read as zero"
        change.judged(f"make {changed} of {size} bytes of '{backend.id}' {to}; they would {content}", whole=False)
    backend.wrote(offset, size)
    change.undo(backend.wrote, offset, size)
    begins_store = preserves and backend.record is not None and backend.aside is None
    if size > _AT_ONCE or begins_store:
        change.claim(backend, "a part of it is being converted")
        return _convert_slowly(gmemd, backend, arguments, change, begins_store=begins_store)
    back = _undo(gmemd, backend, arguments)
    if preserves:
        _set_aside(gmemd, backend, arguments)
    converted = _convert(gmemd, backend, arguments)
    change.undo(back)
    change.rewrite(backend)
    change.done(lambda: _forget(gmemd, backend, arguments))
    change.done(lambda: _tell(gmemd, arguments, converted))
    return {"simulated": _simulated(gmemd), "converted": converted}


async def _convert_slowly(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any], change: Change, *,
                          begins_store: bool) -> Any:
    """The same with waiting, under a claim that lasts until it is durable and what it no longer needs is freed."""
    run = in_thread if arguments["size"] > _AT_ONCE else _at_once
    back = _undo(gmemd, backend, arguments)
    if begins_store:
        change.reserve()
        change.undo(lambda: _drop_store(backend))
    if arguments["preserve"] and arguments["to"] == "private":
        await run(_set_aside, gmemd, backend, arguments)
    if begins_store and backend.aside is not None:
        change.keep(backend.aside)
        await change.settle()  # before it has the only copy of the bytes
    converted = await run(_convert, gmemd, backend, arguments)
    change.undo(lambda: beside(back))
    change.rewrite(backend)
    await change.settle()
    await run(_forget, gmemd, backend, arguments)
    _tell(gmemd, arguments, converted)
    return {"simulated": _simulated(gmemd), "converted": converted}


async def _at_once(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _drop_store(backend: HostMemoryBackend) -> asyncio.Future[None] | None:
    aside, backend.aside = backend.aside, None
    return None if aside is None else close_beside([aside.fd])


def _set_aside(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any]) -> None:
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
    """A function that restores map and preserved content as they are now; other content stays zero."""
    visibility, kernel = visibility_of(backend), gmemd.kernel
    to = arguments["to"] == "private"
    before = [(start, length) for start, length, state in visibility.ranges(arguments["offset"], arguments["size"])
              if state is not to]

    def undo() -> None:
        for start, length in before:
            with contextlib.suppress(OSError):
                convert(backend, kernel, start, length, not to, preserve=arguments["preserve"])
            visibility.set(start, length, not to)
            with contextlib.suppress(OSError):
                forget(backend, kernel, start, length)

    return undo


def _forget(gmemd: Gmemd, backend: HostMemoryBackend, arguments: dict[str, Any]) -> None:
    """Free what is set aside for what is shared now; only to save room: set_aside() begins with the same."""
    with contextlib.suppress(OSError):
        forget(backend, gmemd.kernel, arguments["offset"], arguments["size"])


def _tell(gmemd: Gmemd, arguments: dict[str, Any], converted: int) -> None:
    gmemd.counters.conversions[arguments["to"]] += 1
    gmemd.counters.converted_bytes[arguments["to"]] += converted
    gmemd.emit("MEMDEV_CONVERTED", {name: arguments[name] for name in ("id", "offset", "size", "to")})


def query_memdev_ranges(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    backend = gmemd.objects.find(arguments["id"])
    members, ranges = describe_ranges(gmemd, backend, arguments["offset"], arguments.get("size"))
    count = len(visibility_of(backend))
    rows = map(range_row, ranges) if count <= SHORT else _texts(ranges)
    return listed(rows, count, **members, ranges=...)


def describe_ranges(gmemd: Gmemd, backend: HostMemoryBackend, offset: int,
                    size: int | None = None) -> tuple[dict[str, Any], Iterator[tuple[int, int, bool]]]:
    """The members of MemdevRanges, and each range (offset, size, state) in a part of an object."""
    visibility = visibility_of(backend).copy()
    offset = min(offset, visibility.size)
    left = visibility.size - offset
    return ({"simulated": _simulated(gmemd), "private": visibility.total(PRIVATE)},
            visibility.ranges(offset, left if size is None else min(size, left)))


def range_row(found: tuple[int, int, bool]) -> dict[str, Any]:
    """The MemdevRange of a range."""
    offset, size, state = found
    return {"offset": offset, "size": size, "visibility": _STATES[state]}


def _texts(ranges: Iterator[tuple[int, int, bool]]) -> Iterator[bytes]:
    """The same as JSON, some at a time."""
    forms = {state: Form({"offset": int, "size": int, "visibility": word}).write for state, word in _STATES.items()}
    while some := [forms[state](offset, size) for offset, size, state in islice(ranges, _SOME)]:
        yield b", ".join(some)


def memdev_discard(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    backend, offset, size = part(gmemd, arguments)
    backend.check_writable()
    if change.dry_run:
        change.judged(with_resident(gmemd, backend, offset, size, (
            f"free {{}} of {size} bytes of '{backend.id}', which then read as zero")))
    backend.wrote(offset, size)
    if size > _AT_ONCE or backend.on_file:
        change.claim(backend, "a part of it is being discarded")
        return _discard_slowly(gmemd, backend, offset, size)
    return _discard(gmemd, backend, offset, size)


async def _discard_slowly(gmemd: Gmemd, backend: HostMemoryBackend, offset: int, size: int) -> Any:
    return await in_thread(_discard, gmemd, backend, offset, size)


def _discard(gmemd: Gmemd, backend: HostMemoryBackend, offset: int, size: int) -> dict[str, Any]:
    with os_errors(f"cannot discard part of '{backend.id}'"):
        gmemd.kernel.punch_hole(backend.fd, backend.offset + offset, size)
        if backend.aside is not None:
            gmemd.kernel.punch_hole(backend.aside.fd, offset, size)
        if backend.visibility is not None:
            fill(backend, gmemd.kernel, [(start, length) for start, length, state
                                         in backend.visibility.ranges(offset, size) if state is SHARED])
    return {}


def part(gmemd: Gmemd, arguments: dict[str, Any]) -> tuple[HostMemoryBackend, int, int]:
    """The object and the range that a command names, both valid; else QmpError."""
    backend, offset, size = gmemd.objects.find(arguments["id"]), arguments["offset"], arguments["size"]
    backend.check_idle()
    with os_errors(f"offset {offset:#x} and size {size:#x} are not a range of pages of '{backend.id}'"):
        check_inside(offset, size, backend.memory_size)
    return backend, offset, size


def visibility_of(backend: HostMemoryBackend) -> RangeMap:
    """What of an object is private and what shared; QmpError if it is not a guest_memfd."""
    if backend.visibility is None:
        raise QmpError(f"object '{backend.id}' is not a guest_memfd")
    return backend.visibility


def _simulated(gmemd: Gmemd) -> bool:
    return not (gmemd.kernel.conversion and gmemd.kernel.kvm_enabled)
