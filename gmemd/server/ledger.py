"""The records of one client's commands: each is counted, logged, and audited if it changes something."""

from __future__ import annotations

from gmemd.authority.rights import Rights
from gmemd.commands.context import Gmemd
from gmemd.errors import QmpError
from gmemd.observe.counters import QUICK, clock
from gmemd.observe.log import ClientLog, log
from gmemd.qmp.session import NO_ID, Request, Session


class Ledger:
    """The commands of one client, which has just connected."""

    def __init__(self, gmemd: Gmemd, session: Session, uid: int, pid: int) -> None:
        counters = gmemd.counters
        counters.connections += 1
        self._tallies, self._other = counters.commands, counters.other
        self._session = session
        self._who = {"monitor": counters.connections, "uid": uid, "pid": pid}
        self._log = ClientLog(log, self._who)
        self._audit = None if gmemd.audit is None else gmemd.audit.client(uid, pid)
        self.close = self._log.close

    def use(self, rights: Rights, room: Gmemd) -> None:
        """Say by which rights, where there is a policy, and in which made room."""
        if rights.all:
            return
        by = {"role": rights.role.word, "rule": rights.rule}
        if room.made is not None:
            by |= {"room": room.made.id, "namespace": room.made.namespace}
        log.info("rights", **self._who, **by)
        if self._audit is not None:
            self._audit.use(by)

    def answered(self, request: Request, error: QmpError | None = None) -> float:
        """Record a command that is about to be answered; the time now."""
        ended = clock()
        command, began = request.execute, request.began
        seconds = ended - began
        tally = self._tallies.get(command) or self._other
        if error is None:
            tally.succeeded += 1
        else:
            tally.failed += 1
        durations = tally.durations
        durations.seconds += seconds
        if seconds <= QUICK:
            durations.quick += 1
        else:
            durations.add_slow(seconds)
        request_id = b"" if request.id is NO_ID else self._session.id_json(request)
        self._log.answered(command, began, ended, request_id, error)
        if self._audit is not None:
            self._audit.answered(command, request.arguments, request_id=request_id, error=error)
        return ended
