"""Who has a file open or mapped, found in /proc by device and inode (proc(5)).

A guest_memfd cannot be watched or revoked; looking is all there is.  What may not be looked at is left out.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping

PROC = "/proc"

File = tuple[int, int]  # device and inode


class Holder:
    """One process and how it holds the file."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.uid = 0
        self.comm = ""
        self.cgroup: str | None = None
        self.fds = 0
        self.mapped = 0  # bytes
        self.writable = False
        self.private_copy = False


def holders(fd: int, proc: str = PROC) -> list[Holder]:
    """The processes other than this one that hold the file behind the (borrowed) fd. Takes long; for a thread."""
    status = os.fstat(fd)
    file = status.st_dev, status.st_ino
    return holders_of({file}, proc).get(file, [])


def holders_of(wanted: Collection[File], proc: str = PROC) -> dict[File, list[Holder]]:
    """The same for many files at once, by file; those that nobody holds are left out. Takes long; for a thread."""
    found: dict[File, list[Holder]] = {}
    shown = {(f"{os.major(device):02x}:{os.minor(device):02x}", str(inode)): (device, inode)
             for device, inode in wanted}
    for entry in sorted(int(name) for name in os.listdir(proc) if name.isdecimal()):
        if entry != os.getpid():
            for file, holder in _look(f"{proc}/{entry}", entry, shown).items():
                found.setdefault(file, []).append(holder)
    return found


def _look(place: str, pid: int, shown: Mapping[tuple[str, str], File]) -> dict[File, Holder]:
    """How a process holds files; nothing when it does not, has ended, or may not be looked at.

    `shown`: device and inode as /proc/PID/maps shows them, of each file that is looked for.
    """
    found: dict[File, Holder] = {}

    def holder(file: File) -> Holder:
        return found.setdefault(file, Holder(pid))

    try:
        for file, writable in _open_files(place, set(shown.values())):
            holder(file).fds += 1
            holder(file).writable |= writable
        for file, size, mode in _mappings(place, shown):
            holder(file).mapped += size
            holder(file).writable |= "w" in mode and "s" in mode
            holder(file).private_copy |= "p" in mode
        for one in found.values():
            one.uid, one.cgroup = os.stat(place).st_uid, cgroup_of(place)
            one.comm = _read(f"{place}/comm").rstrip("\n")
    except OSError:
        return {}
    return found


def _open_files(place: str, wanted: Collection[File]) -> Iterator[tuple[File, bool]]:
    """For each fd that is one of the files: which one, and whether it was opened for writing."""
    for name in os.listdir(f"{place}/fd"):
        try:
            status = os.stat(f"{place}/fd/{name}")
            if (status.st_dev, status.st_ino) in wanted:
                flags = _read(f"{place}/fdinfo/{name}").partition("flags:\t")[2].partition("\n")[0]
                yield (status.st_dev, status.st_ino), bool(int(flags, 8) & os.O_ACCMODE)
        except FileNotFoundError:
            continue


def _mappings(place: str, shown: Mapping[tuple[str, str], File]) -> Iterator[tuple[File, int, str]]:
    """Which file, size and permissions of each mapping of one of the files."""
    with open(f"{place}/maps", errors="replace") as maps:
        for line in maps:
            fields = line.split(None, 5)
            file = shown.get((fields[3], fields[4]))
            if file is not None:
                start, _, end = fields[0].partition("-")
                yield file, int(end, 16) - int(start, 16), fields[1]


def cgroup_of(place: str) -> str | None:
    """The control group of the process at /proc/PID: the unified one, or that of the memory controller."""
    try:
        lines = _read(f"{place}/cgroup").splitlines()
    except OSError:
        return None
    groups = {kind: path for _, kind, path in (line.split(":", 2) for line in lines)}
    return groups.get("") or groups.get("memory")


def _read(path: str) -> str:
    with open(path, errors="backslashreplace") as file:
        return file.read()
