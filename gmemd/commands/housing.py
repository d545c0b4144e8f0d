"""Commands that make rooms, remove them and list them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from gmemd.authority.ledger import Account
from gmemd.changes.change import Change
from gmemd.changes.threads import close_beside, in_thread
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.listing import listed
from gmemd.commands.shelf import Shelves
from gmemd.errors import QmpError
from gmemd.kernel.beneath import Paths
from gmemd.objects.rooms import MadeRoom, check_name
from gmemd.observe.log import log
from gmemd.posix.sockets import EVERYBODY, bind_unix

if TYPE_CHECKING:
    import socket

_NOTE_MAX: Final = 64 << 10  # bytes


def memdev_room_add(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    made = MadeRoom(arguments["id"], arguments.get("socket", ""), arguments.get("namespace", ""),
                    arguments.get("note", ""), arguments.get("limits", {}))
    _check(gmemd, caller, made)
    there = gmemd.rooms.get(made.id)
    if there is not None and there.made is not None:
        return _open_again(gmemd, there, there.made, made, change)
    if made.id in gmemd.rooms_coming:
        raise QmpError(f"room '{made.id}' exists already")
    if gmemd.custody.keeps:
        gmemd.custody.check_writable()
    connected = f", whose clients connect to '{made.socket}'" if made.socket else ""
    change.judged(f"make the room '{made.id}'{connected}", whole=not connected, then=partial(make_room, gmemd, made))
    gmemd.rooms_coming.add(made.id)
    change.undo(gmemd.rooms_coming.discard, made.id)
    return _bind(gmemd, caller, made, change) if made.socket else _make(gmemd, caller, made, None, change)


def _check(gmemd: Gmemd, caller: Caller, made: MadeRoom) -> None:
    """Refuse what cannot be a room, or may not be one of this client's."""
    if not gmemd.sees_all:
        raise QmpError("only who sees everybody's objects makes rooms")
    check_name(made.id)
    if made.socket:
        if not made.socket.startswith("/"):
            raise QmpError("parameter 'socket' must be a path that begins with '/'")
        made.root = caller.rights.root_of(made.socket)
    if len(made.note.encode()) > _NOTE_MAX:
        raise QmpError(f"parameter 'note' must not be longer than {_NOTE_MAX} bytes")
    gmemd.host.rights_in(made)


def _open_again(gmemd: Gmemd, room: Gmemd, there: MadeRoom, made: MadeRoom, change: Change) -> Any:
    """Listen at the socket of a room where that failed after a restart; QmpError if it is any other room."""
    if not there.trouble or there.said() != made.said():
        raise QmpError(f"room '{made.id}' exists already")
    change.judged(f"listen at '{there.socket}' again", whole=False)

    async def work() -> dict[str, Any]:
        gmemd.host.open_room(room, await in_thread(listener_of, there))
        change.undo(gmemd.host.close_room, room)
        return {}

    return work()


async def _bind(gmemd: Gmemd, caller: Caller, made: MadeRoom, change: Change) -> dict[str, Any]:
    return _make(gmemd, caller, made, await in_thread(listener_of, made), change)


def _make(gmemd: Gmemd, caller: Caller, made: MadeRoom, listener: socket.socket | None,
          change: Change) -> dict[str, Any]:
    room = make_room(gmemd, made)
    change.undo(remove_room, gmemd, room)
    gmemd.rooms_coming.discard(made.id)
    gmemd.host.open_room(room, listener)
    change.undo(gmemd.host.close_room, room)
    change.undo(gmemd.host.clear_room, room)
    if gmemd.custody.keeps:
        made.record = made.recorded((caller.uid, caller.pid))
        change.enter(made.record)
    return {}


def make_room(gmemd: Gmemd, made: MadeRoom) -> Gmemd:
    """Make a room, with nobody in it."""
    room = gmemd.room_of(made.id)
    room.made, room.account = made, Account(f"room:{made.id}", made.limits)
    room.snapshots = Shelves("")  # gmemd's own directory is for those in the house
    return room


def add_room(gmemd: Gmemd, room: Gmemd) -> None:
    """Put back a room that was removed."""
    assert room.tenant is not None
    gmemd.rooms[room.tenant], gmemd.tree.rooms[room.tenant] = room, room.objects
    room.objects.closed = False


def remove_room(gmemd: Gmemd, room: Gmemd) -> None:
    """Remove an empty room from the others."""
    assert room.tenant is not None
    room.objects.closed = True
    del gmemd.rooms[room.tenant], gmemd.tree.rooms[room.tenant]


def listener_of(made: MadeRoom) -> socket.socket:
    """A listening socket for a room, whose file everybody may open who may open its directory; blocks; QmpError."""
    try:
        with Paths(made.root).creating(made.socket) as path:
            return bind_unix(path, EVERYBODY)
    except OSError as exc:
        raise QmpError(f"Failed to bind socket to {made.socket}: {exc.strerror}") from exc
    except QmpError as exc:
        raise QmpError(exc.desc.replace(path, made.socket), exc.error_class) from exc


async def open_again(room: Gmemd) -> None:
    """Let clients into a room that came back; what prevents it is noted."""
    made = room.made
    assert made is not None
    try:
        room.host.open_room(room, await in_thread(listener_of, made) if made.socket else None)
    except QmpError as exc:
        made.trouble = exc.desc
        log.error("room not open", room=made.id, desc=exc.desc)
        room.host.open_room(room, None)


def memdev_room_del(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    room, made = _found(gmemd, arguments["id"])
    why = _in_use(room)
    if why:
        raise QmpError(f"room '{made.id}' {why}")
    change.judged(f"remove the room '{made.id}', and disconnect {gmemd.host.clients_in(room)} clients",
                  then=partial(remove_room, gmemd, room))
    if made.record is not None and gmemd.custody.keeps:
        change.drop(made.record)
    remove_room(gmemd, room)
    change.undo(add_room, gmemd, room)
    change.done(_end, gmemd, room)
    return {}


def _found(gmemd: Gmemd, name: str) -> tuple[Gmemd, MadeRoom]:
    room = gmemd.rooms.get(name)
    if room is None or room.made is None:
        raise QmpError(f"room '{name}' not found")
    return room, room.made


def _in_use(room: Gmemd) -> str:
    """Why a room cannot be removed; "" if it can."""
    ids = room.objects.taken()
    if ids:
        more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
        return f"has the object '{ids[0]}'{more}: delete what is in it first"
    running = next((job for job in room.jobs if job.status != "concluded"), None)
    return "" if running is None else f"has the job '{running.id}', which runs"


def _end(gmemd: Gmemd, room: Gmemd) -> object:
    """Disconnect the clients of a removed room, and give back what it has left."""
    gmemd.host.clear_room(room)
    gmemd.host.close_room(room)
    for job in list(room.jobs):
        room.jobs.dismiss(job.id)
    assert room.account is not None
    room.account.belong(None)
    return close_beside(room.fd_sets.take_all())


def query_memdev_rooms(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    wanted = arguments.get("id")
    rooms = [(room, room.made) for room in gmemd.rooms.values() if room.made is not None]
    if wanted is not None:
        rooms = [_found(gmemd, wanted)]
    return listed((_described(gmemd, room, made) for room, made in rooms), len(rooms))


def _described(gmemd: Gmemd, room: Gmemd, made: MadeRoom) -> dict[str, Any]:
    trouble = {"trouble": made.trouble} if made.trouble else {}
    return {"id": made.id, **made.said(), **trouble, "objects": len(room.objects),
            "bytes": sum([size for _, size in room.objects.sums.values()]), "clients": gmemd.host.clients_in(room)}
