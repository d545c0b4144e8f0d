"""Commands of those in the house on what is in a room, which they call ID@ROOM: carried out in that room."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final

from gmemd.commands.context import Caller, Function, Gmemd
from gmemd.errors import QmpError
from gmemd.objects.names import IN_THE_HOUSE, at_home

_NAMES: Final = ("id", "ids", "template", "after", "object", "job-id")  # members that name what a room can have


def reaching_rooms(function: Function) -> Function:
    """A command that finds what it names in the room where that is; all of it in one."""
    def run(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
        room, complete = in_its_room(gmemd, arguments)
        if room is gmemd:
            return function(gmemd, caller, arguments)
        with said_outside(room, complete):
            result = function(room, caller, complete)
        return _waited(room, complete, result) if isinstance(result, Coroutine) else result

    return run


async def _waited(room: Gmemd, arguments: dict[str, Any], work: Any) -> Any:
    with said_outside(room, arguments):
        return await work


@contextmanager
def said_outside(room: Gmemd, arguments: dict[str, Any]) -> Iterator[None]:
    """Say in an error of a command what it names as those in the house call it, if they have sent the command."""
    try:
        yield
    except QmpError as exc:
        words = exc.desc
        for own in dict.fromkeys(_named(arguments)):
            words = words.replace(f"'{own}'", f"'{room.named(own)}'")
        if words == exc.desc:
            raise
        raise QmpError(words, exc.error_class) from exc


def in_its_room(gmemd: Gmemd, arguments: dict[str, Any]) -> tuple[Gmemd, dict[str, Any]]:
    """The room of what the arguments of a command name, and the arguments as they are said there."""
    if not gmemd.rooms or not _names_outside(arguments):
        return gmemd, arguments
    tenants = {tenant for name in _named(arguments) if (tenant := at_home(name)[1]) in gmemd.rooms}
    if len(tenants) != 1:
        return gmemd, arguments
    room = gmemd.room_of(tenants.pop()).from_outside()
    own = {member: [at_home(name)[0] for name in value] if isinstance(value, list) else at_home(value)[0]
           for member, value in arguments.items() if member in _NAMES}
    if "template" in arguments and at_home(arguments["template"])[1] is None:  # what is cloned into the room
        own["template"] = IN_THE_HOUSE + arguments["template"]
    return room, arguments | own


def _names_outside(arguments: dict[str, Any]) -> bool:
    """Whether anything named may be in a room: a quick look."""
    for member in _NAMES:
        value = arguments.get(member, "")
        if "@" in value if type(value) is str else any("@" in one for one in value):
            return True
    return False


def _named(arguments: dict[str, Any]) -> Iterator[str]:
    """Everything that is named."""
    for member in _NAMES:
        value = arguments.get(member, [])
        yield from value if isinstance(value, list) else [value]
