"""The keeper's fd store: fds by name, with the rules of systemd's.

One open file has one entry and keeps its first name; names may repeat; fds over the limit are silently dropped; removal
takes all entries of a name; the order is newest first. Unlike in systemd, a new fd is not compared with all others:
files are found by inode, so the cost does not grow with their number.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import stat
from array import array

from gmemd.errors import close_fd
from gmemd.keeper.launch import SPARE_FDS, log

NAME_MAX = 255
PROMISED = 64  # fds that an answer promises to take
_DEFAULT_NAME = "stored"

File = tuple[int, int]  # st_dev, st_ino


class KeptFds:
    """Owns the fds it has taken."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.promised = PROMISED
        self.lost = False  # something that was to be kept since the last barrier was not
        self._answers = -1  # where the daemon reads answers; -1: nowhere
        self._promises = False  # the daemon understands an answer that promises
        self._table = 0  # numbers of descriptors that the kernel has room for
        self._entries: dict[int, tuple[str, File]] = {}  # by fd, oldest first
        self._by_name: dict[str, list[int]] = {}
        self._by_file: dict[File, list[int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def store(self, names: list[str], fds: array[int]) -> None:
        """Take these fds, each of which has its name, out of `fds`.

        What is not kept is reported, and makes the next barrier report failure.
        """
        if len(names) != len(fds):
            self.lost = True
            log(f"{len(fds)} fds with {len(names)} names are not kept")
            return
        for name, fd in zip(names, fds, strict=True):
            if fd not in self._entries:  # else there was no memory for the rest, and this is tried again
                self._try(name, fd)
        fds[:] = array("i", [fd for fd in fds if fd not in self._entries])

    def _try(self, name: str, fd: int) -> None:
        try:
            kept = self.take(name, fd)
        except OSError as exc:
            log(f"'{name}' is not kept: {os.strerror(exc.errno or 0)}")
            self.lost = True
            return
        if not kept:
            self.lost = True
            log(f"the store is full with {self.limit} fds, '{name}' is not kept" if len(self) >= self.limit else
                f"'{name}' is not kept: the same open file is already kept under its first name")

    def answer_once(self, barrier: array[int]) -> None:
        """Report that everything since the last barrier is held; otherwise the daemon only sees the fd closed."""
        if barrier and not self.lost:
            with contextlib.suppress(OSError):
                os.set_blocking(barrier[0], False)
                os.write(barrier[0], b"1")
        self.lost = False

    def answer_at(self, fds: array[int], *, promises: bool) -> None:
        """Answer at this fd from now on, which is taken out of `fds`; promises: an answer may be one, too."""
        self.forget_answers()
        if fds:
            self._answers = fds.pop()
            self._promises = promises
            os.set_blocking(self._answers, False)

    def answer(self) -> None:
        """The same as answer_once there; with another byte if something is not held, or much more will be."""
        try:  # noqa: SIM105  # the usual way to say this costs as much as the rest
            os.write(self._answers, b"0" if self.lost else b"2" if self._promises and self.has_room() else b"1")
        except OSError:  # nobody waits any more
            pass
        self.lost = False

    def forget_answers(self) -> None:
        """Nobody waits for an answer any more."""
        if self._answers >= 0:
            close_fd(self._answers)
            self._answers = -1

    def has_room(self) -> bool:
        """Will `promised` more fds be taken, whatever comes? Neither store, limit nor the kernel's table is short then.

        That holds while nobody lowers the limit of this process to what it has open.
        """
        count = len(self._entries) + self.promised
        top = count + SPARE_FDS
        if count > self.limit or resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= top:
            return False
        if self._table < top:  # it grows by a descriptor of that number, and never shrinks
            try:
                os.close(fcntl.fcntl(self._answers, fcntl.F_DUPFD_CLOEXEC, top))
            except OSError:
                return False
            self._table = top
        return True

    def take(self, name: str, fd: int) -> bool:
        """Keep this fd, or leave it to the caller (False): the store is full, or has this open file.

        OSError when not even fstat works on it.
        """
        if len(self._entries) >= self.limit:
            return False
        status = os.fstat(fd)
        file = (status.st_dev, status.st_ino)
        others = self._by_file.setdefault(file, [])
        if fd not in others:  # else there was no memory for the rest
            if others and any(same_open_file(fd, other, status.st_mode) for other in others):
                return False
            others.append(fd)
        named = self._by_name.setdefault(name, [])
        if fd not in named:
            named.append(fd)
        self._entries[fd] = (name, file)
        return True

    def drop(self, names: list[str]) -> None:
        """Close all fds of these names."""
        for name in names:
            for fd in self._by_name.pop(name, ()):
                _, file = self._entries.pop(fd)
                others = self._by_file[file]
                others.remove(fd)
                if not others:
                    del self._by_file[file]
                close_fd(fd)

    def close(self) -> None:
        """Close them all."""
        self.forget_answers()
        self.drop(list(self._by_name))

    def newest_first(self) -> list[tuple[str, int]]:
        """(name, fd) as they are passed to a new daemon."""
        return [(name, fd) for fd, (name, _) in reversed(self._entries.items())]


def valid_name(name: bytes) -> str:
    """The name under which systemd would store: printable ASCII without ':', else "stored"."""
    if len(name) <= NAME_MAX and name.isascii() and b":" not in name:
        text = name.decode()
        if not text or text.isprintable():
            return text
    return _DEFAULT_NAME


def same_open_file(a: int, b: int, mode: int) -> bool:
    """Are two fds of one inode the same open file (dup, SCM_RIGHTS), as kcmp(2) would say?

    A socket cannot be opened twice. For other files the status flags show it: O_NONBLOCK belongs to the open file, and
    means nothing to memory and disk files; it is flipped and flipped back.
    """
    if stat.S_ISSOCK(mode):
        return True
    before, other = os.get_blocking(a), os.get_blocking(b)
    if before != other:
        return False
    os.set_blocking(a, not before)
    try:
        return os.get_blocking(b) != other
    finally:
        os.set_blocking(a, before)
