"""One connected client on asyncio: socket, received fds, order of answers, flow control.

Follows QEMU's MonitorQMP. In-band requests run one at a time, in order; a long one (a coroutine) or a change that
waits for custody makes the monitor busy. Then nothing more is taken from the input, except with out-of-band enabled,
where up to QUEUE_MAX requests are read ahead so that an out-of-band one among them can be answered at once.

Flow control: while more than HIGH_WATER bytes wait for a client that does not read, its requests wait too; a client
that takes nothing for STALL_SECONDS, or lets events pile up over CUT_BYTES, is cut.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from types import CoroutineType
from typing import Any

from gmemd.commands.context import Change, Gmemd, WithFds
from gmemd.commands.dispatch import Dispatcher
from gmemd.errors import QmpError, close_fd
from gmemd.log import ClientLog, log
from gmemd.metrics import clock
from gmemd.qmp.session import Request, Session

READ_SIZE = 16 * 1024  # bytes at a time
TURN_SECONDS = 50e-6  # after so long it is the turn of others, if any wait; a change waits for those behind it
LONGEST_TURN_SECONDS = 500e-6  # and after so long in any case
FDS_MAX = 253  # SCM_MAX_FD of the kernel; QEMU takes 16 of them
QUEUE_MAX = 8  # QMP_REQ_QUEUE_LEN_MAX
HIGH_WATER = 1 << 20
CUT_BYTES = 8 << 20
STALL_SECONDS = 60.0
_ANCILLARY_SIZE = socket.CMSG_SPACE(FDS_MAX * 4)
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
_unpack_ucred = struct.Struct("iII").unpack  # struct ucred of unix(7)


class Monitor:
    """A client. `closed` is called once, when it is gone."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, dispatcher: Dispatcher, *,
                 pretty: bool, closed: Callable[[Monitor], None]) -> None:
        self._gmemd: Gmemd = dispatcher.gmemd
        self.session = Session(self._gmemd.version, pretty=pretty)
        greeting = (self.session.greeting() if pretty
                    else self._gmemd.encoded("greeting", self.session.hello) + b"\r\n")
        try:
            sent = sock.send(greeting)  # while the client reads it the rest is made
        except OSError:
            sent = 0
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._receive = sock.recvmsg
        self._awaited: Callable[[int], bool] = getattr(loop, "awaited", _always)
        self._dispatch = dispatcher.run
        self._closed = closed
        counters = self._gmemd.counters
        counters.connections += 1
        self._count = counters.count
        self._feed = self.session.feed
        self.pid, self.uid, _ = _unpack_ucred(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self._log = ClientLog(log, {"monitor": counters.connections, "uid": self.uid, "pid": self.pid})
        self._audit = None if self._gmemd.audit is None else self._gmemd.audit.client(self.uid, self.pid)
        self._fds: list[int] = []  # received, not yet taken by a command
        self._queue: deque[Request] = deque()  # read ahead while busy
        self._busy = False  # a long command runs, or changes wait for custody
        self._more = False  # requests that were read wait for the next turn
        self._changes: list[tuple[int, Request, Change]] = []  # place of the reply in _out, request, change
        self._deferred: tuple[Request, Any] | None = None  # a result to deliver once the changes are durable
        self._out: list[bytes] = []
        self._backlog: deque[tuple[memoryview, list[int]]] = deque()
        self._backlog_bytes = 0
        self._stall: asyncio.TimerHandle | None = None
        self._eof = False
        self._open = True
        self._reading = True
        loop.add_reader(self._fd, self._readable)
        if sent < len(greeting):  # not here: whoever makes this monitor does not know it yet, should it close
            loop.call_soon(self._transmit, greeting[sent:])

    # -- input -----------------------------------------------------------------------------------

    def _readable(self) -> None:
        if self._more:
            return
        if (self._busy or self._backlog) and not self._may_read():
            self._stop_reading()
            return
        try:
            data, ancillary, _, _ = self._receive(READ_SIZE, _ANCILLARY_SIZE, _CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if ancillary:
            self._receive_fds(ancillary)
        if data:
            self._feed(data)
        else:
            if not self._busy and not self._backlog:  # everything is answered
                self.close()
                return
            self._eof = True
            self._stop_reading()
        self._run()

    def _may_read(self) -> bool:
        if self._backlog_bytes > HIGH_WATER:
            return False
        return not self._busy or (self.session.oob and len(self._queue) < QUEUE_MAX)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _receive_fds(self, ancillary: Sequence[tuple[int, int, bytes]]) -> None:
        """Keep a batch of fds until a command takes one; a later batch replaces an untaken one."""
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[:len(payload) - len(payload) % fds.itemsize])
        if fds:
            _close_all(self._fds)
            self._fds = fds.tolist()

    def take_fd(self) -> int:
        """Give away the first fd of the last batch and close the rest."""
        if not self._fds:
            raise QmpError("No file descriptor supplied via SCM_RIGHTS")
        fd = self._fds.pop(0)
        _close_all(self._fds)
        return fd

    # -- requests --------------------------------------------------------------------------------

    def _run(self) -> None:  # noqa: C901  # every call would cost each command
        """Answer what can be answered now, in a turn's time, then send and read on."""
        gmemd, session, dispatch = self._gmemd, self.session, self._dispatch
        success = session.success
        self._more, turn_ends, last_end = False, 0.0, 0.0
        while self._open and self._backlog_bytes <= HIGH_WATER and not gmemd.stopping:
            request = self._next() if self._busy or self._queue else session.next_request()
            if request is None:
                break
            request.began = began = clock()
            try:
                result = dispatch(request, session, self)
            except Exception as exc:
                result = exc
            kind = type(result)
            if kind is bytes or kind is dict:
                self._out.append(success(request, result))
                self._answered(request)
            else:
                self._deliver(request, result)
            if began > turn_ends:
                if not turn_ends:
                    last_end = began + LONGEST_TURN_SECONDS
                elif not self._changes and (began > last_end or self._awaited(self._fd)):
                    self._more = True
                    self._loop.call_soon(self._loop.call_soon, self._run)  # behind those who can be read by then
                    break
                turn_ends = began + TURN_SECONDS
        if self._changes and not self._busy:
            self._settle()
        self._flush()
        if not self._open or self._busy or self._more:
            return
        if self._eof:
            if not self._backlog:
                self.close()
        elif not self._reading and self._may_read():
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def _next(self) -> Request | None:
        """The next request that may be answered now, else None."""
        if not self._busy:
            return self._queue.popleft() if self._queue else self.session.next_request()
        while self.session.oob and len(self._queue) < QUEUE_MAX:
            request = self.session.next_request()
            if request is None or request.oob:
                return request
            self._queue.append(request)
        return None

    def _deliver(self, request: Request, result: Any) -> None:
        """Turn what a command gave into its reply, now or when it is time for it."""
        kind = type(result)
        if kind is dict or kind is bytes:
            self._out.append(self.session.success(request, result))
            self._answered(request)
        elif kind is Change:
            self._changes.append((len(self._out), request, result))
            self._out.append(self.session.success(request, result.value))
        elif kind is CoroutineType or kind is WithFds:
            if self._changes:  # it must not overtake them
                self._deferred = (request, result)
                self._settle()
            elif kind is WithFds:
                self._flush()
                self._answered(request)
                self._transmit(self.session.success(request, result.value), result.fds)
            else:
                self._start(request, result)
        elif isinstance(result, Exception):
            if not isinstance(result, QmpError):
                log.error("internal error", command=request.execute, exc_info=result)
                why = f": {os.strerror(result.errno)}" if isinstance(result, OSError) and result.errno else ""
                result = QmpError(f"internal error{why}")
            self._out.append(self.session.failure(request, result))
            self._answered(request, result)
        else:
            self._out.append(self.session.success(request, result))
            self._answered(request)

    def _answered(self, request: Request, error: QmpError | None = None) -> None:
        """Count, log and audit a command that is about to be answered."""
        command, began = request.execute, request.began
        ended = self._count(command, began, error is None)
        request_id = self.session.id_json(request)
        self._log.answered(command, began, ended, request_id, error)
        if self._audit is not None:
            self._audit.answered(command, request.arguments, request_id=request_id, error=error)

    def _start(self, request: Request, work: CoroutineType[Any, Any, Any]) -> None:
        """Run a long command; the monitor is busy until it is done."""
        self._busy = True

        async def run() -> None:
            try:
                result = await work
            except Exception as exc:
                result = exc
            self._busy = False
            self._deliver(request, result)
            self._run()

        self._gmemd.spawn(run())

    def _settle(self) -> None:
        """Hold what is to be sent until custody has made the changes durable, or undo them."""
        out, changes = self._out, self._changes
        self._out, self._changes, self._busy = [], [], True

        def settled() -> None:
            for place, request, change in changes:
                if change.error is not None:
                    out[place] = self.session.failure(request, change.error)
                self._answered(request, change.error)
            self._out[:0] = out
            self._busy = False
            deferred, self._deferred = self._deferred, None
            if deferred is not None:
                self._deliver(*deferred)
            self._run()

        self._gmemd.settle([change for _, _, change in changes], settled)

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event, if the client has negotiated; one that lets them pile up is cut."""
        if self.session.negotiated and self._open:
            self._out.append(self.session.event(name, data))
            if not self._changes:
                self._flush()
            if self._backlog_bytes > CUT_BYTES:
                self.close()

    # -- output ----------------------------------------------------------------------------------

    def _flush(self) -> None:
        out = self._out
        if out:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            self._transmit(data)

    def _transmit(self, data: bytes, fds: list[int] | None = None) -> None:
        """Send, or keep for later, `data`; `fds` belong to the message and are closed behind it."""
        if not self._open:
            _close_all(fds)
            return
        sent = 0
        if not self._backlog:
            try:
                sent = self._send(data, fds) if fds else self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                _close_all(fds)
                self.close()
                return
            if sent == len(data):
                return
        if not self._backlog:
            self._loop.add_writer(self._fd, self._writable)
            self._watch_stall()
        self._backlog.append((memoryview(data)[sent:], fds or []))
        self._backlog_bytes += len(data) - sent

    def _send(self, data: bytes | memoryview, fds: list[int] | None) -> int:
        if not fds:
            return self._sock.send(data)
        sent = self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        self._gmemd.counters.fds_sent += len(fds)
        _close_all(fds)
        return sent

    def _writable(self) -> None:
        try:
            while self._backlog:
                data, fds = self._backlog.popleft()
                try:
                    sent = self._send(data, fds)
                except BaseException:
                    self._backlog.appendleft((data, fds))
                    raise
                self._backlog_bytes -= sent
                if sent < len(data):
                    self._backlog.appendleft((data[sent:], []))
                self._watch_stall()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        self._loop.remove_writer(self._fd)
        self._unwatch_stall()
        self._run()

    def _watch_stall(self) -> None:
        self._unwatch_stall()
        self._stall = self._loop.call_later(STALL_SECONDS, self.close)

    def _unwatch_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    # -- end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let the client go; a running command finishes, queued ones are dropped."""
        if not self._open:
            return
        self._open = False
        self._stop_reading()
        if self._backlog:
            self._loop.remove_writer(self._fd)
            self._unwatch_stall()
            for _, fds in self._backlog:
                _close_all(fds)
            self._backlog.clear()
            self._backlog_bytes = 0
        self._queue.clear()
        _close_all(self._fds)
        with contextlib.suppress(OSError):
            self._sock.close()
        self._log.close()
        self._closed(self)


def _always(fd: int) -> bool:
    """What a loop answers that cannot tell whether others wait."""
    return True


def _close_all(fds: list[int] | None) -> None:
    while fds:
        close_fd(fds.pop())
