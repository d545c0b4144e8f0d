"""What log and audit say of clients that are not let in, however many there are."""

from __future__ import annotations

from gmemd.authority.peer import Peer
from gmemd.commands.context import Gmemd
from gmemd.observe.counters import clock
from gmemd.observe.log import log

_A_SECOND = 10  # lines; one says how many more there were


class Refusals:
    """The clients that were refused since start."""

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
