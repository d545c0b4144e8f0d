"""Letting clients in: who one is, what it may, and what log and audit say of those who are refused."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gmemd.authority.gate import Gate, of_a_member
from gmemd.authority.ledger import NOTHING
from gmemd.authority.peer import Peer
from gmemd.authority.rights import ALL, OBSERVER, Rights
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Gmemd
from gmemd.errors import QmpError
from gmemd.observe.counters import clock
from gmemd.observe.log import log

if TYPE_CHECKING:
    from gmemd.objects.rooms import MadeRoom
    from gmemd.server.monitor import Monitor

_A_SECOND = 10  # lines about refusals; one says how many more there were


class Admission:
    """What a gate decides, told to log, audit and clients."""

    def __init__(self, gate: Gate | None, gmemd: Gmemd) -> None:
        """`gate`: None if everybody who can connect may do everything."""
        self._gate = gate
        self._gmemd = gmemd
        self._refusals = _Refusals(gmemd)

    @property
    def by_policy(self) -> bool:
        """Whether there is a policy, which may be read again."""
        return self._gate is not None and self._gate.policy is not None

    def admit(self, client: socket.socket, path: str) -> tuple[Peer, Rights]:
        """Who a client of the socket at `path` is and what it may; QmpError if it is not let in. Borrows the socket."""
        if self._gate is None:
            return Peer.connected(client), ALL
        try:
            return self._gate.admit(client, path)
        except QmpError as exc:
            self._refusals.tell(Peer.connected(client), exc.desc)
            raise QmpError("this client is not let in") from exc  # why is not told to everybody

    def rights_in(self, made: MadeRoom) -> Rights:
        """What the clients of a made room may; QmpError if the policy gives them nothing."""
        if self._gate is None:
            return of_a_member(made.id, self._gmemd.schema)
        return self._gate.rights_in(made.id, made.namespace)

    def admit_in(self, room: Gmemd, client: socket.socket) -> tuple[Peer, Rights]:
        """Who a client of a made room's socket is and what it may; QmpError if it is not let in. Borrows the socket.

        Whoever can connect is a member: the directory of the socket is the fence, and users of containers have no
        numbers here.
        """
        peer = Peer.connected(client)
        try:
            assert room.made is not None
            if room.objects.closed:
                raise QmpError(f"room '{room.made.id}' was removed")
            return peer, self.rights_in(room.made)
        except QmpError as exc:
            self._refusals.tell(peer, exc.desc)
            raise QmpError("this client is not let in") from exc

    def place(self, room: Gmemd) -> None:
        """Have what is in a made room count for its namespace, under a policy."""
        assert room.made is not None
        assert room.account is not None
        if room.ledger is None:
            return
        try:
            rights = self.rights_in(room.made)
            account, limits = rights.account, rights.limits
        except QmpError:
            account, limits = f"namespace:{room.made.namespace}", NOTHING
        room.account.belong(room.ledger.budget(account, limits).account)

    def _again(self, monitor: Monitor) -> Rights:
        """The rights that a client has by the policy that has just been loaded."""
        assert self._gate is not None
        made = monitor.room.made
        return self._gate.again(monitor.peer) if made is None else self.rights_in(made)

    def admit_http(self, client: socket.socket | None) -> Rights:
        """What a client of HTTP may, None: by TCP; QmpError if it is not let in."""
        if self._gate is None:
            return OBSERVER
        try:
            return self._gate.admit_http(client)
        except QmpError as exc:
            self._refusals.tell(Peer(0, -1, -1) if client is None else Peer.connected(client), f"HTTP: {exc.desc}")
            raise

    async def reload(self, monitors: Iterable[Monitor]) -> None:
        """Read the policy again: all of it holds for all clients from now on, or nothing changes.

        A client that would find other objects, or whose connection would be another account's, has to connect again:
        what it has asked for and not got yet is of the room that it was in.
        """
        gate = self._gate
        assert gate is not None
        try:
            gate.load(await in_thread(gate.read))
        except QmpError as exc:
            log.error("policy not reloaded", desc=exc.desc)
            return
        log.info("policy", words=gate.words)
        for room in self._gmemd.rooms.values():
            if room.made is not None:
                self.place(room)
        for monitor in list(monitors):
            try:
                rights = self._again(monitor)
            except QmpError as exc:
                self._refusals.tell(monitor.peer, exc.desc)
                monitor.close()
            else:
                if (rights.room, rights.account) == (monitor.rights.room, monitor.rights.account):
                    monitor.use(rights)
                else:
                    log.info("client of another room now", uid=monitor.uid, pid=monitor.pid, rule=rights.rule)
                    monitor.close()


class _Refusals:
    """What log and audit say of clients that are not let in, however many there are."""

    def __init__(self, gmemd: Gmemd) -> None:
        self._gmemd = gmemd
        self._second_ends = 0.0
        self._left = 0
        self._omitted = 0

    def tell(self, peer: Peer, why: str) -> None:
        """Record one, and why."""
        now = clock()
        if now >= self._second_ends:
            self._second_ends, self._left = now + 1.0, _A_SECOND
        if not self._left:
            self._omitted += 1
            return
        self._left -= 1
        more = {"unsaid": self._omitted} if self._omitted else {}
        self._omitted = 0
        log.warning("client refused", uid=peer.uid, pid=peer.pid, desc=why, **more)
        if self._gmemd.audit is not None:
            self._gmemd.audit.refused(peer.uid, peer.pid, why)
