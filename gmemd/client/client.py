"""A blocking QMP client on a unix socket, with file descriptors both ways; standard library only.

One command runs at a time: `execute` sends it and reads until its reply; events in between are kept. Replies are
matched by id, so a command whose reply is late (TimeoutError) leaves the connection usable: the late reply is dropped,
and its fds are closed.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from gmemd.client.messages import Messages, ProtocolError, close_all
from gmemd.errors import GENERIC_ERROR, QmpError

__all__ = ["Client", "ProtocolError"]

_CHUNK = 1 << 18  # bytes per read
_SCM_MAX_FD = 253  # the kernel's limit for one message (include/net/scm.h)
_UCRED = struct.Struct("3i")  # pid, uid, gid
_RETRY = 0.05  # seconds between attempts to connect


class Client:
    """A connection to a QMP server, negotiated.

    `address` is the path of a unix socket, or a connected socket, which the client then owns.
    `timeout` (seconds, None: no limit) applies to connecting, greeting and negotiation together and, unless given
    there, to each command. `oob` enables out-of-band execution if the server offers it. `wait` (seconds): how long to
    keep trying while no server listens yet, or one drops us without a greeting (as a starting QEMU may). Raises OSError
    if it cannot connect, ProtocolError, TimeoutError.
    """

    def __init__(self, address: str | os.PathLike[str] | socket.socket, *, timeout: float | None = None,
                 oob: bool = False, wait: float = 0.0) -> None:
        self.timeout = timeout
        self.events: list[dict[str, Any]] = []  # received and not yet taken, oldest first
        self.greeting: dict[str, Any] = {}  # the greeting's "QMP" member
        self.oob = False
        self._wants_oob = oob
        self._last_id = 0
        if isinstance(address, socket.socket):
            self._negotiate(address, self._deadline(None))
        else:
            self._connect(os.fspath(address), time.monotonic() + wait)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and untaken fds; may be called twice."""
        self._messages.close()
        self._socket.close()

    def fileno(self) -> int:
        """Return the socket's fd, for poll: when readable, call `take_events`."""
        return self._socket.fileno()

    @property
    def peer_pid(self) -> int:
        """The process that listens at the other end (SO_PEERCRED of unix(7)); 0: it is not visible from here."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return int(_UCRED.unpack(credentials)[0])

    @property
    def peer_owner(self) -> tuple[int, int]:
        """User and group of that process, when it began to listen."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, gid = _UCRED.unpack(credentials)
        return uid, gid

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *, fds: Sequence[int] = (),
                timeout: float | None = None, oob: bool = False) -> Any:
        """Run a command and return its value; QmpError when the server refuses it.

        `fds` are sent with the command and stay the caller's. fds of the reply are closed. `oob` sends it out of band
        (needs `self.oob`).
        """
        value, received = self.execute_fds(command, arguments, fds=fds, timeout=timeout, oob=oob)
        close_all(received)
        return value

    def execute_fds(self, command: str, arguments: dict[str, Any] | None = None, *, fds: Sequence[int] = (),
                    timeout: float | None = None, oob: bool = False) -> tuple[Any, list[int]]:
        """Run a command; return its value and the fds of its reply, close-on-exec, now the caller's."""
        self._last_id += 1
        request: dict[str, Any] = {"exec-oob" if oob else "execute": command}
        if arguments is not None:
            request["arguments"] = arguments
        request["id"] = self._last_id
        deadline = self._deadline(timeout)
        self._send(json.dumps(request, allow_nan=False).encode() + b"\n", fds, deadline)
        reply, received = self._reply(self._last_id, deadline)
        if "error" in reply:
            close_all(received)
            raise _refusal(reply["error"])
        return reply["return"], received

    def send_text(self, text: bytes, replies: int, *, fds: Sequence[int] = (),
                  timeout: float | None = None) -> list[dict[str, Any]]:
        """Send bytes unchanged and return that many complete replies, including errors; received fds are closed."""
        deadline = self._deadline(timeout)
        self._send(text, fds, deadline)
        found = []
        for _ in range(replies):
            reply, received = self._reply(None, deadline)
            close_all(received)
            found.append(reply)
        return found

    def wait_event(self, name: str | None = None, timeout: float | None = None) -> dict[str, Any]:
        """Take and return the next event with that name (None: any); other events stay in `events`.

        TimeoutError when none arrives in time.
        """
        deadline = self._deadline(timeout)
        seen = 0
        while True:
            for index in range(seen, len(self.events)):
                if name is None or self.events[index].get("event") == name:
                    return self.events.pop(index)
            seen = len(self.events)
            self._keep(*self._receive(deadline))

    def take_events(self) -> list[dict[str, Any]]:
        """Take and return the events that have arrived, without waiting; [] if none.

        A lost connection is reported only when no event is left.
        """
        try:
            while True:
                self._keep(*self._receive(time.monotonic()))
        except TimeoutError:
            pass
        except ConnectionError:
            if not self.events:
                raise
        taken, self.events = self.events, []
        return taken

    # -- connecting

    def _connect(self, path: str, until: float) -> None:
        """Connect and negotiate; where no server listens yet, retry until then."""
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            deadline = self._deadline(None)
            try:
                _reach(connection, path, deadline)
                return self._negotiate(connection, deadline)
            except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError):
                connection.close()
                if time.monotonic() >= until:
                    raise
            except OSError:
                connection.close()
                raise
            time.sleep(_RETRY)

    def _negotiate(self, connection: socket.socket, deadline: float | None) -> None:
        self._socket = connection
        self._messages = Messages()
        try:
            greeting, received = self._receive(deadline)
            close_all(received)
            if isinstance(greeting.get("error"), dict):
                raise _refusal(greeting["error"])  # it admits nobody, or not us
            if not isinstance(greeting.get("QMP"), dict):
                raise ProtocolError("the server did not greet as a QMP server does")
            self.greeting = greeting["QMP"]
            self.oob = self._wants_oob and "oob" in self.greeting.get("capabilities", [])
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            self.execute("qmp_capabilities", {"enable": ["oob"]} if self.oob else None, timeout=left)
        except BaseException:
            self.close()
            raise

    # -- sending and receiving

    def _deadline(self, timeout: float | None) -> float | None:
        if timeout is None:
            timeout = self.timeout
        return None if timeout is None else time.monotonic() + timeout

    def _set_timeout(self, deadline: float | None) -> None:
        # never 0, which would make the socket non-blocking: 1 us reads what has arrived and then times out
        self._socket.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-6))

    def _send(self, data: bytes, fds: Sequence[int], deadline: float | None) -> None:
        """Send all of it, or close: half a command spoils the stream."""
        try:
            if fds:
                self._set_timeout(deadline)
                passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                data = data[self._socket.sendmsg([data], passed) :]
            self._set_timeout(deadline)
            self._socket.sendall(data)
        except TimeoutError:
            self.close()
            raise
        except BrokenPipeError as exc:
            raise ConnectionResetError("the server closed the connection") from exc

    def _reply(self, wanted: int | None, deadline: float | None) -> tuple[dict[str, Any], list[int]]:
        """Read until the reply with that id (None: the next one); keep events, drop other replies."""
        while True:
            message, received = self._receive(deadline)
            if "event" in message:
                self._keep(message, received)
            elif "return" not in message and "error" not in message:
                close_all(received)
                raise ProtocolError("the server sent something that is neither a reply nor an event")
            elif wanted is None or message.get("id", wanted) == wanted:
                return message, received
            else:
                close_all(received)

    def _keep(self, message: dict[str, Any], received: list[int]) -> None:
        close_all(received)
        if "event" in message:
            self.events.append(message)

    def _receive(self, deadline: float | None) -> tuple[dict[str, Any], list[int]]:
        """Return the next message of any kind and its fds."""
        while (found := self._messages.next()) is None:
            self._set_timeout(deadline)
            room = socket.CMSG_SPACE(_SCM_MAX_FD * 4)
            data, ancillary, flags, _ = self._socket.recvmsg(_CHUNK, room, socket.MSG_CMSG_CLOEXEC)
            received = _fds_of(ancillary)
            if flags & socket.MSG_CTRUNC:
                close_all(received)
                raise ProtocolError("file descriptors were lost in transit (too many open files?)")
            if not data:
                raise ConnectionResetError("the server closed the connection")
            self._messages.feed(data, received)
        return found


# -- small parts


def _reach(connection: socket.socket, path: str, deadline: float | None) -> None:
    """Connect a socket; TimeoutError when the server's backlog has no room in time.

    A non-blocking connect(2) to a full backlog fails with EAGAIN, and nothing signals room: the socket module's own
    timeout does not apply.
    """
    connection.setblocking(deadline is None)
    while True:
        try:
            return connection.connect(path)
        except BlockingIOError:
            left = 0.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the server accepts no more connections") from None
            time.sleep(min(left, _RETRY))


def _refusal(error: Any) -> QmpError:
    if not isinstance(error, dict):
        raise ProtocolError("the server sent an error that is not a JSON object")
    return QmpError(str(error.get("desc", "")), str(error.get("class", GENERIC_ERROR)))


def _fds_of(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)
