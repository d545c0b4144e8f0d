"""Speak the service manager's protocol: readiness, what is to be stored, what was passed at start.

sd_notify(3), sd_listen_fds(3): one datagram per message, "KEY=VALUE" lines, fds by SCM_RIGHTS. systemd and `gmemd
--keeper` speak the same protocol; BARRIER=1 says that everything sent before was processed, not that it succeeded:
fdstore.py counts. The keeper understands more, and says so in the environment: a message may have several names
(FDNAMES=), each for one descriptor, and with ANSWER=1 it is answered by a byte in a pipe that lasts (ANSWERS=1 has
brought its end). An answer may also promise that so many more descriptors of memory will be held, whatever becomes of
the daemon: what its queue has accepted, the keeper reads before it notices the daemon's end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
from array import array
from collections.abc import Iterable, MutableMapping, Sequence

from gmemd.errors import QmpError, close_fd, mypyc_attr
from gmemd.keeper import BARRIER_ANSWERS, SEVERAL, SURE
from gmemd.persist.keeping import UNLIMITED

DEFAULT_LIMIT = 1024  # FileDescriptorStoreMax= of the shipped unit; systemd < 254 does not announce it
MESSAGE_MAX = 4096  # bytes; the manager silently drops a longer message
FIRST_FD = 3  # SD_LISTEN_FDS_START

_SEND_BUFFER = 8 << 20  # bytes; so that the manager's queue length is the only limit
_GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN)  # the last: refused before
_NOWAIT = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_HEADING = 64  # bytes of a message besides names, at most
_SOL_SOCKET, _SCM_RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)


@mypyc_attr(allow_interpreted_subclasses=True)
class Notifier:
    """A connection to the manager's notify socket. Nothing here waits."""

    def __init__(self, path: str, *, answers: bool = False, several: int = 1, sure: int = 0) -> None:
        """Connect to `path` ("@name" is an abstract socket).

        OSError when nobody listens there. answers: this manager's barriers report success. several: how many names one
        message may have; if more than one, it may also ask for an answer. sure: how many fds an answer may promise to
        take.
        """
        if not path.startswith(("/", "@")):
            raise QmpError(f"NOTIFY_SOCKET '{path}' is neither a path nor an abstract socket")
        self._address = "\0" + path[1:] if path[0] == "@" else path
        self.several = several
        self.promised = 0  # so many more fds of memory will be held once they are sent
        self._sure = sure
        self._reports = answers
        self._answers = -1  # the pipe of answers; -1: the manager has no end of one yet
        self._feed_due = False  # WATCHDOG=1 goes ahead of the next message
        self._socket = self._connect()

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str]) -> Notifier | None:
        """The manager named by $NOTIFY_SOCKET, or None; the variable is removed, because children must not use it."""
        path, answers = environ.pop("NOTIFY_SOCKET", ""), environ.pop(BARRIER_ANSWERS, "")
        several, sure = environ.pop(SEVERAL, ""), environ.pop(SURE, "")
        return cls(path, answers=answers == "1", several=int(several or 1), sure=int(sure or 0)) if path else None

    def fileno(self) -> int:
        """The socket to wait on for writability after BlockingIOError."""
        return self._socket.fileno()

    def notify(self, text: str, fds: Iterable[int] = ()) -> None:
        """Send one message with (borrowed) fds. BlockingIOError: the queue is full, wait for writability.

        A restarted manager has a new socket: its path is looked up once more, unless it is an abstract name, which
        anybody may have taken meanwhile. Other OSErrors are raised.
        """
        if self._feed_due:
            self._feed()
        try:
            self._send(text, fds)
        except OSError as exc:
            if exc.errno not in _GONE or self._address[0] == "\0":
                raise
            old, self._socket = self._socket, self._connect()
            old.close()
            self._send(text, fds)

    def _feed(self) -> None:
        self._feed_due = False
        try:
            self.notify("WATCHDOG=1")
        except BlockingIOError:
            self._feed_due = True
            raise

    def store(self, names: Sequence[str], fds: Sequence[int], ask: bool = False) -> int:
        """Ask the manager to keep a duplicate of each fd under its name, and where it can to be a barrier, too.

        The barrier, as of `barrier`; -1: the message is not one.
        """
        barrier = self._send_names("FDSTORE=1", names, fds, ask)
        self.promised -= len(fds)
        return barrier

    def remove(self, names: Sequence[str], ask: bool = False) -> int:
        """Ask the manager to close everything it keeps under these names; as `store` does."""
        return self._send_names("FDSTOREREMOVE=1", names, (), ask)

    def _send_names(self, what: str, names: Sequence[str], fds: Sequence[int], ask: bool) -> int:
        if self.several == 1:
            self.notify(f"{what}\nFDNAME={names[0]}", fds)
        elif ask:
            reader = self._pipe_of_answers()
            self.notify(f"{what}\nFDNAMES={':'.join(names)}\nANSWER=1", fds)
            return reader
        else:
            self.notify(f"{what}\nFDNAMES={':'.join(names)}", fds)
        return -1

    def fitting(self, names: Iterable[str]) -> int:
        """How many of these names a message of removals can have."""
        return max(1, min(self.several, (MESSAGE_MAX - _HEADING) // (max(map(len, names)) + 1)))

    def barrier(self) -> int:
        """Ask for a sign that everything sent so far was processed: the returned fd becomes readable.

        Then call `passed`, or, whether it does or not, `abandon`.
        """
        if self.several > 1:
            reader = self._pipe_of_answers()
            self.notify("ANSWER=1")
            return reader
        return self._pipe("BARRIER=1")

    def _pipe_of_answers(self) -> int:
        """Where messages are answered that ask for it, one at a time."""
        if self._answers < 0:
            self._answers = self._pipe("ANSWERS=2" if self._sure else "ANSWERS=1")
        return self._answers

    def passed(self, barrier: int) -> None:
        """A barrier has become readable, and is over: raise OSError if the manager does not hold all it was sent.

        systemd does not report that, and the count has to do.
        """
        answer = b"1"
        if barrier == self._answers or self._reports:
            answer = os.read(barrier, 1)
        if barrier != self._answers or not answer:
            self.abandon(barrier)
        self.promised = self._sure if answer == b"2" else 0
        if answer not in (b"1", b"2"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def abandon(self, barrier: int) -> None:
        """Wait for it no more: a late answer must not be taken for the next one's."""
        close_fd(barrier)
        self.promised = 0
        if barrier == self._answers:
            self._answers = -1

    def _pipe(self, message: str) -> int:
        """Send the writing end of a new pipe; the other end."""
        reader, writer = os.pipe()
        try:
            try:
                self.notify(message, (writer,))
            finally:
                os.close(writer)
        except BaseException:
            os.close(reader)
            raise
        return reader

    def ready(self, status: str = "") -> None:
        """Say that the daemon serves."""
        self.notify(f"READY=1\nSTATUS={_one_line(status)}" if status else "READY=1")

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows."""
        self.notify(f"STATUS={_one_line(text)}")

    def watchdog(self) -> None:
        """Feed the watchdog; if the queue is full, with the next message.

        A batch keeps the queue full as long as the manager works on it, which may be longer than its watchdog waits.
        """
        try:
            self.notify("WATCHDOG=1")
        except BlockingIOError:
            self._feed_due = True

    def stopping(self) -> None:
        """Say that the daemon is about to end."""
        self.notify("STOPPING=1")

    def close(self) -> None:
        if self._answers >= 0:
            self.abandon(self._answers)
        self._socket.close()

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            connection.connect(self._address)
        except BaseException:
            connection.close()
            raise
        return connection

    def _send(self, text: str, fds: Iterable[int]) -> None:
        data = text.encode()
        if len(data) > MESSAGE_MAX:
            raise ValueError(f"a message of {len(data)} bytes would be dropped by the manager")
        rights = [(_SOL_SOCKET, _SCM_RIGHTS, array("i", fds))] if fds else []
        self._socket.sendmsg([data], rights, _NOWAIT)


def watchdog_seconds(environ: MutableMapping[str, str]) -> float | None:
    """Take $WATCHDOG_USEC: within how many seconds the manager expects WATCHDOG=1; None: never."""
    usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 1e6


def listen_fds(environ: MutableMapping[str, str]) -> list[tuple[str, int]]:
    """Take what the manager passed as (name, fd), close-on-exec; the fds are the caller's.

    $LISTEN_* is removed from the environment, or children would inherit it. Names may repeat, and the order means
    nothing. $LISTEN_PIDFDID (systemd 259) is ignored: a container runtime rewrites only LISTEN_PID, and taking the fds
    for another process's would lose the memory.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    environ.pop("LISTEN_PIDFDID", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    fds = range(FIRST_FD, FIRST_FD + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    if len(names) != len(fds):
        names = [*names, *["unknown"] * len(fds)]
    return list(zip(names, fds, strict=False))


def store_limit(environ: MutableMapping[str, str], assumed: int = DEFAULT_LIMIT) -> int:
    """Take $FDSTORE: how many fds the manager keeps; systemd < 254 does not say, then $GMEMD_FDSTORE or `assumed`."""
    told, configured = environ.pop("FDSTORE", ""), environ.pop("GMEMD_FDSTORE", "")
    value = told or configured
    return int(value) if value.isdecimal() else assumed


def raised_limit() -> int:
    """How many descriptors this process could be given at its start; its own limit is raised as far as possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def runner_limit(environ: MutableMapping[str, str]) -> int:
    """Take $GMEMD_NOFILE: what the container runtime can pass on, which the limit inside does not show."""
    told = environ.pop("GMEMD_NOFILE", "")
    return int(told) if told.isdecimal() else UNLIMITED


def _one_line(text: str) -> str:
    """As much of a text as fits into a status line."""
    return " ".join(text.split()).encode()[:1024].decode(errors="ignore")
