"""The names of what is in a room: its id there, and ID@ROOM in the house and in the registry.

A tenant's room is called by its uid, in digits; a made room has a name that is not a number (objects/rooms.py).
"""

from __future__ import annotations

import re
from typing import Any, Final

IN_THE_HOUSE: Final = "/"  # before the id of a template in the house that has a clone in a room

_IN_A_ROOM = re.compile(r"([^@]+)@([A-Za-z0-9][A-Za-z0-9-]{0,62})(\[private\])?")


def at_home(name: str) -> tuple[str, str | None]:
    """The id in its room of what has this name outside, and which room that is; None: none, it is in the house."""
    found = _IN_A_ROOM.fullmatch(name)
    return (name, None) if found is None else (found[1] + (found[3] or ""), found[2])


def is_uid(room: str) -> bool:
    """Whether it is the room of a tenant, who has this uid."""
    return room.isdigit()


def outside(named: Any, room: str) -> Any:
    """The name outside of an id, or of each of several, in a room."""
    return [outside(one, room) for one in named] if isinstance(named, list) else f"{named}@{room}"
