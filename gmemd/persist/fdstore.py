"""Speak the service manager's protocol: readiness, the fd store and its room, what was handed down at
start.

sd_notify(3), sd_listen_fds(3): one datagram a message, "KEY=VALUE" lines, fds by SCM_RIGHTS.
systemd and `gmemd --keeper` speak the same; nothing here knows which of them listens.

The traps this module keeps away from its callers (docs: systemd.exec(5), measured on systemd 252, 257,
262):
- the manager drops silently what is over FileDescriptorStoreMax=: FdStore counts and refuses before;
- an open file is kept once, under its first name: the same under another name is ignored without a word;
- all names come back in one environment string of at most 128 KiB; one byte more and no daemon ever starts
  again;
- BARRIER=1 says that everything sent before was looked at, not that it succeeded.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import socket
import stat
from array import array
from collections.abc import Iterable, MutableMapping

from gmemd.errors import QmpError
from gmemd.keeper.kept import BARRIER_ANSWERS
from gmemd.persist.keeping import SPARED

DEFAULT_LIMIT = 1024  # FileDescriptorStoreMax= of the shipped unit; systemd < 254 does not announce it
NAME_BUDGET = 131_057  # bytes, sum of len(name) + 1 over all fds: MAX_ARG_STRLEN less "LISTEN_FDNAMES="
NAME_MAX = 126  # with up to 1,024 fds always inside the budget; the manager itself takes 255
MESSAGE_MAX = 4096  # bytes; a longer message is dropped by the manager without a word
FIRST_FD = 3  # SD_LISTEN_FDS_START

_SEND_BUFFER = 8 << 20  # bytes; so that the manager's queue length is the only limit
_GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN)  # the last: it was refused before
_NOWAIT = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_SOL_SOCKET, _SCM_RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)


class Notifier:
    """A connection to the manager's notify socket. Nothing here waits."""

    def __init__(self, path: str, *, answers: bool = False) -> None:
        """Connect to `path` ("@name" is an abstract socket). OSError when nobody listens there.

        `answers`: this manager tells by a barrier how it went.
        """
        if not path.startswith(("/", "@")):
            raise QmpError(f"NOTIFY_SOCKET '{path}' is neither a path nor an abstract socket")
        self._address = "\0" + path[1:] if path[0] == "@" else path
        self._answers = answers
        self._feed_due = False  # WATCHDOG=1 goes ahead of the next message
        self._socket = self._connect()

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str]) -> Notifier | None:
        """The manager named by $NOTIFY_SOCKET, or None; the variable is removed, children must not use it."""
        path, answers = environ.pop("NOTIFY_SOCKET", ""), environ.pop(BARRIER_ANSWERS, "")
        return cls(path, answers=answers == "1") if path else None

    def fileno(self) -> int:
        """The socket to wait on for writability after BlockingIOError."""
        return self._socket.fileno()

    def notify(self, text: str, fds: Iterable[int] = ()) -> None:
        """Send one message with (borrowed) fds. BlockingIOError: the queue is full, wait for writability.

        A manager that was started anew has a new socket: it is looked up once again, unless its name is an abstract
        one, which anybody may have taken meanwhile. Other OSErrors pass.
        """
        if self._feed_due:
            self._feed_due = False
            try:
                self.notify("WATCHDOG=1")
            except BlockingIOError:
                self._feed_due = True
                raise
        try:
            self._send(text, fds)
        except OSError as exc:
            if exc.errno not in _GONE or self._address[0] == "\0":
                raise
            old, self._socket = self._socket, self._connect()
            old.close()
            self._send(text, fds)

    def store(self, name: str, fd: int) -> None:
        """Ask the manager to keep a duplicate of `fd` under `name`."""
        self.notify(f"FDSTORE=1\nFDNAME={name}", (fd,))

    def remove(self, name: str) -> None:
        """Ask the manager to close all it keeps under `name`."""
        self.notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def barrier(self) -> int:
        """Ask for a sign that all sent so far was looked at: the returned fd (the caller's) reads EOF."""
        reader, writer = os.pipe()
        try:
            try:
                self.notify("BARRIER=1", (writer,))
            finally:
                os.close(writer)
        except BaseException:
            os.close(reader)
            raise
        return reader

    def check_passed(self, reader: int) -> None:
        """A barrier can be read: raise OSError where the manager says that it does not hold all it was sent.

        systemd says nothing, and the count has to do.
        """
        if self._answers and os.read(reader, 1) != b"1":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def ready(self, status: str = "") -> None:
        """Say that the daemon serves."""
        self.notify(f"READY=1\nSTATUS={_one_line(status)}" if status else "READY=1")

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows."""
        self.notify(f"STATUS={_one_line(text)}")

    def watchdog(self) -> None:
        """Say that the event loop turns; if the queue is full, ahead of the next message.

        A batch keeps the queue full for as long as the manager takes for it, which may be longer than it waits.
        """
        try:
            self.notify("WATCHDOG=1")
        except BlockingIOError:
            self._feed_due = True

    def stopping(self) -> None:
        """Say that the daemon is about to end."""
        self.notify("STOPPING=1")

    def main_pid(self, pid: int) -> None:
        """Name another process as the one whose end is the service's end."""
        self.notify(f"MAINPID={pid}")

    def close(self) -> None:
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
    """Take $WATCHDOG_USEC: within how many seconds the manager wants to hear WATCHDOG=1; None: never."""
    usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 1e6


def listen_fds(environ: MutableMapping[str, str]) -> list[tuple[str, int]]:
    """Take what the manager handed down as (name, fd), close-on-exec; the fds are the caller's.

    $LISTEN_* is removed from the environment, or children would inherit the claim. Names may repeat, and
    the order means nothing. $LISTEN_PIDFDID (systemd 259) is not needed and not believed: a container's
    runner rewrites LISTEN_PID alone, and a wrong "not mine" would leave the memory lying.
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
    """How many descriptors this process could be given at its start; its own limit is raised as far as that goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def runner_limit(environ: MutableMapping[str, str]) -> int:
    """Take $GMEMD_NOFILE: what a container's runner can hand down, of which the limit inside says nothing."""
    told = environ.pop("GMEMD_NOFILE", "")
    return int(told) if told.isdecimal() else UNLIMITED


def opened_again(fd: int) -> int:
    """Another open file of the same file, open for the same; OSError where there cannot be one."""
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    return os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC | os.O_NONBLOCK)


def is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


def check_name(name: str) -> None:
    """Raise ValueError for a name that the manager would change or that could burst the budget."""
    if not 0 < len(name) <= NAME_MAX or not all(" " <= c <= "~" and c != ":" for c in name):
        raise ValueError(f"{name!r} cannot be a name in the fd store")


File = tuple[int, int]  # device and inode
UNLIMITED = 1 << 30  # descriptors


class FdStore:
    """The count of what the manager holds for us, since it says nothing when it drops.

    `held` are the names that may be in the store, `leaving` those of them whose removal is on its way: they
    stop counting for new objects, and `crowded` says when they must really go first.
    """

    def __init__(self, limit: int, handed_down: int = UNLIMITED) -> None:
        """`limit`: of the manager's store. `handed_down`: how many descriptors the next start may have."""
        self.limit = limit
        self.handed_down = handed_down
        self._sockets = 0  # of socket activation, which are handed down as well
        self.leaving: set[str] = set()
        self._held: dict[str, int] = {}  # name: number of fds
        self._count = 0
        self._bytes = 0  # of all names in $LISTEN_FDNAMES, each with its colon
        self._reserved = 0
        self._reserved_bytes = 0
        self._files: dict[str, File] = {}  # of the names held or on their way there
        self._names: dict[File, set[str]] = {}  # the same the other way round

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __len__(self) -> int:
        """How many entries the manager may hold."""
        return self._count

    @property
    def room(self) -> int:
        """How many entries can be kept and come back."""
        return max(0, min(self.limit, self.handed_down - SPARED - self._sockets))

    def account_socket(self, name: str) -> None:
        """Count a socket of socket activation: it takes room where all are handed down, not in the store."""
        self._sockets += 1
        self._bytes += len(name) + 1

    def account(self, name: str) -> None:
        """Count one entry that the manager may hold."""
        self._held[name] = self._held.get(name, 0) + 1
        self._count += 1
        self._bytes += len(name) + 1

    def forget(self, name: str) -> None:
        """Count out all entries of this name."""
        number = self._held.pop(name, 0)
        self._count -= number
        self._bytes -= number * (len(name) + 1)
        self.leaving.discard(name)
        self.drop_file(name)

    def add_file(self, name: str, file: File) -> None:
        """Note of which file a name is, or will be."""
        self._files[name] = file
        self._names.setdefault(file, set()).add(name)

    def drop_file(self, name: str) -> None:
        """Forget it: the name has left, or does not come."""
        file = self._files.pop(name, None)
        if file is not None:
            names = self._names[file]
            names.discard(name)
            if not names:
                del self._names[file]

    def names_of(self, file: File) -> frozenset[str]:
        """The names under which a file is held, or will be."""
        return frozenset(self._names.get(file, ()))

    def check_room(self, name: str) -> None:
        """Raise QmpError, naming the setting to raise, when one more entry would be lost."""
        room = self.room
        if self._count - len(self.leaving) + self._reserved >= room:
            raise QmpError(
                f"the service manager keeps at most {self.limit} file descriptors: "
                f"raise FileDescriptorStoreMax= (--fdstore-max of the keeper) or delete objects"
                if room == self.limit else
                f"the next start can be given at most {room} file descriptors of objects: "
                f"raise LimitNOFILE= (it is {self.handed_down}) or delete objects"
            )
        if self._bytes + self._reserved_bytes + len(name) + 1 > NAME_BUDGET:
            raise QmpError("the names of the stored file descriptors would exceed 128 KiB: delete objects")

    def reserve(self, name: str) -> None:
        """Hold room for an entry of a name as long as this one, between the decision and the act."""
        self.check_room(name)
        self._reserved += 1
        self._reserved_bytes += len(name) + 1

    def release(self, name: str) -> None:
        """Give a reservation back."""
        self._reserved -= 1
        self._reserved_bytes -= len(name) + 1

    def crowded(self, names: Iterable[str]) -> bool:
        """Must the leaving entries be gone before these come, lest the manager drops them?"""
        names = list(names)
        too_many = self._count + len(names) > self.room
        return too_many or self._bytes + sum(len(name) + 1 for name in names) > NAME_BUDGET


def _one_line(text: str) -> str:
    """As much of a text as fits a status line."""
    return " ".join(text.split()).encode()[:1024].decode(errors="ignore")
