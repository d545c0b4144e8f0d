"""One connected client on asyncio: its requests are read, carried out in their order, and answered.

Follows QEMU's MonitorQMP. In-band requests run one at a time, in order; a long one (a coroutine) or a change that waits
for custody makes the monitor busy. Then nothing more is taken from the input, except with out-of-band enabled: then up
to QUEUE_MAX requests are read ahead, and an out-of-band one among them is answered at once.

Flow control: while too much output waits for a client that does not read (outgoing.py), its requests wait too. room.py
limits half-sent messages, and users.py what all clients of one user may make gmemd hold.

A client that closes is served like one that has only ended its input: what it has sent is carried out, and nobody reads
the answers. But if it closes while a long command of its own runs, what waits behind that is dropped, as in QEMU.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from gmemd.authority.peer import Peer
from gmemd.authority.rights import ALL, Rights
from gmemd.changes.change import Change, WithFds
from gmemd.commands.budget import budget_of
from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import Dispatcher
from gmemd.commands.loading import Loaded
from gmemd.errors import QmpError
from gmemd.objects.fds import NamedFds
from gmemd.observe.counters import clock
from gmemd.observe.log import log
from gmemd.qmp.rows import PIECE, Pieces
from gmemd.qmp.session import Postponed, Request, Session
from gmemd.server import long
from gmemd.server.inbox import Inbox
from gmemd.server.ledger import Ledger
from gmemd.server.outgoing import Outgoing
from gmemd.server.turns import CHANGES_SECONDS, LONGEST_TURN_SECONDS, MUCH, SHORT
from gmemd.server.users import FDS_MAX, Users

READ_SIZE = 16 * 1024  # bytes at a time
_READ_LITTLE = 2 * 1024  # when what was read weighed more than _MUCH: that many short tokens take milliseconds
_MUCH = 4 * READ_SIZE
QUEUE_MAX = 8  # QMP_REQ_QUEUE_LEN_MAX
HALF_SECONDS = 600.0  # from the first byte of a message to its last
_ANCILLARY_SIZE = socket.CMSG_SPACE(FDS_MAX * 4)
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)


class Monitor:
    """A client. `closed` is called once, when it is gone."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, dispatcher: Dispatcher, *,
                 pretty: bool, closed: Callable[[Monitor], None], users: Users,
                 peer: Peer | None = None, rights: Rights = ALL, named_fds: NamedFds | None = None) -> None:
        """QmpError if the client's user has too many connections; the socket is still the caller's.

        Without `peer` it is who is connected; `named_fds` are those of the socket, if they are not the client's own.
        """
        self.peer = peer or Peer.connected(sock)
        self.pid, self.uid = self.peer.pid, self.peer.uid
        self._user = users.find(rights.account or f"uid:{self.uid}", rights.limits)
        self._user.check_room()
        self._gmemd: Gmemd = dispatcher.gmemd
        self.session = Session(self._gmemd.version, pretty=pretty, weigh=self._weigh)
        greeting = (self.session.greeting() if pretty
                    else self._gmemd.encoded("greeting", self.session.hello) + b"\r\n")
        try:
            sent = sock.send(greeting)  # the rest is generated while the client reads it
        except OSError:
            sent = 0
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._receive = sock.recvmsg
        self._turns = users.turns
        self._dispatcher = dispatcher
        self._run_beside = dispatcher.run_beside
        self._closed = closed
        self._feed = self.session.feed
        self._ledger = Ledger(self._gmemd, self.session, self.uid, self.pid)
        self.use(rights)
        self._answered = self._ledger.answered
        self.named_fds = NamedFds(self._user.named) if named_fds is None else named_fds
        self._own_names = named_fds is None
        self._inbox = Inbox(self._user, self.go_on)
        self._queue = self._inbox.line  # read ahead while busy
        self._busy = False  # a long command runs, or changes wait for custody
        self._more = False  # requests that were read wait for the next turn
        self._deferred: tuple[Request, Any] | None = None  # a result to deliver when the monitor is no longer busy
        self._outgoing = Outgoing(loop, sock, self.session, self._gmemd.counters, self._user, room=self._run,
                                  cut=self.close)
        self.emit = self._outgoing.emit
        self.silent_for, self.recount = self._outgoing.silent_for, self._outgoing.recount
        self._read_size = READ_SIZE
        self._half = 0  # weight of the incomplete message
        self._half_timer: asyncio.TimerHandle | None = None
        self._eof = False  # no more requests will come
        self._ended = False  # and everything that was sent has been received
        self._open = True
        self._reading = not self._user.full
        if self._reading:
            loop.add_reader(self._fd, self._readable)
        self._user.join(self)
        if sent < len(greeting):  # not here: the creator of this monitor does not know it yet, should it close
            loop.call_soon(self._outgoing.send, greeting[sent:])

    def use(self, rights: Rights) -> None:
        """Have these rights from now on."""
        self.rights = rights
        self.room = self._gmemd.room_of(rights.room)
        self.budget = budget_of(self.room, rights.account or f"uid:{self.uid}", rights.limits, self._user)
        if self._gmemd.ledger is not None:
            self._user.limit(rights.limits)
        self.usable = self._dispatcher.usable(rights)
        self._ledger.use(rights, self.room)

    # -- input -----------------------------------------------------------------------------------

    def _readable(self) -> None:
        if self._more:
            return
        if (self._busy or self._outgoing.weight) and not self._may_read():
            self.pause()
            return
        try:
            data, ancillary, _, _ = self._receive(self._read_size, _ANCILLARY_SIZE, _CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # the client closed without reading everything; what it has sent is read all the same
            data, ancillary = b"", []
        if ancillary:
            self._inbox.receive(ancillary, ahead=self._busy)
            if self._inbox.closing:  # while its unwanted descriptors are being closed it is not read
                self.pause()
        if data:
            self._feed(data)
            if len(data) > MUCH and self._turns.expected:
                self._more = True
                self._turns.go_on(self._run)
                return
        else:
            self._eof = self._ended = True
            if not self._busy and not self._outgoing.weight:  # everything is answered
                self.close()
                return
            self.pause()
        self._run()

    def _may_read(self) -> bool:
        if self._inbox.closing or self._outgoing.weight > self._user.high_water:
            return False
        if self._busy:
            return self.session.oob and self._inbox.requests < QUEUE_MAX and self._half <= self._user.large
        return self._half <= self._user.large or self._user.room.enter(self)

    def pause(self) -> None:
        """Read no more until `go_on`."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def go_on(self) -> None:
        """Resume reading, if nothing prevents it."""
        if self._open and not self._eof and not self._reading and self._may_read():
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def resume(self) -> None:
        """Answer and read again."""
        self._run()

    def _weigh(self, weight: int) -> None:
        """Called by the session with the weight of an incomplete message so far."""
        before, self._half = self._half, weight
        self._user.weigh_half(weight - before)
        if not before or not weight:
            self._time_half(begins=weight > 0)
        self._read_size = _READ_LITTLE if weight - before > _MUCH else READ_SIZE
        if weight > self._user.large:
            if not self._may_read():
                self.pause()
        elif before > weight:
            self._user.room.leave(self)

    def _time_half(self, *, begins: bool) -> None:
        """Disconnect a client that does not complete its message in time, if it could."""
        if self._half_timer is not None:
            self._half_timer.cancel()
        self._half_timer = self._loop.call_later(HALF_SECONDS, self._half_expired) if begins else None

    def _half_expired(self) -> None:
        if self._reading:
            self.close()
        else:
            self._time_half(begins=True)

    def take_fd(self) -> int:
        """Give away the first fd of the last batch received."""
        return self._inbox.take_fd()

    # -- requests --------------------------------------------------------------------------------

    def _run(self, last_end: float = 0.0) -> None:  # noqa: C901  # every call would cost each command
        """Answer what can be answered now, within a turn's time, then send and resume reading.

        `last_end`: when the replies of an earlier turn, which were not sent yet, must be.
        """
        # methods are called by their objects, which is no slower, and in a compiled build faster
        gmemd, session, dispatcher, ledger, outgoing, user, turns = (
            self._gmemd, self.session, self._dispatcher, self._ledger, self._outgoing, self._user, self._turns)
        lines, now = outgoing.lines, clock()
        turn_ends, last_end = now + turns.seconds, last_end or now + LONGEST_TURN_SECONDS
        self._more = simple = False
        while True:
            if not simple:
                if not self._open or outgoing.weight > user.high_water or gmemd.stopping:
                    break
                simple = not (self._busy or self._queue)
            request = session.next_request() if simple else self._next()
            if request is None:
                break
            request.began = began = now
            try:
                result = dispatcher.run(request, session, self)
            except Exception as exc:
                result = exc
            kind = type(result)
            if kind is dict or kind is bytes:
                lines.append(session.success(request, result))
                now = ledger.answered(request)
                if gmemd.stopping:
                    break
            else:
                self._deliver(request, result)
                now, simple = clock(), False
            if began > turn_ends:
                if outgoing.changes:
                    if began > last_end + CHANGES_SECONDS:  # it goes on once they are settled
                        break
                elif began > last_end or (lines and len(lines[-1]) > PIECE):  # large ones fill memory
                    self._more = True
                    turns.go_on(self._run)
                    break
                elif turns.is_over(self._fd):
                    self._more = True
                    if not (lines and len(lines[-1]) > SHORT):
                        turns.go_on(partial(self._run, last_end))
                        return
                    turns.go_on(self._run)
                    break
                turn_ends = began + turns.seconds
        if outgoing.changes and not self._busy:
            self._busy = True
            outgoing.settle(gmemd.settle, self._answered, self._continue)
        outgoing.flush()
        if not self._open or self._busy or self._more:
            return
        if self._eof:
            if not outgoing.weight:
                self.close()
        elif not self._reading:
            self.go_on()

    def _next(self) -> Request | None:
        """The next request that may be answered now, else None."""
        if not self._busy:
            return self._inbox.pop() or self.session.next_request()
        while self.session.oob and self._inbox.requests < QUEUE_MAX:
            request = self.session.next_request()
            if request is None or request.oob:
                return request
            self._inbox.push(request)
        return None

    def _deliver(self, request: Request, result: Any) -> None:
        """Turn a command's result into its reply, now or when its turn comes."""
        kind, outgoing, success = type(result), self._outgoing, self.session.success
        if kind is dict or kind is bytes:
            outgoing.lines.append(success(request, result))
            self._answered(request)
        elif kind is Change:
            outgoing.changes.append((len(outgoing.lines), request, result))
            outgoing.lines.append(success(request, result.value))
        elif kind is WithFds or kind is Pieces or isinstance(result, Coroutine):
            if outgoing.changes:  # it must not overtake them
                self._deferred, self._busy = (request, result), True
                outgoing.settle(self._gmemd.settle, self._answered, self._continue)
            elif kind is WithFds:
                outgoing.flush()
                self._answered(request)
                outgoing.send(success(request, result.value), result.fds)
            elif kind is Pieces:
                outgoing.flush()
                self._answered(request)
                outgoing.send_all(self.session.success_in_pieces(request, result))
            else:
                self._start(request, result)
        elif type(result) is Postponed:
            request.error = result.error
            self._deliver(request, self._run_beside(request, self.session, self))
        elif isinstance(result, Exception):
            if not isinstance(result, QmpError):
                log.error("internal error", command=request.execute, exc_info=result)
                why = f": {os.strerror(result.errno)}" if isinstance(result, OSError) and result.errno else ""
                result = QmpError(f"internal error{why}")
            outgoing.lines.append(self.session.failure(request, result))
            self._answered(request, result)
        else:
            outgoing.lines.append(success(request, result))
            self._answered(request)

    def _start(self, request: Request, work: Coroutine[Any, Any, Any]) -> None:
        """Run a long command; the monitor is busy until it is done."""
        self._busy, gone_before = True, self._hung_up()

        def ended(result: Any) -> None:
            if type(result) is Loaded:
                try:
                    result = result.run()
                except Exception as exc:
                    result = exc
            elif not gone_before and self._hung_up():
                self._drop_input()
            self._deferred = (request, result)
            self._continue()

        self._gmemd.spawn(long.run(work, self._user.long, pretty=self.session.pretty, ended=ended))

    def _continue(self) -> None:
        """Continue after what made the monitor busy."""
        self._busy = False
        deferred, self._deferred = self._deferred, None
        if deferred is not None:
            self._deliver(*deferred)
        self._run()
        if not self._open and not self._busy:
            self._user.dismiss(self._give_names())

    def is_gone(self) -> bool:
        """Whether nobody will read the answer to the running command."""
        return not self._open or self._hung_up()

    def _hung_up(self) -> bool:
        """Whether the client has closed the connection; ending its input alone is not that."""
        return self._open and bool(_events(self._fd, 0) & select.POLLHUP)

    def _drop_input(self) -> None:
        """Carry out no more of what the client has sent."""
        self.pause()
        self._eof = True
        self.session.forget_input()
        self._user.dismiss(self._inbox.empty())

    # -- end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Disconnect the client; a running command finishes, and the descriptors it has taken or named last until
        then."""
        if not self._open:
            return
        self._open = False
        self.pause()
        self._user.room.leave(self)
        self._user.weigh_half(-self._half)
        self._time_half(begins=False)
        fds = self._outgoing.close() + self._inbox.close()
        if not self._busy:
            fds += self._give_names()
        self.session.forget_input()
        self._user.dismiss(fds)
        self._user.leave(self, self._sock, empty=self._ended or not _events(self._fd, select.POLLIN),
                         in_flight=self._outgoing.in_flight)
        self._ledger.close()
        self._closed(self)

    def _give_names(self) -> list[int]:
        return self.named_fds.take_all() if self._own_names else []


def _events(fd: int, wanted: int) -> int:
    """The events that poll(2) reports for a descriptor now; none if it cannot."""
    poll = select.poll()
    poll.register(fd, wanted)
    try:
        return sum([events for _, events in poll.poll(0)])
    except OSError:
        return 0
