"""Who has a file open or mapped, found in /proc by device and inode (proc(5)).

A guest_memfd cannot be watched or revoked; looking is all there is.  What may not be looked at is left out.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")

File = tuple[int, int]  # device and inode


@dataclass
class Holder:
    """One process and how it holds the file."""

    pid: int
    uid: int
    comm: str
    cgroup: str | None
    fds: int = 0
    mapped: int = 0  # bytes
    writable: bool = False
    private_copy: bool = False


def holders(fd: int, proc: Path = PROC) -> list[Holder]:
    """The processes other than this one that hold the file behind the (borrowed) fd. Takes long; for a thread."""
    status = os.fstat(fd)
    file = status.st_dev, status.st_ino
    return holders_of({file}, proc).get(file, [])


def holders_of(wanted: Collection[File], proc: Path = PROC) -> dict[File, list[Holder]]:
    """The same for many files at once, by file; those that nobody holds are left out. Takes long; for a thread."""
    found: dict[File, list[Holder]] = {}
    shown = {(f"{os.major(device):02x}:{os.minor(device):02x}", str(inode)): (device, inode)
             for device, inode in wanted}
    for entry in sorted(int(name) for name in os.listdir(proc) if name.isdecimal()):
        if entry != os.getpid():
            for file, holder in _look(proc / str(entry), entry, shown).items():
                found.setdefault(file, []).append(holder)
    return found


def _look(place: Path, pid: int, shown: Mapping[tuple[str, str], File]) -> dict[File, Holder]:
    """How a process holds files; nothing when it does not, has ended, or may not be looked at.

    `shown`: device and inode as /proc/PID/maps shows them, of each file that is looked for.
    """
    found: dict[File, Holder] = {}

    def holder(file: File) -> Holder:
        return found.setdefault(file, Holder(pid, 0, "", None))

    try:
        for file, writable in _open_files(place, set(shown.values())):
            holder(file).fds += 1
            holder(file).writable |= writable
        for file, size, mode in _mappings(place, shown):
            holder(file).mapped += size
            holder(file).writable |= "w" in mode and "s" in mode
            holder(file).private_copy |= "p" in mode
        for one in found.values():
            one.uid, one.cgroup = place.stat().st_uid, cgroup_of(place)
            one.comm = (place / "comm").read_text().rstrip("\n")
    except OSError:
        return {}
    return found


def _open_files(place: Path, wanted: Collection[File]) -> Iterator[tuple[File, bool]]:
    """For each fd that is one of the files: which one, and whether it was opened for writing."""
    for name in os.listdir(place / "fd"):
        try:
            status = os.stat(f"{place}/fd/{name}")
            if (status.st_dev, status.st_ino) in wanted:
                flags = (place / "fdinfo" / name).read_text().partition("flags:\t")[2].partition("\n")[0]
                yield (status.st_dev, status.st_ino), bool(int(flags, 8) & os.O_ACCMODE)
        except FileNotFoundError:
            continue


def _mappings(place: Path, shown: Mapping[tuple[str, str], File]) -> Iterator[tuple[File, int, str]]:
    """Which file, size and permissions of each mapping of one of the files."""
    with open(place / "maps") as maps:
        for line in maps:
            fields = line.split(None, 5)
            file = shown.get((fields[3], fields[4]))
            if file is not None:
                start, _, end = fields[0].partition("-")
                yield file, int(end, 16) - int(start, 16), fields[1]


def cgroup_of(place: Path) -> str | None:
    """The control group of the process at /proc/PID: the unified one, or that of the memory controller."""
    try:
        lines = (place / "cgroup").read_text().splitlines()
    except OSError:
        return None
    groups = {kind: path for _, kind, path in (line.split(":", 2) for line in lines)}
    return groups.get("") or groups.get("memory")
