"""The doors of a gmemd without sockets: made rooms can be made, and nobody comes in."""

from __future__ import annotations

import os
import socket

from gmemd.authority.gate import of_a_member
from gmemd.authority.rights import Rights
from gmemd.commands.context import Gmemd
from gmemd.objects.rooms import MadeRoom


class Doors:
    """What a test's host has of Host for rooms."""

    gmemd: Gmemd
    listeners: dict[str, socket.socket]  # of rooms that were opened and not closed

    def rights_in(self, made: MadeRoom) -> Rights:
        return of_a_member(made.id, self.gmemd.schema)

    def open_room(self, room: Gmemd, listener: socket.socket | None) -> None:
        if hasattr(self, "usable"):  # it is the caller, too
            self.usable = self.dispatcher.usable(self.rights)  # type: ignore[attr-defined]
        if listener is not None:
            assert room.made is not None
            self.listeners = {**getattr(self, "listeners", {}), room.made.id: listener}

    def close_room(self, room: Gmemd) -> None:
        if room.tenant in getattr(self, "listeners", {}):
            listener = self.listeners.pop(room.tenant)
            os.unlink(listener.getsockname())
            listener.close()

    def clear_room(self, room: Gmemd) -> None: ...

    def clients_in(self, room: Gmemd) -> int:
        return 0
