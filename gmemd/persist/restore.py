"""Decide at start what each fd and each record of a predecessor is. Nothing is closed or removed here.

An fd whose name is in state.removing, or whose sequence number was never acknowledged, is to be dropped; these are the
only two reasons. Everything else without a record is kept and listed. A record whose fd is missing, or is not the file
it was, is lost: nothing is ever created in its place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from gmemd.persist.fdstore import is_socket
from gmemd.persist.record import Record, State

Identify = Callable[[int], str]  # Kernel.identify


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


def sort_out(fds: Iterable[tuple[str, int]], records: Iterable[Record], state: State, *, trusted: bool,
             identify: Identify | None = None) -> Restored:
    """Match fds with records. `trusted`: the registry is intact and writable, so fds may be dropped."""
    result = Restored()
    rest: dict[str, list[int]] = {}
    for name, fd in fds:
        if is_socket(fd):
            result.sockets.append((name, fd))
        else:
            rest.setdefault(name, []).append(fd)
    for record in records:
        _claim(result, record, rest, identify)
    for name, left in rest.items():
        entries = [(name, fd) for fd in left]
        if not entries:
            continue
        why = _why_dropped(name, state) if trusted else ""
        if why:
            result.dropped += entries
            result.words.append(f"'{name}' is dropped from the fd store: {why}")
        else:
            result.unclaimed += entries
            result.words.append(f"'{name}' in the fd store belongs to no object: it is kept")
    return result


def _claim(result: Restored, record: Record, rest: dict[str, list[int]], identify: Identify | None) -> None:
    """Find the record's fd among those with its name."""
    if not record.fd_name:
        result.objects.append((record, -1))
        return
    candidates = rest.get(record.fd_name, [])
    complaint = "its fd did not come back"
    for fd in candidates:
        complaint = difference(record, fd, identify)
        if not complaint:
            candidates.remove(fd)
            result.objects.append((record, fd))
            return
    result.lost.append(record)
    result.words.append(f"object '{record.id}' is lost: {complaint}")


def difference(record: Record, fd: int, identify: Identify | None = None) -> str:
    """In what way an fd does not match the record; "" when it does."""
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != (record.st_dev, record.st_ino):
        return f"the fd with its name is another file, with inode {status.st_ino} instead of {record.st_ino}"
    # others may append to a file on a disk, but shrinking it is noticed
    if status.st_size < record.st_size or (record.kind != "file" and status.st_size != record.st_size):
        return f"its fd has {status.st_size} bytes instead of {record.st_size}"
    if identify is not None and (kind := identify(fd)) != record.kind:
        return f"its fd is a {kind} instead of a {record.kind}"
    return ""


def _why_dropped(name: str, state: State) -> str:
    if name in state.removing:
        return "its object was deleted"
    if sequence(name, state) > state.last_seq:
        return "its creation was never acknowledged"
    return ""
