"""Who owns an object that was moved: the states of gmemd/memory/moves.py made durable, and asking the other side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.jobs import Job
from gmemd.changes.workers import on_lines, working
from gmemd.commands import tombstones
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.jobs import begin, check_job
from gmemd.commands.lines import Line, closing, take_line
from gmemd.commands.listing import listed
from gmemd.commands.memdev import remove
from gmemd.errors import QmpError
from gmemd.memory.moves import DROPPED, OF_THE_SOURCE, Move, concluded
from gmemd.objects.records import move_of, tombstone

FORMAT: Final = {"format": "gmemd-stream", "version": 1}


def memdev_move_resolve(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    backend = gmemd.objects.find(arguments["id"])
    move = backend.move
    if move is None or move.state == "owned":
        raise QmpError(f"object '{backend.id}' is not in the middle of a move")
    if "force" in arguments:
        if "fdname" in arguments:
            raise QmpError("parameter 'force' needs no line: nobody is asked")
        change.judged(f"take it that '{backend.id}' is owned {arguments['force']}, without asking {move.peer}")
        change.claim(backend, "it is being decided who owns it", away=True)
        return _force(gmemd, backend, move, arguments["force"], change)
    if "fdname" not in arguments:
        raise QmpError("Parameter 'fdname' is missing")
    check_job(gmemd, arguments, change)
    line = take_line(caller, {"answers": arguments["fdname"], **arguments}, change)
    change.claim(backend, f"{move.peer} is being asked who owns it", away=True)

    async def work(job: Job | None, change: Change) -> dict[str, Any]:
        return await _ask(gmemd, backend, move, line, job, change)

    return begin(gmemd, arguments, "move-resolve", 0, closing(work, line), change, {})


def query_memdev_moves(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    wanted = arguments.get("id")
    found = [{"id": object_id, "token": move.token, "state": move.state, "peer": move.peer,
              "generation": move.generation} for object_id, move in moves(gmemd)
             if wanted is None or object_id == gmemd.named(wanted)]
    return listed(found, len(found))


def moves(gmemd: Gmemd) -> Iterator[tuple[str, Move]]:
    """The latest move of each object, also of those that are gone."""
    for room in gmemd.seen_rooms():
        for backend in room.objects:
            if backend.move is not None:
                yield room.named(backend.id), backend.move
        for object_id, record in room.gone.items():
            move = move_of(record)
            assert move is not None
            yield room.named(object_id), move


# -- deciding ----------------------------------------------------------------------------------------

async def own(gmemd: Gmemd, backend: HostMemoryBackend, change: Change) -> None:
    """Own what was prepared, durably: the source has given it up."""
    assert backend.move is not None
    change_state(backend, backend.move.now("owned"), change)
    await change.settle()


async def drop(gmemd: Gmemd, backend: HostMemoryBackend, change: Change) -> None:
    """Free what was prepared, durably: the source keeps it."""
    change.release(backend)
    remove(gmemd, backend, change)
    await change.settle()


async def _ask(gmemd: Gmemd, backend: HostMemoryBackend, move: Move, line: Line, job: Job | None,
               change: Change) -> dict[str, Any]:
    """Ask the other side, and do what its answer decides."""
    if move.state == "offered":  # from now on it is certain that this attempt has failed
        move = move.now("kept")
        change_state(backend, move, change)
        await change.settle()
    head = {**FORMAT, "purpose": "resolve", "id": move.token, "state": move.state, "object": {"id": backend.id}}
    spec = {"in": line.into, "out": line.out, "head": head}
    async with working(job, "stream-ask", spec, line.fds, on_lines) as worker:
        async for message in worker:
            state = concluded(move.state, str(message["answer"].get("state")))
            await _conclude(gmemd, backend, move, state, change)
            worker.tell({"done": {"state": state}})
    return {}


async def _conclude(gmemd: Gmemd, backend: HostMemoryBackend, move: Move, state: str, change: Change) -> None:
    if state == "gone":
        await bury(gmemd, backend, move.now("gone"), change)
    elif state == "owned":
        await own(gmemd, backend, change)
        gmemd.emit("MEMDEV_ARRIVED", {"id": backend.id, "generation": backend.generation})
    elif state == DROPPED:
        await drop(gmemd, backend, change)


async def _force(gmemd: Gmemd, backend: HostMemoryBackend, move: Move, owner: str, change: Change) -> dict[str, Any]:
    """Do what a person says."""
    of_source = move.state in OF_THE_SOURCE
    if owner == "here":
        state = "kept" if of_source else "owned"
    elif move.state in ("offered", "kept"):
        raise QmpError(f"object '{backend.id}' is owned here: delete it if it is owned there")
    else:
        state = "gone" if of_source else DROPPED
    if state == "kept":
        change_state(backend, move.now("kept"), change)
        await change.settle()
    else:
        await _conclude(gmemd, backend, move, state, change)
    return {}


def change_state(backend: HostMemoryBackend, move: Move, change: Change) -> None:
    """Have the record say what the object is to this gmemd."""
    before = backend.move

    def undo() -> None:
        backend.move = before

    change.undo(undo)
    backend.move = move
    change.rewrite(backend)


async def bury(gmemd: Gmemd, backend: HostMemoryBackend, move: Move, change: Change) -> None:
    """Free the memory of an object that another gmemd owns, and leave a tombstone; durable afterwards."""
    record = tombstone(backend, move)
    change.bury(backend, record)
    change.release(backend)
    remove(gmemd, backend, change)
    tombstones.bury(gmemd, record)
    change.undo(tombstones.unbury, gmemd, backend.id)
    await change.settle()
