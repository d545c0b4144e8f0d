"""Count what the service manager holds for us, because it does not report what it drops.

Measured on systemd 252, 257, 262 (systemd.exec(5)):
- it silently drops what exceeds FileDescriptorStoreMax=: FdStore counts and refuses before that;
- an open file is kept once, under its first name: the same under another name is silently ignored;
- all names come back in one environment string of at most 128 KiB; one byte more and no daemon ever starts again.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Collection, Iterable

from gmemd.errors import QmpError
from gmemd.persist.keeping import SPARED, UNLIMITED

NAME_BUDGET = 131_057  # bytes, sum of len(name) + 1 over all fds: MAX_ARG_STRLEN less "LISTEN_FDNAMES="
_LONGEST = len("m-01234567-999999999999:")  # bytes that a name may take, as restore.py composes it

File = tuple[int, int]  # device and inode
Again = Callable[[int], int]  # another open file of the same file, like opened_again


def opened_again(fd: int) -> int:
    """Another open file of the same file with the same access mode; OSError where that is impossible."""
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    return os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC | os.O_NONBLOCK)


def seals_of(fd: int) -> int:
    """The seals of a memfd; 0 for any other file."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return 0


def is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


class FdStore:
    """The names that the manager holds.

    `held` are the names that may be in the store, `leaving` those of them that are being removed: they do not count
    against new objects, and `crowded` says when they must really be gone first.
    """

    def __init__(self, limit: int, handed_down: int = UNLIMITED) -> None:
        """`limit`: of the manager's store. `handed_down`: how many descriptors the next start may have."""
        self.limit = limit
        self.handed_down = handed_down
        self.set_aside = 0  # entries that are for the registry's copy, not for objects
        self._sockets = 0  # of socket activation, which are passed on as well
        self.leaving: set[str] = set()
        self._held: dict[str, int] = {}  # name: number of fds
        self._count = 0
        self._bytes = 0  # of all names in $LISTEN_FDNAMES, each with its colon
        self._reserved = 0  # entries that may still come
        self._files: dict[str, File] = {}  # of the names held or on their way there
        self._names: dict[File, set[str]] = {}  # the inverse

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __len__(self) -> int:
        """How many entries the manager may hold."""
        return self._count

    @property
    def room(self) -> int:
        """How many entries can be kept so that they come back."""
        return max(0, min(self.limit, self.handed_down - SPARED - self._sockets))

    def account_socket(self, name: str) -> None:
        """Count a socket of socket activation: it takes room among the fds passed on, not in the store."""
        self._sockets += 1
        self._bytes += len(name) + 1

    def account(self, name: str) -> None:
        """Count one entry that the manager may hold."""
        self._held[name] = self._held.get(name, 0) + 1
        self._count += 1
        self._bytes += len(name) + 1

    def account_reserved(self, name: str) -> None:
        """Count one entry that was reserved."""
        self._reserved -= 1
        self.account(name)

    def leave(self, names: Iterable[str]) -> None:
        """These of what it may hold are being removed."""
        self.leaving.update([name for name in names if name in self._held])

    def forget(self, names: Iterable[str]) -> None:
        """Stop counting all entries of these names."""
        for name in names:
            number = self._held.pop(name, 0)
            self._count -= number
            self._bytes -= number * (len(name) + 1)
            self.leaving.discard(name)
            self.drop_file(name)

    def add_file(self, name: str, file: File) -> None:
        """Note which file a name is, or will be, for."""
        self._files[name] = file
        self._names.setdefault(file, set()).add(name)

    def drop_file(self, name: str) -> None:
        """Forget it: the name has left, or will not come."""
        file = self._files.pop(name, None)
        if file is not None:
            names = self._names[file]
            names.discard(name)
            if not names:
                del self._names[file]

    def names_of(self, file: File) -> frozenset[str]:
        """The names under which a file is held, or will be."""
        return frozenset(self._names.get(file, ()))

    def entry_for(self, fd: int, file: File, again: Again) -> tuple[int, bool]:
        """The fd to store, and whether the removes must be done before.

        The manager keeps an open file once, under its first name, so a file that it may have is opened once more. That
        is impossible for a guest_memfd, which waits for its earlier name to leave, or is refused.
        """
        names = self.names_of(file)
        if not names:
            return fd, False
        try:
            return again(fd), False
        except OSError as exc:
            if names <= self.leaving:
                return fd, True
            raise QmpError(
                "the service manager keeps an open file once, and has this one for another object: "
                f"it cannot be opened again: {os.strerror(exc.errno or 0)}"
            ) from exc

    def reserve(self) -> None:
        """Reserve room for an entry; QmpError, naming the setting to raise, when it would be lost."""
        room = self.room
        if self._count - len(self.leaving) + self._reserved + self.set_aside >= room:
            raise QmpError(
                f"the service manager keeps at most {self.limit} file descriptors: "
                f"raise FileDescriptorStoreMax= (--fdstore-max of the keeper) or delete objects"
                if room == self.limit else
                f"the next start can be given at most {room} file descriptors of objects: "
                f"raise LimitNOFILE= (it is {self.handed_down}) or delete objects"
            )
        if self._bytes + (self._reserved + 1) * _LONGEST > NAME_BUDGET:
            raise QmpError("the names of the stored file descriptors would exceed 128 KiB: delete objects")
        self._reserved += 1

    def release(self) -> None:
        """Cancel a reservation."""
        self._reserved -= 1

    def crowded(self, names: Iterable[str], gone: Collection[str] = ()) -> bool:
        """Must the leaving entries be gone before these are sent, or would the manager drop them?

        gone: those that it has been told to remove.
        """
        names = list(names)
        too_many = self._count + len(names) - len(gone) > self.room
        return too_many or self._bytes + sum([len(name) + 1 for name in names]) \
            - sum([len(name) + 1 for name in gone]) > NAME_BUDGET
