"""The answers of the JSON routes. Each takes the state and the checked parameters and returns a JSON value."""

from __future__ import annotations

from itertools import islice
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.pace import Pace
from gmemd.commands.conversion import describe_ranges, range_row
from gmemd.commands.holders import describe_holder
from gmemd.commands.measure import is_there
from gmemd.commands.snapshots import describe
from gmemd.commands.status import describe_status
from gmemd.errors import DEVICE_NOT_FOUND, QmpError
from gmemd.memory.ranges import PRIVATE
from gmemd.web.openapi import document
from gmemd.web.routes import routes
from gmemd.web.state import State

_FRESH = 1.0  # seconds that a measurement is valid


async def version(state: State, given: dict[str, Any]) -> Any:
    return await state.dispatcher.query("query-version", {})


async def jobs(state: State, given: dict[str, Any]) -> Any:
    return await state.dispatcher.query("query-jobs", {})


async def capabilities(state: State, given: dict[str, Any]) -> Any:
    gmemd = state.gmemd
    kernel, schema = gmemd.kernel, gmemd.schema
    return {"capabilities": ["oob"], "commands": list(schema.commands), "events": list(schema.events),
            "object-types": list(schema.object_types), "kernel": kernel.name, "kernel-reason": kernel.why,
            "conversion": kernel.conversion, "guest-memfd-flags": kernel.guest_memfd_flags,
            "page-size": kernel.page_size, "kept": gmemd.custody.keeps}


async def openapi(state: State, given: dict[str, Any]) -> Any:
    gmemd = state.gmemd
    return gmemd.encoded("openapi", lambda: document(gmemd.schema, routes(gmemd.schema.commands),
                                                     gmemd.version["package"]))


async def objects(state: State, given: dict[str, Any]) -> Any:
    found = await state.objects(given["q"], given["sort"])
    shown = found[given["offset"]:given["offset"] + given["limit"]]
    await state.measurer.measure(shown, _FRESH)
    rows, pace = [], Pace()
    for backend in shown:
        if is_there(backend):
            rows.append(_object(state, backend))
        await pace.keep()
    return {"total": len(found), "offset": given["offset"], "objects": rows}


async def one_object(state: State, given: dict[str, Any]) -> Any:
    backend = _find(state, given["id"])
    await state.measurer.measure([backend], _FRESH)
    return _object(state, _find(state, given["id"]))


async def ranges(state: State, given: dict[str, Any]) -> Any:
    try:
        members, those = describe_ranges(state.gmemd, _find(state, given["id"]), given["offset"])
    except QmpError as exc:
        raise QmpError(exc.desc, DEVICE_NOT_FOUND) from exc
    limit = given["limit"]
    found = [range_row(one) for one in islice(those, limit + 1)]
    answer = {**members, "ranges": found[:limit]}
    return {**answer, "next-offset": found[limit]["offset"]} if len(found) > limit else answer


async def holders_of_one(state: State, given: dict[str, Any]) -> Any:
    backend = _find(state, given["id"])
    found = (await state.holders.find([backend])).get(backend)
    if found is None:
        raise _not_found(given["id"])
    return [describe_holder(holder) for holder in found]


async def holders(state: State, given: dict[str, Any]) -> Any:
    found = await state.objects()
    shown = found[given["offset"]:given["offset"] + given["limit"]]
    held = await state.holders.find(shown)
    return {"total": len(found), "offset": given["offset"],
            "objects": [{"id": state.gmemd.called(backend), "holders": [describe_holder(holder) for holder in those]}
                        for backend, those in held.items()]}


async def snapshots(state: State, given: dict[str, Any]) -> Any:
    try:
        shelf = await state.gmemd.snapshots.open(create=False)
    except QmpError as exc:
        raise QmpError(exc.desc, DEVICE_NOT_FOUND) from exc
    try:
        names = shelf.in_order()
        shown = names[given["offset"]:given["offset"] + given["limit"]]
        return {"total": len(names), "offset": given["offset"],
                "snapshots": [describe(shelf, name) for name in shown]}
    finally:
        shelf.close()


async def events(state: State, given: dict[str, Any]) -> Any:
    return [{"event": name, "data": data,
             "timestamp": {"seconds": int(when), "microseconds": int(when % 1 * 1_000_000)}}
            for when, name, data in islice(reversed(state.gmemd.events), given["limit"])]


def _find(state: State, object_id: str) -> HostMemoryBackend:
    backend = state.gmemd.look_up(object_id)
    if backend is None:
        raise _not_found(object_id)
    return backend


def _not_found(object_id: str) -> QmpError:
    return QmpError(f"object '{object_id}' not found", DEVICE_NOT_FOUND)


def _object(state: State, backend: HostMemoryBackend) -> dict[str, Any]:
    """The members of MemoryObject; the object has just been measured."""
    known = state.measurer.last(backend)
    answer = describe_status(state.gmemd, backend, None if known is None else known.occupied)
    if known is not None:
        answer.update({f"resident-{visibility}": resident for visibility, resident in known.by_visibility.items()})
    if backend.visibility is not None:
        answer["private"] = backend.visibility.total(PRIVATE)
        answer["ranges"] = len(backend.visibility)
    return answer
