"""The sockets that clients come in by: the daemon's own, and those of made rooms."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from gmemd.authority.peer import Peer
from gmemd.authority.rights import Rights
from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import Dispatcher
from gmemd.errors import QmpError
from gmemd.objects.fds import NamedFds
from gmemd.observe.log import log
from gmemd.posix.sockets import identity, remove_own
from gmemd.qmp.session import refusal
from gmemd.server.admission import Admission
from gmemd.server.listener import Listener
from gmemd.server.monitor import Monitor
from gmemd.server.users import Users


class Listening(NamedTuple):
    """A socket to listen on."""

    sock: socket.socket
    pretty: bool = False
    remove: bool = False  # remove its file at the end
    named_fds: NamedFds | None = None  # names of getfd shared by its clients; None: each has its own


class Doors:
    """All of them, and the clients that have come in."""

    def __init__(self, loop: asyncio.AbstractEventLoop, users: Users, admission: Admission) -> None:
        self._loop = loop
        self._users = users
        self._admission = admission
        self._dispatcher: Dispatcher
        self.monitors: set[Monitor] = set()
        self._own: list[Listener] = []
        self._rooms: dict[str, Listener] = {}

    @property
    def paths(self) -> list[str]:
        """Where the daemon's own sockets are."""
        return [listener.path for listener in self._own]

    def serve(self, dispatcher: Dispatcher) -> None:
        """Have clients served by this dispatcher from now on."""
        self._dispatcher = dispatcher

    def open(self, listening: Listening) -> None:
        """Let clients in by a socket of the daemon's own."""
        path = listening.sock.getsockname()
        self._own.append(self._listener(listening, partial(self._admission.admit, path=path)))

    # -- made rooms ------------------------------------------------------------------------------

    def open_room(self, room: Gmemd, sock: socket.socket | None) -> None:
        """As `Host.open_room`."""
        made = room.made
        assert made is not None
        self._admission.place(room)
        if len(room.house.rooms) == 1:  # the first one: who is in the house reaches into it from now on
            for monitor in self.monitors:
                monitor.usable = self._dispatcher.usable(monitor.rights)
        if sock is not None:
            try:
                self._rooms[made.id] = self._listener(
                    Listening(sock, remove=True), partial(self._admission.admit_in, room), made.socket)
            except OSError as exc:
                remove_own(made.socket, identity(made.socket))
                sock.close()
                raise QmpError(f"cannot listen at '{made.socket}': {exc.strerror}") from exc
            made.trouble = ""

    def close_room(self, room: Gmemd) -> None:
        """As `Host.close_room`."""
        listener = self._rooms.pop(room.tenant or "", None)
        if listener is not None:
            listener.close()

    def clear_room(self, room: Gmemd) -> None:
        """As `Host.clear_room`."""
        for monitor in self._in(room):
            monitor.close()

    def clients_in(self, room: Gmemd) -> int:
        """As `Host.clients_in`."""
        return len(self._in(room))

    def _in(self, room: Gmemd) -> list[Monitor]:
        return [monitor for monitor in self.monitors if monitor.room.tenant == room.tenant]

    # -- all of them -----------------------------------------------------------------------------

    def _listener(self, listening: Listening, admit: Callable[[socket.socket], tuple[Peer, Rights]],
                  path: str = "") -> Listener:
        """Give each client of a listening socket a monitor; `path`: of its file, if the socket does not say."""
        def accepted(client: socket.socket) -> None:
            try:
                peer, rights = admit(client)
                self.monitors.add(Monitor(self._loop, client, self._dispatcher, pretty=listening.pretty,
                                          users=self._users, peer=peer, rights=rights, closed=self.monitors.discard,
                                          named_fds=listening.named_fds))
            except OSError:
                client.close()
            except QmpError as exc:
                with contextlib.suppress(OSError):
                    client.send(refusal(exc, pretty=listening.pretty))
                client.close()
            except Exception as exc:
                log.error("internal error", exc_info=exc)
                client.close()

        return Listener(self._loop, listening.sock, accepted=accepted, remove=listening.remove, path=path)

    def close(self) -> None:
        """Let nobody in any more."""
        for listener in (*self._own, *self._rooms.values()):
            listener.close()

    def disconnect(self) -> None:
        """Disconnect all clients."""
        for monitor in list(self.monitors):
            monitor.close()
