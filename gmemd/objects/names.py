"""The names of what is in a tenant's room: its id there, and ID@UID in the house and in the registry."""

from __future__ import annotations

import re
from typing import Any

_IN_A_ROOM = re.compile(r"([^@]+)@(\d{1,10})(\[private\])?")


def at_home(name: str) -> tuple[str, int | None]:
    """The id in its room of what has this name outside, and whose room that is; None: nobody's, it is in the house."""
    found = _IN_A_ROOM.fullmatch(name)
    return (name, None) if found is None else (found[1] + (found[3] or ""), int(found[2]))


def outside(named: Any, tenant: int) -> Any:
    """The name outside of an id, or of each of several, in the room of a tenant."""
    return [outside(one, tenant) for one in named] if isinstance(named, list) else f"{named}@{tenant}"
