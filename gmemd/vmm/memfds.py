"""The memory of VMMs as /proc shows it: which of a process's descriptors are guest memory, and which file it maps."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator
from typing import Final, NamedTuple

# The memfds of QEMU, Cloud Hypervisor, Firecracker, crosvm and StratoVirt that are guest memory.
RAM_NAMES: Final = ("memory-backend-memfd", "ch_ram", "guest_mem", "crosvm_guest", "stratovirt_anon_mem")
_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h
_PREFIX, _DELETED = "/memfd:", " (deleted)"
_GUEST_MEMFD = ("anon_inode:[kvm-gmem]", "/[kvm-gmem] (deleted)")  # before and since Linux 6.19

File = tuple[int, int]  # st_dev and st_ino


class Memfd(NamedTuple):
    """A descriptor of a process that is a memfd or a guest_memfd."""

    fd: int
    name: str  # of the memfd; "" for a guest_memfd
    file: File
    size: int  # bytes

    def is_memory(self, names: Collection[str]) -> bool:
        """Whether it is guest memory: a guest_memfd, or a memfd with one of the names."""
        return not self.name or self.name in names


def path(pid: int, fd: int) -> str:
    """The descriptor of a process as a file."""
    return f"/proc/{pid}/fd/{fd}"


def names_guest_memfd(link: str) -> bool:
    """Whether a link in /proc/PID/fd is that of a guest_memfd; a file can have the newer one, too."""
    return link in _GUEST_MEMFD


def look(pid: int, fd: int) -> Memfd | None:
    """What the descriptor of a process is; None: neither, or not visible from here."""
    try:
        return _look(pid, fd)
    except OSError:
        return None


def memfds(pid: int) -> Iterator[Memfd]:
    """All of a process, by number, each file once; OSError if its descriptors are not visible from here."""
    seen = set()
    for fd in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):
        try:
            found = _look(pid, fd)
        except FileNotFoundError:  # closed meanwhile
            continue
        if found is not None and found.file not in seen:
            seen.add(found.file)
            yield found


def _look(pid: int, fd: int) -> Memfd | None:
    place = path(pid, fd)
    link = os.readlink(place)
    if not link.startswith(_PREFIX) and not names_guest_memfd(link):
        return None
    status = os.stat(place)
    name = "" if names_guest_memfd(link) else link.removeprefix(_PREFIX).removesuffix(_DELETED)
    return Memfd(fd, name, (status.st_dev, status.st_ino), status.st_size)


def closes_on_exec(pid: int, fd: int) -> bool:
    """Whether a process's descriptor is close-on-exec; OSError."""
    with open(f"/proc/{pid}/fdinfo/{fd}") as file:
        flags = next(line for line in file if line.startswith("flags:"))
    return bool(int(flags.split()[1], 8) & os.O_CLOEXEC)


def is_writable(fd: int) -> bool:
    """Whether a guest can run on a descriptor of ours: it is open for reading and writing, and not sealed."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE)
    except OSError:  # it cannot be sealed
        sealed = 0
    return not sealed and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def mapped(pid: int, file: File, *, private: bool = False) -> int | None:
    """How many bytes of a file in memory a process maps for all to see, or also privately; None: not visible."""
    device = f"{os.major(file[0]):02x}:{os.minor(file[0]):02x}"
    total = 0
    try:
        with open(f"/proc/{pid}/maps", errors="replace") as maps:
            for line in maps:
                addresses, mode, _, where, inode, *_ = line.split(None, 5)
                if (where, inode) == (device, str(file[1])) and (private or "s" in mode):
                    start, end = (int(part, 16) for part in addresses.split("-"))
                    total += end - start
    except OSError:
        return None
    return total


def holds(pid: int, file: File) -> bool:
    """Whether a process maps a file in memory or has a descriptor of it, as far as that is visible from here."""
    try:
        return bool(mapped(pid, file, private=True)) or any(one.file == file for one in memfds(pid))
    except OSError:
        return False


def describe(pid: int) -> str:
    """A process for messages: its name and id."""
    try:
        with open(f"/proc/{pid}/comm", errors="backslashreplace") as file:
            return f"{file.read().rstrip()} (process {pid})"
    except OSError:
        return f"process {pid}"


def process_of(thread: int) -> int:
    """The process of a thread; the thread itself if that is not visible."""
    try:
        with open(f"/proc/{thread}/status", errors="replace") as file:
            return int(next(line for line in file if line.startswith("Tgid:")).split()[1])
    except (OSError, StopIteration):
        return thread
