"""How much memory can still be allocated: the machine's and each memory cgroup's above this process.

A guest_memfd has no ENOMEM at creation, and over a cgroup's limit the largest process is OOM-killed (reference, section
6), so gmemd checks before it allocates. Reclaimable file cache does not count as used.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gmemd.kernel.hugepages import HugePool, huge_pools

PROC = "/proc"

# Kernel memory for each resident GiB is 2.4 MiB without and 4.4 MiB with page tables: reserve 1/256.
OVERHEAD_SHIFT = 8

_MACHINE = ("MemAvailable:", "MemTotal:")
# The files with a cgroup's limit and usage, and what of its memory.stat counts.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes",
       "total_inactive_file", "total_active_file", "total_dirty", "total_writeback")
_V2 = ("memory.max", "memory.current", "inactive_file", "active_file", "file_dirty", "file_writeback")


class Headroom(NamedTuple):
    """How much can still be allocated, and what the limit is."""

    available: int  # bytes; never negative
    total: int  # bytes
    limit: str  # the limit: "the machine", "the cgroup /a/b", "the pool of 2048 KiB pages"

    def __str__(self) -> str:
        return f"{self.available} of {self.total} bytes left in {self.limit}"


class NoHeadroom(OSError):
    """ENOMEM instead of an OOM kill: `wanted` bytes do not fit into `headroom`."""

    def __init__(self, wanted: int, headroom: Headroom) -> None:
        super().__init__(errno.ENOMEM, f"{wanted} bytes wanted, {headroom}")
        self.wanted = wanted  # bytes
        self.headroom = headroom


def with_overhead(size: int) -> int:
    """The bytes that allocating `size` bytes takes, including the kernel's own."""
    return size + (size >> OVERHEAD_SHIFT)


def pool_headroom(pool: HugePool) -> Headroom:
    """What a pool of huge pages can still provide, including surplus pages."""
    surplus = max(0, pool.overcommit - pool.surplus)
    pages = max(0, pool.free - pool.reserved + surplus)
    limit = f"the pool of {pool.page_size >> 10} KiB pages"
    return Headroom(pages * pool.page_size, (pool.total + surplus) * pool.page_size, limit)


def check_pool(size: int, page_size: int, *, own_reservation: int = 0) -> None:
    """Raise NoHeadroom when `size` bytes do not fit into the machine's pool of pages of that size.

    own_reservation: bytes of the reserved pages that may belong to this allocation.
    """
    pool = next(pool for pool in huge_pools() if pool.page_size == page_size and pool.node is None)
    left = pool_headroom(pool)
    if size > left.available + min(own_reservation, pool.reserved * page_size):
        raise NoHeadroom(size, left)


def check_memory(size: int, reader: HeadroomReader, already: Callable[[], int] = lambda: 0) -> None:
    """Raise NoHeadroom when `size` bytes do not fit; only then `already` is called for how many of them exist."""
    left = reader.read()
    if with_overhead(size) > left.available:
        size -= already()
        if with_overhead(size) > left.available:
            raise NoHeadroom(size, left)


class HeadroomReader:
    """Finds the memory cgroups of this process once, then reads their figures on request."""

    def __init__(self, proc: str = PROC) -> None:
        self._meminfo = f"{proc}/meminfo"
        self._cgroups = find_cgroups(proc)

    def read(self) -> Headroom:
        """The tightest headroom of all that apply."""
        return min(self.read_all(), key=lambda headroom: headroom.available)

    def read_all(self) -> list[Headroom]:
        """The machine's headroom, then that of each cgroup with a limit."""
        found = [self._machine()]
        for cgroup in self._cgroups:
            headroom = cgroup.read()
            if headroom is not None:
                found.append(headroom)
        return found

    def _machine(self) -> Headroom:
        text = _read(self._meminfo)
        available, total = (int(text.partition(name)[2].split(maxsplit=1)[0]) << 10 for name in _MACHINE)
        return Headroom(available, total, "the machine")


class Cgroup(NamedTuple):
    """One memory cgroup, version 1 or 2, that may have a limit."""

    directory: str
    path: str
    names: tuple[str, ...]  # _V1 or _V2

    def read(self) -> Headroom | None:
        """Its headroom; None when it has no limit (or is gone: then it limits nothing)."""
        try:
            limit = _read(f"{self.directory}/{self.names[0]}").strip()
            if limit == "max" or int(limit) >= 1 << 62:  # v1 writes "none" as the last page below 2^63
                return None
            used = int(_read(f"{self.directory}/{self.names[1]}")) - self._reclaimable()
        except FileNotFoundError:
            return None
        return Headroom(max(0, int(limit) - used), int(limit), f"the cgroup {self.path}")

    def _reclaimable(self) -> int:
        """The bytes of clean file cache, which is reclaimed before anything is killed (no memfd is in it)."""
        stat = _table(_read(f"{self.directory}/memory.stat"))
        inactive, active, dirty, writeback = [stat.get(name, 0) for name in self.names[2:]]
        return max(0, inactive + active - dirty - writeback)


def find_cgroups(proc: str) -> list[Cgroup]:
    """The memory cgroups of this process, its own first, up to the highest one mounted here."""
    found: list[Cgroup] = []
    with open(f"{proc}/self/mountinfo", errors="surrogateescape") as lines:
        mounts = _mounts(lines)
    for line in _read(f"{proc}/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            found += _ancestry(mounts.get("v1"), path, _V1)
        elif number == "0":
            found += _ancestry(mounts.get("v2"), path, _V2)
    return found


def _mounts(mountinfo: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{"v1": (root, mount point), "v2": ...} of the memory hierarchies (proc(5), mountinfo)."""
    found: dict[str, tuple[str, str]] = {}
    for line in mountinfo:
        left, _, right = line.rstrip("\n").partition(" - ")
        kind, _, options = right.split(" ", 2)
        root, point = left.split(" ")[3:5]
        if kind == "cgroup2":
            found["v2"] = (root, point)
        elif kind == "cgroup" and "memory" in options.split(","):
            found["v1"] = (root, point)
    return found


def _ancestry(mount: tuple[str, str] | None, path: str, names: tuple[str, ...]) -> list[Cgroup]:
    if mount is None:
        return []
    root, point = mount
    below = path.removeprefix(root if root != "/" else "").strip("/")
    parts = [part for part in below.split("/") if part not in ("", "..")]
    found = []
    for depth in range(len(parts), -1, -1):
        directory = "/".join((point, *parts[:depth]))
        if os.path.exists(f"{directory}/{names[0]}"):
            found.append(Cgroup(directory, "/" + "/".join(parts[:depth]), names))
    return found


def _read(path: str) -> str:
    """The text of a small kernel file; it is read before each step, so without the layers of open()."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16).decode()
    finally:
        os.close(fd)


def _table(text: str) -> dict[str, int]:
    """{first word: second word as a number} of each line."""
    return {words[0]: int(words[1]) for words in map(str.split, text.splitlines()) if len(words) > 1}
