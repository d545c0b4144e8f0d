"""The processes that have memory open or mapped, found in /proc by device and inode (proc(5)).

A guest_memfd cannot be watched or revoked; all one can do is look. Processes that may not be inspected are left out.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gmemd.processes.identity import PROC, cgroup_of, read

_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors, or a holder could be missed


File = tuple[int, int]  # st_dev and st_ino


class Shown(NamedTuple):
    """How a line of /proc/PID/maps shows a file, and which file it leads to where that does not identify it."""

    device: str
    inode: str
    target: File | None = None  # by stat(2) of the entry in map_files; None: not needed, or not visible


class Memory(NamedTuple):
    """A part of a file."""

    file: File
    offset: int  # bytes
    size: int  # bytes


@dataclass
class Holder:
    """One process and how it holds memory."""

    pid: int
    uid: int = 0
    comm: str = ""
    cgroup: str | None = None
    fds: int = 0  # of the file
    mapped: int = 0  # bytes of the part
    writable: bool = False
    shares: bool = False  # has a shared mapping
    private_copy: bool = False


Found = dict[Memory, Holder]


def shown_as(file: File) -> Shown:
    """How maps show a file whose file system has a single device, like those in memory; kernel.maps handles all."""
    return Shown(f"{os.major(file[0]):02x}:{os.minor(file[0]):02x}", str(file[1]))


def target(place: str, addresses: str) -> File | None:
    """The file of a mapping of the process at /proc/PID, named as in maps; None where it is not visible."""
    start, end = (int(part, 16) for part in addresses.split("-"))
    try:
        status = os.stat(f"{place}/map_files/{start:x}-{end:x}")
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Sought:
    """What to look for: by file, and by how lines of /proc/PID/maps show it."""

    def __init__(self, wanted: Collection[Memory], shown: Mapping[File, Shown]) -> None:
        self.parts: dict[File, list[Memory]] = {}
        self.lines: dict[tuple[str, str], list[tuple[File, File | None]]] = {}  # files that look the same there
        for memory in wanted:
            if memory.file not in self.parts:
                seen = shown.get(memory.file) or shown_as(memory.file)
                self.lines.setdefault((seen.device, seen.inode), []).append((memory.file, seen.target))
            self.parts.setdefault(memory.file, []).append(memory)


def holders_of(wanted: Collection[Memory], shown: Mapping[File, Shown], proc: str = PROC) -> dict[Memory, list[Holder]]:
    """The processes other than this one that hold each part; parts that nobody holds are left out.

    Takes long; for a thread. shown: how maps show the files for which fstat does not say.
    OSError: looking failed, for example for lack of descriptors.
    """
    found: dict[Memory, list[Holder]] = {}
    sought = _Sought(wanted, shown)
    for pid in sorted(int(name) for name in os.listdir(proc) if name.isdecimal()):
        if pid != os.getpid():
            for memory, holder in _look(f"{proc}/{pid}", pid, sought).items():
                found.setdefault(memory, []).append(holder)
    return found


def _look(place: str, pid: int, sought: _Sought) -> Found:
    """How a process holds memory; nothing when it does not, has ended, or may not be inspected."""
    found: Found = {}

    def holder(memory: Memory) -> Holder:
        return found.setdefault(memory, Holder(pid))

    try:
        for file, writable in _open_files(place, sought):
            for memory in sought.parts[file]:
                holder(memory).fds += 1
                holder(memory).writable |= writable
        for file, begin, end, mode in _mappings(place, sought):
            for memory in sought.parts[file]:
                size = min(end, memory.offset + memory.size) - max(begin, memory.offset)
                if size > 0:
                    holder(memory).mapped += size
                    holder(memory).writable |= "w" in mode and "s" in mode
                    holder(memory).shares |= "s" in mode
                    holder(memory).private_copy |= "p" in mode
        for one in found.values():
            one.uid, one.cgroup = os.stat(place).st_uid, cgroup_of(place)
            one.comm = read(f"{place}/comm").rstrip("\n")
    except OSError as exc:
        if exc.errno in _SHORT:
            raise
        return {}
    return found


def _open_files(place: str, sought: _Sought) -> Iterator[tuple[File, bool]]:
    """For each fd that is one of the files: which one, and whether it was opened for writing."""
    for name in os.listdir(f"{place}/fd"):
        try:
            status = os.stat(f"{place}/fd/{name}")
            if (status.st_dev, status.st_ino) in sought.parts:
                flags = read(f"{place}/fdinfo/{name}").partition("flags:\t")[2].partition("\n")[0]
                yield (status.st_dev, status.st_ino), bool(int(flags, 8) & os.O_ACCMODE)
        except FileNotFoundError:
            continue


def _mappings(place: str, sought: _Sought) -> Iterator[tuple[File, int, int, str]]:
    """For each mapping of one of the files: which one, begin and end in the file, and permissions."""
    with open(f"{place}/maps", errors="replace") as maps:
        for line in maps:
            addresses, mode, offset, device, inode, *_ = line.split(None, 5)
            alike = sought.lines.get((device, inode))
            if alike is not None:
                start, end = (int(part, 16) for part in addresses.split("-"))
                begin = int(offset, 16)
                for file in _those_meant(alike, place, addresses):
                    yield file, begin, begin + end - start, mode


def _those_meant(alike: list[tuple[File, File | None]], place: str, addresses: str) -> list[File]:
    """Which of the files that look the same in maps a mapping is of; all of them where that is not visible."""
    if all(known is None for _, known in alike):
        return [file for file, _ in alike]
    actual = target(place, addresses)
    return [file for file, known in alike if known is None or actual is None or known == actual]


def is_mapped(pid: int, file: Shown, address: int, size: int, begin: int = 0) -> bool:
    """Whether a process has mapped a file from `begin` on, shared and at least `size` bytes, at an address.

    False also where the process may not be inspected.
    """
    reached = 0
    try:
        with open(f"{PROC}/{pid}/maps", errors="replace") as lines:
            for line in lines:
                addresses, mode, offset, *rest = line.split()
                start, end = (int(part, 16) for part in addresses.split("-"))
                if start == address + reached and (rest[0], rest[1]) == file[:2] and "s" in mode \
                        and int(offset, 16) == begin + reached:
                    reached = end - address
    except OSError:
        return False
    return reached >= size
