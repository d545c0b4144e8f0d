"""Decide at start what each fd and each record of a predecessor is. Nothing is closed or removed here.

An fd whose name stands in state.removing, or whose sequence number was never acknowledged, is to be
dropped; these two are the only reasons. Everything else that no record claims is kept and listed. A record
whose fd is missing, or is not the file it was, is lost: nothing is ever made anew in its place.
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
        self.objects: list[tuple[Record, int]] = []  # by age; -1: it has no fd
        self.lost: list[Record] = []  # the record is there, its memory is not
        self.unclaimed: list[tuple[str, int]] = []  # fds without record, kept in the store
        self.sockets: list[tuple[str, int]] = []  # of socket activation
        self.dropped: list[tuple[str, int]] = []  # not acknowledged, or deleted
        self.words: list[str] = []  # what the operator should know, a phrase each


def name_prefix(state: State) -> str:
    """What the names of this registry's fds begin with; the sequence number follows."""
    return f"m-{state.generation}-"


def sequence(name: str, state: State) -> int:
    """The sequence number in the name of an fd of this registry; 0: the name is no such name."""
    prefix, _, number = name.rpartition("-")
    return int(number) if f"{prefix}-" == name_prefix(state) and number.isdecimal() else 0


def sort_out(
    fds: Iterable[tuple[str, int]],
    records: Iterable[Record],
    state: State,
    *,
    trusted: bool,
    identify: Identify | None = None,
) -> Restored:
    """Bring fds and records together. `trusted`: the registry is whole and writable: fds may be dropped."""
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
    """Find the record's fd among those of its name."""
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
    """In which way an fd is not what the record says; "" when it is."""
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != (record.st_dev, record.st_ino):
        return f"the fd of its name is another file, inode {status.st_ino} and not {record.st_ino}"
    # others may append to a file on disk, but nobody shrinks it under us unnoticed
    if status.st_size < record.st_size or (record.kind != "file" and status.st_size != record.st_size):
        return f"its fd has {status.st_size} bytes and not {record.st_size}"
    if identify is not None and (kind := identify(fd)) != record.kind:
        return f"its fd is a {kind} and not a {record.kind}"
    return ""


def _why_dropped(name: str, state: State) -> str:
    if name in state.removing:
        return "its object was deleted"
    if sequence(name, state) > state.last_seq:
        return "its creation was never acknowledged"
    return ""
