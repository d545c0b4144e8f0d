"""Who has a file open or mapped, found in /proc by device and inode (proc(5)).

A guest_memfd cannot be watched or revoked; looking is all there is.  What may not be looked at is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


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
    found = []
    for entry in sorted(int(name) for name in os.listdir(proc) if name.isdecimal()):
        if entry != os.getpid():
            holder = _look(proc / str(entry), entry, (status.st_dev, status.st_ino))
            if holder is not None:
                found.append(holder)
    return found


def _look(place: Path, pid: int, file: tuple[int, int]) -> Holder | None:
    """How a process holds the file; None when it does not, has ended, or may not be looked at."""
    try:
        fds = list(_open_modes(place, file))
        mappings = list(_mappings(place, file))
        if not fds and not mappings:
            return None
        holder = Holder(pid, place.stat().st_uid, (place / "comm").read_text().rstrip("\n"), _cgroup(place))
    except OSError:
        return None
    holder.fds = len(fds)
    holder.mapped = sum(size for size, _ in mappings)
    holder.writable = any(fds) or any("w" in mode and "s" in mode for _, mode in mappings)
    holder.private_copy = any("p" in mode for _, mode in mappings)
    return holder


def _open_modes(place: Path, file: tuple[int, int]) -> Iterator[bool]:
    """For each fd that is the file: whether it was opened for writing."""
    for name in os.listdir(place / "fd"):
        try:
            status = os.stat(place / "fd" / name)
            if (status.st_dev, status.st_ino) == file:
                flags = (place / "fdinfo" / name).read_text().partition("flags:\t")[2].partition("\n")[0]
                yield bool(int(flags, 8) & os.O_ACCMODE)
        except FileNotFoundError:
            continue


def _mappings(place: Path, file: tuple[int, int]) -> Iterator[tuple[int, str]]:
    """Size and permissions of each mapping of the file."""
    device, inode = file
    wanted = [f"{os.major(device):02x}:{os.minor(device):02x}", str(inode)]
    with open(place / "maps") as maps:
        for line in maps:
            fields = line.split(None, 5)
            if fields[3:5] == wanted:
                start, _, end = fields[0].partition("-")
                yield int(end, 16) - int(start, 16), fields[1]


def _cgroup(place: Path) -> str | None:
    """The control group: the unified one, or that of the memory controller."""
    try:
        lines = (place / "cgroup").read_text().splitlines()
    except OSError:
        return None
    groups = {kind: path for _, kind, path in (line.split(":", 2) for line in lines)}
    return groups.get("") or groups.get("memory")
