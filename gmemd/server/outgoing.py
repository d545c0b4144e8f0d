"""Output to one client: gathered in a turn, held until changes are durable, queued until the client reads.

Queued output is weighed: its bytes, and FD_WEIGHT for each descriptor. Requests are answered until `weight` reaches
HIGH_WATER; events continue up to CUT_BYTES. A client that lets more pile up, or reads nothing for STALL_SECONDS, is
disconnected. users.py bounds what the clients of one user leave unread together.
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable

from gmemd.changes.change import Change
from gmemd.changes.threads import close_beside, close_copies
from gmemd.errors import QmpError
from gmemd.observe.counters import Counters
from gmemd.posix.sockets import unread
from gmemd.qmp.rows import PIECE
from gmemd.qmp.session import Event, Request, Session
from gmemd.server.users import HIGH_WATER, User

CUT_BYTES = 8 << 20
FD_WEIGHT = 16 << 10  # so at most 64 descriptors are queued for a client
STALL_SECONDS = 60.0
_TURN_WEIGHT = 1 << 20  # that is sent at a time
_UNSEEN = 16  # descriptors that are in flight before anybody looks whether they were received
_RETRY_SECONDS = 0.05  # seconds after which descriptors are passed again when too many were in flight


class Outgoing:
    """The output of one client. `room` is called when there is room again, and when the queue is empty."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, session: Session, counters: Counters,
                 user: User, *, room: Callable[[], None], cut: Callable[[], None]) -> None:
        self.lines: list[bytes] = []  # to be sent by flush()
        self.changes: list[tuple[int, Request, Change]] = []  # not durable yet: place of the reply in `lines`, ...
        self.weight = 0  # of the queue; 0: it is empty
        self.in_flight = 0  # descriptors sent that may not have been received yet
        self._user = user
        self._telling = False  # events in `lines` will be sent in this turn
        self._loop = loop
        self._sock = sock
        self._send = sock.send
        self._fd = sock.fileno()
        self._session = session
        self._counters = counters
        self._room = room
        self._cut = cut
        self._lost = False  # nobody reads any more: output is dropped
        self._waiting: deque[tuple[bytearray, list[int]]] = deque()  # fds go with the first byte
        self._stall: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None

    def emit(self, event: Event) -> None:
        """Send an event with this turn's other output, if the client has negotiated."""
        if self._session.negotiated and not self._lost:
            self.lines.append(event.line(pretty=self._session.pretty))
            if not self._telling:
                self._telling = True
                self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = False
        if not self.changes:
            self.flush()
            if self.weight > (PIECE if self._user.full else CUT_BYTES):
                self._cut()

    def settle(self, settle: Callable[[list[Change], Callable[[], None]], None],
               answered: Callable[[Request, QmpError | None], object], then: Callable[[], None]) -> None:
        """Hold the gathered output until `settle` has made the changes durable, or undone them; then call back.

        Each change is `answered` then. Events are sent meanwhile.
        """
        lines, self.lines[:] = self.lines[:], []  # always the same list
        changes, self.changes = self.changes, []

        def settled() -> None:
            for place, request, change in changes:
                if change.error is not None:
                    lines[place] = self._session.failure(request, change.error)
                answered(request, change.error)
            self.lines += lines
            then()

        settle([change for _, _, change in changes], settled)

    def flush(self) -> None:
        """Send the gathered output."""
        lines = self.lines
        if lines:
            data = lines[0] if len(lines) == 1 else b"".join(lines)
            lines.clear()
            if self._waiting or self._lost:
                self.send(data)
                return
            try:  # as `send`, a call of which would cost each reply
                sent = self._send(data)
            except OSError:
                self.send(data)
                return
            if sent != len(data):
                self._begin_queue(memoryview(data)[sent:], None)

    def send(self, data: bytes | bytearray, fds: list[int] | None = None) -> None:
        """Send or queue `data`; `fds` belong to the message and are closed after it."""
        if self._lost:
            close_beside(fds or ())
            return
        if self._waiting:
            self._keep(data, fds)
            return
        try:
            sent = self._pass(data, fds) if fds else self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as exc:
            if exc.errno != errno.ETOOMANYREFS:
                self._lose(exc, fds)
                return
            sent = 0
            self._retry = self._loop.call_later(_RETRY_SECONDS, self._writable)
        else:
            if sent == len(data):
                return
            fds = None
        self._begin_queue(memoryview(data)[sent:], fds)

    def _begin_queue(self, data: memoryview, fds: list[int] | None) -> None:
        self._keep(data, fds)
        if self._retry is None:
            self._loop.add_writer(self._fd, self._writable)
        self._watch_stall()

    def send_all(self, pieces: Iterable[bytearray]) -> None:
        """Send or queue them; they are given away."""
        for piece in pieces:
            self.send(piece)

    def _pass(self, data: bytes | bytearray, fds: list[int]) -> int:
        if self.in_flight >= _UNSEEN:
            self.recount()
        if self.in_flight >= _UNSEEN and not self._user.may_pass(len(fds)):
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        sent = self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        self._counters.fds_sent += len(fds)
        self.in_flight += len(fds)
        self._user.in_flight.take(len(fds))
        close_copies(fds)  # the message has them
        return sent

    def recount(self) -> None:
        """Count the descriptors in flight again: none, once everything sent has been received."""
        if self.in_flight and not unread(self._sock):
            self._user.in_flight.take(-self.in_flight)
            self.in_flight = 0

    def _keep(self, data: bytes | bytearray | memoryview, fds: list[int] | None) -> None:
        """Append to the queue, in few pieces, because each has its cost, that need not be moved as they grow."""
        weight = len(data) + FD_WEIGHT * len(fds or ())
        self.weight += weight
        self._user.weigh(weight)
        if fds:
            self._waiting.append((bytearray(data), fds))
        elif self._waiting and not self._waiting[-1][1] and len(self._waiting[-1][0]) < PIECE:
            self._waiting[-1][0].extend(data)
        else:
            self._waiting.append((data if type(data) is bytearray else bytearray(data), []))

    def _writable(self) -> None:
        retrying, self._retry = self._retry is not None, None
        before = self.weight
        try:
            try:
                self._send_on()
            finally:
                self._user.weigh(self.weight - before)
        except (BlockingIOError, InterruptedError):
            if retrying:
                self._loop.add_writer(self._fd, self._writable)
            if self.weight <= HIGH_WATER < before:
                self._room()
            return
        except OSError as exc:
            if exc.errno == errno.ETOOMANYREFS:
                if not retrying:
                    self._loop.remove_writer(self._fd)
                self._retry = self._loop.call_later(_RETRY_SECONDS, self._writable)
                return
            self._lose(exc)
        if not retrying:
            self._loop.remove_writer(self._fd)
        self._unwatch_stall()
        self._room()

    def _send_on(self) -> None:
        """Send the queue, or the part that is sent at a time; BlockingIOError if that is not all."""
        end = self.weight - _TURN_WEIGHT
        while self._waiting:
            if self.weight < end:
                raise BlockingIOError
            data, fds = self._waiting[0]
            count = len(fds)
            sent = self._pass(data, fds) if fds else self._sock.send(data)
            self.weight -= sent + FD_WEIGHT * count
            if sent == len(data):
                self._waiting.popleft()
            else:
                del data[:sent]
            self._watch_stall()

    def _lose(self, error: OSError, fds: list[int] | None = None) -> None:
        """Drop the queue, because nobody reads; a client that still might, and would miss a reply, is disconnected."""
        self._lost = True
        close_beside([*(fds or ()), *self._drop()])
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):
            self._loop.call_soon(self._cut)

    def _drop(self) -> list[int]:
        """Forget the queue; its descriptors, given away."""
        fds = [fd for _, kept in self._waiting for fd in kept]
        self._waiting.clear()
        self._user.weigh(-self.weight)
        self.weight = 0
        return fds

    def silent_for(self) -> float:
        """For how long (seconds) the client has not read any of the queue; 0 if there is none."""
        return 0.0 if self._stall is None else self._loop.time() - self._stall.when() + STALL_SECONDS

    def _watch_stall(self) -> None:
        self._unwatch_stall()
        self._stall = self._loop.call_later(STALL_SECONDS, self._cut)

    def _unwatch_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def close(self) -> list[int]:
        """Send what was gathered, if there is room, and no more; the unsent descriptors, given away."""
        if not self.changes:
            self.flush()
        self._lost = True
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        elif self._waiting:
            self._loop.remove_writer(self._fd)
        self._unwatch_stall()
        self._room = self._cut = lambda: None  # so that nothing refers to the monitor any more
        self.recount()
        return self._drop()
