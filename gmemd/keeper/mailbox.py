"""The keeper's notify socket: who sent what, with which fds. The receiving end of sd_notify(3)."""

from __future__ import annotations

import contextlib
import socket
import struct
from array import array
from collections.abc import Callable

from gmemd.errors import close_fd
from gmemd.keeper.launch import log
from gmemd.posix.sockets import Identity, bind, identity, remove_own, taking

MESSAGE_MAX = 4096  # bytes, as systemd's NOTIFY_BUFFER_MAX: a longer one is ignored with its fds
RIGHTS_MAX = 253  # fds per message, the kernel's SCM_MAX_FD
ROUND = 1000  # messages; a runaway daemon must not keep the keeper from its signals

_RECEIVE_BUFFER = 8 << 20  # bytes
_ANCILLARY = socket.CMSG_SPACE(RIGHTS_MAX * 4) + socket.CMSG_SPACE(12)
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid
# plain numbers: comparing the socket module's enumerations costs more than receiving
_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_SCM_RIGHTS, _SCM_CREDENTIALS = int(socket.SCM_RIGHTS), int(socket.SCM_CREDENTIALS)

Message = tuple[int, bytes, "array[int]", bool]  # the sender's pid, the text, the fds, and whether all of it arrived
Act = Callable[[int, bytes, "array[int]", bool], bool]


class Mailbox:
    """A datagram socket that reports the sender's pid."""

    def __init__(self, path: str = "") -> None:
        """Bind to a path that only this user can write; "": to an abstract name that the kernel chooses."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._path = path
        self._own: Identity | None = None
        self._left: Message | None = None  # there was no memory to act on it
        try:
            with taking(path) if path else contextlib.nullcontext():
                bind(self._socket, path, 0o600)
                self._own = identity(path)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        except BaseException:
            self.close()
            raise
        name = self._socket.getsockname()
        self.address = name if isinstance(name, str) else "@" + name[1:].decode()  # for $NOTIFY_SOCKET

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self, act: Act) -> bool:
        """Work through the messages in the queue; True: there may be more.

        `act` gets the sender's pid, the text, the fds, and whether all of it arrived. It takes out of the fds what it
        keeps; the rest is closed, which answers a barrier, whoever sent it. If it answers True, nothing is likely to
        follow. If it raises MemoryError, it gets the same again with the next call.
        """
        for _ in range(ROUND):
            message = self._left or self._next()
            if message is None:
                return False
            self._left = message
            try:
                last = act(*message)
            except MemoryError:
                raise
            except BaseException:
                self._drop(message)
                raise
            self._drop(message)
            if last:
                return True
        return True

    def _next(self) -> Message | None:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(MESSAGE_MAX, _ANCILLARY, _FLAGS)
        except BlockingIOError:
            return None
        fds, pid = array("i"), 0
        for _, kind, value in ancillary:
            if kind == _SCM_RIGHTS:
                fds.frombytes(value[: len(value) & ~3])
            elif kind == _SCM_CREDENTIALS:
                pid = _CREDENTIALS.unpack(value)[0]
        return pid, data, fds, flags == _FLAGS or _whole(flags)

    def _drop(self, message: Message) -> None:
        """It is over; what was not kept of it is closed."""
        self._left = None
        for fd in message[2]:
            close_fd(fd)

    def close(self) -> None:
        remove_own(self._path, self._own)
        self._socket.close()


def fields_of(lines: list[bytes]) -> dict[bytes, bytes]:
    """The assignments of a message; the first of a repeated key counts."""
    fields: dict[bytes, bytes] = {}
    for line in lines:
        key, equals, value = line.partition(b"=")
        if equals:
            fields.setdefault(key, value)
    return fields


def _whole(flags: int) -> bool:
    """Did all of a message with these flags arrive? Reports what did not."""
    if flags & socket.MSG_TRUNC:
        log(f"a message of more than {MESSAGE_MAX} bytes is ignored")
        return False
    if flags & socket.MSG_CTRUNC:
        log("fds of a message were lost: too many open files")
        return False
    return True
