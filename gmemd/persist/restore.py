"""Decide at start what each fd and each record of a predecessor is. Nothing is closed or removed here.

An fd whose name is in state.removing, or whose sequence number was never acknowledged, is to be dropped; these are the
only two reasons. Everything else without a record is kept and listed. A record whose fd is missing, or is not the file
it was, is lost: nothing is ever created in its place.

A file is identified by device and inode, and after a live update, which gives it others, by name, size, kind and seals.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from gmemd.persist.fdstore import is_socket, seals_of
from gmemd.persist.record import Record, State

Identify = Callable[[int], str]  # Kernel.identify

NO_SEALS: Final[Mapping[str, int]] = MappingProxyType({})
_CARRIED: Final = "memfd"  # the only kind that a live update carries
_NAMELESS: Final = "/ (deleted)"  # the link of what it has carried


class Restored:
    """What a predecessor left. The fds are the caller's, except those of `dropped`."""

    def __init__(self) -> None:
        self.objects: list[tuple[Record, int]] = []  # by age; -1: no fd
        self.lost: list[Record] = []  # the record exists, its memory does not
        self.unclaimed: list[tuple[str, int]] = []  # fds without a record, kept in the store
        self.sockets: list[tuple[str, int]] = []  # of socket activation
        self.dropped: list[tuple[str, int]] = []  # not acknowledged, or deleted
        self.words: list[str] = []  # messages for the operator


def name_prefix(state: State) -> str:
    """The prefix of the names of this registry's fds; the sequence number follows."""
    return f"m-{state.generation}-"


def sequence(name: str, state: State) -> int:
    """The sequence number in the name of an fd of this registry; 0: it is not such a name."""
    prefix, _, number = name.rpartition("-")
    return int(number) if f"{prefix}-" == name_prefix(state) and number.isdecimal() else 0


class Match:
    """How the fds of a predecessor are told apart."""

    def __init__(self, *, trusted: bool, identify: Identify | None = None, boot: str = "",
                 seals: Mapping[str, int] = NO_SEALS) -> None:
        """`trusted`: the registry is intact, current and writable, so fds may be dropped.

        boot: this one; records of another describe files that had another inode then. seals: at least these, by name.
        """
        self.trusted = trusted
        self.identify = identify
        self.boot = boot
        self.seals = seals

    def is_from_elsewhere(self, record: Record, fd: int = -1) -> bool:
        """Whether a record is of another boot; where /proc hides which one this is, its fd shows it."""
        if record.boot and self.boot:
            return record.boot != self.boot
        if fd < 0:
            return False
        status = os.fstat(fd)
        return (status.st_dev, status.st_ino) != (record.st_dev, record.st_ino) and (
            os.readlink(f"/proc/self/fd/{fd}") == _NAMELESS)

    def difference(self, record: Record, fd: int) -> str:
        """In what way an fd does not match the record; "" when it does."""
        status = os.fstat(fd)
        elsewhere = self.is_from_elsewhere(record, fd)
        if not elsewhere and (status.st_dev, status.st_ino) != (record.st_dev, record.st_ino):
            return f"the fd with its name is another file, with inode {status.st_ino} instead of {record.st_ino}"
        # others may append to a file on a disk, but shrinking it is noticed
        if status.st_size < record.st_size or (record.kind != "file" and status.st_size != record.st_size):
            return f"its fd has {status.st_size} bytes instead of {record.st_size}"
        kind = record.kind if self.identify is None else self.identify(fd)
        if kind != record.kind and not (kind == _CARRIED and carries(record)):  # a stand-in that has lost its name
            return f"its fd is a {kind} instead of a {record.kind}"
        wanted = self.seals.get(record.fd_name, 0) if elsewhere else 0
        return f"its fd has lost seals: {wanted:#x} are expected" if wanted & ~seals_of(fd) else ""

    def missing(self, record: Record) -> str:
        """Why a record's fd is not among those that came back."""
        if not self.is_from_elsewhere(record):
            return "its fd did not come back"
        if not carries(record):
            return f"the machine was started anew, and no kernel carries a {record.kind} across kexec"
        return "the machine was started anew, and its fd did not come back"


def carries(record: Record) -> bool:
    """Whether the kernel can carry the memory of a record into another boot; a simulated guest_memfd is a memfd."""
    return record.kind == _CARRIED or (record.kind == "guest-memfd" and record.kernel == "simulated")


def sort_out(fds: Iterable[tuple[str, int]], records: Iterable[Record], state: State, match: Match) -> Restored:
    """Match fds with records."""
    result = Restored()
    rest: dict[str, list[int]] = {}
    for name, fd in fds:
        if is_socket(fd):
            result.sockets.append((name, fd))
        else:
            rest.setdefault(name, []).append(fd)
    for record in records:
        _claim(result, record, rest, match)
    for name, left in rest.items():
        entries = [(name, fd) for fd in left]
        if not entries:
            continue
        why = _why_dropped(name, state) if match.trusted else ""
        if why:
            result.dropped += entries
            result.words.append(f"'{name}' is dropped from the fd store: {why}")
        else:
            result.unclaimed += entries
            result.words.append(f"'{name}' in the fd store belongs to no object: it is kept")
    return result


def _claim(result: Restored, record: Record, rest: dict[str, list[int]], match: Match) -> None:
    """Find the record's fd among those with its name."""
    candidates = rest.get(record.fd_name, []) if record.fd_name else [-1]
    complaint = match.missing(record)
    for fd in candidates:
        complaint = match.difference(record, fd) if fd >= 0 else ""
        if not complaint:
            candidates.remove(fd)
            result.objects.append((record, fd))
            _move_in(record, fd, match)
            return
    record.missing = complaint
    result.lost.append(record)
    result.words.append(f"object '{record.id}' is lost: {complaint}")


def _move_in(record: Record, fd: int, match: Match) -> None:
    """Have the record describe its file as it is in this boot."""
    record.carried = match.is_from_elsewhere(record, fd)
    record.boot = match.boot
    if record.carried and fd >= 0:
        status = os.fstat(fd)
        record.st_dev, record.st_ino = status.st_dev, status.st_ino


def _why_dropped(name: str, state: State) -> str:
    if name in state.removing:
        return "its object was deleted"
    if sequence(name, state) > state.last_seq:
        return "its creation was never acknowledged"
    return ""
